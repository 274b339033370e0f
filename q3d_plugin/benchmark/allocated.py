"""Peak of the memory that tensors take, of one call within this process."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ['peak_of', 'size_of']


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, those that share memory counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def peak_of(function: Callable[[], Any], model: nn.Module, device: torch.device) -> int:
    """Bytes that a model takes together with what a call allocates, at the peak.

    On the CPU those tensors are counted that an operation of torch gives back, forward and backward; what an
    operation allocates for itself is not seen there.

    Args:
        function: Called once.
        model: Whose parameters and buffers are counted as there from the beginning.
        device: Where it runs.
    """
    own = size_of([*model.parameters(), *model.buffers()])
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return own + torch.cuda.max_memory_allocated(device) - before
    with _Allocated() as seen:
        function()
    return own + seen.peak


class _Allocated(TorchDispatchMode):
    """Follows the memory of the tensors that operations give back.

    Attributes:
        peak: The largest sum in bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Dict[int, Tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What comes in was there before, or is known.
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._note(tensor, new=True)
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes() if new else 0
            self.now += size
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), size

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)[1]


def _tensors(value: Any) -> Iterable[Tensor]:
    return (v for v in tree_flatten(value)[0] if isinstance(v, Tensor) and v.layout is torch.strided)
