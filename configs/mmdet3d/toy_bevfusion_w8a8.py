"""The toy BEVFusion in INT8: the float config plus the quantization lines.

q3d test configs/mmdet3d/toy_bevfusion_w8a8.py configs/mmdet3d/toy_bevfusion.pth
"""

_base_ = './toy_bevfusion.py'

model = dict(
    type='QuantBEVFusion',
    img_backbone=dict(type='QuantResNet'),
    img_neck=dict(type='QuantGeneralizedLSSFPN'),
    view_transform=dict(type='QuantDepthLSSTransform'),
    pts_middle_encoder=dict(type='QuantBEVFusionSparseEncoder'),
    fusion_layer=dict(type='QuantConvFuser'),
    pts_backbone=dict(type='QuantSECOND'),
    pts_neck=dict(type='QuantSECONDFPN'),
    bbox_head=dict(type='QuantTransFusionHead'),
)
recipe = dict(mode='ptq', target='tensorrt', calibration=dict(split='train', frames=64))
custom_hooks = [dict(type='QuantHook', recipe=recipe)]
