"""Generated cameras for the detectors of OpenPCDet that read images."""

import math
from typing import Dict, Sequence

import torch
from torch import Tensor

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
    intrinsics = torch.tensor(
        [[width / 2, 0, width / 2, 0], [0, width / 2, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    )
    to_image = []
    for angle in torch.arange(count) * (2 * math.pi / count):
        cos, sin = torch.cos(angle).item(), torch.sin(angle).item()
        to_image.append([[sin, -cos, 0, 0], [0, 0, -1, 0], [cos, sin, 0, 0], [0, 0, 0, 1.0]])
    lidar2camera = torch.tensor(to_image)[None]
    return {
        'camera_imgs': torch.randn(1, count, 3, height, width, generator=generator),
        'camera_intrinsics': intrinsics.expand(1, count, 4, 4),
        'lidar2camera': lidar2camera,
        'camera2lidar': torch.linalg.inv(lidar2camera),
        'lidar2image': intrinsics @ lidar2camera,
        'img_aug_matrix': torch.eye(4).expand(1, count, 4, 4),
        'lidar_aug_matrix': torch.eye(4)[None],
    }
