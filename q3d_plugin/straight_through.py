"""Fake quantization with gradients: straight through inside the range, and for the range itself.

On the CPU this is faster than torch's own kernels, which pass over memory several times and keep a mask: here
a large tensor goes through the cache piece by piece, and the input itself is kept, which the layer before
keeps anyway. On CUDA torch's kernel does it in one pass; where the range is learned, its gradients take some
more, and the host does not wait for the device.
"""

import functools
from collections.abc import Sequence
from typing import Any, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from q3d_plugin import kernel

__all__ = ['fake_quantize', 'gradient_scale']

PIECE = 2**16
"""Elements that a thread computes on at a time: they stay in its cache."""
_HALF = (torch.float16, torch.bfloat16)
_between = torch.ops.aten.hardtanh_backward


def gradient_scale(x: Tensor, high: int, axis: Optional[int]) -> float:
    """The factor of a learned step's gradient: Esser et al. 2020 (LSQ), section 2.2, ``1 / sqrt(N * Qp)``.

    N is the number of values that one step is for: of a weight the elements of one output channel, of an
    activation those of one sample, so that it does not depend on how a batch is divided among processes.

    Args:
        x: A weight, output channel first; or an activation, samples (of sparse features: voxels) first.
        high: Qp, the largest integer.
        axis: The axis that has steps of its own; None for one step for all.
    """
    count = x.numel() // max(1, x.shape[0 if axis is None else axis]) if x.dim() else 1
    return (max(1, count) * high) ** -0.5


def fake_quantize(
    x: Tensor, amax: Tensor, scale: Tensor, axis: Optional[int], low: int, high: int, factor: float = 1.0
) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale``, with gradients.

    The gradient of ``x`` is 1 where the rounded value is within the range, and 0 elsewhere. That of the step
    is equation 3 of Esser et al. 2020, "Learned Step Size Quantization":
    ``round(x / s) - x / s`` inside, and ``low`` or ``high`` outside, times ``factor``.

    Args:
        x: Any shape, floating point.
        amax: The range; gets a gradient where it requires one.
        scale: ``amax / high``, float32, without gradients.
        axis: The axis that has ranges of its own; None for one range for all.
        low: The smallest integer.
        high: The largest integer.
        factor: Of the gradient of ``amax``.

    Returns:
        Tensor: Shape and dtype of ``x``.
    """
    learned = amax.requires_grad and torch.is_grad_enabled()
    if learned or x.device.type == 'cpu':
        return _FakeQuantize.apply(x, amax, scale, axis, low, high, factor)
    half = x.dtype in _HALF and (axis is not None or x.dtype is torch.bfloat16)
    return kernel.fake_quantize(x.float() if half else x, scale, axis, low, high).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """:func:`fake_quantize` on the CPU, and where the range is learned.

    torch's own kernels that have a gradient for the step wait for a CUDA device, twice a tensor.
    """

    @staticmethod
    def forward(ctx: Any, x, amax, scale, axis, low, high, factor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.rule = axis, low, high, factor
        ctx.amax_like = amax.detach()
        if x.device.type != 'cpu' and x.numel():
            return kernel.fake_quantize(_wide(x), scale, axis, low, high).to(x.dtype)
        if not _in_pieces(x, axis):
            wide = _wide(x)
            step = _along(scale, x, axis)
            out = (wide * (1.0 / step).to(wide.dtype)).round_().clamp_(low, high).mul_(step)
            return out.to(x.dtype)
        out = torch.empty_like(x)
        inverse, step = _number(1.0 / scale, x), _number(scale, x)
        for (source,), target in _pieces((x,), out):
            if source.dtype in _HALF:
                target.copy_((source.float() * inverse).round_().clamp_(low, high).mul_(step))
            else:
                torch.mul(source, inverse, out=target).round_().clamp_(low, high).mul_(step)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, scale = ctx.saved_tensors
        axis, low, high, factor = ctx.rule
        of_x, of_amax = ctx.needs_input_grad[:2]
        function = _backward_in_pieces if _in_pieces(x, axis) else _backward
        out, total = function(x, grad, scale, axis, low, high, of_amax)
        amax = (total * (factor / high)).to(ctx.amax_like).reshape(ctx.amax_like.shape) if of_amax else None
        return (out if of_x else None, amax, None, None, None, None, None)


def _in_pieces(x: Tensor, axis: Optional[int]) -> bool:
    """Whether a tensor goes through the cache piece by piece; weights are small."""
    return x.device.type == 'cpu' and axis is None


def _backward(
    x: Tensor, grad: Tensor, scale: Tensor, axis: Optional[int], low: int, high: int, of_amax: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    """The gradient of ``x``, and that of each step where it is wanted."""
    source, upper = _wide(x), _wide(grad)
    inverse = (1.0 / _along(scale, x, axis)).to(source.dtype)
    out, *work = (torch.empty_like(source) for _ in range(3 if of_amax else 2))
    slope = _gradients(source, inverse, upper, low, high, out, work)
    if slope is not None:
        slope.mul_(upper)
        others = [i for i in range(x.dim()) if axis is None or i != axis % x.dim()]
        slope = slope.sum(others) if others else slope
    return out.to(x.dtype), slope


def _backward_in_pieces(
    x: Tensor, grad: Tensor, scale: Tensor, axis: None, low: int, high: int, of_amax: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    """As :func:`_backward`, for one step."""
    out = torch.empty_like(x)
    sums = []
    inverse = _number(1.0 / scale, x)
    # One for all pieces: allocators may give memory of this size back to the system each time.
    work = x.new_empty((2 if of_amax else 1, min(x.numel(), _piece())), dtype=inverse.dtype)
    for (source, upper), target in _pieces((x, grad), out):
        upper = _wide(upper)
        passed = target if target.dtype is upper.dtype else torch.empty_like(upper)
        memory = work[:, : source.numel()].unbind()
        slope = _gradients(_wide(source), inverse, upper, low, high, passed, memory)
        if passed is not target:
            target.copy_(passed)
        if slope is not None:
            sums.append(torch.dot(upper, slope))
    if not of_amax:
        return out, None
    return out, torch.stack(sums).sum() if sums else x.new_zeros(())


def _gradients(
    x: Tensor, inverse: Tensor, grad: Tensor, low: int, high: int, out: Tensor, work: Sequence[Tensor]
) -> Optional[Tensor]:
    """The gradient of ``x``, and the slope of the result in the step.

    The gradient of hardtanh passes what lies between two bounds, in one pass and without a mask.

    Args:
        x: Float32 or float64.
        inverse: One over the step; broadcasts to ``x``.
        grad: Of the result; shape and dtype of ``x``.
        low: The smallest integer.
        high: The largest integer.
        out: For the gradient of ``x``.
        work: Tensors like ``x`` to compute in: one, or two where the slope is wanted.

    Returns:
        Tensor: The slope, in the first one of ``work``; None where it is not wanted.
    """
    scaled = torch.mul(x, inverse, out=work[0])
    bounds = _bounds(low, high, x.dtype)
    _between(grad, scaled, *bounds, grad_input=out)
    if len(work) == 1:
        return None
    inside = _between(scaled, scaled, *bounds, grad_input=work[1])
    return scaled.round_().clamp_(low, high).sub_(inside)


@functools.lru_cache
def _bounds(low: int, high: int, dtype: torch.dtype) -> Tuple[float, float]:
    """What lies strictly between them is rounded to ``low`` to ``high``.

    Halves are rounded to the even number, which ``low`` is and ``high`` is not.
    """
    least = torch.tensor(low - 0.5, dtype=dtype)
    return torch.nextafter(least, torch.full_like(least, -torch.inf)).item(), high + 0.5


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _number(value: Tensor, x: Tensor) -> Tensor:
    """A scalar tensor of the type that ``x`` is computed with."""
    return value.reshape(()).to(torch.float32 if x.dtype in _HALF else x.dtype)


def _along(scale: Tensor, x: Tensor, axis: Optional[int]) -> Tensor:
    if axis is None:
        return scale.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _pieces(tensors: Tuple[Tensor, ...], out: Tensor) -> Iterator[Tuple[Tuple[Tensor, ...], Tensor]]:
    """Pieces of tensors of one shape, flat, and the same pieces of ``out``, which is filled.

    Args:
        tensors: The first one says in which order elements are gone through.
        out: Of the layout of the first one, as ``empty_like`` gives it.
    """
    first = tensors[0]
    flat = [_flat(t, first) for t in tensors]
    target = _flat(out, first)
    # A tensor whose elements do not lie side by side was copied: so is the result, back.
    copied = target.data_ptr() != out.data_ptr()
    size = _piece()
    for i in range(0, first.numel(), size):
        yield tuple(t[i : i + size] for t in flat), target[i : i + size]
    if copied:
        out.copy_(target.reshape(out.shape))


def _piece() -> int:
    """Elements of one piece, for all threads."""
    return PIECE * torch.get_num_threads()


def _flat(x: Tensor, order: Tensor) -> Tensor:
    """``x`` in one dimension, in the order of memory of ``order``; a view where that is possible."""
    last = order.dim() == 4 and order.is_contiguous(memory_format=torch.channels_last)
    if last and not order.is_contiguous():
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)
