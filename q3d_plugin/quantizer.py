"""The quantizer of one tensor: the only room that imports pytorch_quantization.

:class:`Quantizer` is a ``TensorQuantizer``, so that tools which look for those (NVIDIA's export scripts, for
example) find them, with four differences: its state is in buffers that every framework's loader copies,
signedness can be decided by calibration, statistics go to a
:class:`~q3d_plugin.observer.MagnitudeHistogram`, and the arithmetic is
:func:`q3d_plugin.numerics.fake_quantize`.
"""

import enum
import weakref
from typing import Dict, Optional, Tuple, Union

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor

from q3d_plugin import numerics
from q3d_plugin.errors import Q3DError
from q3d_plugin.observer import MagnitudeHistogram
from q3d_plugin.recipe import ActivationSpec, WeightSpec

__all__ = ['Mode', 'Quantizer', 'largest_magnitude']


class Mode(enum.IntEnum):
    """What a quantizer does."""

    UNCALIBRATED = 0
    """It has no range yet: a forward pass is an error."""
    SIGNED = 1
    """It quantizes to signed integers."""
    UNSIGNED = 2
    """It quantizes to unsigned integers."""
    FLOAT = 3
    """It lets its input through: it saw no data, or the recipe's mode is float."""
    DYNAMIC_SIGNED = 4
    """As SIGNED, by the largest magnitude of the current tensor."""
    DYNAMIC_UNSIGNED = 5
    """As UNSIGNED, by the largest magnitude of the current tensor."""


def largest_magnitude(*tensors: Tensor) -> Tensor:
    """The largest magnitude in some tensors, a scalar without gradient; 0 where all are empty.

    Args:
        tensors: Any shapes.
    """
    found = [numerics.extremes(t.detach()).abs().amax().to(t.dtype) for t in tensors if t.numel()]
    return torch.stack(found).amax() if found else torch.zeros(())


class Quantizer(TensorQuantizer):
    """Fake-quantizes one tensor, per tensor or per channel.

    Args:
        spec: Bits, calibrator and (for activations) signedness.
        channels: Number of output channels of a weight; None for an activation.
        axis: The axis of the weight's output channels.
        name: Whose quantizer it is, for messages.

    Attributes:
        spec: As given.
        owners: Names of the layers that share it.
        observer: Statistics, while :attr:`observing`.
        seen: What the last calibration saw, compact and in plain data; None before one.
        used: Whether it was called since this was last set to False, switched off or not.

    Shape:
        - Input: any floating point tensor. Output: the same shape and dtype.
    """

    def __init__(
        self,
        spec: Union[ActivationSpec, WeightSpec],
        channels: Optional[int] = None,
        axis: Optional[int] = None,
        name: str = '',
    ) -> None:
        descriptor = QuantDescriptor(num_bits=spec.bits, axis=None if channels is None else axis)
        super().__init__(descriptor)
        # The package's own calibrators are replaced by the observer: its histogram calls .cuda() and knows
        # one rank.
        self._calibrator = None
        self.spec = spec
        self.name = name
        self.owners = []
        self.observer: Optional[MagnitudeHistogram] = None
        self.seen: Optional[Dict] = None
        self.finite = True
        self.used = False
        self._memo = None
        shape = () if channels is None else (channels,)
        self.register_buffer('_amax', torch.zeros(shape))
        # Mode and bits are in a buffer, so that a quantized checkpoint describes itself to any loader. NCCL,
        # by which DistributedDataParallel broadcasts buffers, has no 16-bit integers.
        self.register_buffer('_state', torch.tensor([Mode.UNCALIBRATED, spec.bits], dtype=torch.int32))
        self._set_mode(Mode.UNCALIBRATED)

    @property
    def mode(self) -> Mode:
        """What it does at present."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._set_mode(Mode(value))
        self._state[0] = int(value)

    def _set_mode(self, mode: Mode) -> None:
        # Kept apart: looked at in every forward pass.
        self._mode = mode
        self._unsigned = mode in (Mode.UNSIGNED, Mode.DYNAMIC_UNSIGNED)
        self._dynamic = mode in (Mode.DYNAMIC_SIGNED, Mode.DYNAMIC_UNSIGNED)

    @property
    def unsigned(self) -> bool:
        """Whether the integers start at zero."""
        return self._unsigned

    @property
    def dynamic(self) -> bool:
        """Whether the range is the largest magnitude of the current tensor."""
        return self._dynamic

    @property
    def per_channel(self) -> bool:
        """Whether it has one range per output channel, as weights have."""
        return self._amax.dim() > 0

    @property
    def shared(self) -> bool:
        """Whether several layers read the tensor that it quantizes."""
        return len(self.owners) > 1

    @property
    def observing(self) -> bool:
        """Whether it takes statistics and lets its input through unchanged."""
        return self.observer is not None

    def observe(self) -> None:
        """Starts to take statistics."""
        self.observer = MagnitudeHistogram()
        self.finite = True
        self._memo = None

    def set_range(self, amax: Tensor, unsigned: bool = False) -> None:
        """Ends calibration with a range.

        Args:
            amax: Scalar, or (C,) for a weight. A dynamic range replaces it for every tensor.
            unsigned: Whether the integers start at zero.
        """
        self._amax.copy_(amax.to(self._amax).reshape(self._amax.shape))
        if getattr(self.spec, 'range', 'static') == 'dynamic':
            self.mode = Mode.DYNAMIC_UNSIGNED if unsigned else Mode.DYNAMIC_SIGNED
        else:
            self.mode = Mode.UNSIGNED if unsigned else Mode.SIGNED
        self._end_observing()

    def leave_float(self) -> None:
        """From now on lets its input through."""
        self.mode = Mode.FLOAT
        self._end_observing()

    def _end_observing(self) -> None:
        self._memo = None
        if self.observer is not None:
            self.seen = self.observer.compact()
        self.observer = None

    def forward(self, inputs: Tensor, inplace: bool = False, amax: Optional[Tensor] = None) -> Tensor:
        """Observes, quantizes or passes on ``inputs``, as the mode says.

        Args:
            inputs: Any floating point tensor.
            inplace: Whether ``inputs`` may be overwritten, which saves a copy; without gradients only.
            amax: A range for this one tensor, in place of the calibrated one.

        Raises:
            Q3DError: It was never calibrated.
        """
        self.used = True
        if self._disabled or inputs.numel() == 0:
            return inputs
        if self.observer is not None:
            if not self._seen_before(inputs):
                self.finite = self.observer.update(inputs) and self.finite
                self._remember(inputs, inputs)
            return inputs
        if self._mode is Mode.FLOAT:
            return inputs
        if self._mode is Mode.UNCALIBRATED:
            raise Q3DError(
                f'{self.name or "a quantizer"} has no range: the model has Quant types but was not '
                "calibrated. Add custom_hooks = [dict(type='QuantHook', recipe=dict(...))] to the config "
                '(OpenPCDet: a Quant detector such as NAME: QuantCenterPoint, the recipe under MODEL.QUANT), '
                'or load a quantized checkpoint'
            )
        if amax is not None:
            return numerics.fake_quantize(inputs, amax, self._num_bits, self._unsigned, self._axis, inplace)
        if self._seen_before(inputs):
            return self._memo[3]
        if self._on_grid(inputs):
            return inputs
        amax = largest_magnitude(inputs) if self._dynamic else self._amax
        out = numerics.fake_quantize(inputs, amax, self._num_bits, self._unsigned, self._axis, inplace)
        self._remember(inputs, out)
        if inplace and not self._dynamic and not out.is_inference():
            out._q3d_grid = (out._version, self._grid)
        return out

    @property
    def _grid(self) -> Tuple:
        """What two quantizers have in common that quantize to the same values."""
        return self._amax.tolist(), self._num_bits, self._unsigned

    def _on_grid(self, x: Tensor) -> bool:
        """Whether ``x`` came quantized to this very grid, from a concatenation: once more changes nothing.

        It spares a copy of the largest tensor of a detector. In a trace every quantizer has to appear.
        """
        tag = getattr(x, '_q3d_grid', None)
        if tag is None or self._dynamic or torch.is_grad_enabled() or torch.jit.is_tracing():
            return False
        return tag == (x._version, self._grid)

    # Layers that share a quantizer read the same tensor: it is quantized, or counted, once. The memo holds
    # the input weakly and forgets the output when the input dies, so nothing lives longer than it did.
    def _seen_before(self, x: Tensor) -> bool:
        memo = self._memo
        if memo is None or not self.shared:
            return False
        return memo[0]() is x and memo[1] == x._version and memo[2] == torch.is_grad_enabled()

    def _remember(self, x: Tensor, out: Tensor) -> None:
        if not self.shared or x.is_inference():
            return
        self_ref = weakref.ref(self)

        def forget(reference):
            quantizer = self_ref()
            if quantizer is not None and quantizer._memo is not None and quantizer._memo[0] is reference:
                quantizer._memo = None

        # A quantizer that only counts must not keep its input alive through the memo.
        kept = None if out is x else out
        self._memo = (weakref.ref(x, forget), x._version, torch.is_grad_enabled(), kept)

    def __getstate__(self):
        state = self.__dict__.copy()
        state['_memo'] = None
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Loads the buffers and takes mode and bits from them."""
        # A float checkpoint has no ranges, and that is no mistake: nothing is reported as missing. (The
        # parent's version of this method logs an error for every quantizer of every float checkpoint.)
        if prefix + '_state' not in state_dict:
            return
        torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
        mode, bits = self._state.tolist()
        self._set_mode(Mode(mode))
        self._num_bits = bits
        self._memo = None

    def extra_repr(self) -> str:
        if self._mode in (Mode.UNCALIBRATED, Mode.FLOAT):
            return f'{self._mode.name.lower()} {self._num_bits} bits'
        if self._dynamic:
            return f'{self._mode.name.lower()} {self._num_bits} bits'.replace('_', ' ')
        shape = 'per channel' if self.per_channel else f'amax={self._amax.item():.4g}'
        return f'{self._mode.name.lower()} {self._num_bits} bits {shape}'
