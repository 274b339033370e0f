"""Frames that are generated for models that only have to run: no detector finds anything in them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ['POINTS', 'Ring', 'camera_ring', 'synthetic_points']

POINTS = 32_000
"""Number of points of an outdoor frame."""


def synthetic_points(area: Sequence[float], channels: int, count: int) -> np.ndarray:
    """Points of which seven tenths lie in 32 clusters; always the same ones.

    Args:
        area: Lower and upper bounds in x, y, z, metres.
        channels: Numbers per point; all beyond the third are between 0 and 1.
        count: Number of points.

    Returns:
        np.ndarray: (count, channels) float32, inside the area.
    """
    rng = np.random.default_rng(0)
    low, high = np.array(area[:3], float), np.array(area[3:6], float)
    size = high - low
    points = rng.uniform(0, 1, (count, channels))
    centres = rng.uniform(0.1, 0.9, (32, 3))
    chosen = rng.integers(0, 32, count)
    clustered = rng.random(count) < 0.7
    spread = centres[chosen] + rng.normal(0, 0.01, (count, 3)) * np.array([1, 1, 5])
    points[:, :3] = np.where(clustered[:, None], spread, points[:, :3]).clip(0.001, 0.999) * size + low
    return points.astype(np.float32)


class Ring(NamedTuple):
    """The matrices of cameras that look around from where the LiDAR is.

    Attributes:
        intrinsics: (N, 4, 4), from a camera's frame to its pixels.
        lidar2cam: (N, 4, 4), from the LiDAR's frame (x ahead, y left, z up) to a camera's (x right, y down, z
            ahead).
        cam2lidar: (N, 4, 4), the way back.
        lidar2img: (N, 4, 4), from the LiDAR's frame to pixels.
    """

    intrinsics: np.ndarray
    lidar2cam: np.ndarray
    cam2lidar: np.ndarray
    lidar2img: np.ndarray


def camera_ring(size: Sequence[int], count: int = 6) -> Ring:
    """Cameras at equal angles, the first one looking ahead, each of which sees a quarter of the surroundings.

    Args:
        size: Height and width of the images, pixels.
        count: Number of cameras.

    Returns:
        Ring: Matrices in float32.
    """
    height, width = size
    intrinsic = np.array(
        [[width / 2, 0, width / 2, 0], [0, width / 2, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    lidar2cam = np.empty((count, 4, 4))
    for i in range(count):
        cos, sin = math.cos(2 * math.pi * i / count), math.sin(2 * math.pi * i / count)
        lidar2cam[i] = [[sin, -cos, 0, 0], [0, 0, -1, 0], [cos, sin, 0, 0], [0, 0, 0, 1]]
    matrices = (
        np.broadcast_to(intrinsic, (count, 4, 4)), lidar2cam, np.linalg.inv(lidar2cam), intrinsic @ lidar2cam
    )  # fmt: skip
    return Ring(*(m.astype(np.float32) for m in matrices))
