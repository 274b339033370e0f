"""Full-size BEVFusion on nuScenes, cameras (Swin-T) and LiDAR, in INT8: MMDetection3D's own config of
projects/BEVFusion plus the quantization lines. MMDET3D_ROOT names a source checkout of MMDetection3D.

q3d test configs/mmdet3d/bevfusion_lidar-cam_swint_w8a8.py FLOAT_CHECKPOINT.pth
"""

_base_ = __import__('q3d_plugin.mmdet3d.projects', fromlist=['_']).upstream_config(
    'bevfusion_lidar-cam_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d'
)
custom_imports = dict(imports=['q3d_plugin.mmdet3d', 'projects.BEVFusion.bevfusion'])

model = dict(
    type='QuantBEVFusion',
    # All weights come from the checkpoint: nothing is to be downloaded when the model is built.
    img_backbone=dict(type='QuantSwinTransformer', init_cfg=None),
    img_neck=dict(type='QuantGeneralizedLSSFPN'),
    view_transform=dict(type='QuantDepthLSSTransform'),
    fusion_layer=dict(type='QuantConvFuser'),
    pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    bbox_head=dict(type='QuantTransFusionHead'),
)
recipe = dict(mode='ptq', target='tensorrt', calibration=dict(split='train', frames=300))
custom_hooks = [dict(type='QuantHook', recipe=recipe)]
