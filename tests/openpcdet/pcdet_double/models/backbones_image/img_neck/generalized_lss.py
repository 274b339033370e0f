"""From coarse to fine, each level is concatenated with the one above it."""

import torch
from torch import nn
from torch.nn import functional as F

from ...model_utils.basic_block_2d import BasicBlock2D


class GeneralizedLSSFPN(nn.Module):
    def __init__(self, model_cfg):
        super().__init__()
        self.model_cfg = model_cfg
        self.in_channels, out = model_cfg.IN_CHANNELS, model_cfg.OUT_CHANNELS
        self.start_level, last = model_cfg.START_LEVEL, len(self.in_channels) - 1
        self.lateral_convs, self.fpn_convs = nn.ModuleList(), nn.ModuleList()
        for i in range(self.start_level, last):
            above = self.in_channels[i + 1] if i == last - 1 else out
            self.lateral_convs.append(
                BasicBlock2D(self.in_channels[i] + above, out, kernel_size=1, bias=False)
            )
            self.fpn_convs.append(BasicBlock2D(out, out, kernel_size=3, padding=1, bias=False))

    def forward(self, batch_dict):
        levels = list(batch_dict['image_features'])
        for i in reversed(range(len(levels) - 1)):
            size = levels[i].shape[2:]
            x = F.interpolate(levels[i + 1], size=size, mode='bilinear', align_corners=False)
            levels[i] = self.fpn_convs[i](self.lateral_convs[i](torch.cat([levels[i], x], dim=1)))
        batch_dict['image_fpn'] = tuple(levels[:-1])
        return batch_dict
