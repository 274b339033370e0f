"""What all quantized layers have in common: slots for quantizers, and a float class that they are made
from."""

from collections.abc import Callable
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import torch
from torch import Tensor, nn

from q3d_plugin import numerics
from q3d_plugin.layers.conventions import is_wrapper
from q3d_plugin.layers.smoothing import SmoothedInput
from q3d_plugin.memo import TensorMemo
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


class InputGroup:
    """Layers that read the same tensor hold the same group, and so share one input quantizer.

    Args:
        one_tensor: False where they read tensors that have one range, as behind a padding with zeros.
    """

    def __init__(self, one_tensor: bool = True) -> None:
        self.one_tensor = one_tensor
        self._memos: Dict[Any, TensorMemo] = {}

    def once(self, key: Any, x: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        """``compute(x)``, computed by the first layer of the group that asks for it.

        Args:
            key: Says what is computed; layers that compute something else have another one.
            x: The input of the group.
            compute: Called with ``x``; what it returns is not None.
        """
        memo = self._memos.setdefault(key, TensorMemo())
        value = memo.value_of(x)
        if value is None:
            value = compute(x)
            memo.keep(x, value)
        return value

    def __getstate__(self):
        return {'one_tensor': self.one_tensor, '_memos': {}}


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

    family = 'elementwise'
    """The kind of layer that engines tell it for; one of :data:`q3d_plugin.recipe.FAMILIES`."""

    float_by_default = ''
    """Why the unit stays float unless the recipe's ``include`` names it; set where a part is set up."""

    def _init_unit(self) -> None:
        self.input_quantizer = None
        self.input_group: Optional[InputGroup] = None
        self.float_reason = ''
        self.target = ''
        # The quantizers that it was built with, in use or not: past nn.Module's own __setattr__, since a
        # quantizer that is not in use must be in no state_dict.
        self.__dict__['_built'] = {}

    def apply_plan(self, plan: LayerPlan, name: str, shared: Dict) -> None:
        """Has the unit quantize as ``plan`` says.

        A quantizer exists once, from the time that the model is built: it is given another spec, not
        replaced, so that optimizers and wrappers of the model go on holding the right one. Only where layers
        that read the same tensor are to be quantized in different ways are quantizers added.

        Args:
            plan: The part of the recipe that concerns this unit.
            name: Dotted name of this unit in the model.
            shared: The input quantizers given out so far, by group and spec; added to.
        """
        self.float_reason, self.target = plan.reason, plan.target
        self.input_quantizer = None
        if plan.activation is not None:
            # Layers that are smoothed in another way read the tensor in another scale. Operations without a
            # weight are never smoothed.
            group = id(self.input_group) if self.input_group is not None else name
            key = (group, plan.activation, plan.smooth if hasattr(self, 'weight') else None)
            if key not in shared:
                built = self._built.get('input')
                if built is None or any(built is other for other in shared.values()):
                    built = Quantizer(plan.activation)
                built.configure(plan.activation, f'{name}.input_quantizer')
                shared[key] = built
            # Without a parameter it is not known here where the model is: see transforms/insert.py.
            self.input_quantizer = self._built['input'] = shared[key].to(self.device())
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

    def device(self) -> Optional[torch.device]:
        """Where the parameters of this unit are; None where it has none, as an addition."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else parameter.device

    def quantizers(self) -> List[Quantizer]:
        """The quantizers of this unit, input first."""
        return [] if self.input_quantizer is None else [self.input_quantizer]

    def quantize_input(self, x: Tensor) -> Tensor:
        """``x`` through the input quantizer, if there is one."""
        return x if self.input_quantizer is None else self.input_quantizer(x)


class QuantWeightLayer(SmoothedInput, QuantUnit):
    """A layer with a weight. Subclasses say where the channels are and how the layer computes.

    What is written here is the layout of a linear layer: (out, in), channels last.

    Instances are made by :func:`converted` from float layers, whose parameters they keep.
    """

    weight_quantizer: Optional[Quantizer]
    family = 'linear'
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

    @property
    def input_channels(self) -> int:
        """Number of input channels or features."""
        return self.weight.shape[1]

    def features(self, x: Any) -> Tensor:
        """The tensor in what the layer is called with or returns."""
        return x

    def channel_axis(self, x: Tensor) -> int:
        """The axis of the channels in an input or an output."""
        return x.dim() - 1

    def kernel_view(self, weight: Tensor) -> Tensor:
        """``weight`` (in this layer's layout) as (groups, out / groups, in / groups, kernel positions)."""
        return weight[None, :, :, None]

    def scale_input(self, weight: Tensor, factor: Tensor) -> Tensor:
        """``weight`` (in this layer's layout) with what input channel c meets multiplied by ``factor[c]``."""
        return weight * factor

    searchable = True
    """Whether :meth:`rows_of` is there, so that an alpha can be searched for."""

    def rows_of(self, x: Any, out: Any, places: Tensor) -> Tensor:
        """What some outputs are computed from.

        Args:
            x: What the layer was called with.
            out: What it returned.
            places: (count,) which outputs, counted in the order of memory as if channels came last; of a
                sparse layer the rows of its output.

        Returns:
            Tensor: (count, input channels, kernel positions), zero where a position lies outside. The sum of
            its products with :meth:`kernel_view` is the output without its bias.
        """
        return x.reshape(-1, x.shape[-1])[places][..., None]

    def input_amax(self) -> Tensor:
        """(C_in,) largest magnitude of the weight for each input channel, in every group."""
        return self.kernel_view(self.weight.detach()).abs().amax(dim=(1, 3)).reshape(-1)

    def quantize_input(self, x: Tensor) -> Tensor:
        return super().quantize_input(self._scaled(x) if self._smoothing else x)

    def quantize_weight(self) -> Tensor:
        """The weight through its quantizer, if there is one, in its own layout."""
        return self._quantized_weight(self.weight, None)

    def quantized(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Input and weight, smoothed and quantized as the recipe says.

        Args:
            x: The input; of a sparse layer its features.
        """
        if self._smoothing and self.smooth_spec.mode == 'dynamic':
            x, scale = self._once('dynamic', x, self._smoothed_dynamically)
            weight = self.scale_input(self.weight, scale.to(self.weight.dtype))
            # The range of the weight goes with the scale.
            return super().quantize_input(x), self._quantized_weight(weight, self._weight_range(weight))
        return self.quantize_input(x), self.quantize_weight()

    def _quantized_weight(self, weight: Tensor, amax: Optional[Tensor]) -> Tensor:
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight, amax=amax)

    def apply_plan(self, plan: LayerPlan, name: str, shared: Dict) -> None:
        super().apply_plan(plan, name, shared)
        self._plan_smoothing(plan.smooth)
        self.weight_quantizer = None
        if plan.weight is not None:
            built = self._built.get('weight')
            if built is None:
                built = Quantizer(plan.weight, self.output_channels, self.weight_axis)
            built.configure(plan.weight, f'{name}.weight_quantizer')
            built.owners.append(name)
            self.weight_quantizer = self._built['weight'] = built.to(self.weight.device)

    def quantizers(self) -> List[Quantizer]:
        return super().quantizers() + ([] if self.weight_quantizer is None else [self.weight_quantizer])

    def calibrate_weight(self) -> None:
        """Sets the ranges of the weight from the weight as it is now."""
        quantizer = self.weight_quantizer
        if quantizer is not None:
            spec = quantizer.spec
            rows = self.output_first(self.weight.detach())
            quantizer.set_range(
                numerics.weight_amax(rows, quantizer.num_bits, spec.calibrator, spec.percentile)
            )

    def _weight_range(self, weight: Tensor) -> Optional[Tensor]:
        if self.weight_quantizer is None or not self.weight_quantizer.has_range:
            return None
        spec = self.weight_quantizer.spec
        rows = self.output_first(weight.detach())
        return numerics.weight_amax(rows, spec.bits, spec.calibrator, spec.percentile)


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
            if cls is base or cls.forward is base.forward or is_wrapper(cls):
                return base, ''
            return None, f'{cls.__name__} computes in its own way (it overrides {base.__name__}.forward)'
    return None, 'no quantized version of this type'


def is_converted(module: nn.Module) -> bool:
    """Whether ``module`` is a quantized layer, or one that :func:`converted` made of several."""
    return isinstance(module, (QuantUnit, *REGISTRY.values()))


def why_not(module: nn.Module) -> str:
    """Why ``module`` can't be converted; empty where it can."""
    return _base_of(type(module))[1]


_made: Dict[Tuple[Type, Type], Type] = {}


def _class_for(quant: Type[nn.Module], cls: Type[nn.Module]) -> Type[nn.Module]:
    """The quantized class of ``cls``, which derives from the float class that ``quant`` stands for."""
    if (quant, cls) not in _made:
        namespace = {'__module__': __name__, '__reduce_ex__': _reduce_made, '_made_of': (quant, cls)}
        _made[quant, cls] = type(f'Quant{cls.__name__}', (quant, cls), namespace)
    return _made[quant, cls]


def _reduce_made(self, protocol):
    """Has pickle make the class again, in another process too: no module has it under its name."""
    _, _, *state = object.__reduce_ex__(self, max(protocol, 2))
    return (_blank, self._made_of, *state)


def _blank(quant: Type[nn.Module], cls: Type[nn.Module]) -> nn.Module:
    """An instance of :func:`_class_for` whose state is to follow."""
    made = _class_for(quant, cls)
    return made.__new__(made)


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
    module.__class__ = quant if cls is base else _class_for(quant, cls)
    module._init_unit()
    return module
