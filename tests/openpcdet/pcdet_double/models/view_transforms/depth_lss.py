"""Image features lifted by a distribution over depth and pooled into a map.

The real one projects points and pixels with the matrices of the cameras. Here some pixels have a depth, and
each pixel and depth has its cell by its number alone.
"""

import torch
from torch import nn


def _convolutions(*layers):
    out = []
    for layer, norm in layers:
        out += [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(True)] if norm else [layer]
    return nn.Sequential(*out)


class DepthLSSTransform(nn.Module):
    def __init__(self, model_cfg):
        super().__init__()
        self.model_cfg, inside = model_cfg, model_cfg.IN_CHANNEL
        self.C, self.D = model_cfg.OUT_CHANNEL, model_cfg.DEPTHS
        depths = (nn.Conv2d(8, 32, 5, 4, 2), True), (nn.Conv2d(32, 64, 5, 2, 2), True)
        self.dtransform = _convolutions((nn.Conv2d(1, 8, 1), True), *depths)
        self.depthnet = _convolutions(
            (nn.Conv2d(inside + 64, inside, 3, padding=1), True),
            (nn.Conv2d(inside, inside, 3, padding=1), True),
            (nn.Conv2d(inside, self.D + self.C, 1), False),
        )
        make = dict(padding=1, bias=False)
        self.downsample = _convolutions(
            *((nn.Conv2d(self.C, self.C, 3, stride=s, **make), True) for s in (1, 2, 1))
        )

    def get_cam_feats(self, x, d):
        B, N, C, fH, fW = x.shape
        d = self.dtransform(d.view(B * N, *d.shape[2:]))
        x = self.depthnet(torch.cat([d, x.view(B * N, C, fH, fW)], dim=1))
        depth = x[:, : self.D].softmax(dim=1)
        x = depth.unsqueeze(1) * x[:, self.D : (self.D + self.C)].unsqueeze(2)
        return x.view(B, N, self.C, self.D, fH, fW).permute(0, 1, 3, 4, 5, 2)

    def forward(self, batch_dict):
        images, x = batch_dict['camera_imgs'], batch_dict['image_fpn'][0]
        batch, views = images.shape[:2]
        depth = images.new_zeros(batch, views, 1, *images.shape[-2:])
        depth[..., ::7, ::5] = 3.0
        x = self.get_cam_feats(x.view(batch, views, *x.shape[1:]), depth).flatten(1, 4)
        cells = 2 * self.model_cfg.CELLS
        where = torch.arange(x.shape[1], device=x.device) % (cells * cells)
        pooled = x.new_zeros(batch, cells * cells, self.C).index_add(1, where, x)
        x = self.downsample(pooled.transpose(1, 2).reshape(batch, self.C, cells, cells))
        batch_dict['spatial_features_img'] = x.permute(0, 1, 3, 2)
        return batch_dict
