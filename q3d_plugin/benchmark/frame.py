"""The frame that is measured on: a recorded one, or one of the toy nuScenes."""

from pathlib import Path

import numpy as np

from q3d_plugin.errors import Q3DError

__all__ = ['POINTS', 'generated_frame', 'read_frame']

POINTS = 34_688
"""A keyframe of nuScenes has about as many."""


def read_frame(path: str) -> np.ndarray:
    """The points of a LiDAR file of nuScenes.

    Args:
        path: File of float32 ``x y z intensity ring``.

    Returns:
        np.ndarray: (N, 5) with the time lag 0 in place of the ring, as the frameworks' pipelines feed a
        keyframe.

    Raises:
        Q3DError: The file is missing or is no such file.
    """
    if not Path(path).is_file():
        raise Q3DError(f'frame {path!r} is not a file')
    size = Path(path).stat().st_size
    if size == 0 or size % 20:
        raise Q3DError(
            f'frame {path!r} has {size} bytes, which is not a whole number of points of 5 float32 '
            '(x y z intensity ring)'
        )
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
    if not np.isfinite(points).all():
        raise Q3DError(f'frame {path!r} holds NaN or Inf: its points have to be float32 x y z intensity ring')
    points[:, 4] = 0
    return points


def generated_frame(count: int = POINTS, seed: int = 0) -> np.ndarray:
    """Points of a scene of the toy nuScenes.

    Its sweeps are thinner than those of nuScenes, so that several of the same instant are merged: that comes
    near the number of points and of voxels of a real keyframe. (Sweeps of several instants have half as many
    voxels again.)

    Args:
        count: Number of points.
        seed: Of scene and noise.

    Returns:
        np.ndarray: (count, 5) float32 x, y, z, intensity, time lag 0.
    """
    from q3d_plugin.toy_nuscenes import geometry, lidar, placement

    rng = np.random.default_rng(seed)
    scene = placement.make_scene(rng, np.zeros(2), 1)
    ground = np.array([scene.ground[0] - scene.ground[1:] @ scene.origin, *scene.ground[1:]])
    position, vehicle = scene.ego_pose(0.0)
    position, rotation = position + vehicle @ np.array([0.94, 0.0, 1.84]), geometry.rotation_z(-np.pi / 2)
    solids, sweeps = scene.solids(0.0), []
    while sum(map(len, sweeps)) < count:
        sweep = lidar.cast(solids, len(scene.instances), ground, position, vehicle @ rotation, rng)
        sweeps.append(sweep.points)
    points = np.concatenate(sweeps).astype(np.float32)
    points[:, 4] = 0
    return points[np.sort(rng.permutation(len(points))[:count])]
