"""Generated cameras for the detectors of OpenPCDet that read images."""

from typing import Dict, Sequence

import torch
from torch import Tensor

from q3d_plugin.synthetic import camera_ring

__all__ = ['synthetic_cameras']


def synthetic_cameras(size: Sequence[int], count: int = 6) -> Dict[str, Tensor]:
    """Images and matrices of cameras that look around, as OpenPCDet's nuScenes data set gives them.

    Args:
        size: Height and width of the images, pixels.
        count: Number of cameras.

    Returns:
        dict: ``camera_imgs`` (1, count, 3, height, width), and the (1, count, 4, 4) matrices of the cameras.
    """
    height, width = size
    generator = torch.Generator().manual_seed(0)
    ring = (torch.from_numpy(m)[None] for m in camera_ring(size, count))
    names = ('camera_intrinsics', 'lidar2camera', 'camera2lidar', 'lidar2image')
    return {
        'camera_imgs': torch.randn(1, count, 3, height, width, generator=generator),
        **dict(zip(names, ring)),
        'img_aug_matrix': torch.eye(4).expand(1, count, 4, 4),
        'lidar_aug_matrix': torch.eye(4)[None],
    }
