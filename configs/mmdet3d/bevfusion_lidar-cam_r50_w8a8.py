"""Full-size BEVFusion on nuScenes, cameras (ResNet50) and LiDAR, in INT8: the config with Swin-T, with the image
backbone of NVIDIA's CUDA-BEVFusion.

q3d test configs/mmdet3d/bevfusion_lidar-cam_r50_w8a8.py FLOAT_CHECKPOINT.pth
"""

_base_ = './bevfusion_lidar-cam_swint_w8a8.py'

model = dict(
    img_backbone=dict(
        _delete_=True,
        type='QuantResNet',
        depth=50,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        style='pytorch',
    ),
    img_neck=dict(in_channels=[512, 1024, 2048]),
)
