"""Puts the quantized structure in place of the float one, when a framework builds a module."""

import math
from collections.abc import Iterable, Mapping
from typing import List, Type

from torch import nn

from q3d_plugin.layers import InputGroup, QuantUnit, QuantWeightLayer, converted, why_not
from q3d_plugin.recipe import ActivationSpec, LayerPlan, Recipe, SmoothSpec, WeightSpec
from q3d_plugin.transforms.fold import find_pairs, fold_, fold_state_dict
from q3d_plugin.transforms.sharing import check_specs, declare_sharing

__all__ = ['quantize_', 'share_input']


def quantize_(root: nn.Module, blocks: Mapping[Type[nn.Module], Type[nn.Module]] = None) -> nn.Module:
    """Converts every layer below ``root`` that can be quantized, folds BatchNorm, and names what reads the
    same.

    With all quantizers off ``root`` computes what it computed before. A float checkpoint fits into the
    result: its BatchNorms are folded while it is loaded.

    Args:
        root: A float module; changed in place.
        blocks: Float block class -> quantized block class, for blocks whose forward has an addition or a
            concatenation. The quantized class derives from the float one. It may have a method
            ``setup_quant()``, as ``root`` may, which is called once the layers below are converted, and an
            attribute ``shared_scales`` (:class:`~q3d_plugin.transforms.sharing.SharedScale`).

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
    # A Quant type may derive from another one, whose folds are there already.
    if not hasattr(root, '_q3d_folds'):
        root._q3d_folds = []
        root._register_load_state_dict_pre_hook(_load_hook, with_module=True)
    root._q3d_folds += fold_(root, pairs)
    for module in [*(m for m in changed if m is not root), root]:
        if hasattr(module, 'setup_quant'):
            module.setup_quant()
    # Until a recipe or a quantized checkpoint comes, every layer has quantizers without a range: a forward
    # pass is an error then, not a float result that passes for a quantized one.
    apply_recipe(root, Recipe())
    root._q3d_configured = False
    return root


def apply_recipe(root: nn.Module, recipe: Recipe, prefix: str = '') -> None:
    """Gives every unit below ``root`` the quantizers that the recipe asks for.

    Args:
        root: A module with quantized units.
        recipe: What to make.
        prefix: What the names of units begin with.

    Raises:
        Q3DError: The recipe treats units differently that were declared to have one scale.
    """
    declare_sharing(root)
    check_specs(root, recipe, prefix)
    shared = {}
    for name, module in root.named_modules():
        if hasattr(module, '_q3d_configured'):
            module._q3d_configured = True
        if isinstance(module, QuantUnit):
            plan = recipe.plan(prefix + name, module.float_by_default)
            module.apply_plan(plan, prefix + name, shared)
    _place_quantizers(root)


def _place_quantizers(root: nn.Module) -> None:
    """Puts quantizers of units without parameters, such as additions, where the layers before them are."""
    found = [m for m in root.modules() if isinstance(m, QuantUnit)]
    devices = [unit.device() for unit in found]
    here = next((d for d in devices if d is not None), None)
    if here is None:
        here = next((p.device for p in root.parameters()), None)
    for unit, device in zip(found, devices):
        here = device or here
        for quantizer in unit.quantizers() if device is None and here is not None else ():
            quantizer.to(here)


def share_input(layers: Iterable[nn.Module], one_tensor: bool = True) -> None:
    """Declares that these units read the same tensor; those that can't be quantized are passed over.

    Units of different parts, and tensors that only have one scale, are declared by
    :class:`~q3d_plugin.transforms.sharing.SharedScale`.

    Args:
        layers: The units.
        one_tensor: False where they read tensors that have one range, as behind a padding with zeros.
    """
    group = InputGroup(one_tensor)
    for layer in layers:
        if isinstance(layer, QuantUnit):
            layer.input_group = group


def _load_hook(module, state_dict, prefix, *_) -> None:
    fold_state_dict(module, state_dict, prefix, module._q3d_folds)
    if not module._q3d_configured:
        _adopt_quantizers(module, state_dict, prefix)


def _adopt_quantizers(root: nn.Module, state_dict: Mapping, prefix: str) -> None:
    """Gives ``root`` the quantizers that a quantized checkpoint describes; a float one changes nothing.

    It lets a quantized checkpoint run where no recipe is at hand, in MMDetection3D's ``init_model`` for
    example.
    """
    described = [k for k in state_dict if k.startswith(prefix) and k.endswith('_quantizer._state')]
    if not described:
        return
    shared = {}
    for name, unit in root.named_modules():
        if not isinstance(unit, QuantUnit):
            continue
        specs = {}
        for kind, spec in (('weight', WeightSpec), ('input', ActivationSpec)):
            state = state_dict.get(f'{prefix}{name}.{kind}_quantizer._state')
            specs[kind] = None if state is None else spec(bits=int(state[1]))
        reason = '' if specs['weight'] or specs['input'] else 'float in the checkpoint'
        amax = state_dict.get(f'{prefix}{name}.input_quantizer._amax')
        # Layers that read the same tensor may have had recipes, and so ranges, of their own.
        ranges = shared.setdefault(None if amax is None else float(amax), {})
        # What a smoothed layer does with its input is in its buffers.
        smooth = None
        for key, mode in (('smooth_scale', 'static'), ('smooth_weight', 'dynamic')):
            if f'{prefix}{name}.{key}' in state_dict:
                alpha = float(state_dict[f'{prefix}{name}.smooth_alpha'])
                smooth = SmoothSpec(None if math.isnan(alpha) else alpha, mode, ())
        plan = LayerPlan(specs['weight'], specs['input'], reason, smooth)
        unit.apply_plan(plan, prefix + name, ranges)
    _place_quantizers(root)


def first_layer(module: nn.Module) -> nn.Module:
    """The first layer with a weight below ``module`` in the order of its children."""
    return next((m for m in module.modules() if isinstance(m, QuantWeightLayer)), None)
