"""A single frame with cameras, read and prepared by OpenPCDet's own nuScenes data set.

:func:`q3d_plugin.openpcdet.register` has to be called before this module is imported.
"""

import copy
import logging
from typing import Any, Dict, List, Tuple

import numpy as np
from pcdet import datasets

from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Frame

__all__ = ['frame_item']

DATASET = 'NuScenesDataset'


def frame_item(dataset_cfg: Any, class_names: List[str], frame: Frame) -> Tuple[Any, Dict[str, Any]]:
    """A data set that consists of one frame, and that frame as it prepares it for testing.

    Args:
        dataset_cfg: ``DATA_CONFIG`` of a detector of nuScenes that reads images; not changed.
        class_names: Names of the classes.
        frame: With cameras. Sweeps before it are not there.

    Raises:
        Q3DError: The config is of another data set.
    """
    if dataset_cfg.DATASET != DATASET:
        raise Q3DError(
            f'frame {str(frame.lidar.parent)!r}: it has the cameras of nuScenes, and DATA_CONFIG.DATASET is '
            f'{dataset_cfg.DATASET!r}; a config of {DATASET!r} would work'
        )
    cfg = copy.deepcopy(dataset_cfg)
    cfg.MAX_SWEEPS, cfg.INFO_PATH = 1, {'train': [], 'test': []}
    cfg.VERSION = ''  # the data set looks for files below its root and this
    folder = frame.lidar.parent.absolute()
    dataset = getattr(datasets, DATASET)(
        dataset_cfg=cfg, class_names=class_names, training=False, root_path=folder,
        logger=logging.getLogger('q3d_plugin.openpcdet'),
    )  # fmt: skip
    dataset.infos.append(_info(frame))
    return dataset, dataset[0]


def _info(frame: Frame) -> Dict[str, Any]:
    """A frame as OpenPCDet's info files describe it."""
    cameras = {}
    for camera in frame.cameras:
        to_lidar = np.linalg.inv(camera.from_lidar)
        cameras[camera.name] = {
            'data_path': str(camera.image.absolute()),
            'camera_intrinsics': camera.intrinsic,
            'sensor2lidar_rotation': to_lidar[:3, :3],
            'sensor2lidar_translation': to_lidar[:3, 3],
            # Where the cameras sit on the vehicle is read, and used by no detector.
            'sensor2ego_rotation': [1.0, 0.0, 0.0, 0.0],
            'sensor2ego_translation': to_lidar[:3, 3],
        }
    return {'lidar_path': str(frame.lidar.absolute()), 'token': 'frame', 'sweeps': [], 'cams': cameras}
