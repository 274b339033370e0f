"""BEVFusion for the toy nuScenes: the module types and topology of the full-size config, but narrow.

Cameras and LiDAR are both needed: in the toy data's profile ``look-alikes`` three pairs of classes differ by
their colours alone. Made and trained on two CPU cores, by one process each, with

    export MMDET3D_ROOT=CHECKOUT_OF_MMDETECTION3D OMP_NUM_THREADS=1
    q3d toy-data --out data/toy_nuscenes_look_alikes --profile look-alikes
    torchrun --nproc_per_node=2 -m q3d_plugin train configs/mmdet3d/toy_bevfusion.py --launcher pytorch
    q3d strip-checkpoint work_dirs/toy_bevfusion/epoch_16.pth configs/mmdet3d/toy_bevfusion.pth
"""

# BEVFusion's configs are in no wheel: their folder is found below MMDET3D_ROOT.
_base_ = __import__('q3d_plugin.mmdet3d.projects', fromlist=['_']).upstream_config(
    'bevfusion_lidar-cam_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d'
)
# In this order: the plugin makes BEVFusion's import work without its compiled operators.
custom_imports = dict(imports=['q3d_plugin.mmdet3d', 'projects.BEVFusion.bevfusion'])

voxel_size = [0.2, 0.2, 0.2]
point_cloud_range = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
grid_size = [512, 512, 41]
image_size = [96, 256]
class_names = [
    'car', 'truck', 'construction_vehicle', 'bus', 'trailer', 'barrier',
    'motorcycle', 'bicycle', 'pedestrian', 'traffic_cone'
]  # yapf: disable

model = dict(
    data_preprocessor=dict(
        voxelize_cfg=dict(
            voxel_size=voxel_size, point_cloud_range=point_cloud_range, max_voxels=[30000, 40000]
        )
    ),
    img_backbone=dict(
        _delete_=True,
        type='mmdet.ResNet',
        depth=18,
        base_channels=16,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
    ),
    img_neck=dict(in_channels=[32, 64, 128], out_channels=48),
    view_transform=dict(
        in_channels=48,
        out_channels=24,
        image_size=image_size,
        feature_size=[12, 32],
        xbound=[-51.2, 51.2, 0.8],
        ybound=[-51.2, 51.2, 0.8],
        dbound=[1.0, 55.0, 1.5],
    ),
    pts_middle_encoder=dict(
        sparse_shape=grid_size,
        base_channels=8,
        output_channels=32,
        encoder_channels=((8, 16), (16, 24), (24, 32), (32,)),
        encoder_paddings=((0, 1), (0, 1), (0, (1, 1, 0)), (0,)),
    ),
    fusion_layer=dict(in_channels=[24, 64], out_channels=64),
    pts_backbone=dict(in_channels=64, out_channels=[48, 80], layer_nums=[3, 3]),
    pts_neck=dict(in_channels=[48, 80], out_channels=[64, 64]),
    bbox_head=dict(
        num_proposals=150,
        in_channels=128,
        hidden_channel=64,
        decoder_layer=dict(
            self_attn_cfg=dict(embed_dims=64, num_heads=4, dropout=0.0),
            cross_attn_cfg=dict(embed_dims=64, num_heads=4, dropout=0.0),
            ffn_cfg=dict(embed_dims=64, feedforward_channels=128, ffn_drop=0.0),
            pos_encoding_cfg=dict(num_pos_feats=64),
        ),
        train_cfg=dict(grid_size=grid_size, voxel_size=voxel_size, point_cloud_range=point_cloud_range),
        test_cfg=dict(grid_size=grid_size, voxel_size=voxel_size[:2], pc_range=point_cloud_range[:2]),
        bbox_coder=dict(voxel_size=voxel_size[:2], pc_range=point_cloud_range[:2]),
    ),
)

data_root = 'data/toy_nuscenes_look_alikes/'
# NuScenesMetric takes the version from here: v1.0-trainval where none is named.
metainfo = dict(classes=class_names, version='v1.0-mini')
load_data = [
    dict(type='BEVLoadMultiViewImageFromFiles', to_float32=True, color_type='color'),
    dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=5, use_dim=5),
    # The toy set has one sweep between two keyframes; test_mode takes the nearest instead of a random one.
    dict(
        type='LoadPointsFromMultiSweeps',
        sweeps_num=1,
        load_dim=5,
        use_dim=5,
        pad_empty_sweeps=True,
        remove_close=True,
        test_mode=True,
    ),
]
meta_keys = [
    'cam2img', 'ori_cam2img', 'lidar2cam', 'lidar2img', 'cam2lidar', 'ori_lidar2img', 'img_aug_matrix',
    'box_type_3d', 'sample_idx', 'lidar_path', 'img_path', 'lidar_aug_matrix', 'num_pts_feats'
]  # yapf: disable
train_pipeline = [
    *load_data,
    dict(type='LoadAnnotations3D', with_bbox_3d=True, with_label_3d=True, with_attr_label=False),
    dict(
        type='ImageAug3D',
        final_dim=image_size,
        resize_lim=[0.64, 0.76],
        bot_pct_lim=[0.0, 0.0],
        rot_lim=[-5.4, 5.4],
        rand_flip=True,
        is_train=True,
    ),
    dict(
        type='BEVFusionGlobalRotScaleTrans',
        scale_ratio_range=[0.95, 1.05],
        rot_range=[-0.785, 0.785],
        translation_std=0.0,
    ),
    dict(type='BEVFusionRandomFlip3D'),
    dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='ObjectRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='ObjectNameFilter', classes=class_names),
    dict(type='PointShuffle'),
    dict(type='Pack3DDetInputs', keys=['points', 'img', 'gt_bboxes_3d', 'gt_labels_3d'], meta_keys=meta_keys),
]
test_pipeline = [
    *load_data,
    dict(
        type='ImageAug3D',
        final_dim=image_size,
        resize_lim=[0.64, 0.64],
        bot_pct_lim=[0.0, 0.0],
        rot_lim=[0.0, 0.0],
        rand_flip=False,
        is_train=False,
    ),
    dict(type='PointsRangeFilter', point_cloud_range=point_cloud_range),
    # Nothing is blanked unless an option says so: test_dataloader.dataset.pipeline.5.sensor=cameras (or lidar).
    dict(type='BlankSensor', sensor='none'),
    dict(type='Pack3DDetInputs', keys=['img', 'points'], meta_keys=meta_keys),
]
dataset = dict(
    type='NuScenesDataset',
    data_root=data_root,
    metainfo=metainfo,
    modality=dict(use_lidar=True, use_camera=True),
    data_prefix=dict(
        pts='samples/LIDAR_TOP',
        CAM_FRONT='samples/CAM_FRONT',
        CAM_FRONT_LEFT='samples/CAM_FRONT_LEFT',
        CAM_FRONT_RIGHT='samples/CAM_FRONT_RIGHT',
        CAM_BACK='samples/CAM_BACK',
        CAM_BACK_RIGHT='samples/CAM_BACK_RIGHT',
        CAM_BACK_LEFT='samples/CAM_BACK_LEFT',
        sweeps='sweeps/LIDAR_TOP',
    ),
    box_type_3d='LiDAR',
)
train_dataloader = dict(
    _delete_=True,
    batch_size=1,  # of each of two processes
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

epochs = 16
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
