"""Memory for large results that are short-lived, used again once nobody holds them.

The system hands out fresh memory page by page, and clears each page. For an elementwise operation on a large
tensor that takes several times as long as the arithmetic: on the CPU a fake-quantized activation of 70 MB
costs 2.1 ns an element in fresh memory and 0.4 ns in memory that was used before.
"""

import threading
from typing import List, Optional

import torch
from torch import Tensor

__all__ = ['LARGE', 'rounded', 'scratch_like']

LARGE = 2**18
"""Number of elements from which on a result is large: smaller memory stays with the process anyway."""
BUFFERS, BYTES = 2, 128 * 2**20
"""How many buffers a thread keeps at most, and how large they are together."""

PIECE = 2**16
"""Elements that a thread computes on at a time: they stay in its cache."""

_uses = getattr(torch._C, '_storage_Use_Count', None)


class _Kept(threading.local):
    """The buffers of a thread."""

    def __init__(self) -> None:
        self.buffers: List[Tensor] = []


_kept = _Kept()


def scratch_like(x: Tensor) -> Optional[Tensor]:
    """A tensor of any content with the shape, strides and type of ``x``, in memory that was used before.

    It is the caller's as long as the caller, or a view or a graph of autograd, holds it.

    Args:
        x: Its elements lie side by side in memory, in any order.

    Returns:
        Tensor: None where there is no such memory: ``x`` is small, not on the CPU, or too large; all buffers
        are in use; or tensors of this mode cannot be kept.
    """
    count, size = x.numel(), x.element_size()
    if count < LARGE or x.device.type != 'cpu' or _uses is None or torch.is_inference_mode_enabled():
        return None
    free = [b for b in _kept.buffers if b.dtype == x.dtype and _is_free(b)]
    fitting = [b for b in free if b.numel() >= count]
    if fitting:
        buffer = min(fitting, key=Tensor.numel)
    else:
        # The largest one that is free grows.
        others = [b for b in _kept.buffers if not free or b is not max(free, key=Tensor.numel)]
        used = sum(b.numel() * b.element_size() for b in others)
        if len(others) >= BUFFERS or used + count * size > BYTES:
            return None
        buffer = torch.empty(count, dtype=x.dtype)
        _kept.buffers = [*others, buffer]
    return buffer.as_strided(x.shape, x.stride())


def _is_free(buffer: Tensor) -> bool:
    """Whether nothing but the buffer itself holds its memory."""
    storage = buffer.untyped_storage()
    # The buffer, and the object that was made here to ask.
    return _uses(storage._cdata) <= 2


def rounded(
    x: Tensor, inverse: Tensor, scale: Tensor, low: int, high: int, inplace: bool = False
) -> Optional[Tensor]:
    """``clamp(round(x * inverse), low, high) * scale``, in memory that was used before.

    The chain of operations runs on a piece of the tensor while that is in the cache.

    Args:
        x: Any shape, floating point.
        inverse: Scalar.
        scale: Scalar.
        low: Lower bound.
        high: Upper bound.
        inplace: Write the result into ``x``.

    Returns:
        Tensor: None where there is no such memory, or the elements of ``x`` do not lie side by side.
    """
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    out = (x if inplace else scratch_like(x)) if dense else None
    if out is None:
        return None
    size = PIECE * torch.get_num_threads()
    sources, pieces = (t.as_strided((t.numel(),), (1,)).split(size) for t in (x, out))
    for source, piece in zip(sources, pieces):
        torch.mul(source, inverse, out=piece)
        piece.round_().clamp_(low, high).mul_(scale)
    return out
