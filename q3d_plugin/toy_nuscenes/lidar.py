"""A spinning LiDAR with 32 beams, ray-cast against upright boxes, upright cylinders and a plane.

The sensor frame is that of nuScenes: x right, y forward, z up, in metres. One sweep is an instant: the motion
of the vehicle during a turn is left out, as nuScenes takes it out of its own sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from q3d_plugin.toy_nuscenes.scene import GROUND_INTENSITY, Solids

ELEVATIONS = np.deg2rad(np.linspace(-30.67, 10.67, 32))
AZIMUTH_STEPS = 640
MAX_RANGE = 70.0
RANGE_NOISE = 0.02
DROPOUT = 0.06
# More than real asphalt loses: nearly half of all rays meet the ground close by and would fill the files.
GROUND_DROPOUT = 0.5


@dataclass
class Sweep:
    """Result of one sweep.

    Attributes:
        points: (N, 5) float32 x, y, z in the sensor frame, intensity 0 to 255, ring 0 to 31, in firing order.
        owner: (N,) index of the instance that was hit, -1 for the background.
        alone: (M,) number of rays that meet each instance when nothing is in the way.
        seen: (M,) number of rays that meet it first.
    """

    points: np.ndarray
    owner: np.ndarray
    alone: np.ndarray
    seen: np.ndarray


def ray_directions(phase: float) -> np.ndarray:
    """Unit directions (32, AZIMUTH_STEPS, 3) in the sensor frame; azimuth clockwise from the forward axis."""
    azimuth = phase + 2 * np.pi * np.arange(AZIMUTH_STEPS) / AZIMUTH_STEPS
    elevation = ELEVATIONS[:, None]
    return np.stack(
        np.broadcast_arrays(
            np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth), np.sin(elevation)
        ),
        axis=-1,
    )


def intersect_box(origin: np.ndarray, rays: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Meets rays with an axis-aligned box around 0 (slab method).

    Args:
        origin: (3,) common origin of the rays, outside the box.
        rays: (..., 3) unit directions.
        half: (3,) half extents.

    Returns:
        Range (...), inf for a miss, and cosine (...) of the incidence.
    """
    safe = np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    first = (-half - origin) / safe
    second = (half - origin) / safe
    enter = np.minimum(first, second)
    leave = np.maximum(first, second).min(axis=-1)
    axis = enter.argmax(axis=-1)
    start = np.take_along_axis(enter, axis[..., None], -1)[..., 0]
    cosine = np.abs(np.take_along_axis(rays, axis[..., None], -1)[..., 0])
    return np.where((start <= leave) & (start > 0), start, np.inf), cosine


def intersect_cylinder(
    origin: np.ndarray, rays: np.ndarray, half: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Meets rays with an upright cylinder around 0 and its top; arguments as `intersect_box`."""
    a = np.maximum(rays[..., 0] ** 2 + rays[..., 1] ** 2, 1e-12)
    b = rays[..., 0] * origin[0] + rays[..., 1] * origin[1]
    c = origin[0] ** 2 + origin[1] ** 2 - half[0] ** 2
    root = np.sqrt(np.maximum(b * b - a * c, 0))
    side = (-b - root) / a
    height = origin[2] + side * rays[..., 2]
    on_side = (b * b > a * c) & (side > 0) & (np.abs(height) <= half[2])
    hit = origin[:2] + side[..., None] * rays[..., :2]
    cosine = np.abs((hit * rays[..., :2]).sum(-1)) / half[0]

    down = np.where(rays[..., 2] < -1e-9, rays[..., 2], -1e-9)
    top = (half[2] - origin[2]) / down
    spot = origin[:2] + top[..., None] * rays[..., :2]
    on_top = (rays[..., 2] < -1e-9) & (top > 0) & ((spot**2).sum(-1) <= half[0] ** 2)
    distance = np.where(on_side, side, np.where(on_top, top, np.inf))
    return distance, np.where(on_side, cosine, np.abs(rays[..., 2]))


def _columns(corners: np.ndarray, phase: float) -> list[np.ndarray]:
    """Azimuth columns each solid can occupy, from its corners (P, 8, 3) in the sensor frame."""
    middle = corners.mean(axis=1)
    center = np.arctan2(middle[:, 0], middle[:, 1])
    azimuth = np.arctan2(corners[..., 0], corners[..., 1]) - center[:, None]
    azimuth = (azimuth + np.pi) % (2 * np.pi) - np.pi
    low, high = azimuth.min(axis=1), azimuth.max(axis=1)
    step = 2 * np.pi / AZIMUTH_STEPS
    begin = np.ceil((center + low - phase) / step - 1e-6).astype(int)
    end = np.floor((center + high - phase) / step + 1e-6).astype(int)
    result = []
    for first, last, span in zip(begin, end, high - low):
        wide = span > np.pi or last - first + 1 >= AZIMUTH_STEPS
        result.append(np.arange(AZIMUTH_STEPS) if wide else np.arange(first, last + 1) % AZIMUTH_STEPS)
    return result


def solid_corners(solids: Solids) -> np.ndarray:
    """Global corners (P, 8, 3) of the boxes around the solids."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    local = signs[None] * solids.half[:, None]
    cos, sin = np.cos(solids.yaw)[:, None], np.sin(solids.yaw)[:, None]
    turned = np.stack(
        [
            cos * local[..., 0] - sin * local[..., 1],
            sin * local[..., 0] + cos * local[..., 1],
            local[..., 2],
        ],
        -1,
    )
    return turned + solids.center[:, None]


def cast(
    solids: Solids,
    instances: int,
    ground: np.ndarray,
    origin: np.ndarray,
    rotation: np.ndarray,
    rng: np.random.Generator,
) -> Sweep:
    """Records one sweep.

    Args:
        solids: What there is, in the global frame.
        instances: Number of annotated instances M.
        ground: (3,) plane z = ground[0] + ground[1] x + ground[2] y in the global frame.
        origin: (3,) global position of the sensor.
        rotation: (3, 3) sensor to global.
        rng: Source of noise, drop-outs and the phase of the turn.

    Returns:
        The sweep.
    """
    phase = rng.uniform(0, 2 * np.pi / AZIMUTH_STEPS)
    local_rays = ray_directions(phase)
    rays = local_rays @ rotation.T
    shape = rays.shape[:2]

    # The ground first: everything else then only has to be nearer.
    above = origin[2] - ground[0] - ground[1] * origin[0] - ground[2] * origin[1]
    descent = rays[..., 2] - ground[1] * rays[..., 0] - ground[2] * rays[..., 1]
    best = np.where(descent < -1e-6, above / np.maximum(-descent, 1e-6), np.inf)
    cosine = np.abs(descent)
    intensity = np.full(shape, GROUND_INTENSITY)
    owner = np.full(shape, -1)
    on_ground = np.ones(shape, dtype=bool)
    alone = np.zeros((instances, *shape), dtype=bool)

    distance = np.linalg.norm(solids.center[:, :2] - origin[:2], axis=1)
    near = distance - solids.half[:, :2].max(axis=1) < MAX_RANGE
    columns = _columns((solid_corners(solids) - origin) @ rotation, phase)
    for index in np.flatnonzero(near):
        cols = columns[index]
        if not len(cols):
            continue
        cos, sin = np.cos(solids.yaw[index]), np.sin(solids.yaw[index])
        to_solid = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        part_rays = rays[:, cols] @ to_solid.T
        part_origin = to_solid @ (origin - solids.center[index])
        intersect = intersect_cylinder if solids.round[index] else intersect_box
        distance, part_cosine = intersect(part_origin, part_rays, solids.half[index])
        who = solids.owner[index]
        if who >= 0:
            alone[who][:, cols] |= distance < MAX_RANGE
        row, col = np.nonzero(distance < best[:, cols])
        at = (row, cols[col])
        best[at] = distance[row, col]
        cosine[at] = part_cosine[row, col]
        intensity[at] = solids.intensity[index]
        owner[at] = who
        on_ground[at] = False

    hit = best < MAX_RANGE
    seen = np.bincount(owner[hit & (owner >= 0)], minlength=instances)
    keep = rng.uniform(size=shape) > DROPOUT
    # Asphalt swallows pulses, the more the flatter they come in.
    lost = np.clip(GROUND_DROPOUT + np.where(hit, best, 0.0) / MAX_RANGE, 0, 0.9)
    keep &= ~on_ground | (rng.uniform(size=shape) > lost)
    noise = rng.normal(0, RANGE_NOISE, size=shape)
    speckle = rng.uniform(0.88, 1.12, size=shape)
    keep &= hit

    # Firing order: all beams of one azimuth, then the next azimuth.
    keep = keep.T
    distance = np.where(hit, best + noise, 0.0).T[keep]
    xyz = local_rays.transpose(1, 0, 2)[keep] * distance[:, None]
    strength = np.clip(intensity * (0.35 + 0.65 * cosine) * speckle, 0, 255).T[keep]
    ring = np.broadcast_to(np.arange(shape[0])[:, None], shape).T[keep]
    points = np.column_stack([xyz, np.round(strength), ring]).astype(np.float32)
    return Sweep(points, owner.T[keep], alone.sum(axis=(1, 2)), seen)
