"""The registry of fusers."""

import torch
from torch import nn


class ConvFuser(nn.Module):
    def __init__(self, model_cfg):
        super().__init__()
        self.model_cfg = model_cfg
        layer = nn.Conv2d(model_cfg.IN_CHANNEL, model_cfg.OUT_CHANNEL, 3, padding=1, bias=False)
        self.conv = nn.Sequential(layer, nn.BatchNorm2d(model_cfg.OUT_CHANNEL), nn.ReLU(True))

    def forward(self, batch_dict):
        maps = [batch_dict['spatial_features_img'], batch_dict['spatial_features']]
        batch_dict['spatial_features'] = self.conv(torch.cat(maps, dim=1))
        return batch_dict


__all__ = {'ConvFuser': ConvFuser}
