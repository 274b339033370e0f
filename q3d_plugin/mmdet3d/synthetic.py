"""A generated frame for any detector of MMDetection3D: points, images and metadata that its config names."""

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import torch
from mmdet3d.structures import Det3DDataSample, get_box_type
from torch import nn

from q3d_plugin.mmdet3d.frames import packed_keys, pipeline_of, steps_of
from q3d_plugin.synthetic import POINTS, camera_ring, synthetic_points

__all__ = ['synthetic_frame']

INDOOR_POINTS = 4096
IMAGE = (256, 512)
"""Height and width of images."""
VIEWS, RING = 5, 6
"""Cameras of a frame with several: that all look ahead, or around for a view transform."""


def synthetic_frame(cfg: Any, model: nn.Module) -> Dict[str, Any]:
    """A frame as the loader of a config's test set would give it.

    Args:
        cfg: A config with ``test_pipeline`` or ``test_dataloader``.
        model: Its model.

    Returns:
        dict: ``inputs`` and ``data_samples`` of a batch of one frame.
    """
    steps, packed = list(steps_of(pipeline_of(cfg))), packed_keys(cfg)
    inputs, views, size = {}, 0, _image_size(steps)
    around = getattr(model, 'view_transform', None) is not None
    if 'points' in packed:
        inputs['points'] = [torch.from_numpy(_points(cfg, model, steps))]
    if 'img' in packed:
        views = (RING if around else VIEWS) if any('MultiView' in s['type'] for s in steps) else 0
        generator = torch.Generator().manual_seed(0)
        shape = (views, 3, *size) if views else (3, *size)
        inputs['img'] = [torch.randint(0, 256, shape, generator=generator).float()]
    coordinates = next((s['coord_type'] for s in steps if 'coord_type' in s), None)
    coordinates = coordinates or ('CAMERA' if not hasattr(model, 'neck_3d') else 'LIDAR')
    info = _metainfo(*get_box_type(coordinates.title()), views, size)
    if around and views:
        info.update(_looking_around(size))
    return {'inputs': inputs, 'data_samples': [Det3DDataSample(metainfo=info)]}


def _image_size(steps: List[Dict]) -> Tuple[int, int]:
    """Height and width that the pipeline gives to images, where a step says it."""
    named = next((s['final_dim'] for s in steps if 'final_dim' in s), IMAGE)
    return tuple(int(n) for n in named)


def _looking_around(size: Sequence[int]) -> Dict[str, Any]:
    """What BEVFusion's pipeline writes about six cameras around the vehicle, whose images are not scaled."""
    ring = camera_ring(size, RING)
    return {
        'cam2img': ring.intrinsics,
        'ori_cam2img': ring.intrinsics,
        'lidar2cam': ring.lidar2cam,
        'cam2lidar': ring.cam2lidar,
        'lidar2img': ring.lidar2img,
        'ori_lidar2img': ring.lidar2img,
        'img_aug_matrix': np.tile(np.eye(4, dtype=np.float32), (RING, 1, 1)),
        'lidar_aug_matrix': np.eye(4, dtype=np.float32),
    }


def _points(cfg: Any, model: nn.Module, steps: List[Dict]) -> np.ndarray:
    """Points of as many channels as the pipeline loads, in the area that the model looks at."""
    loader = next((s for s in steps if s['type'] == 'LoadPointsFromFile'), {})
    layer = getattr(model.data_preprocessor, 'voxel_layer', None)
    area = getattr(layer, 'point_cloud_range', None) or cfg.get('point_cloud_range')
    indoor = loader.get('coord_type') == 'DEPTH'
    area = area or ([-3, -3, -0.5, 3, 3, 2.5] if indoor else [0, -40, -3, 70, 40, 1])
    dims = loader.get('use_dim', 4)
    sweeps = next((s for s in steps if s['type'] == 'LoadPointsFromMultiSweeps'), None)
    if sweeps is not None:
        dims = sweeps.get('use_dim', [0, 1, 2, 4])
    channels = (dims if isinstance(dims, int) else len(dims)) + bool(loader.get('shift_height'))
    backbone = getattr(model, 'backbone', None)
    if 'PointNet' in type(backbone).__name__ or 'DGCNN' in type(backbone).__name__:
        channels = getattr(backbone, 'in_channels', channels)
    # The first six numbers of a cylinder are radius, angle and height.
    if 'Cylinder' in type(model).__name__:
        area = [-30, -30, -4, 30, 30, 2]
    return synthetic_points(area, max(channels, 3), INDOOR_POINTS if indoor else POINTS)


def _metainfo(box_type, box_mode, views: int, size: Tuple[int, int]) -> Dict[str, Any]:
    """All that the pipelines write about a frame, for one camera that looks ahead, or for several that do."""
    height, width = size
    cam2img = np.array([[width, 0, width / 2, 0], [0, width, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    lidar2cam = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    depth2cam = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    lidar2img = (cam2img @ lidar2cam).astype(np.float32)
    info = {
        'box_type_3d': box_type,
        'box_mode_3d': box_mode,
        'cam2img': cam2img.astype(np.float32).tolist(),
        'ori_cam2img': cam2img.astype(np.float32).tolist(),
        'lidar2cam': lidar2cam.astype(np.float32),
        'lidar2img': lidar2img,
        'ori_lidar2img': lidar2img,
        'depth2img': (cam2img[:3, :3] @ depth2cam).astype(np.float32),
        'trans_mat': np.array([[0.25, 0, 0], [0, 0.25, 0], [0, 0, 1]], np.float32),
        'affine_aug': False,
        'img_shape': size,
        'ori_shape': size,
        'pad_shape': size,
        'input_shape': size,
        'batch_input_shape': size,
        'scale_factor': np.ones(4, np.float32),
        'flip': False,
        'sample_idx': 0,
        'lidar_path': 'frame.bin',
    }
    if views:
        for key in ('lidar2cam', 'lidar2img', 'ori_cam2img', 'ori_lidar2img', 'scale_factor', 'flip'):
            info[key] = [info[key]] * views
        info.update(num_views=views, num_ref_frames=0)
    return info
