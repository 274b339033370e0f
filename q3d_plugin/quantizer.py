"""The quantizer of one tensor: the only module that imports pytorch_quantization.

:class:`Quantizer` is a ``TensorQuantizer``, so that tools which look for those (NVIDIA's export scripts, for
example) find them, and what they do to one they do to ours: ``disable``, ``disable_quant``, setting ``amax``,
``num_bits`` or ``unsigned``, and ``use_fb_fake_quant`` in an export. Four things differ: its state is in
buffers that every framework's loader copies, signedness can be decided by calibration, statistics go to a
:class:`~q3d_plugin.observer.MagnitudeHistogram`, and the arithmetic is
:func:`q3d_plugin.numerics.fake_quantize`.
"""

import dataclasses
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor

from q3d_plugin import numerics
from q3d_plugin.errors import Q3DError
from q3d_plugin.memo import TensorMemo
from q3d_plugin.modes import STAGES, UNSIGNED_MODES, Mode, Role, Stage
from q3d_plugin.observer import MagnitudeHistogram
from q3d_plugin.recipe import ActivationSpec, WeightSpec
from q3d_plugin.trained_range import TrainedRange, largest_magnitude

__all__ = ['ADVICE', 'UNSIGNED_MODES', 'Mode', 'Quantizer', 'Role', 'Stage', 'largest_magnitude']


ADVICE: List[str] = []
"""How a model gets its ranges, for messages; each adapter adds the way of its framework."""


_ITSELF = object()


class Quantizer(TrainedRange, TensorQuantizer):
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
        finite: Whether all that it observed was finite.

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
        super().__init__(QuantDescriptor(num_bits=spec.bits, axis=None if channels is None else axis))
        # The package's own calibrators are replaced by the observer: its histogram calls .cuda() and knows
        # one rank.
        self._calibrator = None
        self.register_buffer('_amax', torch.zeros(() if channels is None else (channels,)))
        # Mode and bits are in a buffer, so that a quantized checkpoint describes itself to any loader. NCCL,
        # by which DistributedDataParallel broadcasts buffers, has no 16-bit integers.
        self.register_buffer('_state', torch.zeros(2, dtype=torch.int32))
        self.configure(spec, name)

    def configure(self, spec: Union[ActivationSpec, WeightSpec], name: str = '') -> None:
        """Starts anew with another spec: switched on, without a range, owned by nobody.

        Args:
            spec: Bits, calibrator and (for activations) signedness.
            name: Whose quantizer it is, for messages.
        """
        self.spec, self.name, self.owners = spec, name, []
        self.observer: Optional[MagnitudeHistogram] = None
        self.seen: Optional[Dict] = None
        self.finite, self.used = True, False
        self._memo, self._memo_version = TensorMemo(), -1
        self._amax_read: Optional[Tuple] = None
        self._disabled, self._if_quant = False, True
        self.train_range('fixed')
        with torch.no_grad():
            self._amax.zero_()
        self._num_bits = spec.bits
        self._state[1] = spec.bits
        self.mode = Mode.UNCALIBRATED

    @property
    def role(self) -> Role:
        """The kind of tensor that it is for."""
        return Role.WEIGHT if self.per_channel else Role.ACTIVATION

    @property
    def stage(self) -> Stage:
        """The treatment that the next tensor gets."""
        if not self.enabled:
            return Stage.OFF
        if self.observer is not None:
            return Stage.OBSERVING
        return STAGES[self._mode] if self._if_quant else Stage.OFF

    @property
    def enabled(self) -> bool:
        """Whether it is switched on: see :meth:`enable` and :meth:`disable`."""
        return not self._disabled

    @property
    def has_range(self) -> bool:
        """Whether calibration, or whoever set ``amax``, gave it a range, switched on or not."""
        return STAGES[self._mode] is Stage.STATIC

    @property
    def mode(self) -> Mode:
        """Stage and signedness as checkpoints hold them."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._set_mode(Mode(value))
        self._state[0] = int(value)

    def _set_mode(self, mode: Mode) -> None:
        # Kept apart: looked at in every forward pass.
        self._mode = mode
        self._unsigned = mode in UNSIGNED_MODES
        self._dynamic = STAGES[mode] is Stage.DYNAMIC
        self._memo.clear()

    # The properties of a TensorQuantizer that can be set.

    @property
    def unsigned(self) -> bool:
        """Whether the integers start at zero."""
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        if STAGES[self._mode] in (Stage.STATIC, Stage.DYNAMIC):
            self._set_ranged(bool(value), self._dynamic)
        else:
            # QuantDescriptor and spec say it in advance.
            self._unsigned = bool(value)

    @property
    def num_bits(self) -> int:
        """Width of the integers."""
        return self._num_bits

    @num_bits.setter
    def num_bits(self, value: int) -> None:
        self._num_bits = int(value)
        self.spec = dataclasses.replace(self.spec, bits=int(value))
        self._state[1] = int(value)
        self._memo.clear()

    @property
    def amax(self) -> Optional[Tensor]:
        """The range, or ranges; None where there is none."""
        with torch.no_grad():
            return self.current_range() if self.has_range else None

    @amax.setter
    def amax(self, value: Union[float, Tensor]) -> None:
        value = torch.as_tensor(value, dtype=self._amax.dtype, device=self._amax.device)
        if value.numel() != self._amax.numel():
            raise TypeError(
                f'amax of {self.name or "a quantizer"}: {value.numel()} numbers were given, it has '
                f'{self._amax.numel()} ranges'
            )
        self._put(value)
        self._set_ranged(self._unsigned, dynamic=False)
        self._end_observing()

    def _put(self, amax: Tensor) -> None:
        # A range that somebody sets is not the one that was learned.
        self.train_range('fixed')
        with torch.no_grad():
            self._amax.copy_(amax.to(self._amax).reshape(self._amax.shape))

    @property
    def narrow_range(self) -> bool:
        """Whether the smallest integer is left out; it never is: engines use -128 too."""
        return False

    @narrow_range.setter
    def narrow_range(self, value: bool) -> None:
        if value:
            raise Q3DError('narrow_range: True was given; the integers go from -128 to 127 here (False)')

    def _set_ranged(self, unsigned: bool, dynamic: bool) -> None:
        signed = (Mode.SIGNED, Mode.DYNAMIC_SIGNED), (Mode.UNSIGNED, Mode.DYNAMIC_UNSIGNED)
        self.mode = signed[unsigned][dynamic]

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
        self._memo.clear()

    def counted(self, x: Tensor) -> bool:
        """Whether another layer that shares it has read this tensor, which is in the statistics then."""
        return self._remembered(x) is not None

    def join(self, other: 'Quantizer') -> None:
        """Takes over the statistics and the layers of another quantizer of the same spec."""
        if other.observer is not None:
            self.observer.merge(other.observer)
        self.finite, self.used = self.finite and other.finite, self.used or other.used
        self.owners += [name for name in other.owners if name not in self.owners]

    def set_range(self, amax: Tensor, unsigned: bool = False) -> None:
        """Ends calibration with a range.

        Args:
            amax: Scalar, or (C,) for a weight. A dynamic range replaces it for every tensor.
            unsigned: Whether the integers start at zero.
        """
        self._put(amax)
        self._set_ranged(unsigned, getattr(self.spec, 'range', 'static') == 'dynamic')
        self._end_observing()

    def leave_float(self) -> None:
        """From now on lets its input through."""
        self.mode = Mode.FLOAT
        self._end_observing()

    def _end_observing(self) -> None:
        self._memo.clear()
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
            return self.tied(inputs)
        if self.observer is not None:
            if self._remembered(inputs) is None:
                self.finite = self.observer.update(inputs) and self.finite
                self._remember(inputs, inputs)
            return inputs
        if self._mode is Mode.FLOAT or not self._if_quant or (self.waiting and self.training):
            return self.tied(inputs)
        if self._mode is Mode.UNCALIBRATED:
            raise Q3DError(
                f'{self.name or "a quantizer"} has no range: the model has Quant types but was not '
                f'calibrated. {"; or ".join([*ADVICE, "load a quantized checkpoint"])}'
            )
        if amax is not None:
            return self._quantize(inputs, amax, inplace)
        known = self._remembered(inputs)
        if known is not None:
            return inputs if known is _ITSELF else known
        if self._on_grid(inputs):
            return inputs
        if self.training and self.trained == 'moving':
            self.note_peak(inputs)
        range_ = largest_magnitude(inputs) if self._dynamic else self.current_range()
        if self.counting and self.training and not self._dynamic:
            self.note_clipped(inputs, range_, *numerics.bounds(self._num_bits, self._unsigned))
        out = self._quantize(inputs, range_, inplace)
        self._remember(inputs, out)
        if inplace and not self._dynamic and not out.is_inference():
            out._q3d_grid = (out._version, self._grid)
        return out

    # Layers that share a quantizer read the same tensor: it is quantized, or counted, once.
    def _remembered(self, x: Tensor) -> Any:
        if self.shared and self._memo_version != self._range_version:
            self._memo.clear()
        return self._memo.value_of(x) if self.shared else None

    @property
    def _range_version(self) -> int:
        """Another one after each change of the range in place, as training makes them."""
        parameter = self.range_parameter
        value = self._amax if parameter is None else parameter
        return 0 if value.is_inference() else value._version

    def _remember(self, x: Tensor, out: Tensor) -> None:
        if self.shared:
            self._memo_version = self._range_version
            # A tensor that was counted, or quantized in place, must not be kept alive by its own memo.
            self._memo.keep(x, _ITSELF if out is x else out)

    def _quantize(self, x: Tensor, amax: Tensor, inplace: bool) -> Tensor:
        if TensorQuantizer.use_fb_fake_quant:
            return numerics.native_fake_quantize(x, amax, self._num_bits, self._unsigned, self._axis)
        high, factor = numerics.bounds(self._num_bits, self._unsigned)[1], 1.0
        if amax.requires_grad:
            factor = self.range_gradient_factor(x, high)
        return numerics.fake_quantize(x, amax, self._num_bits, self._unsigned, self._axis, inplace, factor)

    @property
    def _grid(self) -> Tuple:
        """Range and format: two quantizers that have the same quantize to the same values."""
        # Read once, since reading waits for a CUDA device.
        stamp = self._amax, self._amax._version
        if self._amax_read is None or self._amax_read[0] is not stamp[0] or self._amax_read[1] != stamp[1]:
            self._amax_read = (*stamp, self._amax.tolist())
        return self._amax_read[2], self._num_bits, self._unsigned

    def _on_grid(self, x: Tensor) -> bool:
        """Whether ``x`` came quantized to this very grid, from a concatenation: once more changes nothing.

        It spares a copy of the largest tensor of a detector. In a trace every quantizer has to appear.
        """
        tag = getattr(x, '_q3d_grid', None)
        if tag is None or self._dynamic or torch.is_grad_enabled():
            return False
        if torch.jit.is_tracing() or TensorQuantizer.use_fb_fake_quant:
            return False
        return tag == (x._version, self._grid)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Loads the buffers and takes mode and bits from them."""
        # A float checkpoint has no ranges, and that is no mistake: nothing is reported as missing. (The
        # parent's version of this method logs an error for every quantizer of every float checkpoint.)
        if prefix + '_state' not in state_dict:
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        mode, bits = self._state.tolist()
        self._set_mode(Mode(mode))
        self._num_bits = bits
        self.spec = dataclasses.replace(self.spec, bits=bits)

    def extra_repr(self) -> str:
        words = [self.role.value, self.stage.value, f'{self._num_bits} bits']
        if self.stage in (Stage.STATIC, Stage.DYNAMIC):
            words.insert(2, 'unsigned' if self._unsigned else 'signed')
        if self.stage is Stage.STATIC:
            words.append('per channel' if self.per_channel else f'amax={self._amax.item():.4g}')
        return ' '.join(words)
