"""Quantization-aware training of full-size CenterPoint-Voxel 0.075 m on nuScenes: the PTQ config plus what
training needs.

q3d train configs/mmdet3d/centerpoint_voxel0075_second_secfpn_nus_w8a8_qat.py \
    --cfg-options load_from=FLOAT_CHECKPOINT.pth
"""

_base_ = './centerpoint_voxel0075_second_secfpn_nus_w8a8.py'

recipe = dict(
    mode='qat',
    target='tensorrt',
    calibration=dict(split='train', frames=300),
    training=dict(distillation=dict()),
)
custom_hooks = [dict(type='QuantHook', recipe=recipe)]

# Without gt-sampling: pasted objects had the float detector see rare classes often, in frames that no sensor
# records. At the end of a training it does better without them (Wang et al. 2021, PointAugmenting, fading
# strategy), and ranges are to be learned for the frames that will come.
train_pipeline = [step for step in _base_.train_pipeline if step['type'] != 'ObjectSample']
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))

# A tenth of the float schedule with half of its highest learning rate, which is reached soon: the weights are
# good already, and have to find values near by that suit the integers.
epochs = 2
param_scheduler = [
    dict(
        type='OneCycleLR',
        eta_max=5e-4,
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
