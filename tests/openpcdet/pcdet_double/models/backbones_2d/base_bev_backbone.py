"""Levels of convolutions, and transposed ones that bring each level back to one resolution."""

import torch
from torch import nn


def _block(layer):
    return [layer, nn.BatchNorm2d(layer.out_channels, eps=1e-3, momentum=0.01), nn.ReLU()]


class BaseBEVBackbone(nn.Module):
    def __init__(self, model_cfg, input_channels):
        super().__init__()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        inside = input_channels
        levels = zip(model_cfg.LAYER_NUMS, model_cfg.LAYER_STRIDES, model_cfg.NUM_FILTERS)
        for i, (number, stride, channels) in enumerate(levels):
            layers = [nn.ZeroPad2d(1), *_block(nn.Conv2d(inside, channels, 3, stride=stride, bias=False))]
            for _ in range(number):
                layers += _block(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            self.blocks.append(nn.Sequential(*layers))
            up, out = model_cfg.UPSAMPLE_STRIDES[i], model_cfg.NUM_UPSAMPLE_FILTERS[i]
            self.deblocks.append(
                nn.Sequential(*_block(nn.ConvTranspose2d(channels, out, up, stride=up, bias=False)))
            )
            inside = channels
        self.num_bev_features = sum(model_cfg.NUM_UPSAMPLE_FILTERS)

    def forward(self, data_dict):
        x, ups = data_dict['spatial_features'], []
        for block, deblock in zip(self.blocks, self.deblocks):
            x = block(x)
            ups.append(deblock(x))
        data_dict['spatial_features_2d'] = torch.cat(ups, dim=1)
        return data_dict
