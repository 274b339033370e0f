"""Fake quantization with gradients: straight through inside the range, and for the range itself.

On the CPU this is faster than torch's own kernels, which pass over memory several times and keep a mask: here
a large tensor goes through the cache piece by piece, and the input itself is kept, which the layer before
keeps anyway. On CUDA torch's kernels do it in one pass.
"""

from typing import Any, Iterator, Optional, Tuple

import torch
from torch import Tensor

from q3d_plugin import kernel

__all__ = ['fake_quantize', 'gradient_scale']

PIECE = 2**16
"""Elements that a thread computes on at a time: they stay in its cache."""
_HALF = (torch.float16, torch.bfloat16)


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
    if x.device.type == 'cpu':
        return _FakeQuantize.apply(x, amax, scale, axis, low, high, factor)
    half = x.dtype in _HALF and (learned or axis is not None or x.dtype is torch.bfloat16)
    source = x.float() if half else x
    if not learned:
        out = kernel.fake_quantize(source, scale, axis, low, high)
    else:
        # In one node of the graph the step has the value of ``scale``, and the gradient of ``amax``.
        step = scale + (amax.to(scale) - amax.detach().to(scale)) / high
        out = kernel.learned_fake_quantize(source, step, axis, low, high, factor)
    return out.to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """:func:`fake_quantize` on the CPU."""

    @staticmethod
    def forward(ctx: Any, x, amax, scale, axis, low, high, factor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.rule = axis, low, high, factor
        ctx.amax_type = amax.dtype, amax.shape
        if axis is not None:
            wide = _wide(x)
            step = _along(scale, x, axis).to(wide.dtype)
            out = (wide * (1.0 / step)).round_().clamp_(low, high).mul_(step)
            return out.to(x.dtype)
        out = torch.empty_like(x)
        if x.numel() == 0:
            return out
        inverse, step = _number(1.0 / scale, x), _number(scale, x)
        for (source,), target in _pieces((x,), out):
            if source.dtype in _HALF:
                target.copy_((source.float() * inverse).round_().clamp_(low, high).mul_(step))
            else:
                torch.mul(source, inverse, out=target).round_().clamp_(low, high).mul_(step)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, scale = ctx.saved_tensors
        axis, low, high, factor = ctx.rule
        rest = (None,) * 5
        of_x, of_amax = ctx.needs_input_grad[:2]
        if axis is not None:
            step = _along(scale, x, axis).to(_wide(x).dtype)
            scaled = _wide(x) * (1.0 / step)
            level = scaled.round()
            inside = (level >= low) & (level <= high)
            amax = None
            if of_amax:
                slope = torch.where(inside, level - scaled, level.clamp(low, high)).mul_(grad)
                others = [i for i in range(x.dim()) if i != axis % x.dim()]
                amax = (slope.sum(others) if others else slope) * (factor / high)
            return (grad * inside if of_x else None, _like(amax, ctx), *rest)
        out = torch.empty_like(x) if of_x else None
        sums = []
        inverse = _number(1.0 / scale, x)
        for (source, upper), target in _pieces((x, grad), out):
            source, upper = _wide(source), _wide(upper)
            scaled = source * inverse
            level = scaled.round()
            clipped = level.clamp(low, high)
            inside = torch.eq(level, clipped)
            if target is not None and target.dtype not in _HALF:
                passed = torch.mul(upper, inside, out=target)
            else:
                passed = upper * inside
                if target is not None:
                    target.copy_(passed)
            if of_amax:
                sums.append(torch.dot(upper, clipped) - torch.dot(passed, scaled))
        amax = None
        if of_amax:
            total = torch.stack(sums).sum() if sums else x.new_zeros(())
            amax = total * (factor / high)
        return (out, _like(amax, ctx), *rest)


def _like(amax: Optional[Tensor], ctx: Any) -> Optional[Tensor]:
    dtype, shape = ctx.amax_type
    return None if amax is None else amax.to(dtype).reshape(shape)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALF else x


def _number(value: Tensor, x: Tensor) -> Tensor:
    """A scalar tensor of the type that ``x`` is computed with."""
    return value.reshape(()).to(torch.float32 if x.dtype in _HALF else x.dtype)


def _along(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def _pieces(
    tensors: Tuple[Tensor, ...], out: Optional[Tensor]
) -> Iterator[Tuple[Tuple[Tensor, ...], Optional[Tensor]]]:
    """Pieces of tensors of one shape, flat, and the same pieces of ``out``, which is filled.

    Args:
        tensors: The first one says in which order elements are gone through.
        out: Of the layout of the first one, as ``empty_like`` gives it; or None.
    """
    first = tensors[0]
    flat = [_flat(t, first) for t in tensors]
    target = None if out is None else _flat(out, first)
    # A tensor whose elements do not lie side by side was copied: so is the result, back.
    copied = out is not None and target.data_ptr() != out.data_ptr()
    size = PIECE * torch.get_num_threads()
    for i in range(0, first.numel(), size):
        yield tuple(t[i : i + size] for t in flat), None if target is None else target[i : i + size]
    if copied:
        out.copy_(target.reshape(out.shape))


def _flat(x: Tensor, order: Tensor) -> Tensor:
    """``x`` in one dimension, in the order of memory of ``order``; a view where that is possible."""
    last = order.dim() == 4 and order.is_contiguous(memory_format=torch.channels_last)
    if last and not order.is_contiguous():
        return x.permute(0, 2, 3, 1).reshape(-1)
    return x.reshape(-1)
