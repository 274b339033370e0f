"""Six pinhole cameras: a z-buffer renderer with flat shading.

Camera frame: x right, y down, z along the optical axis, in metres. Images have the nuScenes size of
1600 x 900 pixels but are drawn at half of it: exact enough for flat colours, and four times cheaper. A
profile can have smaller ones.
"""

from __future__ import annotations

from typing import Callable

import cv2
import numpy as np

from q3d_plugin.toy_nuscenes.profiles import Profile
from q3d_plugin.toy_nuscenes.road import ROAD_HALF_WIDTH, Road
from q3d_plugin.toy_nuscenes.scene import Solids

WIDTH, HEIGHT = 1600, 900
SCALE = 2
NEAR = 0.3
FAR = 90.0

# Channel: heading of the axis in degrees and position in the vehicle frame, focal length in pixels, and the
# exposure in seconds before the LiDAR keyframe: the LiDAR turns clockwise and triggers them one by one.
RIG = {
    'CAM_FRONT': (0.0, (1.70, 0.0, 1.51), 1260.0, 0.035),
    'CAM_FRONT_RIGHT': (-55.0, (1.55, -0.50, 1.50), 1260.0, 0.028),
    'CAM_BACK_RIGHT': (-110.0, (1.02, -0.48, 1.56), 1260.0, 0.020),
    'CAM_BACK': (180.0, (0.03, 0.0, 1.57), 810.0, 0.011),
    'CAM_BACK_LEFT': (110.0, (1.03, 0.48, 1.57), 1260.0, 0.002),
    'CAM_FRONT_LEFT': (55.0, (1.52, 0.50, 1.51), 1260.0, 0.043),
}

SKY, ASPHALT, LOT, PAINT = (205, 190, 170), (88, 88, 92), (125, 128, 112), (190, 190, 190)
LIGHT = np.array([0.35, 0.2, 0.92])


def solid_faces(solids: Solids) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outer faces of all solids as quadrilaterals: cylinders as hexagonal prisms, no undersides.

    Returns:
        Corners (Q, 4, 3) in the global frame, outward normals (Q, 3) and index of the solid (Q,).
    """
    angle = np.arange(6) * np.pi / 3
    hexagon = np.stack([np.cos(angle), np.sin(angle)], -1)
    square = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    corners, index = [], []
    for is_round, outline in ((False, square), (True, hexagon)):
        which = np.flatnonzero(solids.round == is_round)
        local = outline[None] * solids.half[which, None, :2]
        cos, sin = np.cos(solids.yaw[which])[:, None], np.sin(solids.yaw[which])[:, None]
        x = cos * local[..., 0] - sin * local[..., 1] + solids.center[which, 0:1]
        y = sin * local[..., 0] + cos * local[..., 1] + solids.center[which, 1:2]
        low = np.stack([x, y, np.broadcast_to((solids.center - solids.half)[which, 2:], x.shape)], -1)
        high = np.stack([x, y, np.broadcast_to((solids.center + solids.half)[which, 2:], x.shape)], -1)
        n = len(outline)
        for i in range(n):
            j = (i + 1) % n
            corners.append(np.stack([low[:, i], low[:, j], high[:, j], high[:, i]], 1))
            index.append(which)
        for i in range(1, n - 2, 2):
            corners.append(np.stack([high[:, 0], high[:, i], high[:, i + 1], high[:, i + 2]], 1))
            index.append(which)
    corners, index = np.concatenate(corners), np.concatenate(index)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return corners, normals, index


def clip_near(polygon: np.ndarray) -> np.ndarray:
    """Cuts off the part of a polygon (N, 3), in the camera frame, that is nearer than `NEAR`."""
    result = []
    for here, there in zip(polygon, np.roll(polygon, -1, axis=0)):
        if here[2] >= NEAR:
            result.append(here)
        if (here[2] >= NEAR) != (there[2] >= NEAR):
            result.append(here + (there - here) * ((NEAR - here[2]) / (there[2] - here[2])))
    return np.array(result).reshape(-1, 3)


def inverse_depth(normal: np.ndarray, point: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Coefficients (..., 3) of 1 / z = a u + b v + c for planes.

    Args:
        normal: (..., 3) normals in the camera frame.
        point: (..., 3) a point of each plane.
        intrinsic: (3, 3) of the camera.

    Returns:
        a, b and c.
    """
    offset = (normal * point).sum(-1, keepdims=True)
    return normal @ np.linalg.inv(intrinsic) / np.where(np.abs(offset) > 1e-9, offset, 1e-9)


def shrunk(intrinsic: np.ndarray, scale: int) -> np.ndarray:
    """The intrinsic matrix (3, 3) of an image whose pixels are `scale` x `scale` of the given one's."""
    # The centre of a small pixel is the middle of the large ones it is spread over.
    shift = 0.5 / scale - 0.5
    return np.array([[1 / scale, 0, shift], [0, 1 / scale, shift], [0, 0, 1.0]]) @ intrinsic


def _draw_ground(
    image: np.ndarray, quads: np.ndarray, color: tuple, to_camera: tuple, intrinsic: np.ndarray
) -> None:
    """Paints quadrilaterals (Q, 4, 3) on the ground, in place; `to_camera`: rotation and position."""
    rotation, position = to_camera
    for quad in (quads - position) @ rotation:
        if quad[:, 2].max() <= NEAR:
            continue
        flat = clip_near(quad)
        pixels = flat @ intrinsic.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        if len(pixels) >= 3 and np.abs(pixels).max() < 1e5:
            cv2.fillConvexPoly(image, np.round(pixels * 16).astype(np.int32), color, shift=4)


def render(
    solids: Solids,
    road: Road,
    around: float,
    ground_normal: np.ndarray,
    ground_height: Callable[[np.ndarray], np.ndarray],
    rotation: np.ndarray,
    position: np.ndarray,
    intrinsic: np.ndarray,
    scale: int,
) -> np.ndarray:
    """Draws what a camera sees.

    Args:
        solids: What there is, in the global frame.
        road: The road, painted onto the ground.
        around: Length along the road of the ego vehicle.
        ground_normal: (3,) upward normal of the ground in the global frame.
        ground_height: Height of the ground at positions (..., 2).
        rotation: (3, 3) camera to global.
        position: (3,) global position of the camera.
        intrinsic: (3, 3) of the image that is drawn.
        scale: It has the size of nuScenes divided by this.

    Returns:
        (HEIGHT / scale, WIDTH / scale, 3) uint8 RGB.
    """
    height, width = HEIGHT // scale, WIDTH // scale
    u, v = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]

    foot = np.append(position[:2], ground_height(position[:2]))
    plane = inverse_depth(ground_normal @ rotation, (foot - position) @ rotation, intrinsic)
    a, b, c = plane.astype(np.float32)
    depth = a * u + (b * v + c)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = LOT
    s = np.arange(around - 64, around + 65, 4.0)
    bands = [(-ROAD_HALF_WIDTH, ROAD_HALF_WIDTH, s[:-1], s[1:], ASPHALT)]
    bands += [(x - 0.08, x + 0.08, s[:-1:2], s[:-1:2] + 3.0, PAINT) for x in (-1.85, 1.85)]
    for right, left, begin, end, color in bands:
        outline = ((begin, right), (begin, left), (end, left), (end, right))
        corner = np.stack([road.pose(x, y)[..., :2] for x, y in outline], 1)
        quads = np.concatenate([corner, ground_height(corner)[..., None]], -1)
        _draw_ground(image, quads, color, (rotation, position), intrinsic)
    image[depth < 1 / 400] = SKY
    depth = np.maximum(depth, 1 / 400)

    corners, normals, index = solid_faces(solids)
    facing = ((corners[:, 0] - position) * normals).sum(1) < 0
    local = (corners - position) @ rotation
    facing &= (local[..., 2].max(1) > NEAR) & (local[..., 2].min(1) < FAR)
    # A face is out of view when all of its corners are beyond the same side of the view pyramid.
    for axis, size in ((0, width), (1, height)):
        f, middle = intrinsic[axis, axis], intrinsic[axis, 2]
        facing &= (f * local[..., axis] + middle * local[..., 2] > 0).any(1)
        facing &= (f * local[..., axis] + (middle - size) * local[..., 2] < 0).any(1)
    shade = 0.62 + 0.38 * np.clip(normals @ LIGHT, -0.3, 1)
    colors = np.clip(solids.color[index] * shade[:, None], 0, 255).astype(np.uint8)

    which = np.flatnonzero(facing)
    local, colors = local[which], colors[which]
    planes = inverse_depth(normals[which] @ rotation, local[:, 0], intrinsic).astype(np.float32)
    projected = local @ intrinsic.T
    whole = local[..., 2].min(1) >= NEAR
    nearest = np.full((height, width), -1, np.int16)
    for face in range(len(which)):
        pixels = projected[face] if whole[face] else clip_near(local[face]) @ intrinsic.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        left, top = np.maximum(np.floor(pixels.min(0)), 0).astype(int)
        right, bottom = np.minimum(np.ceil(pixels.max(0)) + 1, (width, height)).astype(int)
        if left >= right or top >= bottom:
            continue
        mask = np.zeros((bottom - top, right - left), np.uint8)
        # OpenCV keeps coordinates in 16.16 fixed point: far-off corners of near faces must not overflow it.
        outline = np.clip((pixels - (left, top)) * 16, -5e5, 5e5)
        cv2.fillConvexPoly(mask, np.round(outline).astype(np.int32), 1, shift=4)
        a, b, c = planes[face]
        plane = a * u[left:right] + (b * v[top:bottom] + c)
        window = depth[top:bottom, left:right]
        front = plane > window
        front &= mask.view(bool)
        np.copyto(window, plane, where=front)
        np.copyto(nearest[top:bottom, left:right], face, where=front)
    drawn = nearest >= 0
    image[drawn] = colors[nearest[drawn]]
    return image


def encode(image: np.ndarray, profile: Profile) -> bytes:
    """JPEG file of an RGB image (H, W, 3), as a profile has them."""
    # Flat images spend nearly all bytes on the codes of empty blocks, which optimised tables make shorter.
    options = [cv2.IMWRITE_JPEG_QUALITY, profile.jpeg_quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    if profile.full_chroma:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    ok, data = cv2.imencode('.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise RuntimeError('OpenCV could not encode a camera image as JPEG')
    return data.tobytes()
