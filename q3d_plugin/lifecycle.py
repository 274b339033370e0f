"""The life of a quantized model: configure, load, calibrate, test or train. Both adapters run on this."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, List, Optional

from torch import nn

from q3d_plugin.calibration import any_of_ranks, collect, compute_ranges, from_all_ranks
from q3d_plugin.coverage import NO_DATA
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers.model import is_calibrated, layer_facts, quantizers, set_enabled, switched, units
from q3d_plugin.quantizer import Role
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import apply_recipe
from q3d_plugin.transforms.sharing import check_sharing, share_scales
from q3d_plugin.transforms.smooth_model import READ_ONCE, smooth_model

__all__ = ['calibrate', 'check_recipe', 'configure', 'is_calibrated', 'quantizers', 'set_enabled', 'units']

_logger = logging.getLogger(__name__)


def configure(model: nn.Module, recipe: Recipe, logger: logging.Logger = None) -> None:
    """Gives ``model`` the quantizers that ``recipe`` asks for. Parameters are not touched.

    Args:
        model: A model with Quant types in it.
        recipe: Validated recipe.
        logger: Where the presets of the recipe are written out.

    Raises:
        Q3DError: The model has no Quant types, a pattern matches no layer, or the target cannot run a layer.
    """
    found = units(model)
    if not found:
        types = sorted({type(m).__name__ for _, m in model.named_children()})
        raise Q3DError(
            f'{recipe.place}: the config has a recipe, but nothing in the model has a Quant type, so nothing '
            f'would be quantized; the parts of this model are {", ".join(types)}. Write Quant before the '
            "type of each part that is to be quantized, such as type='QuantSECOND'"
        )
    check_recipe(model, recipe)
    for text in recipe.presets([name for name, _ in found]):
        (logger or _logger).info(text)
    apply_recipe(model, recipe)
    if recipe.mode == 'float':
        set_enabled(model, False)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Checks a recipe against the layers of ``model``, before anything is changed.

    Args:
        model: A model with Quant types in it.
        recipe: Validated recipe.

    Raises:
        Q3DError: A pattern means no layer, or the target cannot run a layer as the recipe has it.
    """
    recipe.check(layer_facts(model))


class _Watched:
    """``forward``; its first call finds out which units have to have one scale.

    Attributes:
        groups: Their names.
    """

    def __init__(self, model: nn.Module, forward: Callable, logger: logging.Logger) -> None:
        self.model, self.forward, self.logger = model, forward, logger
        self.groups: Optional[List[List[str]]] = None

    def __call__(self, batch: Any) -> Any:
        if self.groups is not None:
            return self.forward(batch)
        out: List[Any] = []
        found = check_sharing(self.model, lambda: out.append(self.forward(batch)))
        self.groups = found.scales
        for group in found.together:
            self.logger.warning(
                f'these layers share a quantizer, as layers that read one tensor, but read several: '
                f'{", ".join(group)}'
            )
        return out[0]


def calibrate(
    model: nn.Module,
    batches: Iterable,
    forward: Callable,
    names: Callable = None,
    logger: logging.Logger = None,
) -> int:
    """Takes statistics over ``batches`` and sets every range: activations first, then weights.

    A layer whose input never came stays float altogether, and is named in one warning. Where the recipe has
    layers smoothed, that comes first, in a pass of its own.

    Args:
        model: A configured model.
        batches: Batches of the framework's loader; read twice where layers are smoothed.
        forward: Called with each batch.
        names: Gives the name of a batch for messages.
        logger: Where the warning goes.

    Returns:
        int: Number of batches seen.

    Raises:
        Q3DError: There were no batches, or an activation holds NaN or Inf.
    """
    logger = logger or _logger
    smoothed = smooth_model(model, batches, forward, names, logger)
    activations = [q for q in quantizers(model) if q.role is Role.ACTIVATION]
    weights = [q for q in quantizers(model) if q.role is Role.WEIGHT]
    # Statistics are those of the float model: weights are let through while they are taken. What was switched
    # off gets its range too, and is off again afterwards.
    with switched(activations, True), switched(weights, False):
        for quantizer in weights:
            quantizer.used = False
        watched = _Watched(model, forward, logger)
        seen = collect(model, batches, watched, activations, names)
        # A rank without any frame has to build what the others have.
        groups = [group for found in from_all_ranks(watched.groups or []) for group in found]
        for members in share_scales(model, groups):
            logger.debug(f'the inputs of these have one scale: {", ".join(members)}')
    if seen == 0 and smoothed:
        raise Q3DError(READ_ONCE.format(type(batches).__name__))
    if seen == 0:
        raise Q3DError('calibration: there is not one frame to calibrate on')
    activations = [q for q in quantizers(model) if q.role is Role.ACTIVATION]
    empty = set(compute_ranges(activations))
    # A layer whose weight is read by other code, past its forward, never calls its weight's quantizer.
    unused = {q for q, used in zip(weights, any_of_ranks([q.used for q in weights])) if not used}
    left = []
    for name, unit in units(model):
        weight = getattr(unit, 'weight_quantizer', None)
        idle = unit.input_quantizer in empty or weight in unused
        if idle:
            left.append(name)
        if idle or unit.float_reason == NO_DATA:
            unit.float_reason = NO_DATA if idle else ''
        if weight is not None:
            if idle:
                weight.leave_float()
            else:
                unit.calibrate_weight()
    if left:
        logger.warning(f'{len(left)} layers saw no data during calibration and stay float: {", ".join(left)}')
    return seen
