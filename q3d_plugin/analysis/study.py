"""The study's experiments with CenterPoint-Voxel as recipes, whatever the framework calls its layers."""

from collections.abc import Sequence
from typing import Any, Dict, List

__all__ = ['recipes_of']


def _of_bits(weight: int, activation: int, **changes: Any) -> Dict[str, Any]:
    """Everything quantized, with these widths."""
    title = f'W{weight}A{activation}' + ''.join(f', {word}' for word in changes.pop('words', ()))
    bits = {'weight.bits': weight, 'activation.bits': activation}
    return dict(name=title, **bits, **changes)


def recipes_of(
    sparse: Sequence[str],
    backbone: Sequence[str],
    head: Sequence[str],
    listed: Sequence[str],
    fragile: Sequence[str],
) -> List[Dict[str, Any]]:
    """Named recipes for ``tools/sweep.py``; each is what it changes of the config's recipe.

    The first part is the study's own table: only the dense layers are quantized, and SmoothQuant takes its
    scales from the running input (dynamic). The second part is what the study left open: the sparse backbone,
    static scales, searched alpha, bit widths.

    Args:
        sparse: Patterns of the sparse backbone.
        backbone: Patterns of the dense backbone and neck.
        head: Patterns of the head.
        listed: Head layers that the study found to have a large error between float and quantized.
        fragile: First and last layers, which LiDAR-PTQ and most of the literature keep float.
    """
    dynamic, plain = dict(alpha=0.5, mode='dynamic'), [dict(layers=list(listed), alpha=None)]
    all_dense, listed_float = dict(skip=list(sparse)), dict(skip=[*sparse, *listed])
    recipes = [
        dict(name='dense W8A8, signed', activation=dict(unsigned=False), **all_dense),
        dict(name='dense W8A8, unsigned', **all_dense),
        dict(name='dense W8A8, SmoothQuant 0.5 on all', smoothquant=dynamic, **all_dense),
        dict(
            name='dense W8A8, SmoothQuant 0.5 on the backbone, head plain',
            smoothquant=dict(dynamic, layers=backbone),
            **all_dense,
        ),
        dict(name='head W8A8, backbone float', skip=[*sparse, *backbone]),
        dict(name='backbone W8A8, head float', skip=[*sparse, *head]),
        dict(
            name='dense W8A8, SmoothQuant 0.5 on the head but the listed layers',
            smoothquant=dict(dynamic, layers=head, overrides=plain),
            **all_dense,
        ),
        dict(
            name='dense W8A8, SmoothQuant 0.5 on all but the listed layers',
            smoothquant=dict(dynamic, overrides=plain),
            **all_dense,
        ),
        dict(name='dense W8A8, SmoothQuant 0.5, listed layers float', smoothquant=dynamic, **listed_float),
        dict(name='dense W8A8, static SmoothQuant 0.5 on all', smoothquant=dict(alpha=0.5), **all_dense),
        dict(name='dense W8A8, static SmoothQuant searched', smoothquant=dict(alpha='search'), **all_dense),
        _of_bits(8, 8),
        _of_bits(8, 8, words=['SmoothQuant searched'], smoothquant=dict(alpha='search')),
        _of_bits(16, 8),
        _of_bits(8, 16),
        _of_bits(16, 4),
        _of_bits(8, 4),
        _of_bits(4, 16),
        _of_bits(3, 16),
        _of_bits(2, 16),
    ]
    for activation in (8, 4):
        for name, changes in {
            '': {},
            'SmoothQuant searched': dict(smoothquant=dict(alpha='search')),
            'fragile layers float': dict(skip=fragile),
            'SmoothQuant searched, fragile layers float': dict(
                smoothquant=dict(alpha='search'), skip=fragile
            ),
        }.items():
            recipes.append(_of_bits(4, activation, words=[name] if name else [], **changes))
    return recipes
