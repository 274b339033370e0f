"""Puts the quantized structure in place of the float one, when a framework builds a module."""

from collections.abc import Iterable, Mapping
from typing import List, Type

from torch import nn

from q3d_plugin.layers import InputGroup, QuantUnit, QuantWeightLayer, converted, why_not
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.fold import find_pairs, fold_, fold_state_dict

__all__ = ['quantize_', 'share_input']


def quantize_(root: nn.Module, blocks: Mapping[Type[nn.Module], Type[nn.Module]] = None) -> nn.Module:
    """Converts every layer below ``root`` that can be quantized, folds BatchNorm, and names what reads the
    same.

    With all quantizers off ``root`` computes what it computed before. A float checkpoint fits into the
    result: its BatchNorms are folded while it is loaded.

    Args:
        root: A float module; changed in place.
        blocks: Float block class -> quantized block class, for blocks whose forward has an addition or a
            concatenation. The quantized class derives from the float one and may have a method
            ``setup_quant()``, which is called once its layers are converted.

    Returns:
        nn.Module: ``root``.
    """
    blocks = blocks or {}
    pairs = find_pairs(root)
    changed: List[nn.Module] = []
    for _, module in list(root.named_modules()):
        if type(module) in blocks:
            module.__class__ = blocks[type(module)]
            changed.append(module)
        elif not why_not(module):
            converted(module)
    root._q3d_folds = fold_(root, pairs)
    root._register_load_state_dict_pre_hook(_fold_hook, with_module=True)
    for module in changed:
        if hasattr(module, 'setup_quant'):
            module.setup_quant()
    return root


def apply_recipe(root: nn.Module, recipe: Recipe, prefix: str = '') -> None:
    """Gives every unit below ``root`` the quantizers that the recipe asks for.

    Args:
        root: A module with quantized units.
        recipe: What to make.
        prefix: What the names of units begin with.
    """
    shared = {}
    for name, module in root.named_modules():
        if isinstance(module, QuantUnit):
            module.apply_plan(recipe.plan(prefix + name), prefix + name, shared)


def share_input(layers: Iterable[nn.Module]) -> None:
    """Declares that these units read the same tensor; those that can't be quantized are passed over."""
    group = InputGroup()
    for layer in layers:
        if isinstance(layer, QuantUnit):
            layer.input_group = group


def _fold_hook(module, state_dict, prefix, *_) -> None:
    fold_state_dict(module, state_dict, prefix, module._q3d_folds)


def first_layer(module: nn.Module) -> nn.Module:
    """The first layer with a weight below ``module`` in the order of its children."""
    return next((m for m in module.modules() if isinstance(m, QuantWeightLayer)), None)
