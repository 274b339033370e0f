"""BatchNorm folding: into the layers of a model, and into a float checkpoint while it is loaded.

Jacob et al. 2018, section 3.2: at inference ``gamma * (W x - mean) / sqrt(var + eps) + beta`` is a
convolution with the weight ``W * f`` and the bias ``beta + (b - mean) * f``, where ``f = gamma / sqrt(var +
eps)``.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin.layers import QuantWeightLayer, why_not
from q3d_plugin.layers.conventions import is_activation, is_sequence, pairs_of
from q3d_plugin.trained_range import LOG2_KEY
from q3d_plugin.transforms.folded_norm import FoldedNorm, Handover

__all__ = ['Fold', 'find_pairs', 'fold_', 'fold_state_dict', 'norm_keys']

_NORM_NAMES = {'conv': ('bn', 'norm'), 'linear': ('norm', 'bn'), 'fc': ('bn', 'norm')}
WEIGHT_RANGE = 'weight_quantizer._amax'
_NORM_STATE = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')


@dataclass(frozen=True)
class Fold:
    """A layer and the BatchNorm that was behind it.

    Attributes:
        layer: Dotted name of the layer, relative to the module that was quantized.
        norm: Dotted name of the BatchNorm.
        eps: Of the BatchNorm.
    """

    layer: str
    norm: str
    eps: float


def _sequential_pairs(module: nn.Module) -> List[Tuple[str, str]]:
    names = list(module._modules)
    return list(zip(names, names[1:]))


def _named_pairs(module: nn.Module) -> List[Tuple[str, str]]:
    pairs = []
    for name in module._modules:
        for stem, norms in _NORM_NAMES.items():
            if name.startswith(stem) and (name == stem or name[len(stem) :].isdigit()):
                suffix = name[len(stem) :]
                pairs += [(name, norm + suffix) for norm in norms if norm + suffix in module._modules][:1]
    # Some blocks normalize behind the activation: they have conv1, act1 and bn1, in this order.
    return [(layer, norm) for layer, norm in pairs if not _activation_between(module, layer, norm)]


def _activation_between(module: nn.Module, layer: str, norm: str) -> bool:
    names = list(module._modules)
    between = [module._modules[n] for n in names[names.index(layer) + 1 : names.index(norm)]]
    return any(is_activation(m) for m in between)


def _possible_pairs(module: nn.Module) -> List[Tuple[str, str]]:
    """Names of children that may be a layer and its BatchNorm."""
    known = pairs_of(module)
    if known is not None:
        return known
    return _sequential_pairs(module) if is_sequence(module) else _named_pairs(module)


def find_pairs(root: nn.Module) -> List[Tuple[str, str]]:
    """Layers that a BatchNorm follows at once, by the structure of the modules that hold them.

    In a sequence that is the next child; elsewhere ``conv1`` and ``bn1`` (or ``norm1``), ``conv`` and ``bn``,
    ``linear`` and ``norm``, as residual blocks and pillar feature nets name them; or the pairs that were
    handed in for a type of block (:func:`~q3d_plugin.layers.conventions.add_conventions`). Modules that stand
    at several places of the tree are left alone, and layers whose weight is computed from something else.
    The forward pass tells whether this was right, see
    :class:`~q3d_plugin.transforms.folded_norm.FoldedNorm`.

    Args:
        root: Where to look.

    Returns:
        list: Pairs of dotted names relative to ``root``: layer, BatchNorm.
    """
    places: Dict[int, int] = {}
    for _, module in root.named_modules(remove_duplicate=False):
        places[id(module)] = places.get(id(module), 0) + 1
    pairs = []
    for prefix, module in root.named_modules():
        for layer_name, norm_name in _possible_pairs(module):
            layer, norm = module._modules[layer_name], module._modules[norm_name]
            if layer is None or not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
                continue
            if not isinstance(layer, QuantWeightLayer) and why_not(layer):
                continue
            if 'weight' not in layer._parameters:  # spectral norm, for example, would undo the fold
                continue
            if places[id(layer)] > 1 or places[id(norm)] > 1:
                continue
            channels = getattr(layer, 'out_channels', getattr(layer, 'out_features', None))
            if channels == norm.num_features:
                dot = prefix + '.' if prefix else ''
                pairs.append((dot + layer_name, dot + norm_name))
    return pairs


def _factor(norm: MutableMapping, eps: float) -> Tensor:
    """(C,) what a BatchNorm multiplies its input by, in float64."""
    factor = (norm['running_var'].double() + eps).rsqrt()
    return factor if norm.get('weight') is None else factor * norm['weight'].double()


def _folded(
    layer: QuantWeightLayer, weight: Tensor, bias: Optional[Tensor], norm: MutableMapping, eps: float
) -> Tuple[Tensor, Tensor]:
    """Weight and bias of the layer with the BatchNorm in it; computed in float64."""
    mean, factor = norm['running_mean'].double(), _factor(norm, eps)
    new_bias = -mean if bias is None else bias.double() - mean
    new_bias = new_bias * factor
    if norm.get('bias') is not None:
        new_bias = new_bias + norm['bias'].double()
    new_weight = layer.scale_output(weight.double(), factor)
    # A checkpoint in half precision is folded to single: rounding again would lose what the fold computed.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return new_weight.to(dtype), new_bias.to(dtype)


@torch.no_grad()
def fold_(root: nn.Module, pairs: List[Tuple[str, str]]) -> List[Fold]:
    """Folds the BatchNorms of ``pairs`` into their layers; a :class:`FoldedNorm` takes the place of each.

    Each layer has a bias afterwards. The layers are quantized ones already (float layers have no say in
    where their output channel is).

    Args:
        root: The module that the names of ``pairs`` are relative to.
        pairs: From :func:`find_pairs`.

    Returns:
        list: What was folded; :func:`fold_state_dict` needs it.
    """
    folds = []
    for layer_name, norm_name in pairs:
        layer, norm = root.get_submodule(layer_name), root.get_submodule(norm_name)
        state = dict(norm._parameters, running_mean=norm.running_mean, running_var=norm.running_var)
        weight, bias = _folded(layer, layer.weight, layer.bias, state, norm.eps)
        layer.weight.copy_(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(bias)
        else:
            layer.bias.copy_(bias)
        parent, _, child = norm_name.rpartition('.')
        holder = root.get_submodule(parent)
        # Assigned through _modules: some containers (spconv's) have no plain attribute of that name.
        where = type(root).__name__
        handover = Handover(f'{where}.{layer_name}', f'{where}.{norm_name}', _block_name(holder))
        handover.attach(layer)
        frozen = not all(p.requires_grad for p in norm.parameters()) or getattr(root, 'norm_eval', False)
        holder._modules[child] = FoldedNorm(handover, norm.eps, norm.momentum, frozen)
        folds.append(Fold(layer_name, norm_name, norm.eps))
    return folds


def _block_name(holder: nn.Module) -> str:
    """The name of the float type of a block, for which pairs may be handed in."""
    if is_sequence(holder):
        return 'TypeOfTheBlock'
    names = (cls.__name__ for cls in type(holder).__mro__)
    return next(name for name in names if not name.startswith(('Quant', '_')))


def fold_state_dict(root: nn.Module, state_dict: MutableMapping, prefix: str, folds: List[Fold]) -> None:
    """Folds the BatchNorms of a float ``state_dict``, in place; does nothing to one that is folded already.

    Args:
        root: The module that the names of ``folds`` are relative to.
        state_dict: May hold keys of other modules too. Its tensors are replaced, never written to.
        prefix: What the names of ``root`` begin with in ``state_dict``.
        folds: From :func:`fold_`.
    """
    for fold in folds:
        norm_prefix, layer_prefix = f'{prefix}{fold.norm}.', f'{prefix}{fold.layer}.'
        weight = state_dict.get(layer_prefix + 'weight')
        if weight is None or norm_prefix + 'running_var' not in state_dict:
            continue
        if root.get_submodule(fold.norm).live:
            continue
        layer, bias = root.get_submodule(fold.layer), state_dict.get(layer_prefix + 'bias')
        norm = {k: state_dict[norm_prefix + k] for k in _NORM_STATE if norm_prefix + k in state_dict}
        vectors = [v for k, v in norm.items() if k != 'num_batches_tracked'] + (
            [] if bias is None else [bias]
        )
        out_channels = layer.output_channels
        if any(v.numel() != out_channels for v in vectors) or weight.numel() != layer.weight.numel():
            continue  # of another model: left as it is, so that whoever checks the keys can name it
        for key in norm:
            del state_dict[norm_prefix + key]
        weight, bias = _folded(layer, weight, bias, norm, fold.eps)
        state_dict[layer_prefix + 'weight'], state_dict[layer_prefix + 'bias'] = weight, bias
        amax = state_dict.get(layer_prefix + WEIGHT_RANGE)
        if amax is not None:
            # Of a training with the BatchNorm in place: the integers stay, their step is another one.
            state_dict[layer_prefix + WEIGHT_RANGE] = (amax.double() * _factor(norm, fold.eps).abs()).to(amax)
            state_dict.pop(layer_prefix + WEIGHT_RANGE.replace('_amax', LOG2_KEY), None)


def norm_keys(fold: Fold, prefix: str) -> List[str]:
    """The keys that a float checkpoint has for the BatchNorm of ``fold``."""
    return [f'{prefix}{fold.norm}.{k}' for k in _NORM_STATE]
