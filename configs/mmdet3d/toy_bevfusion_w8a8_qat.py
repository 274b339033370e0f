"""Quantization-aware training of the toy BEVFusion in INT8: the PTQ config plus what training needs.

q3d train configs/mmdet3d/toy_bevfusion_w8a8_qat.py
"""

_base_ = './toy_bevfusion_w8a8.py'

load_from = '{{ fileDirname }}/toy_bevfusion.pth'
recipe = dict(
    mode='qat',
    target='tensorrt',
    calibration=dict(split='train', frames=64),
    training=dict(distillation=dict()),
)
custom_hooks = [dict(type='QuantHook', recipe=recipe)]

# A quarter of the float schedule with half of its highest learning rate, which is reached soon: the weights are
# good already, and have to find values near by that suit the integers.
epochs = 4
param_scheduler = [
    dict(
        type='OneCycleLR',
        eta_max=1e-3,
        pct_start=0.1,
        div_factor=10,
        final_div_factor=100,
        total_steps=epochs,
        by_epoch=True,
        begin=0,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=epochs, val_interval=1)
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=2, save_best='NuScenes metric/pred_instances_3d_NuScenes/mAP')
)
