"""Full-size CenterPoint-Voxel 0.075 m on nuScenes in INT8: MMDetection3D's own config plus the quantization lines.

q3d test configs/mmdet3d/centerpoint_voxel0075_second_secfpn_nus_w8a8.py FLOAT_CHECKPOINT.pth
"""

_base_ = 'mmdet3d::centerpoint/centerpoint_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d.py'
custom_imports = dict(imports=['q3d_plugin.mmdet3d'])

model = dict(
    pts_middle_encoder=dict(type='QuantSparseEncoder'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    pts_bbox_head=dict(type='QuantCenterHead'),
)
recipe = dict(mode='ptq', target='tensorrt', calibration=dict(split='train', frames=300))
custom_hooks = [dict(type='QuantHook', recipe=recipe)]
