"""Voxels whose coordinates are in the order x, y, z."""

import torch
from torch import nn

from .voxel_layer import hard_voxelize


class Voxelization(nn.Module):
    def __init__(self, voxel_size, point_cloud_range, max_num_points, max_voxels=20000, deterministic=True):
        super().__init__()
        self.voxel_size, self.point_cloud_range = voxel_size, point_cloud_range
        self.max_num_points, self.max_voxels = max_num_points, max_voxels

    def forward(self, points):
        most = self.max_voxels[not self.training]
        voxels = points.new_zeros(most, self.max_num_points, points.shape[1])
        cells, counts = points.new_zeros(most, 3, dtype=torch.int), points.new_zeros(most, dtype=torch.int)
        place = self.voxel_size, self.point_cloud_range, self.max_num_points, most
        count = hard_voxelize(points, voxels, cells, counts, *place, 3, True)
        return voxels[:count], cells[:count], counts[:count]
