"""Frames that are generated for models that only have to run: no detector finds anything in them."""

from collections.abc import Sequence

import numpy as np

__all__ = ['POINTS', 'synthetic_points']

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
