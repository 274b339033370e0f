"""Puts the objects and the background of a scene in their places, so that nothing ever collides."""

from __future__ import annotations

from typing import Callable

import numpy as np

from q3d_plugin.toy_nuscenes.catalog import CLASSES, sample_size
from q3d_plugin.toy_nuscenes.geometry import rectangles_overlap
from q3d_plugin.toy_nuscenes.profiles import PROFILES, Profile
from q3d_plugin.toy_nuscenes.road import LANE, STRIP, Ego, Motion, Road, make_road
from q3d_plugin.toy_nuscenes.scene import (
    EGO_CENTER_AHEAD,
    EGO_SIZE,
    KEYFRAME_PERIOD,
    SWEEP_PERIOD,
    Instance,
    Scene,
    Solids,
)

# Instances a scene is asked for at 32 keyframes; as many as give every class about the same number in view.
COUNTS = {
    'car': 12,
    'truck': 7,
    'bus': 6,
    'trailer': 6,
    'construction_vehicle': 8,
    'pedestrian': 26,
    'motorcycle': 12,
    'bicycle': 15,
    'traffic_cone': 32,
    'barrier': 20,
}
COUNTS_KEYFRAMES = 32
# Placed from large to small: the large ones find the least space.
PLACEMENT_ORDER = (
    'bus',
    'trailer',
    'truck',
    'construction_vehicle',
    'car',
    'barrier',
    'motorcycle',
    'bicycle',
    'traffic_cone',
    'pedestrian',
)
MOVING_SHARE = {
    'car': 0.45,
    'truck': 0.3,
    'bus': 0.35,
    'trailer': 0.15,
    'construction_vehicle': 0.1,
    'pedestrian': 0.7,
    'motorcycle': 0.45,
    'bicycle': 0.45,
    'traffic_cone': 0.0,
    'barrier': 0.0,
}


class Occupancy:
    """Footprints over time of what has been placed, to reject trajectories that collide."""

    def __init__(self, times: np.ndarray) -> None:
        self.times = times
        self.poses: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []

    def add(self, poses: np.ndarray, size: np.ndarray) -> None:
        """Records a footprint: poses (T, 3) x, y, yaw over `times` and its size (2,) length, width."""
        self.poses.append(poses)
        self.sizes.append(np.asarray(size, dtype=float))

    def is_free(self, poses: np.ndarray, size: np.ndarray, margin: float) -> bool:
        """Whether a footprint stays `margin` metres clear of all others at all times."""
        if not self.poses:
            return True
        others, sizes = np.stack(self.poses), np.stack(self.sizes)[:, None, :]
        grown = np.asarray(size, dtype=float) + 2 * margin
        reach = (np.linalg.norm(grown) + np.linalg.norm(sizes[..., :], axis=-1)) / 2
        near = np.linalg.norm(others[..., :2] - poses[None, :, :2], axis=-1) < reach
        if not near.any():
            return True
        which, when = np.nonzero(near)
        return not rectangles_overlap(others[which, when], sizes[which, 0], poses[when], grown).any()


def _propose(rng: np.random.Generator, name: str, moving: bool, ego: Ego, duration: float) -> dict:
    """Draws where on the road an object is at some time, its heading against the road, and how it moves."""
    meet = rng.uniform(0, duration)
    offset = rng.uniform(-42, 42)
    s = float(ego.travelled(np.array(meet))) + offset
    side = rng.choice([-1.0, 1.0])
    draw = rng.uniform()
    if name == 'pedestrian':
        along = draw < 0.75
        low, high = (5.4, 7.0) if draw < 0.35 else (10.5, 14) if along else (14, 22)
        lateral = side * rng.uniform(low, high)
        yaw = rng.choice([0.0, np.pi]) + rng.normal(0, 0.1) if along else rng.uniform(0, 2 * np.pi)
        return {
            'kind': 'arc' if moving else 'static',
            's': s,
            'lateral': lateral,
            'yaw': yaw,
            'speed': rng.uniform(0.8, 1.7) if moving else 0.0,
            'turn': rng.normal(0, 0.03) if moving else 0.0,
            'meet': meet,
        }
    if moving:
        # Traffic keeps to the right: our direction on the right-hand lane, the other on the left-hand one.
        if name == 'bicycle':
            lateral, speed = side * 6.1, rng.uniform(3.0, 3.6)
        else:
            lateral, speed = side * LANE, None
        return {'kind': 'lane', 's': s, 'lateral': lateral, 'speed': speed, 'direction': -side, 'meet': meet}
    yaw = 0.0 if side < 0 else np.pi
    if name in ('traffic_cone', 'barrier'):
        lateral = side * (rng.uniform(5.4, 7.0) if draw < 0.4 else rng.uniform(10.5, 16))
        yaw += rng.normal(0, 0.2) + (np.pi / 2 if draw > 0.4 else 0.0)
    elif name in ('motorcycle', 'bicycle'):
        lateral = side * (rng.uniform(6.6, 10) if draw < 0.5 else rng.uniform(10.5, 20))
        yaw += rng.normal(0, 0.2) if draw < 0.5 else rng.uniform(0, 2 * np.pi)
    elif draw < 0.35:
        lateral, yaw = side * (STRIP + rng.normal(0, 0.2)), yaw + rng.normal(0, 0.04)
    else:
        lateral, yaw = side * rng.uniform(13, 28), rng.uniform(0, 2 * np.pi)
    return {'kind': 'static', 's': s, 'lateral': lateral, 'yaw': yaw, 'speed': 0.0, 'turn': 0.0, 'meet': meet}


def _motion(draw: dict, road: Road, lane_speed: dict[float, float]) -> Motion:
    """Turns a proposal into a trajectory that passes the proposed place at the proposed time."""
    if draw['kind'] == 'lane':
        # One speed for a lane, so that its vehicles neither catch up with nor run into each other.
        speed = draw['speed'] if draw['speed'] is not None else lane_speed[draw['direction']]
        speed *= draw['direction']
        return Motion('lane', np.array([draw['s'] - speed * draw['meet'], draw['lateral']]), speed)
    pose = road.pose(np.array(draw['s']), draw['lateral'])
    pose[2] += draw['yaw']
    if draw['kind'] == 'arc':
        there = Motion('arc', pose, draw['speed'], draw['turn'])
        # Walk the arc backwards to where it starts at t = 0.
        begin = there.poses(np.array([-draw['meet']]), None, None)[0]
        return Motion('arc', begin, draw['speed'], draw['turn'])
    return Motion('static', pose)


def _attribute(rng: np.random.Generator, name: str, moving: bool, with_rider: bool) -> str | None:
    """The one nuScenes attribute of an object."""
    if name == 'pedestrian':
        return 'pedestrian.moving' if moving else 'pedestrian.standing'
    if name in ('bicycle', 'motorcycle'):
        return 'cycle.with_rider' if with_rider else 'cycle.without_rider'
    if name in ('traffic_cone', 'barrier'):
        return None
    if moving:
        return 'vehicle.moving'
    return 'vehicle.parked' if rng.uniform() < 0.7 else 'vehicle.stopped'


def _place_objects(
    rng: np.random.Generator,
    road: Road,
    ego: Ego,
    duration: float,
    occupancy: Occupancy,
    profile: Profile,
) -> list[Instance]:
    """Places instances of all classes along the whole route, clear of each other at all times."""
    lane_speed = {1.0: rng.uniform(3.5, 9.0), -1.0: rng.uniform(3.0, 6.0)}
    # In view is the route and what is seen beyond its ends, and that is there in short scenes too.
    stretch = (ego.speed * duration + 80) / (7 * COUNTS_KEYFRAMES * KEYFRAME_PERIOD + 80)
    instances = []

    def admit(
        name: str, motion: Motion, moving: bool, with_rider: bool, size: np.ndarray, margin: float
    ) -> bool:
        poses = motion.poses(occupancy.times, road, ego)
        if not occupancy.is_free(poses, size[:2], margin):
            return False
        occupancy.add(poses, size[:2])
        color = np.array(CLASSES[name].color) * rng.uniform(0.88, 1.12)
        gain = rng.uniform(0.85, 1.15)
        attribute = _attribute(rng, name, moving, with_rider)
        shape = profile.shape_of(name)
        color = np.clip(color, 0, 255)
        instances.append(Instance(name, size, with_rider, motion, attribute, color, gain, shape))
        return True

    for name in ('car', 'truck'):
        # Someone drives ahead of and someone behind the ego vehicle, at its own speed.
        gap = rng.uniform(14, 24) * (1 if name == 'car' else -1)
        size = sample_size(rng, profile.shape_of(name), False)
        admit(name, Motion('convoy', np.array([gap, 0.0]), 1.0), True, False, size, 0.5)
    for name in PLACEMENT_ORDER:
        for _ in range(max(2, round(COUNTS[name] * stretch))):
            moving = rng.uniform() < MOVING_SHARE[name]
            cycle = name in ('bicycle', 'motorcycle')
            with_rider = cycle and (moving or rng.uniform() < 0.15)
            size = sample_size(rng, profile.shape_of(name), with_rider)
            margin = 0.4 if name in ('pedestrian', 'traffic_cone', 'barrier') else 0.6
            for _attempt in range(60):
                draw = _propose(rng, name, moving, ego, duration)
                if admit(name, _motion(draw, road, lane_speed), moving, with_rider, size, margin):
                    break
    return instances


def _place_background(
    rng: np.random.Generator,
    road: Road,
    length: float,
    occupancy: Occupancy,
    height: Callable[[np.ndarray], np.ndarray],
) -> Solids:
    """Walls at the sides of the lots, and poles, bushes and bins as clutter."""
    rows = []

    def admit(where: tuple, turn: float, size: tuple, is_round: bool, intensity: float, color: tuple) -> None:
        pose = road.pose(np.array(where[0]), where[1])
        pose[2] += turn
        poses = np.broadcast_to(pose, (len(occupancy.times), 3))
        if occupancy.is_free(poses, size[:2], 0.5):
            occupancy.add(poses, size[:2])
            # Sunk into the ground, or a slope would leave a gap below long walls.
            z = height(pose[:2]) + size[2] / 2 - 0.25
            shade = np.clip(np.array(color) * rng.uniform(0.85, 1.15), 0, 255)
            center = np.array([pose[0], pose[1], z])
            half = np.array([size[0] / 2, size[1] / 2, size[2] / 2 + 0.25])
            rows.append((center, half, pose[2], is_round, intensity * rng.uniform(0.8, 1.2), shade))

    for side in (-1, 1):
        s = -70.0
        while s < length + 70:
            run = rng.uniform(9, 18)
            if rng.uniform() < 0.8:
                size = (run, 0.5, rng.uniform(3, 8))
                where = s + run / 2, side * rng.uniform(33, 38)
                admit(where, rng.normal(0, 0.05), size, False, 45, (150, 125, 110))
            s += run + rng.uniform(1, 5)
    per_100m = (length + 120) / 100
    for _ in range(round(3 * per_100m)):
        size = (rng.uniform(4, 8), 0.4, rng.uniform(2, 3))
        where = rng.uniform(-60, length + 60), rng.choice([-1, 1]) * rng.uniform(21, 29)
        admit(where, rng.normal(0, 0.3), size, False, 45, (165, 140, 120))
    for _ in range(round(10 * per_100m)):
        d = rng.uniform(0.2, 0.45)
        where = rng.uniform(-60, length + 60), rng.choice([-1, 1]) * rng.uniform(10.6, 30)
        admit(where, 0.0, (d, d, rng.uniform(3, 7)), True, 85, (95, 95, 100))
    for _ in range(round(9 * per_100m)):
        d = rng.uniform(0.9, 2.2)
        where = rng.uniform(-60, length + 60), rng.choice([-1, 1]) * rng.uniform(12, 31)
        admit(where, 0.0, (d, d, rng.uniform(0.6, 1.6)), True, 18, (45, 90, 40))
    for _ in range(round(4 * per_100m)):
        size = (rng.uniform(0.8, 1.6), rng.uniform(0.8, 1.2), rng.uniform(0.9, 1.5))
        where = rng.uniform(-60, length + 60), rng.choice([-1, 1]) * rng.uniform(11, 31)
        admit(where, rng.uniform(0, 2 * np.pi), size, False, 60, (80, 100, 95))
    columns = [np.array(column) for column in zip(*rows)]
    return Solids(*columns, owner=np.full(len(rows), -1))


def make_scene(
    rng: np.random.Generator, center: np.ndarray, keyframes: int, profile: Profile = PROFILES['default']
) -> Scene:
    """Builds a scene.

    Args:
        rng: Source of all its chances.
        center: (2,) middle of the driven route.
        keyframes: Number of keyframes.
        profile: How the objects look.

    Returns:
        The scene, for the times -`SWEEP_PERIOD` to (keyframes - 1) * `KEYFRAME_PERIOD`.
    """
    duration = max(keyframes - 1, 1) * KEYFRAME_PERIOD
    ego = Ego(rng.uniform(5.5, 9.0), rng.uniform(0.5, 2.0), rng.uniform(0, 2 * np.pi))
    length = float(ego.travelled(np.array(duration)))
    road = make_road(rng, center, length)
    ground = np.array([rng.uniform(-2, 2), rng.uniform(-0.012, 0.012), rng.uniform(-0.012, 0.012)])

    occupancy = Occupancy(np.arange(-2 * SWEEP_PERIOD, duration + SWEEP_PERIOD, 0.125))
    poses = road.pose(ego.travelled(occupancy.times))
    ahead = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], -1) * EGO_CENTER_AHEAD
    occupancy.add(np.column_stack([poses[:, :2] + ahead, poses[:, 2]]), EGO_SIZE)

    scene = Scene(road, ego, duration, ground, np.asarray(center, dtype=float), [], None)
    scene.instances = _place_objects(rng, road, ego, duration, occupancy, profile)
    scene.background = _place_background(rng, road, length, occupancy, scene.ground_height)
    return scene
