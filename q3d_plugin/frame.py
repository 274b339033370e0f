"""A single frame outside of a data set: the points of a LiDAR and, in a folder, the images of its cameras."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from q3d_plugin import safe_load
from q3d_plugin.errors import Q3DError

__all__ = ['Camera', 'Frame', 'read_frame', 'square']

LAYOUT = (
    "one LiDAR file (*.bin), the cameras' images, and one info file (*.pkl) as MMDetection3D writes it, with "
    'cam2img and lidar2cam of each image'
)
"""What a folder of a frame holds."""


@dataclass(frozen=True)
class Camera:
    """One camera of a frame.

    Attributes:
        name: Its channel, such as ``'CAM_FRONT'``.
        image: The file of its image.
        intrinsic: (3, 3), from the camera's frame (x right, y down, z ahead, metres) to pixels.
        from_lidar: (4, 4), from the LiDAR's frame to the camera's.
    """

    name: str
    image: Path
    intrinsic: np.ndarray
    from_lidar: np.ndarray


@dataclass(frozen=True)
class Frame:
    """What the sensors of a vehicle saw at one moment.

    Attributes:
        points: (N, 5) float32: x, y, z in metres, intensity, time lag.
        lidar: The file of the points: float32 ``x y z intensity ring``.
        cameras: In the order in which detectors get them; none where the frame is points alone.
    """

    points: np.ndarray
    lidar: Path
    cameras: Tuple[Camera, ...] = ()


def read_frame(path: str) -> Frame:
    """A recorded frame of nuScenes.

    Args:
        path: A LiDAR file of float32 ``x y z intensity ring``, or a folder with the cameras' images, too.

    Raises:
        Q3DError: A file is missing, or is not what it should be.
    """
    place = Path(path)
    if not place.is_dir():
        return Frame(_points(place), place)
    lidar, infos = _only(place, '*.bin'), _only(place, '*.pkl')
    return Frame(_points(lidar), lidar, tuple(_cameras(place, lidar, infos)))


def square(matrix: Any) -> np.ndarray:
    """A matrix of at most 4 x 4 as the corner of a unit matrix (4, 4).

    Examples:
        >>> square([[2.0]])[0].tolist()
        [2.0, 0.0, 0.0, 0.0]
    """
    given, out = np.asarray(matrix, float), np.eye(4)
    out[: given.shape[0], : given.shape[1]] = given
    return out


def _points(path: Path) -> np.ndarray:
    """The points of a file with the time lag 0 in place of the ring, as pipelines feed a keyframe."""
    if not path.is_file():
        raise Q3DError(f'frame {str(path)!r} is not a file')
    size = path.stat().st_size
    if size == 0 or size % 20:
        raise Q3DError(
            f'frame {str(path)!r} has {size} bytes, which is not a whole number of points of 5 float32 '
            '(x y z intensity ring)'
        )
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
    if not np.isfinite(points).all():
        raise Q3DError(
            f'frame {str(path)!r} holds NaN or Inf: its points have to be float32 x y z intensity ring'
        )
    points[:, 4] = 0
    return points


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Q3DError(f'frame {str(folder)!r} has {len(found)} files {pattern}; {LAYOUT} would work')
    return found[0]


def _cameras(folder: Path, lidar: Path, infos: Path) -> List[Camera]:
    """The cameras of the frame of an info file that has the LiDAR file of the folder."""
    info, cameras = _info_of(infos, lidar), []
    for name, given in info['images'].items():
        image = folder / Path(given.get('img_path') or f'{name}.jpg').name
        if not image.is_file():
            raise Q3DError(f'frame {str(folder)!r}: the image of {name}, {image.name!r}, is not there')
        matrices = [np.asarray(given.get(key, ()), float) for key in ('cam2img', 'lidar2cam')]
        if any(m.ndim != 2 or min(m.shape) < 3 or not np.isfinite(m).all() for m in matrices):
            raise Q3DError(
                f'frame {str(infos)!r}: {name} has no cam2img or no lidar2cam; {LAYOUT} would work'
            )
        cameras.append(Camera(name, image, square(matrices[0])[:3, :3], square(matrices[1])))
    return cameras


def _info_of(path: Path, lidar: Path) -> Dict[str, Any]:
    """The entry of an info file for a LiDAR file."""
    try:
        content = safe_load.load_plain(path)
        entries = list(content['data_list'])
        names = [Path(entry['lidar_points']['lidar_path']).name for entry in entries]
        info = entries[names.index(lidar.name)]
        if not info['images']:
            raise KeyError('images')
    except Exception as error:  # whatever a damaged pickle can raise
        raise Q3DError(
            f'frame {str(path)!r} is no info file with images for {lidar.name!r} '
            f'({type(error).__name__}: {error}); {LAYOUT} would work'
        ) from error
    return info
