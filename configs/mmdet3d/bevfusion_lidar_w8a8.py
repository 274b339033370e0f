"""Full-size BEVFusion on nuScenes with the LiDAR alone in INT8: MMDetection3D's own config of projects/BEVFusion
plus the quantization lines. MMDET3D_ROOT names a source checkout of MMDetection3D.

q3d test configs/mmdet3d/bevfusion_lidar_w8a8.py FLOAT_CHECKPOINT.pth
"""

_base_ = __import__('q3d_plugin.mmdet3d.projects', fromlist=['_']).upstream_config(
    'bevfusion_lidar_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d'
)
custom_imports = dict(imports=['q3d_plugin.mmdet3d', 'projects.BEVFusion.bevfusion'])

model = dict(
    type='QuantBEVFusion',
    pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    bbox_head=dict(type='QuantTransFusionHead'),
)
recipe = dict(mode='ptq', target='tensorrt', calibration=dict(split='train', frames=300))
custom_hooks = [dict(type='QuantHook', recipe=recipe)]
