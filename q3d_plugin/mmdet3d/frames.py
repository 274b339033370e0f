"""A single frame with cameras as a config's own test pipeline prepares it."""

import copy
from collections.abc import Iterator
from typing import Any, Dict, List, Set

from mmdet3d.structures import get_box_type
from mmengine.dataset import Compose, pseudo_collate

from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Frame

__all__ = ['frame_inputs', 'packed_keys', 'pipeline_of', 'steps_of']


def pipeline_of(cfg: Any) -> List[Dict]:
    """The steps that prepare a frame for testing; none where the config has no data."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    return dataset.get('pipeline') or cfg.get('test_pipeline') or []


def steps_of(pipeline: List[Dict]) -> Iterator[Dict]:
    """The steps of a pipeline, those inside of others behind them."""
    for step in pipeline:
        yield step
        yield from steps_of(step.get('transforms', ()))


def packed_keys(cfg: Any) -> Set[str]:
    """The inputs that a config's pipeline packs, such as ``'points'`` and ``'img'``.

    BEVFusion's LiDAR pipeline also names images, which no step of it loads.
    """
    steps = list(steps_of(pipeline_of(cfg)))
    packed = {k for s in steps if s['type'].endswith('Pack3DDetInputs') for k in s['keys']}
    loaded = any('Load' in s['type'] and 'Image' in s['type'] for s in steps)
    return packed if loaded else packed - {'img'}


def frame_inputs(cfg: Any, frame: Frame) -> Dict[str, Any]:
    """What the loader of a config's test set would give for a frame.

    Sweeps before it are not there, and not made up by repeating its points.

    Args:
        cfg: A config whose pipeline loads the images of several cameras.
        frame: With cameras.

    Returns:
        dict: ``inputs`` and ``data_samples`` of a batch of one frame.

    Raises:
        Q3DError: The pipeline reads the image of one camera.
    """
    pipeline = copy.deepcopy(list(pipeline_of(cfg)))
    if not any('MultiView' in s['type'] for s in steps_of(pipeline)):
        raise Q3DError(
            f'frame {str(frame.lidar.parent)!r}: the test pipeline of the config reads the image of one '
            'camera in the layout of another data set; a detector of nuScenes would work'
        )
    for step in steps_of(pipeline):
        if step['type'].endswith('LoadPointsFromMultiSweeps'):
            step['pad_empty_sweeps'] = False
    box_type, box_mode = get_box_type('LiDAR')
    images = {
        c.name: {
            'img_path': str(c.image),
            'cam2img': c.intrinsic.tolist(),
            'lidar2cam': c.from_lidar.tolist(),
        }
        for c in frame.cameras
    }
    info = {
        'sample_idx': 0,
        'timestamp': 0.0,
        'lidar_points': {'lidar_path': str(frame.lidar), 'num_pts_feats': 5},
        'lidar_path': str(frame.lidar),
        'num_pts_feats': 5,
        'images': images,
        'box_type_3d': box_type,
        'box_mode_3d': box_mode,
    }
    return pseudo_collate([Compose(pipeline)(info)])
