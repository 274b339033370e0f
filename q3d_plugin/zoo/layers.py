"""The layers of a quantized model: how many are quantized, and where the float model has the same tensors."""

import collections
from typing import Dict, List

from torch import Tensor, nn

from q3d_plugin.coverage import coverage
from q3d_plugin.layers import QuantUnit
from q3d_plugin.zoo.rows import Row

__all__ = ['comparable', 'compared_at', 'count_layers', 'own_weights']


def own_weights(module: nn.Module) -> List[Tensor]:
    """The weights of a layer that are matrices or kernels."""
    if isinstance(module, QuantUnit):
        weight = getattr(module, 'weight', None)
        return [] if weight is None else [weight]
    return [p for n, p in module._parameters.items() if p is not None and 'weight' in n and p.dim() > 1]


def count_layers(model: nn.Module, row: Row) -> None:
    """Counts what is quantized, from the coverage table of ``model``.

    Args:
        model: A configured model.
        row: Gets the numbers, and the reasons of what is left.
    """
    left = collections.defaultdict(collections.Counter)
    for line in coverage(model):
        module = model.get_submodule(line.name)
        weights = own_weights(module)
        if not weights or isinstance(module, nn.Embedding):
            continue
        elements = sum(w.numel() for w in weights)
        row.layers, row.elements = row.layers + 1, row.elements + elements
        if line.quantized:
            row.quantized, row.quantized_elements = row.quantized + 1, row.quantized_elements + elements
        else:
            left[line.note][line.kind] += 1
    row.left = {reason: dict(kinds) for reason, kinds in left.items()}


def compared_at(model: nn.Module) -> Dict[str, str]:
    """For each layer of a quantized model the name at which the float model has the same tensor: the layer's,
    that of the BatchNorm that was folded into it (whose place an identity holds), or that of the attention
    that it is a projection of (the float one does not call its projections)."""
    folded = {}
    for name, module in model.named_modules():
        for fold in getattr(module, '_q3d_folds', ()):
            dot = f'{name}.' if name else ''
            folded[dot + fold.layer] = dot + fold.norm
    places = {}
    for name, module in model.named_modules():
        holder = name.rpartition('.')[0]
        if isinstance(model.get_submodule(holder), nn.MultiheadAttention):
            places[name] = holder
        elif own_weights(module):
            places[name] = folded.get(name, name)
    return places


def comparable(model: nn.Module) -> List[str]:
    """Names at which a quantized model has the same tensors as the float one."""
    return list(dict.fromkeys(compared_at(model).values()))
