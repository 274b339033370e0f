"""A small BEVFusion of MMDetection3D: the double of ``projects/BEVFusion``, configs, and a frame.

``checkout_double`` stands for a checkout of MMDetection3D. Its types have the names, attributes and data flow
of the real ones, as far as quantization has to do with them; ``test_upstream_bevfusion_parts.py``
compares both. Backbones and the decoder are the real ones of mmdet and MMDetection3D.
"""

import contextlib
import copy
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from mmdet3d.registry import MODELS, TASK_UTILS, TRANSFORMS
from mmdet3d.structures import Det3DDataSample, LiDARInstance3DBoxes
from mmdet3d.utils import register_all_modules

from q3d_plugin.mmdet3d import parts, projects

DOUBLE = Path(__file__).resolve().parent / 'checkout_double'
REGISTRIES = (MODELS, TASK_UTILS, TRANSFORMS)
VIEWS, IMAGE = 2, (64, 176)
AREA, VOXEL, GRID = [-8.0, -8.0, -3.0, 8.0, 8.0, 1.0], [0.25, 0.25, 0.1], [64, 64, 41]
NORM = dict(type='BN', eps=1e-3, momentum=0.01)

RESNET = dict(
    type='mmdet.ResNet', depth=50, base_channels=4, stem_channels=4, out_indices=(1, 2, 3), norm_eval=False
)
SWIN = dict(
    type='mmdet.SwinTransformer',
    embed_dims=8,
    depths=[2, 2, 2, 2],
    num_heads=[1, 2, 4, 8],
    window_size=4,
    out_indices=(1, 2, 3),
)
BACKBONES = {'resnet': (RESNET, [32, 64, 128]), 'swin': (SWIN, [16, 32, 64])}
HEAD = dict(
    type='TransFusionHead',
    num_proposals=5,
    auxiliary=True,
    in_channels=16,
    hidden_channel=8,
    num_classes=3,
    nms_kernel_size=3,
    bn_momentum=0.1,
    num_decoder_layers=1,
    decoder_layer=dict(
        type='TransformerDecoderLayer',
        self_attn_cfg=dict(embed_dims=8, num_heads=2, dropout=0.1),
        cross_attn_cfg=dict(embed_dims=8, num_heads=2, dropout=0.1),
        ffn_cfg=dict(
            embed_dims=8,
            feedforward_channels=16,
            num_fcs=2,
            ffn_drop=0.1,
            act_cfg=dict(type='ReLU', inplace=True),
        ),
        norm_cfg=dict(type='LN'),
        pos_encoding_cfg=dict(input_channel=2, num_pos_feats=8),
    ),
    train_cfg=None,
    test_cfg=dict(
        dataset='toy',
        grid_size=GRID,
        out_size_factor=8,
        voxel_size=VOXEL[:2],
        pc_range=AREA[:2],
        nms_type=None,
    ),
    common_heads=dict(center=[2, 2], height=[1, 2], dim=[3, 2], rot=[2, 2], vel=[2, 2]),
    bbox_coder=dict(
        type='TransFusionBBoxCoder',
        pc_range=AREA[:2],
        post_center_range=[-20, -20, -10, 20, 20, 10],
        score_threshold=0.0,
        out_size_factor=8,
        voxel_size=VOXEL[:2],
        code_size=10,
    ),
    loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True, reduction='mean'),
    loss_heatmap=dict(type='mmdet.GaussianFocalLoss', reduction='mean'),
    loss_bbox=dict(type='mmdet.L1Loss', reduction='mean'),
)
VIEW = dict(
    type='DepthLSSTransform',
    in_channels=8,
    out_channels=4,
    image_size=IMAGE,
    feature_size=(8, 22),
    xbound=[-8.0, 8.0, 1.0],
    ybound=[-8.0, 8.0, 1.0],
    zbound=[-10.0, 10.0, 20.0],
    dbound=[1.0, 10.0, 1.0],
    downsample=2,
)


def lidar_config():
    """The model with the LiDAR alone."""
    return dict(
        type='BEVFusion',
        data_preprocessor=dict(
            type='Det3DDataPreprocessor',
            voxelize_cfg=dict(
                max_num_points=10,
                point_cloud_range=AREA,
                voxel_size=VOXEL,
                max_voxels=[2000, 2000],
                voxelize_reduce=True,
            ),
        ),
        pts_voxel_encoder=dict(type='HardSimpleVFE', num_features=5),
        pts_middle_encoder=dict(
            type='BEVFusionSparseEncoder',
            in_channels=5,
            sparse_shape=GRID,
            order=('conv', 'norm', 'act'),
            norm_cfg=dict(type='BN1d', eps=0.001, momentum=0.01),
            base_channels=4,
            output_channels=4,
            encoder_channels=((4, 4, 8), (8, 8, 8), (8, 8, 8), (8, 8)),
            encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, (1, 1, 0)), (0, 0)),
            block_type='basicblock',
        ),
        pts_backbone=dict(
            type='SECOND',
            in_channels=8,
            out_channels=[8, 12],
            layer_nums=[1, 1],
            layer_strides=[1, 2],
            norm_cfg=NORM,
        ),
        pts_neck=dict(
            type='SECONDFPN',
            in_channels=[8, 12],
            out_channels=[8, 8],
            upsample_strides=[1, 2],
            norm_cfg=NORM,
            upsample_cfg=dict(type='deconv', bias=False),
            use_conv_for_no_stride=True,
        ),
        bbox_head=copy.deepcopy(HEAD),
    )


def fusion_config(backbone='resnet', view='DepthLSSTransform'):
    """The model with cameras and LiDAR.

    Args:
        backbone: A key of :data:`BACKBONES`.
        view: The type of the view transform.
    """
    image, channels = copy.deepcopy(BACKBONES[backbone])
    cfg = lidar_config()
    cfg['data_preprocessor'].update(mean=[123.0, 116.0, 103.0], std=[58.0, 57.0, 57.0], bgr_to_rgb=False)
    cfg.update(
        img_backbone=image,
        img_neck=dict(
            type='GeneralizedLSSFPN',
            in_channels=channels,
            out_channels=8,
            start_level=0,
            num_outs=3,
            norm_cfg=dict(type='BN2d', requires_grad=True),
            act_cfg=dict(type='ReLU', inplace=True),
            upsample_cfg=dict(mode='bilinear', align_corners=False),
        ),
        view_transform={**copy.deepcopy(VIEW), 'type': view},
        fusion_layer=dict(type='ConvFuser', in_channels=[4, 8], out_channels=8),
    )
    return cfg


def frame(views=VIEWS, image=IMAGE, seed=0):
    """A batch of one frame: points, and images of cameras that look to the front and to the back."""
    draw = torch.Generator().manual_seed(seed)
    points = (torch.rand(3000, 5, generator=draw) - 0.5) * torch.tensor([15.0, 15.0, 3.5, 1.0, 0.1])
    points[:, 2] -= 1
    height, width = image
    intrinsics = np.eye(4)
    intrinsics[0, 0] = intrinsics[1, 1] = width / 2
    intrinsics[0, 2], intrinsics[1, 2] = width / 2, height / 2
    to_camera = []
    for side in [1.0, -1.0] * views:
        turned = np.array([[0, -side, 0, 0], [0, 0, -1, 0], [side, 0, 0, 0], [0, 0, 0, 1.0]])
        to_camera.append(turned)
    sample = Det3DDataSample()
    sample.set_metainfo(
        dict(
            lidar2img=[intrinsics @ m for m in to_camera[:views]],
            cam2img=[intrinsics] * views,
            cam2lidar=[np.linalg.inv(m) for m in to_camera[:views]],
            img_aug_matrix=[np.eye(4)] * views,
            lidar_aug_matrix=np.eye(4),
            box_type_3d=LiDARInstance3DBoxes,
        )
    )
    images = torch.randint(0, 256, (views, 3, height, width), generator=draw).float()
    return {'inputs': {'points': [points], 'img': [images]}, 'data_samples': [sample]}


def raw_outputs(model, batch):
    """What the head of a model predicts for :func:`frame`, by name; one without cameras gets points alone."""
    batch = {**batch, 'inputs': dict(batch['inputs'])}
    if model.img_backbone is None:
        batch['inputs'].pop('img', None)
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    metas = [sample.metainfo for sample in data['data_samples']]
    with torch.no_grad():
        (found,) = model.bbox_head(model.extract_feat(data['inputs'], metas), metas)
    return found[0]


def _of_projects(name):
    return name == 'projects' or name.startswith('projects.')


def _take_types():
    """Takes the types of ``projects`` and their Quant types out of the registries."""
    ours = {parts.quant_name(part.base) for part in parts.PARTS if part.project}
    taken = []
    for modules in (registry.module_dict for registry in REGISTRIES):
        names = [n for n, cls in modules.items() if n in ours or _of_projects(cls.__module__)]
        taken.append({name: modules.pop(name) for name in names})
    return taken


@contextlib.contextmanager
def checkout(root=DOUBLE, registered=True):
    """BEVFusion is that of a checkout inside, and nothing of it is left afterwards.

    Args:
        root: The checkout.
        registered: Whether the plugin's types are registered before anything is imported.
    """
    register_all_modules()
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_projects(name)}
    path, callbacks, types = list(sys.path), list(projects._callbacks), _take_types()
    sys.path[:] = [p for p in path if not (Path(p or '.') / 'projects' / 'BEVFusion').is_dir()]
    projects._callbacks.clear()
    try:
        with mock.patch.dict(os.environ, MMDET3D_ROOT=str(root)):
            projects.prepare_bevfusion()
            if registered:
                parts.register_parts()
            yield
    finally:
        for name in [n for n in sys.modules if _of_projects(n)]:
            del sys.modules[name]
        sys.modules.update(loaded)
        sys.path[:], projects._callbacks[:] = path, callbacks
        _take_types()
        for registry, found in zip(REGISTRIES, types):
            registry.module_dict.update(found)
