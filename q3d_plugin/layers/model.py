"""The quantized parts of a model: its units and its quantizers."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import List, Tuple

from torch import nn

from q3d_plugin.layers.base import REGISTRY, QuantUnit
from q3d_plugin.quantizer import Mode, Quantizer
from q3d_plugin.recipe import LayerFacts

__all__ = [
    'layer_facts',
    'is_calibrated',
    'quantizable_types',
    'quantizers',
    'set_enabled',
    'switched',
    'units',
]


def units(model: nn.Module) -> List[Tuple[str, QuantUnit]]:
    """Every layer, addition and concatenation of ``model`` that can be quantized, with its dotted name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, QuantUnit)]


def layer_facts(model: nn.Module) -> List[LayerFacts]:
    """The facts by which a recipe is checked, for every layer, addition and concatenation of the model."""
    return [
        LayerFacts(name, unit.family, hasattr(unit, 'weight'), unit.float_by_default)
        for name, unit in units(model)
    ]


def quantizers(model: nn.Module) -> List[Quantizer]:
    """Every quantizer of ``model`` once, in the order of the modules."""
    return [m for m in model.modules() if isinstance(m, Quantizer)]


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches all quantizers on, or off (then ``model`` computes in float)."""
    for quantizer in quantizers(model):
        if enabled:
            quantizer.enable()
        else:
            quantizer.disable()


@contextlib.contextmanager
def switched(some: Iterable[Quantizer], on: bool) -> Iterator[None]:
    """All of these quantizers on, or off; afterwards each is as it was before."""
    before = [(q, q.enabled) for q in some]
    try:
        for quantizer, _ in before:
            quantizer.enable() if on else quantizer.disable()
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enable() if enabled else quantizer.disable()


def is_calibrated(model: nn.Module) -> bool:
    """Whether every quantizer of ``model`` has a range or was left float."""
    return all(q.mode is not Mode.UNCALIBRATED for q in quantizers(model))


def quantizable_types() -> List[str]:
    """Names of the float layer types that have a quantized version."""
    return sorted(c.__name__ for c in REGISTRY)
