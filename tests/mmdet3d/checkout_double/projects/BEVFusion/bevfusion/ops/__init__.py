"""Pooling into a map, and voxelization."""

from .bev_pool import bev_pool
from .voxel import Voxelization

__all__ = ['Voxelization', 'bev_pool']
