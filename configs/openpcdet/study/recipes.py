"""The study's experiments with CenterPoint-Voxel as recipes, for any of its configs: toy or real.

    python tools/sweep.py CONFIG CHECKPOINT --grid configs/openpcdet/study/recipes.py

Each entry is what it changes of the config's recipe. The first part is the study's own table: only the dense
layers are quantized. Its SmoothQuant took the scales from the running input (dynamic). The second part is
what the study left open: the sparse backbone, static scales, searched alpha, bit widths.
"""

SPARSE, BACKBONE, HEAD = ['backbone_3d'], ['backbone_2d'], ['dense_head']
# Which head layers the study found to have a large error between float and quantized, in every head, in the
# first two and in the first three.
_BRANCHES = 'dense_head.heads_list'
LISTED = [f'{_BRANCHES}.*.{x}' for x in ('center.1', 'dim.1', 'vel.1', 'hm.0.0', 'hm.1')]
LISTED += [f'{_BRANCHES}.{head}.center_z.1' for head in (0, 1)]
LISTED += [f'{_BRANCHES}.{head}.rot.1' for head in (0, 1, 2)]
PLAIN = [dict(layers=LISTED, alpha=None)]
# First and last layers, as LiDAR-PTQ and most of the literature keep them.
FRAGILE = ['backbone_3d.conv_input', f'{_BRANCHES}.*.1']

DYNAMIC = dict(alpha=0.5, mode='dynamic')
ALL_DENSE = dict(skip=SPARSE)
LISTED_FLOAT = dict(skip=[*SPARSE, *LISTED])


def of_bits(weight, activation, **changes):
    """Everything quantized, with these widths."""
    title = f'W{weight}A{activation}' + ''.join(f', {word}' for word in changes.pop('words', ()))
    bits = {'weight.bits': weight, 'activation.bits': activation}
    return dict(name=title, **bits, **changes)


recipes = [
    dict(name='dense W8A8, signed', activation=dict(unsigned=False), **ALL_DENSE),
    dict(name='dense W8A8, unsigned', **ALL_DENSE),
    dict(name='dense W8A8, SmoothQuant 0.5 on all', smoothquant=DYNAMIC, **ALL_DENSE),
    dict(
        name='dense W8A8, SmoothQuant 0.5 on the backbone, head plain',
        smoothquant=dict(DYNAMIC, layers=BACKBONE),
        **ALL_DENSE,
    ),
    dict(name='head W8A8, backbone float', skip=[*SPARSE, *BACKBONE]),
    dict(name='backbone W8A8, head float', skip=[*SPARSE, *HEAD]),
    dict(
        name='dense W8A8, SmoothQuant 0.5 on the head but the listed layers',
        smoothquant=dict(DYNAMIC, layers=HEAD, overrides=PLAIN),
        **ALL_DENSE,
    ),
    dict(
        name='dense W8A8, SmoothQuant 0.5 on all but the listed layers',
        smoothquant=dict(DYNAMIC, overrides=PLAIN),
        **ALL_DENSE,
    ),
    dict(name='dense W8A8, SmoothQuant 0.5, listed layers float', smoothquant=DYNAMIC, **LISTED_FLOAT),
    dict(name='dense W8A8, static SmoothQuant 0.5 on all', smoothquant=dict(alpha=0.5), **ALL_DENSE),
    dict(name='dense W8A8, static SmoothQuant searched', smoothquant=dict(alpha='search'), **ALL_DENSE),
    of_bits(8, 8),
    of_bits(8, 8, words=['SmoothQuant searched'], smoothquant=dict(alpha='search')),
    of_bits(16, 8),
    of_bits(8, 16),
    of_bits(16, 4),
    of_bits(8, 4),
    of_bits(4, 16),
    of_bits(3, 16),
    of_bits(2, 16),
]
for activation in (8, 4):
    for name, changes in {
        '': {},
        'SmoothQuant searched': dict(smoothquant=dict(alpha='search')),
        'fragile layers float': dict(skip=FRAGILE),
        'SmoothQuant searched, fragile layers float': dict(smoothquant=dict(alpha='search'), skip=FRAGILE),
    }.items():
        recipes.append(of_bits(4, activation, words=[name] if name else [], **changes))
