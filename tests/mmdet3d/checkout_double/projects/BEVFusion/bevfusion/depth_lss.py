"""Image features lifted by a distribution over depth and pooled into a map; points may tell the depth."""

import torch
from mmdet3d.registry import MODELS
from torch import nn

from .ops import bev_pool


def _parameter(values):
    return nn.Parameter(torch.as_tensor(values), requires_grad=False)


def _convolutions(*layers):
    """Convolutions with their norm and activation; those without a norm are last."""
    out = []
    for layer, norm in layers:
        out += [layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(True)] if norm else [layer]
    return nn.Sequential(*out)


class BaseViewTransform(nn.Module):
    def __init__(
        self,
        in_channels,
        out_channels,
        image_size,
        feature_size,
        xbound,
        ybound,
        zbound,
        dbound,
        downsample=1,
    ):
        super().__init__()
        bounds = (xbound, ybound, zbound)
        self.image_size, self.feature_size, self.dbound = image_size, feature_size, dbound
        self.dx = _parameter([float(step) for _, _, step in bounds])
        self.bx = _parameter([low + step / 2 for low, _, step in bounds])
        self.nx = _parameter([int((high - low) / step) for low, high, step in bounds])
        self.C, self.frustum = out_channels, self.create_frustum()
        self.D = len(self.frustum)
        self.make_depthnet(in_channels)
        self.downsample = nn.Identity()
        if downsample > 1:
            make = dict(padding=1, bias=False)
            convs = [nn.Conv2d(self.C, self.C, 3, stride=s, **make) for s in (1, downsample, 1)]
            self.downsample = _convolutions(*((conv, True) for conv in convs))

    def create_frustum(self):
        (height, width), (rows, columns) = self.image_size, self.feature_size
        d, y, x = torch.meshgrid(
            torch.arange(*self.dbound, dtype=torch.float),
            torch.linspace(0, height - 1, rows),
            torch.linspace(0, width - 1, columns),
            indexing='ij',
        )
        return _parameter(torch.stack((x, y, d), -1))

    def get_geometry(self, camera2lidar, intrinsics, image_aug, lidar_aug):
        """Where each pixel and depth of each camera is: (B, views, D, H, W, 3)."""

        def moved(points, rotation, translation):
            rotation, translation = rotation[:, :, None, None, None], translation[:, :, None, None, None]
            return (rotation @ points[..., None])[..., 0] + translation

        undo = torch.inverse(image_aug[..., :3, :3])
        points = (undo[:, :, None, None, None] @ (self.frustum - _wide(image_aug[..., :3, 3]))[..., None])[
            ..., 0
        ]
        points = torch.cat([points[..., :2] * points[..., 2:], points[..., 2:]], -1)
        to_lidar = camera2lidar[..., :3, :3] @ torch.inverse(intrinsics[..., :3, :3])
        points = moved(points, to_lidar, camera2lidar[..., :3, 3])
        return moved(points, lidar_aug[:, None, :3, :3], lidar_aug[:, None, :3, 3])

    def bev_pool(self, geometry, x):
        cells = ((geometry - (self.bx - self.dx / 2)) / self.dx).long().flatten(1, -2)
        batch = torch.arange(len(cells)).view(-1, 1, 1).expand(-1, cells.shape[1], 1)
        cells = torch.cat([cells, batch], -1).flatten(0, 1)
        kept = ((cells[:, :3] >= 0) & (cells[:, :3] < self.nx)).all(1)
        nx, ny, nz = self.nx.tolist()
        x = bev_pool(x.reshape(-1, x.shape[-1])[kept], cells[kept], len(geometry), nz, nx, ny)
        return torch.cat(x.unbind(2), 1)

    def lifted(self, x, frames, views):
        depth, x = x[:, : self.D].softmax(1), x[:, self.D : self.D + self.C]
        x = (depth[:, None] * x[:, :, None]).unflatten(0, (frames, views))
        return x.permute(0, 1, 3, 4, 5, 2)

    def forward(
        self,
        img,
        points,
        lidar2image,
        camera_intrinsics,
        camera2lidar,
        img_aug_matrix,
        lidar_aug_matrix,
        metas,
        **kwargs,
    ):
        geometry = self.get_geometry(camera2lidar, camera_intrinsics, img_aug_matrix, lidar_aug_matrix)
        return self.bev_pool(geometry, self.get_cam_feats(img))


def _wide(vectors):
    return vectors[:, :, None, None, None]


class BaseDepthTransform(BaseViewTransform):
    def depths(self, points, views, lidar2image, image_aug, lidar_aug):
        """The depths of the points that meet a pixel, metres: (B, views, 1, image height, width)."""
        height, width = self.image_size
        out = torch.zeros(len(points), views, 1, height, width)
        for b, frame in enumerate(points):
            xyz = (frame[:, :3] - lidar_aug[b, :3, 3]) @ torch.inverse(lidar_aug[b, :3, :3]).T
            for c in range(views):
                seen = xyz @ lidar2image[b, c, :3, :3].T + lidar2image[b, c, :3, 3]
                distance = seen[:, 2].clone()
                z = distance.clamp(1e-5, 1e5)[:, None]
                pixels = torch.cat([seen[:, :2] / z, z], 1) @ image_aug[b, c, :3, :3].T
                pixels = (pixels + image_aug[b, c, :3, 3])[:, [1, 0]]
                inside = ((pixels >= 0) & (pixels < torch.tensor([height, width]))).all(1)
                row, column = pixels[inside].long().unbind(1)
                out[b, c, 0, row, column] = distance[inside]
        return out

    def forward(
        self,
        img,
        points,
        lidar2image,
        cam_intrinsic,
        camera2lidar,
        img_aug_matrix,
        lidar_aug_matrix,
        metas,
        **kwargs,
    ):
        depths = self.depths(points, img.shape[1], lidar2image, img_aug_matrix, lidar_aug_matrix)
        geometry = self.get_geometry(camera2lidar, cam_intrinsic, img_aug_matrix, lidar_aug_matrix)
        return self.bev_pool(geometry, self.get_cam_feats(img, depths))


@MODELS.register_module()
class LSSTransform(BaseViewTransform):
    def make_depthnet(self, in_channels):
        self.depthnet = nn.Conv2d(in_channels, self.D + self.C, 1)

    def get_cam_feats(self, x):
        return self.lifted(self.depthnet(x.flatten(0, 1)), *x.shape[:2])

    def forward(self, *args, **kwargs):
        return self.downsample(super().forward(*args, **kwargs))


@MODELS.register_module()
class DepthLSSTransform(BaseDepthTransform):
    def make_depthnet(self, in_channels):
        depths = (nn.Conv2d(8, 32, 5, 4, 2), True), (nn.Conv2d(32, 64, 5, 2, 2), True)
        self.dtransform = _convolutions((nn.Conv2d(1, 8, 1), True), *depths)
        self.depthnet = _convolutions(
            (nn.Conv2d(in_channels + 64, in_channels, 3, padding=1), True),
            (nn.Conv2d(in_channels, in_channels, 3, padding=1), True),
            (nn.Conv2d(in_channels, self.D + self.C, 1), False),
        )

    def get_cam_feats(self, x, d):
        both = torch.cat([self.dtransform(d.flatten(0, 1)), x.flatten(0, 1)], dim=1)
        return self.lifted(self.depthnet(both), *x.shape[:2])

    def forward(self, *args, **kwargs):
        return self.downsample(super().forward(*args, **kwargs))
