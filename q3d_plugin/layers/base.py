"""What all quantized layers have in common: slots for quantizers, and a float class that they are made
from."""

from typing import Dict, Iterator, List, Optional, Tuple, Type

import torch
from torch import Tensor, nn

from q3d_plugin import numerics
from q3d_plugin.quantizer import Quantizer
from q3d_plugin.recipe import LayerPlan

__all__ = [
    'InputGroup',
    'QuantUnit',
    'QuantWeightLayer',
    'REGISTRY',
    'converted',
    'is_converted',
    'register',
    'why_not',
]

REGISTRY: Dict[Type[nn.Module], Type[nn.Module]] = {}
"""Float class -> quantized class: a :class:`QuantWeightLayer`, or a module whose weights such layers below it
read."""

# Wrappers whose forward differs from their parent's only in how it treats empty input under old versions of
# torch.
_TRANSPARENT_WRAPPERS = ('mmcv.cnn.bricks.wrappers',)


class InputGroup:
    """Layers that read the same tensor hold the same group, and so share one input quantizer."""


class QuantUnit(nn.Module):
    """A module with an input quantizer: a layer, an addition or a concatenation.

    Attributes:
        input_quantizer: Quantizes every input tensor; None where the unit stays float.
        input_group: What units share the input quantizer.
        float_reason: Why there is no quantizer; empty where there is one.
    """

    input_quantizer: Optional[Quantizer]
    kind = ''
    """Word for the coverage table."""

    def _init_unit(self) -> None:
        self.input_quantizer = None
        self.input_group: Optional[InputGroup] = None
        self.float_reason = ''

    def apply_plan(self, plan: LayerPlan, name: str, shared: Dict) -> None:
        """Puts the quantizers of ``plan`` in place of the present ones.

        Args:
            plan: What the recipe says of this unit.
            name: Dotted name of this unit in the model.
            shared: The input quantizers made so far, by group and spec; added to.
        """
        self.float_reason = plan.reason
        self.input_quantizer = None
        if plan.activation is not None:
            key = (id(self.input_group) if self.input_group is not None else name, plan.activation)
            if key not in shared:
                shared[key] = Quantizer(plan.activation, name=f'{name}.input_quantizer')
            self.input_quantizer = shared[key].to(self._device())
            self.input_quantizer.owners.append(name)

    def children(self) -> Iterator[nn.Module]:
        """None: to those who walk the children down to the leaves, a layer is the leaf that it was in float.

        OpenPCDet's one-cycle optimizer collects its parameters in this way, and would leave out every layer
        that has children.
        """
        return iter(())

    def _apply(self, *args, **kwargs):
        # What nn.Module does by way of children().
        for quantizer in self.quantizers():
            quantizer._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True):
        for quantizer in self.quantizers():
            quantizer.train(mode)
        return super().train(mode)

    def _device(self) -> torch.device:
        parameter = next(self.parameters(), None)
        return torch.device('cpu') if parameter is None else parameter.device

    def quantizers(self) -> List[Quantizer]:
        """The quantizers of this unit, input first."""
        return [] if self.input_quantizer is None else [self.input_quantizer]

    def quantize_input(self, x: Tensor) -> Tensor:
        """``x`` through the input quantizer, if there is one."""
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QuantWeightLayer(QuantUnit):
    """A layer with a weight. Subclasses say where the output channel is and how the layer computes.

    Instances are made by :func:`converted` from float layers, whose parameters they keep.
    """

    weight_quantizer: Optional[Quantizer]
    weight_axis = 0
    """Axis of the weight's output channels, where the layout has one such axis."""

    def _init_unit(self) -> None:
        super()._init_unit()
        self.weight_quantizer = None

    def output_first(self, weight: Tensor) -> Tensor:
        """The weight as (out, everything else); gradients pass."""
        return weight.transpose(0, self.weight_axis) if self.weight_axis else weight

    @property
    def output_channels(self) -> int:
        """Number of output channels or features."""
        return self.output_first(self.weight).shape[0]

    def scale_output(self, weight: Tensor, factor: Tensor) -> Tensor:
        """``weight`` (in this layer's layout) with output channel c multiplied by ``factor[c]``."""
        shape = [1] * weight.dim()
        shape[self.weight_axis] = -1
        return weight * factor.reshape(shape)

    def quantize_weight(self) -> Tensor:
        """The weight through its quantizer, if there is one, in its own layout."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def apply_plan(self, plan: LayerPlan, name: str, shared: Dict) -> None:
        super().apply_plan(plan, name, shared)
        self.weight_quantizer = None
        if plan.weight is not None:
            quantizer = Quantizer(
                plan.weight, self.output_channels, self.weight_axis, f'{name}.weight_quantizer'
            )
            quantizer.owners.append(name)
            self.weight_quantizer = quantizer.to(self.weight.device)

    def quantizers(self) -> List[Quantizer]:
        return super().quantizers() + ([] if self.weight_quantizer is None else [self.weight_quantizer])

    def calibrate_weight(self) -> None:
        """Sets the ranges of the weight from the weight as it is now."""
        quantizer = self.weight_quantizer
        if quantizer is not None:
            spec = quantizer.spec
            rows = self.output_first(self.weight.detach())
            quantizer.set_range(numerics.weight_amax(rows, spec.bits, spec.calibrator, spec.percentile))


def register(*float_classes: Type[nn.Module]):
    """Class decorator: the quantized class stands for these float classes."""

    def add(cls):
        for float_class in float_classes:
            REGISTRY[float_class] = cls
        return cls

    return add


def _base_of(cls: Type[nn.Module]) -> Tuple[Optional[Type[nn.Module]], str]:
    """The registered class that ``cls`` is or derives from, and why it can't stand for ``cls`` ('' if it
    can)."""
    for base in cls.__mro__:
        if base in REGISTRY:
            if cls is base or cls.forward is base.forward or cls.__module__ in _TRANSPARENT_WRAPPERS:
                return base, ''
            return None, f'{cls.__name__} computes in its own way (it overrides {base.__name__}.forward)'
    return None, 'no quantized version of this type'


def is_converted(module: nn.Module) -> bool:
    """Whether ``module`` is a quantized layer, or one that :func:`converted` made of several."""
    return isinstance(module, (QuantUnit, *REGISTRY.values()))


def why_not(module: nn.Module) -> str:
    """Why ``module`` can't be converted; empty where it can."""
    return _base_of(type(module))[1]


_made: Dict[Tuple, Type] = {}


def converted(module: nn.Module) -> nn.Module:
    """Turns a float layer into its quantized version, in place: same object, same parameters, other class.

    In place, because other code may hold references to the layer already (a list of blocks, a hook, an
    ``init_cfg`` record). Classes derived from the registered ones keep their own attributes and names.

    Args:
        module: A layer for which :func:`why_not` is empty.

    Returns:
        nn.Module: ``module``.
    """
    cls = type(module)
    if is_converted(module):
        return module
    base, reason = _base_of(cls)
    if base is None:
        raise TypeError(reason)
    quant = REGISTRY[base]
    if cls is not base:
        key = (quant, cls)
        if key not in _made:
            _made[key] = type(f'Quant{cls.__name__}', (quant, cls), {'__module__': __name__})
        quant = _made[key]
    module.__class__ = quant
    module._init_unit()
    return module
