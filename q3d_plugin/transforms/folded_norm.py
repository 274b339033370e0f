"""The module in the place of a BatchNorm that was folded, which looks whether the fold was right.

Which BatchNorm follows which layer is decided from structure and names, before anything ran, and a block may
run its modules in another order (norm, ReLU, convolution). So the first forward passes are looked at.
"""

import collections
import weakref
from collections.abc import Iterable
from typing import Any, Deque, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.numerics import extremes
from q3d_plugin.transforms.graph import unwatched

__all__ = ['FoldedNorm', 'Handover', 'came_from']

CHECKS = 4
"""How many calls of a folded BatchNorm are looked at; a block may call one several times in a pass."""

_REMEMBERED = 64
"""How many outputs of a layer may make up one input of its BatchNorm: some encoders work in pieces."""

_PLACES = 16
"""At how many positions values are compared, where the tensor itself is another one."""


class _Output(NamedTuple):
    """An output of a layer that may still reach its BatchNorm: the tensor, its version, its channel axis."""

    tensor: weakref.ref
    version: Optional[int]
    axis: int


class Handover:
    """A forward hook of a layer: what it returned, and the check that its BatchNorm gets just that.

    Removes itself once :data:`CHECKS` inputs of the BatchNorm were right.

    Args:
        layer: Name of the layer, for messages.
        norm: Name of the BatchNorm.
        block: The type that holds them.
    """

    def __init__(self, layer: str, norm: str, block: str) -> None:
        self.layer, self.norm, self.block = layer, norm, block
        self.left = CHECKS
        self._handle: Any = None
        self._forget()

    def _forget(self) -> None:
        self._outputs: Deque[_Output] = collections.deque(maxlen=_REMEMBERED)
        # Of the last one the values, too: it may be gone by the time that a copy of it is normalized.
        self._last: Optional[Tensor] = None
        self._unread = 0

    def attach(self, layer: QuantWeightLayer) -> None:
        """Looks at what ``layer`` returns from now on."""
        self._handle = layer.register_forward_hook(self)

    def __call__(self, layer: QuantWeightLayer, args: Tuple, output: Any) -> None:
        y = layer.features(output)
        if not _can_look(y) or getattr(layer, '_is_replica', False):
            return
        if self._unread == _REMEMBERED:
            raise Q3DError(self._message('but it is never called'))
        self._unread += 1
        self._outputs.append(_Output(weakref.ref(y), _version(y), layer.channel_axis(y)))
        with unwatched():
            self._last = y.detach()

    def check(self, x: Tensor) -> None:
        """Looks whether ``x`` is what the layer returned.

        Args:
            x: The input of the BatchNorm.

        Raises:
            Q3DError: It is something else.
        """
        if not self.left:
            return
        unread, self._unread = self._unread, 0
        if not _can_look(x):
            return
        if self._returned(x):
            self.left -= 1
        elif all(output.tensor() is not None for output in list(self._outputs)[-unread:-1] if unread):
            told = 'this is not what that returned' if self._outputs else 'that has not returned anything yet'
            raise Q3DError(self._message(f'but it is given a tensor of shape {tuple(x.shape)}, and {told}'))
        # Else it may be made of outputs that are gone: nothing can be said this time.
        self._last = None
        if not self.left:
            self._forget()
            self._handle.remove()

    def _returned(self, x: Tensor) -> bool:
        known = [(y, axis) for tensor, version, axis in self._outputs if _unchanged(y := tensor(), version)]
        if any(_is_same(x, y, axis) for y, axis in known):
            return True
        if self._last is not None and self._outputs[-1].tensor() is None:
            _, version, axis = self._outputs[-1]
            known += [(self._last, axis)] if _unchanged(self._last, version) else []
        with unwatched(), torch.no_grad():
            return came_from(x, [y.movedim(axis, 0) for y, axis in known])

    def _message(self, seen: str) -> str:
        return (
            f'{self.norm!r} is a BatchNorm that was folded into the layer {self.layer!r}, going by structure '
            f'and names, {seen}: the model would compute something else. Say which BatchNorm follows which '
            'layer before the model is built: q3d_plugin.layers.conventions.add_conventions(pairs={'
            f"{self.block}: lambda block: [('conv1', 'norm2')]}}), an empty list where none does"
        )

    def __getstate__(self):
        # References to tensors of this model and this process.
        return {
            **self.__dict__,
            '_outputs': collections.deque(maxlen=_REMEMBERED),
            '_last': None,
            '_unread': 0,
        }


class FoldedNorm(nn.Identity):
    """Returns its input, which at first it checks; has no parameters and no buffers.

    For a training it can be brought back to life: see :meth:`revive`.

    Args:
        handover: What the layer that the BatchNorm was folded into returned.
        eps: Of the BatchNorm.
        momentum: Of the BatchNorm.
        frozen: Whether it was one that does not learn.
    """

    def __init__(
        self, handover: Handover, eps: float = 1e-5, momentum: Optional[float] = 0.1, frozen: bool = False
    ) -> None:
        super().__init__()
        self.handover, self.eps, self.momentum, self.frozen = handover, eps, momentum, frozen

    @property
    def live(self) -> bool:
        """Whether it is a BatchNorm again."""
        return 'weight' in self._parameters

    def revive(self, mean: Tensor, var: Tensor) -> None:
        """Makes it a BatchNorm again, which at first changes nothing in eval mode.

        Its entries in the ``state_dict`` are those that the BatchNorm of a float checkpoint has, and are
        folded by whoever loads them without one.

        Args:
            mean: (C,) mean of the output of the folded layer.
            var: (C,) its variance.
        """
        self.weight = nn.Parameter((var + self.eps).sqrt())
        self.bias = nn.Parameter(mean.clone())
        self.register_buffer('running_mean', mean.clone())
        self.register_buffer('running_var', var.clone())
        self.register_buffer('num_batches_tracked', torch.zeros((), dtype=torch.long, device=mean.device))

    def bury(self) -> None:
        """Undoes :meth:`revive`, without folding anything."""
        self._parameters.clear()
        self._buffers.clear()

    def forward(self, input: Tensor) -> Tensor:
        if self.handover.left and not getattr(self, '_is_replica', False):
            self.handover.check(input)
        if not self.live:
            return input
        momentum = self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            # As nn.BatchNorm has it: without a momentum the average over all batches.
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.0 if momentum is None else momentum,
            self.eps,
        )

    def extra_repr(self) -> str:
        return f'behind {self.handover.layer}' if self.live else f'in {self.handover.layer}'


def _can_look(x: Any) -> bool:
    """Whether ``x`` holds values, and not those of a program that is only written down."""
    if not isinstance(x, Tensor) or x.numel() == 0 or x.device.type == 'meta':
        return False
    return not torch.jit.is_tracing() and not _is_compiling()


_is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)  # torch 2.1 has none


def _version(x: Tensor) -> Optional[int]:
    return None if x.is_inference() else x._version


def _unchanged(x: Optional[Tensor], version: Optional[int]) -> bool:
    return x is not None and _version(x) == version


def _is_same(x: Tensor, y: Tensor, axis: int) -> bool:
    """Whether ``x``, whose channels are on axis 1, is ``y`` or a view of all of it with the same channels."""
    if x is y:
        return axis == 1
    same = x.dim() > 1 and x.data_ptr() == y.data_ptr() and x.numel() == y.numel() and x.dtype == y.dtype
    return same and x.shape[1] == y.shape[axis] and x.stride(1) == y.stride(axis)


def came_from(x: Tensor, outputs: Iterable[Tensor]) -> bool:
    """Whether the values of each channel of ``x`` are among those of the same channel of ``outputs``.

    Some values of ``x`` are looked at. So rows may have been moved, left out or joined on the way; the
    result of an activation is something else.

    Args:
        x: (N, C, ...).
        outputs: (C, ...) each.

    Examples:
        >>> x = torch.randn(2, 3, 4)
        >>> y = x.transpose(0, 1)
        >>> came_from(x, [y[:, 1:], y[:, :1]]), came_from(x.relu(), [y])
        (True, False)
    """
    if x.dim() < 2:
        return False
    rows = x.transpose(0, 1).flatten(1)
    step = max(1, rows.shape[1] // _PLACES) | 1
    # With the smallest and the largest value: those an activation changes, where it changes little.
    rows = torch.cat([rows[:, ::step], extremes(rows, dim=1).t()], dim=1)
    found = rows.isnan()
    for y in outputs:
        if len(y) == len(rows):
            # In the type of x, which may have been cast; one position at a time, so that copies stay small.
            values = y.flatten(1).to(x.dtype)
            hits = [(values == place[:, None]).any(1) for place in rows.unbind(1)]
            found = found | torch.stack(hits, dim=1)
    return bool(found.all())
