"""Rotations, oriented boxes and overlap tests: metres, radians, quaternions as (w, x, y, z)."""

from __future__ import annotations

import numpy as np


def rotation_z(yaw: float) -> np.ndarray:
    """Rotation matrix (3, 3) about the upward axis."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def rotation_x(angle: float) -> np.ndarray:
    """Rotation matrix (3, 3) about the first axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])


def matrix_to_quaternion(matrix: np.ndarray) -> np.ndarray:
    """Unit quaternion (4,) of a rotation matrix (3, 3), with a non-negative scalar part.

    Solved as the main eigenvector of a symmetric 4 x 4 matrix, which has no special cases near half turns.
    """
    m = matrix
    k = np.array(
        [
            [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
            [m[2, 1] - m[1, 2], m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
            [m[0, 2] - m[2, 0], m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
            [m[1, 0] - m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1]],
        ]
    )
    quaternion = np.linalg.eigh(k)[1][:, -1]
    return -quaternion if quaternion[0] < 0 else quaternion


def quaternion_to_matrix(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) of a quaternion (4,), normalised first."""
    w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def points_in_box(points: np.ndarray, center: np.ndarray, size_lwh: np.ndarray, yaw: float) -> np.ndarray:
    """Which points lie inside an upright oriented box.

    Args:
        points: (N, 3) positions.
        center: (3,) centre of the box, in the frame of the points.
        size_lwh: (3,) length, width, height.
        yaw: Heading of the box.

    Returns:
        (N,) bool, the surface counted as inside.
    """
    offset = points - center
    cos, sin = np.cos(yaw), np.sin(yaw)
    along = cos * offset[:, 0] + sin * offset[:, 1]
    across = -sin * offset[:, 0] + cos * offset[:, 1]
    half = np.asarray(size_lwh) / 2
    return (np.abs(along) <= half[0]) & (np.abs(across) <= half[1]) & (np.abs(offset[:, 2]) <= half[2])


def rectangles_overlap(
    pose_a: np.ndarray, size_a: np.ndarray, pose_b: np.ndarray, size_b: np.ndarray
) -> np.ndarray:
    """Separating-axis test of oriented rectangles, broadcast over the leading dimensions.

    Args:
        pose_a: (..., 3) x, y, yaw of the first rectangles.
        size_a: (..., 2) their length and width.
        pose_b: (..., 3) the second rectangles.
        size_b: (..., 2) their length and width.

    Returns:
        (...) bool, True where the two overlap.
    """
    delta = pose_b[..., :2] - pose_a[..., :2]
    turn = pose_b[..., 2] - pose_a[..., 2]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    overlap = np.ones(np.broadcast(delta[..., 0], cos).shape, dtype=bool)
    for yaw, own, other in ((pose_a[..., 2], size_a, size_b), (pose_b[..., 2], size_b, size_a)):
        along = np.abs(np.cos(yaw) * delta[..., 0] + np.sin(yaw) * delta[..., 1])
        across = np.abs(-np.sin(yaw) * delta[..., 0] + np.cos(yaw) * delta[..., 1])
        overlap &= along <= (own[..., 0] + cos * other[..., 0] + sin * other[..., 1]) / 2
        overlap &= across <= (own[..., 1] + sin * other[..., 0] + cos * other[..., 1]) / 2
    return overlap
