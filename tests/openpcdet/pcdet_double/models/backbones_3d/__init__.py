"""The registry of 3D backbones."""

from .spconv_backbone import VoxelResBackBone8x

__all__ = {'VoxelResBackBone8x': VoxelResBackBone8x}
