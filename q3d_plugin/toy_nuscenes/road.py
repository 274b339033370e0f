"""The road, and how the ego vehicle and the objects move on it.

Positions are in the global frame, in metres; times are in seconds from the start of the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LANE = 3.7  # lateral distance of the neighbouring lanes to the ego lane
STRIP = 8.6  # ... of the parking strips
ROAD_HALF_WIDTH = 10.6


@dataclass
class Road:
    """The route as a densely sampled curve, parametrised by its length `s`."""

    s: np.ndarray
    xy: np.ndarray
    yaw: np.ndarray

    def pose(self, s: np.ndarray, lateral: np.ndarray | float = 0.0) -> np.ndarray:
        """Poses (..., 3) x, y, yaw at length `s` along the route and `lateral` metres to its left."""
        yaw = np.interp(s, self.s, self.yaw)
        x = np.interp(s, self.s, self.xy[:, 0]) - lateral * np.sin(yaw)
        y = np.interp(s, self.s, self.xy[:, 1]) + lateral * np.cos(yaw)
        return np.stack([x, y, yaw], axis=-1)


def make_road(rng: np.random.Generator, center: np.ndarray, length: float) -> Road:
    """A gently winding road whose driven part, of `length` metres, is centred at `center` (2,)."""
    step = 0.5
    s = np.arange(-400.0, length + 400.0, step)
    swing = rng.uniform(0.12, 0.35) * rng.choice([-1.0, 1.0])
    yaw = rng.uniform(0, 2 * np.pi) + swing * np.sin(
        2 * np.pi * s / rng.uniform(160, 240) + rng.uniform(0, 2 * np.pi)
    )
    xy = np.cumsum(np.stack([np.cos(yaw), np.sin(yaw)], axis=-1), axis=0) * step
    middle = np.argmin(np.abs(s - length / 2))
    return Road(s, xy - xy[middle] + center, yaw)


@dataclass
class Ego:
    """The ego vehicle: drives along the road with a speed that swings gently around its mean."""

    speed: float
    swing: float
    phase: float

    def travelled(self, t: np.ndarray) -> np.ndarray:
        """Length `s` along the road at times `t`."""
        return self.speed * t + self.swing * (np.sin(0.4 * t + self.phase) - np.sin(self.phase))


@dataclass
class Motion:
    """How an object moves.

    Attributes:
        kind: 'static', 'arc' (constant turn rate), 'lane' (follows the road) or 'convoy' (keeps its distance
            to the ego vehicle along the road).
        start: For 'static' and 'arc' (3,) x, y, yaw at t = 0; for 'lane' (2,) length along the road at t = 0
            and lateral offset; for 'convoy' (2,) length ahead of the ego vehicle and lateral offset.
        speed: m/s along the heading; negative on a lane: against the direction of the ego vehicle.
        turn: Turn rate in rad/s, for 'arc'.
    """

    kind: str
    start: np.ndarray
    speed: float = 0.0
    turn: float = 0.0

    def poses(self, t: np.ndarray, road: Road, ego: Ego) -> np.ndarray:
        """Poses (len(t), 3) x, y, yaw at times `t`."""
        if self.kind == 'static':
            return np.broadcast_to(self.start, (len(t), 3))
        if self.kind == 'arc':
            x, y, yaw = self.start
            heading = yaw + self.turn * t
            if abs(self.turn) < 1e-6:
                way = self.speed * t
                return np.stack([x + way * np.cos(yaw), y + way * np.sin(yaw), heading], -1)
            radius = self.speed / self.turn
            return np.stack(
                [
                    x + radius * (np.sin(heading) - np.sin(yaw)),
                    y - radius * (np.cos(heading) - np.cos(yaw)),
                    heading,
                ],
                -1,
            )
        s = self.start[0] + (ego.travelled(t) if self.kind == 'convoy' else self.speed * t)
        pose = road.pose(s, self.start[1])
        if self.speed < 0:
            pose[:, 2] += np.pi
        return pose
