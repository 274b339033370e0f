"""A frame of the toy nuScenes, for measurements without a recorded one."""

from pathlib import Path

import numpy as np

from q3d_plugin.frame import Camera, Frame, square

__all__ = ['POINTS', 'generated_frame']

POINTS = 34_688
"""A keyframe of nuScenes has about as many."""


def generated_frame(folder: Path, count: int = POINTS, seed: int = 0) -> Frame:
    """The points and the six camera images of a scene of the toy nuScenes.

    Its sweeps are thinner than those of nuScenes, so that several of the same instant are merged: that comes
    near the number of points and of voxels of a real keyframe. (Sweeps of several instants have half as many
    voxels again.) The cameras are mounted and focused as those of nuScenes.

    Args:
        folder: Where the files are written.
        count: Number of points.
        seed: Of scene and noise.
    """
    import cv2

    from q3d_plugin.toy_nuscenes import camera, generate, geometry, lidar, placement, profiles

    rng = np.random.default_rng(seed)
    scene = placement.make_scene(rng, np.zeros(2), 1)
    ground = np.array([scene.ground[0] - scene.ground[1:] @ scene.origin, *scene.ground[1:]])
    start, vehicle = scene.ego_pose(0.0)
    mounted = np.array([0.94, 0.0, 1.84])
    position, rotation = start + vehicle @ mounted, vehicle @ geometry.rotation_z(-np.pi / 2)
    solids, sweeps = scene.solids(0.0), []
    while sum(map(len, sweeps)) < count:
        sweep = lidar.cast(solids, len(scene.instances), ground, position, rotation, rng)
        sweeps.append(sweep.points)
    points = np.concatenate(sweeps).astype(np.float32)
    points[:, 4] = 0
    points = points[np.sort(rng.permutation(len(points))[:count])]
    file = folder / 'frame.pcd.bin'
    file.write_bytes(points.tobytes())

    mounts, cameras = generate.calibrate(np.random.default_rng(seed)), []
    normal = np.array([-scene.ground[1], -scene.ground[2], 1.0])
    normal /= np.linalg.norm(normal)
    along = float(scene.ego.travelled(np.array(0.0)))
    for name in camera.RIG:
        mount, image = mounts[name], folder / f'{name}.jpg'
        there, turned = start + vehicle @ np.array(mount.translation), vehicle @ mount.rotation
        intrinsic = np.array(mount.intrinsic)
        where = (scene.ground_height, turned, there, camera.shrunk(intrinsic, camera.SCALE), camera.SCALE)
        drawn = camera.render(solids, scene.road, along, normal, *where)
        drawn = cv2.resize(drawn, (camera.WIDTH, camera.HEIGHT), interpolation=cv2.INTER_NEAREST)
        image.write_bytes(camera.encode(drawn, profiles.PROFILES['default']))
        from_lidar = square(turned.T @ rotation)
        from_lidar[:3, 3] = turned.T @ (position - there)
        cameras.append(Camera(name, image, intrinsic, from_lidar))
    return Frame(points, file, tuple(cameras))
