"""Quantization-aware training of full-size BEVFusion on nuScenes, cameras (ResNet50) and LiDAR: the PTQ config plus
what training needs. MMDET3D_ROOT names a source checkout of MMDetection3D.

q3d train configs/mmdet3d/bevfusion_lidar-cam_r50_w8a8_qat.py \
    --cfg-options load_from=FLOAT_CHECKPOINT.pth
"""

_base_ = './bevfusion_lidar-cam_r50_w8a8.py'

recipe = dict(
    mode='qat',
    target='tensorrt',
    calibration=dict(split='train', frames=300),
    training=dict(distillation=dict()),
)
custom_hooks = [dict(type='QuantHook', recipe=recipe)]

# The pipeline of the base has no gt-sampling, which would paste objects into the points and not into the images.
# The weights are good already, and have to find values near by that suit the integers: two epochs, at half of the
# highest learning rate of the float training.
epochs = 2
param_scheduler = [
    dict(
        type='OneCycleLR',
        eta_max=1e-4,
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
