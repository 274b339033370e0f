"""What the real config of this name has that the plugin's configs change or rely on."""

custom_imports = dict(imports=['projects.BEVFusion.bevfusion'], allow_failed_imports=False)
voxel_size = [0.075, 0.075, 0.2]
model = dict(
    type='BEVFusion',
    data_preprocessor=dict(type='Det3DDataPreprocessor', voxelize_cfg=dict(voxel_size=voxel_size)),
    pts_voxel_encoder=dict(type='HardSimpleVFE', num_features=5),
    pts_middle_encoder=dict(type='BEVFusionSparseEncoder', in_channels=5),
    pts_backbone=dict(type='SECOND', in_channels=256),
    pts_neck=dict(type='SECONDFPN', in_channels=[128, 256]),
    bbox_head=dict(type='TransFusionHead', num_proposals=200),
)
custom_hooks = [dict(type='DisableObjectSampleHook', disable_after_epoch=15)]
