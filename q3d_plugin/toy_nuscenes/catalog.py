"""The objects: sizes, convex parts and materials; nuScenes categories and attributes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Every surface stays this far inside its annotation box, so that range noise does not throw points out of it.
INSET = 0.05

CATEGORIES = {
    'human.pedestrian.adult': 'Adult.',
    'human.pedestrian.child': 'Child.',
    'human.pedestrian.wheelchair': 'Wheelchair with its user.',
    'human.pedestrian.stroller': 'Stroller with the person pushing it.',
    'human.pedestrian.personal_mobility': 'Small electric or self-propelled vehicle with its user.',
    'human.pedestrian.police_officer': 'Police officer.',
    'human.pedestrian.construction_worker': 'Construction worker.',
    'animal': 'Animal.',
    'vehicle.car': 'Passenger car.',
    'vehicle.motorcycle': 'Motorcycle, with its rider if it has one.',
    'vehicle.bicycle': 'Bicycle, with its rider if it has one.',
    'vehicle.bus.bendy': 'Bus with a joint.',
    'vehicle.bus.rigid': 'Bus without a joint.',
    'vehicle.truck': 'Lorry, including its cargo.',
    'vehicle.construction': 'Construction vehicle.',
    'vehicle.emergency.ambulance': 'Ambulance.',
    'vehicle.emergency.police': 'Police vehicle.',
    'vehicle.trailer': 'Trailer.',
    'movable_object.barrier': 'Temporary road barrier.',
    'movable_object.trafficcone': 'Traffic cone.',
    'movable_object.pushable_pullable': 'Object that is pushed or pulled, such as a bin.',
    'movable_object.debris': 'Debris on the road.',
    'static_object.bicycle_rack': 'Bicycle rack.',
}

ATTRIBUTES = {
    'vehicle.moving': 'The vehicle is moving.',
    'vehicle.stopped': 'The vehicle stands, with a driver who intends to move.',
    'vehicle.parked': 'The vehicle stands, with no intent to move.',
    'cycle.with_rider': 'There is a rider on the cycle.',
    'cycle.without_rider': 'There is no rider on the cycle.',
    'pedestrian.sitting_lying_down': 'The person sits or lies.',
    'pedestrian.standing': 'The person stands.',
    'pedestrian.moving': 'The person moves.',
}


@dataclass(frozen=True)
class Part:
    """One convex part of an object, in fractions of its box.

    Attributes:
        x: Range along the length, -0.5 (back) to 0.5 (front).
        y: Range along the width, -0.5 (right) to 0.5 (left).
        z: Range along the height, 0 (ground) to 1.
        intensity: LiDAR intensity at normal incidence, 0 to 255.
        tint: Factor on the colour of the object in the images.
        round: Upright cylinder that fits into the range, instead of a box.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    z: tuple[float, float]
    intensity: float
    tint: float = 1.0
    round: bool = False


@dataclass(frozen=True)
class ObjectClass:
    """One detection class.

    Attributes:
        category: Name in the nuScenes category table.
        size_lwh: Mean length, width, height in metres.
        spread: Relative standard deviation of the size.
        color: RGB, 0 to 255.
        parts: Parts of the object (of a cycle: without its rider).
        rider: Parts added by a rider.
        rider_height: Height in metres with a rider, 0 for classes without one.
    """

    category: str
    size_lwh: tuple[float, float, float]
    spread: float
    color: tuple[int, int, int]
    parts: tuple[Part, ...]
    rider: tuple[Part, ...] = ()
    rider_height: float = 0.0


FULL = (-0.5, 0.5)

CLASSES = {
    'car': ObjectClass(
        'vehicle.car',
        (4.6, 1.95, 1.7),
        0.06,
        (60, 90, 190),
        (
            Part(FULL, FULL, (0.14, 0.56), 48),
            Part((-0.44, 0.16), (-0.44, 0.44), (0.56, 1.0), 22, 0.4),
        ),
    ),
    'truck': ObjectClass(
        'vehicle.truck',
        (7.0, 2.5, 2.9),
        0.08,
        (40, 150, 150),
        (
            Part((0.28, 0.5), (-0.46, 0.46), (0.1, 0.8), 65, 0.7),
            Part((-0.5, 0.24), FULL, (0.3, 1.0), 110),
            Part((-0.48, 0.45), (-0.35, 0.35), (0.12, 0.3), 40, 0.4),
        ),
    ),
    'bus': ObjectClass(
        'vehicle.bus.rigid',
        (11.0, 2.9, 3.5),
        0.05,
        (200, 60, 60),
        (
            Part((-0.5, 0.48), FULL, (0.08, 0.5), 82),
            Part((-0.5, 0.46), (-0.49, 0.49), (0.5, 0.8), 30, 0.45),
            Part((-0.5, 0.48), FULL, (0.8, 0.93), 82),
            Part((-0.45, -0.1), (-0.35, 0.35), (0.93, 1.0), 82, 0.8),
            Part((0.48, 0.5), FULL, (0.08, 0.3), 82, 0.6),
        ),
    ),
    'trailer': ObjectClass(
        'vehicle.trailer',
        (12.0, 2.9, 3.9),
        0.06,
        (170, 170, 180),
        (
            Part((-0.5, 0.42), FULL, (0.34, 1.0), 145),
            Part((-0.5, 0.5), (-0.42, 0.42), (0.26, 0.34), 70, 0.5),
            Part((-0.46, -0.2), (-0.45, 0.45), (0.02, 0.26), 35, 0.3),
            Part((0.26, 0.29), (-0.35, 0.35), (0.0, 0.26), 70, 0.4),
        ),
    ),
    'construction_vehicle': ObjectClass(
        'vehicle.construction',
        (6.5, 2.8, 3.2),
        0.08,
        (235, 180, 30),
        (
            Part((-0.5, 0.15), FULL, (0.08, 0.55), 180),
            Part((-0.35, -0.02), (-0.4, 0.3), (0.55, 1.0), 120, 0.6),
            Part((0.0, 0.5), (-0.14, 0.14), (0.58, 0.74), 180, 0.9),
            Part((0.38, 0.5), (-0.42, 0.42), (0.04, 0.4), 160, 0.7),
            Part((0.4, 0.48), (-0.14, 0.14), (0.4, 0.58), 180, 0.9),
        ),
    ),
    'pedestrian': ObjectClass(
        'human.pedestrian.adult',
        (0.7, 0.7, 1.75),
        0.07,
        (230, 120, 180),
        (
            Part((-0.45, 0.35), (-0.4, 0.4), (0.0, 0.86), 30, 1.0, True),
            Part((-0.25, 0.2), (-0.23, 0.23), (0.86, 1.0), 45, 0.8, True),
            Part((0.1, 0.5), (-0.3, 0.3), (0.58, 0.68), 40, 0.9),
        ),
    ),
    'bicycle': ObjectClass(
        'vehicle.bicycle',
        (1.75, 0.65, 1.15),
        0.05,
        (60, 190, 60),
        (
            Part(FULL, (-0.12, 0.12), (0.0, 0.62), 75),
            Part((0.2, 0.3), FULL, (0.84, 1.0), 75, 0.7),
            Part((0.2, 0.3), (-0.12, 0.12), (0.6, 0.84), 75, 0.7),
            Part((-0.25, -0.05), (-0.2, 0.2), (0.62, 0.86), 60, 0.5),
        ),
        (Part((-0.28, 0.1), (-0.4, 0.4), (0.45, 1.0), 55, 0.6),),
        1.7,
    ),
    'motorcycle': ObjectClass(
        'vehicle.motorcycle',
        (2.15, 0.85, 1.2),
        0.05,
        (150, 70, 200),
        (
            Part((-0.48, 0.3), (-0.3, 0.3), (0.08, 0.62), 125),
            Part((0.3, 0.5), (-0.12, 0.12), (0.0, 0.7), 105, 0.5),
            Part((0.14, 0.26), FULL, (0.74, 1.0), 125, 0.8),
            Part((-0.5, -0.32), (-0.22, 0.22), (0.5, 0.9), 125, 0.7),
        ),
        (Part((-0.25, 0.08), (-0.36, 0.36), (0.4, 1.0), 90, 0.5),),
        1.65,
    ),
    'traffic_cone': ObjectClass(
        'movable_object.trafficcone',
        (0.45, 0.45, 1.0),
        0.08,
        (250, 120, 20),
        (
            Part((-0.5, 0.5), (-0.5, 0.5), (0.0, 0.08), 120, 0.6),
            Part((-0.42, 0.42), (-0.42, 0.42), (0.08, 0.4), 225, 1.0, True),
            Part((-0.32, 0.32), (-0.32, 0.32), (0.4, 0.7), 245, 1.0, True),
            Part((-0.2, 0.2), (-0.2, 0.2), (0.7, 1.0), 225, 1.0, True),
        ),
    ),
    # As in nuScenes the long side of a barrier is its width: it faces the traffic it keeps out.
    'barrier': ObjectClass(
        'movable_object.barrier',
        (0.6, 2.5, 1.05),
        0.06,
        (230, 230, 90),
        (
            Part((-0.5, 0.5), FULL, (0.0, 0.3), 170, 0.7),
            Part((-0.22, 0.32), FULL, (0.3, 1.0), 200),
        ),
    ),
}


def sample_size(rng: np.random.Generator, name: str, with_rider: bool) -> np.ndarray:
    """Draws length, width, height (3,) in metres, rounded to millimetres as the tables store them."""
    cls = CLASSES[name]
    mean = np.array(cls.size_lwh)
    if with_rider:
        mean[2] = cls.rider_height
    factor = 1 + cls.spread * np.clip(rng.standard_normal(3), -2, 2)
    return np.round(mean * factor, 3)


def object_parts(name: str, size_lwh: np.ndarray, with_rider: bool) -> dict[str, np.ndarray]:
    """Parts of an object in its own frame: origin at the centre of the box, x forward, y left, z up.

    Args:
        name: Detection class.
        size_lwh: (3,) length, width, height of the box in metres.
        with_rider: Whether a cycle carries its rider.

    Returns:
        `center` and `half` (P, 3) in metres, `round` (P,) bool, `intensity` and `tint` (P,).
    """
    cls = CLASSES[name]
    parts = list(cls.parts)
    if with_rider:
        # The rider comes on top of the cycle, whose own parts keep their height in metres.
        squeeze = cls.size_lwh[2] / cls.rider_height
        parts = [
            Part(p.x, p.y, (p.z[0] * squeeze, p.z[1] * squeeze), p.intensity, p.tint, p.round) for p in parts
        ]
        parts += cls.rider
    low = np.array([[p.x[0], p.y[0], p.z[0]] for p in parts])
    high = np.array([[p.x[1], p.y[1], p.z[1]] for p in parts])
    inner = np.array([size_lwh[0] - 2 * INSET, size_lwh[1] - 2 * INSET, size_lwh[2] - INSET])
    low, high = low * inner, high * inner
    low[:, 2] -= size_lwh[2] / 2
    high[:, 2] -= size_lwh[2] / 2
    half = (high - low) / 2
    is_round = np.array([p.round for p in parts])
    half[is_round, :2] = half[is_round, :2].min(axis=1, keepdims=True)
    return {
        'center': (low + high) / 2,
        'half': half,
        'round': is_round,
        'intensity': np.array([p.intensity for p in parts], dtype=float),
        'tint': np.array([p.tint for p in parts], dtype=float),
    }
