"""The toy CenterPoint-Voxel in INT8: the float config plus the quantization lines.

q3d test configs/mmdet3d/toy_centerpoint_voxel_w8a8.py FLOAT_CHECKPOINT.pth
"""

_base_ = './toy_centerpoint_voxel.py'

model = dict(
    pts_middle_encoder=dict(type='QuantSparseEncoder'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    pts_bbox_head=dict(type='QuantCenterHead'),
)
recipe = dict(mode='ptq', target='tensorrt', calibration=dict(split='train', frames=64))
custom_hooks = [dict(type='QuantHook', recipe=recipe)]
