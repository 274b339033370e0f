"""A scene: a road, an ego vehicle that drives along it, objects with trajectories, and the background.

Positions are in the global frame, in metres; times are in seconds from the start of the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from q3d_plugin.toy_nuscenes.catalog import object_parts
from q3d_plugin.toy_nuscenes.geometry import rotation_z
from q3d_plugin.toy_nuscenes.road import Ego, Motion, Road

KEYFRAME_PERIOD = 0.5
# One LiDAR sweep is recorded half-way between two keyframes (nine in nuScenes), to keep the set small.
SWEEP_PERIOD = 0.25

EGO_SIZE = np.array([5.6, 2.6])  # with a margin around the real 4.1 m x 1.7 m
EGO_CENTER_AHEAD = 1.3  # the ego frame sits on the rear axle
GROUND_INTENSITY = 14.0


@dataclass
class Instance:
    """One annotated object."""

    name: str
    size_lwh: np.ndarray
    with_rider: bool
    motion: Motion
    attribute: str | None
    color: np.ndarray  # (3,) RGB, 0 to 255
    gain: float  # factor on the LiDAR intensity
    shape: str  # the class whose parts it has


@dataclass
class Solids:
    """Convex solids, upright boxes and cylinders, at one moment.

    Attributes:
        center: (P, 3) global position.
        half: (P, 3) half extents; of a cylinder: radius, radius, half height.
        yaw: (P,) heading.
        round: (P,) True for cylinders.
        intensity: (P,) LiDAR intensity at normal incidence.
        color: (P, 3) RGB, 0 to 255.
        owner: (P,) index of the annotated instance, -1 for the background; sorted.
    """

    center: np.ndarray
    half: np.ndarray
    yaw: np.ndarray
    round: np.ndarray
    intensity: np.ndarray
    color: np.ndarray
    owner: np.ndarray


@dataclass
class Scene:
    """Everything there is in a scene, at any time."""

    road: Road
    ego: Ego
    duration: float
    ground: np.ndarray  # (3,) height z = g0 + g1 (x - x0) + g2 (y - y0)
    origin: np.ndarray  # (2,) x0, y0
    instances: list[Instance]
    background: Solids

    def ground_height(self, xy: np.ndarray) -> np.ndarray:
        """Height (...) of the ground at positions (..., 2)."""
        return self.ground[0] + (xy - self.origin) @ self.ground[1:]

    def ego_pose(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3), vehicle to global, with the vehicle upright on the slope."""
        pose = self.road.pose(self.ego.travelled(np.array(t)))
        normal = np.array([-self.ground[1], -self.ground[2], 1.0])
        normal /= np.linalg.norm(normal)
        forward = rotation_z(pose[2])[:, 0]
        forward = forward - normal * (forward @ normal)
        forward /= np.linalg.norm(forward)
        rotation = np.stack([forward, np.cross(normal, forward), normal], axis=1)
        return np.append(pose[:2], self.ground_height(pose[:2])), rotation

    def boxes(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes at time `t`: centres (M, 3), sizes (M, 3) as length, width, height, and headings (M,)."""
        time = np.array([t])
        poses = [i.motion.poses(time, self.road, self.ego)[0] for i in self.instances]
        poses = np.array(poses).reshape(-1, 3)
        sizes = np.array([i.size_lwh for i in self.instances]).reshape(-1, 3)
        z = self.ground_height(poses[:, :2]) + sizes[:, 2] / 2
        return np.column_stack([poses[:, :2], z]), sizes, poses[:, 2]

    def solids(self, t: float) -> Solids:
        """All solids at time `t`, the background first."""
        centers, sizes, yaws = self.boxes(t)
        rows = [[getattr(self.background, f)] for f in self.background.__dataclass_fields__]
        for index, instance in enumerate(self.instances):
            parts = object_parts(instance.shape, sizes[index], instance.with_rider)
            n = len(parts['round'])
            for row, value in zip(
                rows,
                (
                    centers[index] + parts['center'] @ rotation_z(yaws[index]).T,
                    parts['half'],
                    np.full(n, yaws[index]),
                    parts['round'],
                    np.clip(parts['intensity'] * instance.gain, 0, 255),
                    np.clip(parts['tint'][:, None] * instance.color, 0, 255),
                    np.full(n, index),
                ),
            ):
                row.append(value)
        return Solids(*[np.concatenate(row) for row in rows])
