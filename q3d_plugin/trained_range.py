"""The range of a quantizer in training: fixed, a moving average, or a parameter."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from q3d_plugin import numerics
from q3d_plugin.straight_through import gradient_scale

__all__ = ['LOG2_KEY', 'TrainedRange', 'largest_magnitude', 'levels']

LOG2_KEY = '_log2_amax'
"""The entry of a training checkpoint that holds the logarithm of a learned range, beside the range."""

# A range below this is as good as zero; its logarithm is finite.
_SMALLEST = 1e-12
# A step below this would overflow when it is inverted.
_TINY = 1e-30


def largest_magnitude(*tensors: Tensor) -> Tensor:
    """The largest magnitude in some tensors, a scalar without gradient; 0 where all are empty.

    Args:
        tensors: Any shapes.
    """
    found = [numerics.extremes(t.detach()).abs().amax().to(t.dtype) for t in tensors if t.numel()]
    return torch.stack(found).amax() if found else torch.zeros((), device=tensors[0].device)


def levels(x: Tensor, amax: Tensor, high: int, axis: Optional[int] = None) -> Tensor:
    """The integers that values are rounded to, before those outside of the format are clipped.

    Args:
        x: Any shape, floating point.
        amax: Range; a scalar tensor, or one number per index of ``axis``.
        high: The largest integer of the format, which ``amax`` maps to.
        axis: The axis that has ranges of its own; None for one range for all.

    Returns:
        Tensor: Shape of ``x``; whole numbers as float32, or as float64 where ``x`` has that type.

    Examples:
        >>> levels(torch.tensor([-0.3, 0.26, 9.0]), torch.tensor(7.0), high=7)
        tensor([-0., 0., 9.])
    """
    x = x.detach()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    scale = (amax.detach().to(x.device, torch.float32) / high).clamp_min(_TINY)
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale = scale.reshape(shape)
    return (x * (1.0 / scale).to(x.dtype)).round_()


class _Tied(torch.autograd.Function):
    """The input as it is, and a gradient of zero for a parameter that had no part in it.

    DistributedDataParallel waits for the gradient of every parameter in every step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.like = torch.zeros_like(parameter)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, Tensor]:
        return grad, ctx.like


class TrainedRange(nn.Module):
    """The part of a quantizer that concerns training.

    A range that is learned is ``_amax`` itself as a parameter, or, as a logarithm, the parameter
    ``_log2_amax``, from which ``_amax`` is computed. Either way the entries of a quantized checkpoint are in
    the ``state_dict``.

    Attributes:
        trained: ``'fixed'``, ``'moving'`` or ``'learned'``.
        waiting: Whether inputs pass unchanged in training, because the schedule has not come that far.
        peak: The largest magnitude since it was last taken, where the range is a moving average.
        counting: Whether values that the range clips are counted in training.
        clipped: (2,) how many were clipped, and how many there were, since it was last taken; None where none
            were counted.
        share_of_peak: (C,) the fixed ratio of a weight's ranges to its largest magnitudes; None before the
            first step of a training.
    """

    trained = 'fixed'
    waiting = False
    peak: Optional[Tensor] = None
    counting = False
    clipped: Optional[Tensor] = None
    share_of_peak: Optional[Tensor] = None
    _synced: Optional[int] = None

    def train_range(self, kind: str, log2: bool = False) -> None:
        """From now on the range is trained in another way.

        Args:
            kind: ``'fixed'``, ``'moving'`` or ``'learned'``.
            log2: Whether the logarithm is the parameter, where it is learned.
        """
        with torch.no_grad():
            amax = self.current_range().detach().clone()
        self.trained, self.waiting, self.peak, self._synced = kind, False, None, None
        self.share_of_peak = None
        learned, was_learned = kind == 'learned', bool(self._parameters)
        if not learned and not was_learned:
            return
        for name in ('_amax', LOG2_KEY):
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        if learned and not log2:
            self.register_parameter('_amax', nn.Parameter(amax))
        else:
            self.register_buffer('_amax', amax)
        if learned and log2:
            self.register_parameter(LOG2_KEY, nn.Parameter(amax.clamp_min(_SMALLEST).log2()))

    @property
    def _logarithm(self) -> Optional[nn.Parameter]:
        return self._parameters.get(LOG2_KEY)

    @property
    def range_parameter(self) -> Optional[nn.Parameter]:
        """The parameter, where the range is learned."""
        if self.trained != 'learned':
            return None
        return self._amax if self._logarithm is None else self._logarithm

    def current_range(self) -> Tensor:
        """The range; where it is learned, with its graph."""
        log2 = self._logarithm
        if log2 is None:
            return self._amax
        if torch.is_grad_enabled():
            return log2.exp2()
        if self._synced != log2._version:
            with torch.no_grad():
                self._amax.copy_(log2.exp2())
            self._synced = log2._version
        return self._amax

    def range_gradient_factor(self, x: Tensor, high: int) -> float:
        """What the gradient of the range is multiplied by: see :func:`gradient_scale`.

        Args:
            x: The tensor that is quantized.
            high: The largest integer.
        """
        axis = self._axis if self._amax.dim() else None
        factor = gradient_scale(x, high, axis)
        # LSQ's parameter is the step, amax / high. With this factor gradient descent on amax moves the step
        # as it does there.
        return factor if self._logarithm is not None else factor * high**2

    def tied(self, x: Tensor) -> Tensor:
        """``x`` as it is, in a graph that gives the learned range a gradient of zero."""
        parameter = self.range_parameter
        if parameter is None or not (torch.is_grad_enabled() and parameter.requires_grad):
            return x
        return _Tied.apply(x, parameter)

    def note_peak(self, x: Tensor) -> None:
        """Takes the largest magnitude of ``x`` into account for the next step of the moving average."""
        largest = largest_magnitude(x).to(self._amax)
        self.peak = largest if self.peak is None else torch.maximum(self.peak, largest)

    def note_clipped(self, x: Tensor, amax: Tensor, low: int, high: int) -> None:
        """Counts the values of ``x`` that are clipped, which are those that get no gradient.

        Args:
            x: The tensor that is quantized.
            amax: Its range, a scalar.
            low: The smallest integer.
            high: The largest integer.
        """
        with torch.no_grad():
            found = levels(x, amax, high)
            inside = torch.count_nonzero((found >= low) & (found <= high))
            counted = torch.stack([x.numel() - inside, torch.full_like(inside, x.numel())])
            self.clipped = counted if self.clipped is None else self.clipped + counted

    def move(self, peak: Tensor, momentum: float) -> None:
        """A step of the moving average.

        Args:
            peak: Of all processes; a scalar, or (C,) for a weight.
            momentum: What stays of the old value.
        """
        self.peak = None
        with torch.no_grad():
            self._amax.lerp_(peak.to(self._amax).reshape(self._amax.shape), 1 - momentum)

    def __getstate__(self):
        # A copy of the model, such as that of an exponential moving average, has seen nothing.
        return {**self.__dict__, 'peak': None, 'counting': False, 'clipped': None, '_synced': None}

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        with torch.no_grad():
            self.current_range()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        log2 = state_dict.get(prefix + LOG2_KEY)
        if self._logarithm is None:
            state_dict.pop(prefix + LOG2_KEY, None)
        elif log2 is None and prefix + '_amax' in state_dict:
            state_dict[prefix + LOG2_KEY] = state_dict[prefix + '_amax'].clamp_min(_SMALLEST).log2()
        # Past TensorQuantizer's own version, which logs an error for every quantizer of a float checkpoint.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
        self._synced = None
