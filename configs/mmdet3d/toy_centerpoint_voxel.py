"""CenterPoint-Voxel for the toy nuScenes: the module types and topology of the full-size config, but narrow.

Trained on two CPU cores by

    q3d train configs/mmdet3d/toy_centerpoint_voxel.py

A user with the real nuScenes changes ``data_root``.
"""

_base_ = 'mmdet3d::centerpoint/centerpoint_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d.py'
custom_imports = dict(imports=['q3d_plugin.mmdet3d'])

voxel_size = [0.2, 0.2, 0.2]
point_cloud_range = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
grid_size = [512, 512, 40]
class_names = [
    'car', 'truck', 'construction_vehicle', 'bus', 'trailer', 'barrier',
    'motorcycle', 'bicycle', 'pedestrian', 'traffic_cone'
]  # yapf: disable

model = dict(
    data_preprocessor=dict(
        voxel_layer=dict(
            voxel_size=voxel_size, point_cloud_range=point_cloud_range, max_voxels=(30000, 40000)
        )
    ),
    pts_middle_encoder=dict(
        sparse_shape=[41, 512, 512],
        base_channels=8,
        output_channels=32,
        encoder_channels=((8, 8, 16), (16, 16, 24), (24, 24, 32), (32, 32)),
    ),
    pts_backbone=dict(in_channels=64, out_channels=[48, 80]),
    pts_neck=dict(in_channels=[48, 80], out_channels=[64, 64]),
    pts_bbox_head=dict(
        in_channels=128,
        share_conv_channel=32,
        separate_head=dict(type='SeparateHead', init_bias=-2.19, final_kernel=3, head_conv=24),
        bbox_coder=dict(voxel_size=voxel_size[:2], pc_range=point_cloud_range[:2]),
    ),
    train_cfg=dict(pts=dict(grid_size=grid_size, voxel_size=voxel_size, point_cloud_range=point_cloud_range)),
    test_cfg=dict(pts=dict(voxel_size=voxel_size[:2], pc_range=point_cloud_range[:2])),
)

data_root = 'data/toy_nuscenes/'
# NuScenesMetric takes the version from here: v1.0-trainval where none is named.
metainfo = dict(classes=class_names, version='v1.0-mini')
load_points = [
    dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=5, use_dim=5),
    # The toy set has one sweep between two keyframes; test_mode takes the nearest instead of a random one.
    dict(
        type='LoadPointsFromMultiSweeps',
        sweeps_num=1,
        use_dim=[0, 1, 2, 3, 4],
        pad_empty_sweeps=True,
        remove_close=True,
        test_mode=True,
    ),
]
train_pipeline = [
    *load_points,
    dict(type='LoadAnnotations3D', with_bbox_3d=True, with_label_3d=True),
    dict(
        type='GlobalRotScaleTrans',
        rot_range=[-0.785, 0.785],
        scale_ratio_range=[0.95, 1.05],
        translation_std=[0, 0, 0],
    ),
    dict(type='RandomFlip3D', sync_2d=False, flip_ratio_bev_horizontal=0.5, flip_ratio_bev_vertical=0.5),
    dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='ObjectRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='ObjectNameFilter', classes=class_names),
    dict(type='PointShuffle'),
    dict(type='Pack3DDetInputs', keys=['points', 'gt_bboxes_3d', 'gt_labels_3d']),
]
test_pipeline = [
    *load_points,
    dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='Pack3DDetInputs', keys=['points']),
]
dataset = dict(
    type='NuScenesDataset',
    data_root=data_root,
    metainfo=metainfo,
    modality=dict(use_lidar=True, use_camera=False),
    data_prefix=dict(pts='samples/LIDAR_TOP', img='', sweeps='sweeps/LIDAR_TOP'),
    box_type_3d='LiDAR',
)
train_dataloader = dict(
    _delete_=True,
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **dataset,
        ann_file='nuscenes_infos_train.pkl',
        pipeline=train_pipeline,
        test_mode=False,
        use_valid_flag=True,
    ),
)
val_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, ann_file='nuscenes_infos_val.pkl', pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(data_root=data_root, ann_file=data_root + 'nuscenes_infos_val.pkl')
test_evaluator = val_evaluator

# The cyclic shape of the full-size config, with a higher peak: 256 frames make few iterations.
epochs = 14
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(
        type='OneCycleLR',
        eta_max=2e-3,
        pct_start=0.3,
        total_steps=epochs,
        by_epoch=True,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=32),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
)
env_cfg = dict(dist_cfg=dict(backend='gloo'))
randomness = dict(seed=0)
