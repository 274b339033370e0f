"""The study's experiments with CenterPoint-Voxel as recipes, for any of its configs: toy or real.

q3d study CONFIG CHECKPOINT, or q3d sweep CONFIG CHECKPOINT --grid configs/mmdet3d/study/recipes.py
"""

from q3d_plugin.analysis.study import recipes_of

# Which head layers the study found to have a large error between float and quantized, in every head, in the
# first two and in the first three.
_BRANCHES = 'pts_bbox_head.task_heads'
LISTED = [f'{_BRANCHES}.*.{x}' for x in ('reg.1', 'dim.1', 'vel.1', 'heatmap.0', 'heatmap.1')]
LISTED += [f'{_BRANCHES}.{head}.height.1' for head in (0, 1)]
LISTED += [f'{_BRANCHES}.{head}.rot.1' for head in (0, 1, 2)]
# First and last layers, as LiDAR-PTQ and most of the literature keep them.
FRAGILE = ['pts_middle_encoder.conv_input', f'{_BRANCHES}.*.1']

SPARSE, BACKBONE, HEAD = ['pts_middle_encoder'], ['pts_backbone', 'pts_neck'], ['pts_bbox_head']
recipes = recipes_of(SPARSE, BACKBONE, HEAD, LISTED, FRAGILE)
