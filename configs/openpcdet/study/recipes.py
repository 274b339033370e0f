"""The study's experiments with CenterPoint-Voxel as recipes, for any of its configs: toy or real.

q3d study CONFIG CHECKPOINT, or q3d sweep CONFIG CHECKPOINT --grid configs/openpcdet/study/recipes.py
"""

from q3d_plugin.analysis.study import recipes_of

# Which head layers the study found to have a large error between float and quantized, in every head, in the
# first two and in the first three.
_BRANCHES = 'dense_head.heads_list'
LISTED = [f'{_BRANCHES}.*.{x}' for x in ('center.1', 'dim.1', 'vel.1', 'hm.0.0', 'hm.1')]
LISTED += [f'{_BRANCHES}.{head}.center_z.1' for head in (0, 1)]
LISTED += [f'{_BRANCHES}.{head}.rot.1' for head in (0, 1, 2)]
# First and last layers, as LiDAR-PTQ and most of the literature keep them.
FRAGILE = ['backbone_3d.conv_input', f'{_BRANCHES}.*.1']

SPARSE, BACKBONE, HEAD = ['backbone_3d'], ['backbone_2d'], ['dense_head']
recipes = recipes_of(SPARSE, BACKBONE, HEAD, LISTED, FRAGILE)
