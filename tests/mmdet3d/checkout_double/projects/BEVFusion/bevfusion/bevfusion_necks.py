"""The image neck: from coarse to fine, each level is concatenated with the one above it."""

import torch
from mmcv.cnn import ConvModule
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from torch import nn
from torch.nn import functional as F

NORM, ACTIVATION = dict(type='BN2d'), dict(type='ReLU')
UPSAMPLING = dict(mode='bilinear', align_corners=True)


@MODELS.register_module()
class GeneralizedLSSFPN(BaseModule):
    def __init__(
        self,
        in_channels,
        out_channels,
        num_outs,
        start_level=0,
        end_level=-1,
        no_norm_on_lateral=False,
        conv_cfg=None,
        norm_cfg=NORM,
        act_cfg=ACTIVATION,
        upsample_cfg=UPSAMPLING,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.start_level = in_channels, out_channels, start_level
        self.upsample_cfg = dict(upsample_cfg)
        end = len(in_channels) - 1 if end_level == -1 else end_level
        self.lateral_convs, self.fpn_convs = nn.ModuleList(), nn.ModuleList()
        rest = dict(conv_cfg=conv_cfg, act_cfg=act_cfg, inplace=False)
        for i in range(start_level, end):
            above = in_channels[i + 1] if i == end - 1 else out_channels
            norm = None if no_norm_on_lateral else norm_cfg
            self.lateral_convs.append(
                ConvModule(in_channels[i] + above, out_channels, 1, norm_cfg=norm, **rest)
            )
            self.fpn_convs.append(
                ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, **rest)
            )

    def forward(self, inputs):
        levels = [inputs[i + self.start_level] for i in range(len(inputs))]
        for i in reversed(range(len(levels) - 1)):
            x = F.interpolate(levels[i + 1], size=levels[i].shape[2:], **self.upsample_cfg)
            x = torch.cat([levels[i], x], dim=1)
            levels[i] = self.fpn_convs[i](self.lateral_convs[i](x))
        return tuple(levels[:-1])
