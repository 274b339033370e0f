"""What all quantized layers have in common: slots for quantizers, and a float class that they are made
from."""

import math
import weakref
from collections.abc import Callable
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import torch
from torch import Tensor, nn

from q3d_plugin import numerics
from q3d_plugin.layers.conventions import is_wrapper
from q3d_plugin.quantizer import Mode, Quantizer
from q3d_plugin.recipe import LayerPlan, SmoothSpec

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
    """Layers that read the same tensor hold the same group, and so share one input quantizer."""

    def __init__(self) -> None:
        self._memo: Dict[Any, Tuple] = {}

    def once(self, key: Any, x: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        """``compute(x)``, computed by the first layer of the group that asks for it.

        Args:
            key: What is computed; layers that compute something else have another one.
            x: The input of the group.
            compute: Called with ``x``.
        """
        if x.is_inference():
            return compute(x)
        memo = self._memo.get(key)
        stamp = x._version, torch.is_grad_enabled()
        if memo is None or memo[0]() is not x or memo[1] != stamp:
            self_ref = weakref.ref(self)

            def forget(reference):
                # Nothing lives longer than the input that it was computed from.
                group = self_ref()
                if group is not None and key in group._memo and group._memo[key][0] is reference:
                    del group._memo[key]

            memo = weakref.ref(x, forget), stamp, compute(x)
            self._memo[key] = memo
        return memo[2]

    def __getstate__(self):
        return {'_memo': {}}


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
            # Layers that are smoothed in another way read the tensor in another scale.
            group = id(self.input_group) if self.input_group is not None else name
            key = (group, plan.activation, plan.smooth)
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
    """A layer with a weight. Subclasses say where the channels are and how the layer computes.

    What is written here is the layout of a linear layer: (out, in), channels last.

    Instances are made by :func:`converted` from float layers, whose parameters they keep.
    """

    weight_quantizer: Optional[Quantizer]
    weight_axis = 0
    """Axis of the weight's output channels, where the layout has one such axis."""
    smooth_spec: Optional[SmoothSpec] = None
    """How the recipe has the input smoothed; None where it has not."""
    smooth_note: str = ''
    """What became of it, for the coverage table."""
    smooth_producers: Tuple[str, ...] = ()
    """The layers that have the inverse scales in their weights."""
    _smoothing = False

    # Smoothing keeps three buffers, only where the recipe asks for it: smooth_alpha (NaN: not smoothed);
    # smooth_scale (static), what the input is multiplied by; smooth_weight (dynamic), the largest magnitude
    # of the weight per input channel.

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

    def _once(self, what: str, x: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        group = self.input_group
        return compute(x) if group is None else group.once((what, self.smooth_spec), x, compute)

    def _scaled(self, x: Tensor) -> Tensor:
        if self.smooth_spec.mode == 'dynamic':
            return self._once('dynamic', x, self._smoothed_dynamically)[0]
        return self._once('static', x, lambda x: self._times(x, self.smooth_scale))

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.channel_axis(x)] = -1
        return x * factor.to(x.dtype).reshape(shape)

    def _smoothed_dynamically(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The input divided by scales of its own, and the scales."""
        largest = numerics.channel_amax(x.detach(), self.channel_axis(x)).float()
        scale = numerics.smoothing_scale(largest, self.smooth_weight, self.smooth_alpha)
        return self._times(x, 1 / scale), scale

    def apply_plan(self, plan: LayerPlan, name: str, shared: Dict) -> None:
        super().apply_plan(plan, name, shared)
        self._plan_smoothing(plan.smooth)
        self.weight_quantizer = None
        if plan.weight is not None:
            quantizer = Quantizer(
                plan.weight, self.output_channels, self.weight_axis, f'{name}.weight_quantizer'
            )
            quantizer.owners.append(name)
            self.weight_quantizer = quantizer.to(self.weight.device)

    def _plan_smoothing(self, spec: Optional[SmoothSpec]) -> None:
        """Gives the layer the buffers that ``spec`` needs; at first they change nothing."""
        for name in ('smooth_alpha', 'smooth_scale', 'smooth_weight'):
            self._buffers.pop(name, None)
        self.smooth_spec, self.smooth_note, self.smooth_producers, self._smoothing = spec, '', (), False
        if spec is not None:
            device = self.weight.device
            self.register_buffer('smooth_alpha', torch.full((), math.nan, device=device))
            name = 'smooth_scale' if spec.mode == 'static' else 'smooth_weight'
            self.register_buffer(name, torch.ones(self.input_channels, device=device))

    @property
    def smoothing(self) -> bool:
        """Whether the input is multiplied before it is quantized, because no layer before does it."""
        return self._smoothing

    def refresh_smoothing(self) -> None:
        """Looks whether the buffers ask for anything: scales of one cost nothing."""
        spec = self.smooth_spec
        if spec is None:
            self._smoothing = False
        elif spec.mode == 'static':
            self._smoothing = bool((self.smooth_scale != 1).any())
        else:
            self._smoothing = not bool(self.smooth_alpha.isnan())

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if self.smooth_spec is not None:
            # A float checkpoint has no scales, and that is no mistake.
            for name in ('smooth_alpha', 'smooth_scale', 'smooth_weight'):
                if prefix + name in missing_keys:
                    missing_keys.remove(prefix + name)
            self.refresh_smoothing()

    def quantizers(self) -> List[Quantizer]:
        return super().quantizers() + ([] if self.weight_quantizer is None else [self.weight_quantizer])

    def calibrate_weight(self) -> None:
        """Sets the ranges of the weight from the weight as it is now."""
        quantizer = self.weight_quantizer
        if quantizer is not None:
            spec = quantizer.spec
            rows = self.output_first(self.weight.detach())
            quantizer.set_range(numerics.weight_amax(rows, spec.bits, spec.calibrator, spec.percentile))

    def _weight_range(self, weight: Tensor) -> Optional[Tensor]:
        if self.weight_quantizer is None or self.weight_quantizer.mode is not Mode.SIGNED:
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
