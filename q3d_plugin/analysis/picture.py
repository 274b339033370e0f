"""A frame of nuScenes as a picture: points and boxes from above, beside a camera image with the same boxes.

The nuScenes devkit projects them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from q3d_plugin.analysis import charts
from q3d_plugin.analysis.nuscenes import Detections

__all__ = ['CameraView', 'camera_views', 'frame_picture', 'outline']

EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
"""Pairs of corners of a box of the devkit, whose first four are those of its front."""
RANGE = 52.0
"""Half of the side of the square that is seen from above, metres."""


class Set(NamedTuple):
    """A set of boxes, and how it is drawn.

    Attributes:
        name: In the legend.
        boxes: Of the devkit's evaluation, in the global frame.
        colour: Of all its lines.
        width: Of its lines, points.
        style: Of its lines.
    """

    name: str
    boxes: List[Any]
    colour: str
    width: float
    style: Any


class CameraView(NamedTuple):
    """A camera at the moment of a frame.

    Attributes:
        channel: Such as ``'CAM_FRONT'``.
        image: The file of its image.
        size: Width and height, pixels.
        intrinsic: (3, 3).
        position: (3,) in the global frame, metres.
        rotation: (3, 3), from the camera to the global frame.
    """

    channel: str
    image: Path
    size: Tuple[int, int]
    intrinsic: np.ndarray
    position: np.ndarray
    rotation: np.ndarray

    def corners(self, box: Any) -> Optional[np.ndarray]:
        """Corners of a box in the image, (8, 2) pixels; None where the devkit does not see it there.

        Args:
            box: Of the devkit's evaluation, in the global frame.
        """
        from nuscenes.utils.data_classes import Box
        from nuscenes.utils.geometry_utils import BoxVisibility, box_in_image, view_points
        from pyquaternion import Quaternion

        placed = Box(box.translation, box.size, Quaternion(box.rotation))
        placed.translate(-self.position)
        placed.rotate(Quaternion(matrix=self.rotation, rtol=1e-4, atol=1e-5).inverse)
        if not box_in_image(placed, self.intrinsic, self.size, BoxVisibility.ANY):
            return None
        return view_points(placed.corners(), self.intrinsic, normalize=True)[:2].T


def _pose(nusc: Any, data: Dict[str, Any]) -> Tuple[np.ndarray, np.ndarray]:
    """Global position (3,) and rotation (3, 3) of a sensor at the moment of a recording."""
    from pyquaternion import Quaternion

    sensor = nusc.get('calibrated_sensor', data['calibrated_sensor_token'])
    pose = nusc.get('ego_pose', data['ego_pose_token'])
    vehicle = Quaternion(pose['rotation']).rotation_matrix
    position = vehicle @ np.array(sensor['translation']) + np.array(pose['translation'])
    return position, vehicle @ Quaternion(sensor['rotation']).rotation_matrix


def camera_views(nusc: Any, token: str) -> List[CameraView]:
    """The cameras of a sample whose images are on disk.

    Args:
        nusc: The data set, as the devkit reads it.
        token: Of the sample.
    """
    views = []
    for channel, key in nusc.get('sample', token)['data'].items():
        data = nusc.get('sample_data', key)
        image = Path(nusc.dataroot) / data['filename']
        sensor = nusc.get('calibrated_sensor', data['calibrated_sensor_token'])
        if sensor['camera_intrinsic'] and image.is_file():
            intrinsic = np.array(sensor['camera_intrinsic'])
            size = (data['width'], data['height'])
            views.append(CameraView(channel, image, size, intrinsic, *_pose(nusc, data)))
    return views


def outline(box: Any, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """The outline of a global box on the ground, in the frame of a sensor: (5, 2), closed, front edge first.

    Args:
        box: Of the devkit's evaluation.
        position: (3,) of the sensor, global.
        rotation: (3, 3), from the sensor to the global frame.
    """
    from pyquaternion import Quaternion

    width, length = box.size[0], box.size[1]
    local = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1], [1, 1]]) * [length / 2, width / 2]
    local = np.concatenate([local, np.zeros((5, 1))], 1)
    placed = local @ Quaternion(box.rotation).rotation_matrix.T + np.array(box.translation)
    return ((placed - position) @ rotation)[:, :2]


def frame_picture(
    detections: Detections, reference: Optional[Detections] = None, score: float = 0.3
) -> Tuple[bytes, str]:
    """The frame with the most ground truth, and of its cameras the one that sees most of that.

    Args:
        detections: Of a run.
        reference: Of the run of the float model, on the same data.
        score: Detections below it are not drawn.

    Returns:
        tuple: PNG, and a line of text about it.
    """
    nusc, truth = detections.nusc, detections.truth
    token = max(truth.sample_tokens, key=lambda t: len(truth[t]))

    def shown(found: Detections) -> List[Any]:
        return [b for b in found.predicted[token] if b.detection_score >= score]

    sets = [Set('ground truth', list(truth[token]), '#1a9850', 2.2, '-')]
    if reference is not None:
        sets.append(Set(f'float, score from {score}', shown(reference), '#2b6cd4', 1.5, '-'))
    name = f'{"detected" if reference is None else "quantized"}, score from {score}'
    sets.append(Set(name, shown(detections), '#d73027', 1.5, (0, (3, 2))))

    views = camera_views(nusc, token)
    words = f'sample {token}'
    if not views:
        made, (above,) = charts.panels(8, 8.4)
        words += '; no camera image of it is on disk'
    else:
        made, (image, above) = charts.panels(16.5, 6.5, (1.72, 1))
        counts = [sum(v.corners(b) is not None for b in sets[0].boxes) for v in views]
        best = int(np.argmax(counts))
        _draw_image(image, views[best], sets)
        words += f'; {views[best].channel} sees most objects ({counts[best]} of {len(truth[token])})'
    count = _draw_above(above, nusc, token, sets, views[best] if views else None)
    made.legend(*_legend(sets), loc='outside upper center', ncols=len(sets), fontsize=10, frameon=False)
    return charts.png(made, dpi=100), f'{words}; {count} points.'


def _legend(sets: Sequence[Set]) -> Tuple[List[Any], List[str]]:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=s.colour, linewidth=s.width, linestyle=s.style) for s in sets]
    return lines, [f'{s.name} ({len(s.boxes)})' for s in sets]


def _draw_above(axes: Any, nusc: Any, token: str, sets: Sequence[Set], view: Optional[CameraView]) -> int:
    """Points and boxes in the frame of the LiDAR, and what the camera sees; returns the number of points."""
    from nuscenes.utils.data_classes import LidarPointCloud

    data = nusc.get('sample_data', nusc.get('sample', token)['data']['LIDAR_TOP'])
    position, rotation = _pose(nusc, data)
    points = LidarPointCloud.from_file(str(Path(nusc.dataroot) / data['filename'])).points[:2]
    if view is not None:
        # From the camera along the left and the right border of its image.
        borders = np.array([[0, 0, 1], [view.size[0], 0, 1]]) @ np.linalg.inv(view.intrinsic).T
        ends = view.position + 2.9 * RANGE * (borders * [1, 0, 1]) @ view.rotation.T
        cone = ((np.stack([ends[0], view.position, ends[1]]) - position) @ rotation)[:, :2]
        axes.fill(*cone.T, color='#fff2b3', zorder=0)
        axes.text(0.01, 0.01, f'yellow: seen by {view.channel}', transform=axes.transAxes, fontsize=8)
    axes.scatter(points[0], points[1], s=0.5, c='#888888', linewidths=0, zorder=1)
    for one in sets:
        for box in one.boxes:
            corners = outline(box, position, rotation)
            ahead = np.stack([corners[:4].mean(0), corners[:2].mean(0)])
            for line in (corners, ahead):
                axes.plot(*line.T, color=one.colour, linewidth=0.7 * one.width, linestyle=one.style, zorder=2)
    axes.set(xlim=(-RANGE, RANGE), ylim=(-RANGE, RANGE), aspect='equal')
    axes.set_title('from above; x and y of the LiDAR, m', fontsize=10)
    return points.shape[1]


def _draw_image(axes: Any, view: CameraView, sets: Sequence[Set]) -> None:
    """A camera image with all boxes, and the names of those that there is space for."""
    from PIL import Image

    with Image.open(view.image) as image:
        axes.imshow(np.asarray(image.convert('RGB')), extent=(0, view.size[0], view.size[1], 0))
    seen = []
    for one in sets:
        for box in one.boxes:
            corners = view.corners(box)
            if corners is None:
                continue
            # On the floor, from the middle of the box to that of its front.
            ahead = np.stack([corners[[2, 3, 6, 7]].mean(0), corners[2:4].mean(0)])
            for line in (*(corners[[a, b]] for a, b in EDGES), ahead):
                axes.plot(*line.T, color=one.colour, linewidth=one.width, linestyle=one.style)
            if one is sets[-1]:
                seen.append((corners, f'{box.detection_name} {box.detection_score:.2f}'))
    for x, y, text in _labels(seen, view.size):
        axes.text(
            x, y, text, fontsize=7.5, color='white', va='bottom', clip_on=True,
            bbox={'facecolor': sets[-1].colour, 'edgecolor': 'none', 'alpha': 0.85, 'pad': 1.2},
        )  # fmt: skip
    axes.set(xlim=(0, view.size[0]), ylim=(view.size[1], 0), xticks=[], yticks=[])
    axes.set_title(view.channel, fontsize=10)


def _labels(seen: Sequence[Tuple[np.ndarray, str]], size: Tuple[int, int]) -> List[Tuple[float, float, str]]:
    """Places of labels above their boxes, largest box first; those that would cover another are left out.

    Args:
        seen: Corners (8, 2) in the image, and text.
        size: Width and height of the image, pixels.

    Returns:
        list: Left end and lower edge of each text, and the text.
    """
    letter, height = size[0] / 128, size[0] / 48
    placed: List[Tuple[float, float, float, float]] = []
    out = []
    for corners, text in sorted(seen, key=lambda item: -np.ptp(item[0], axis=0).prod()):
        low = corners.min(0)
        width = letter * len(text) + letter
        x = float(np.clip(low[0], 0, size[0] - width))
        y = float(np.clip(low[1] - 4, height, size[1] - 4))
        here = (x, y - height, x + width, y)
        if all(here[2] < b[0] or b[2] < here[0] or here[3] < b[1] or b[3] < here[1] for b in placed):
            placed.append(here)
            out.append((x, y, text))
    return out
