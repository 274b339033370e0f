"""What the real config of this name has that the plugin's configs change or rely on."""

_base_ = ['./bevfusion_lidar_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d.py']
model = dict(
    img_backbone=dict(type='mmdet.SwinTransformer', embed_dims=96, init_cfg=dict(type='Pretrained')),
    img_neck=dict(type='GeneralizedLSSFPN', in_channels=[192, 384, 768], out_channels=256),
    view_transform=dict(type='DepthLSSTransform', in_channels=256),
    fusion_layer=dict(type='ConvFuser', in_channels=[80, 256], out_channels=256),
)
del _base_.custom_hooks
