"""Quantization-aware training of the toy CenterPoint-Voxel with weights of 4 bits and inputs of 4 bits.

q3d train configs/mmdet3d/toy_centerpoint_voxel_w4a4_qat.py

No target has such integers for convolutions yet: target='simulation' computes what an engine with them would.
"""

_base_ = './toy_centerpoint_voxel_w8a8_qat.py'

recipe = dict(
    mode='qat',
    target='simulation',
    weight=dict(bits=4),
    activation=dict(bits=4),
    calibration=dict(split='train', frames=64),
    training=dict(distillation=dict()),
)
custom_hooks = [dict(type='QuantHook', recipe=recipe)]
