"""Remembers what was computed from a tensor, for other layers that read the same tensor."""

import weakref
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

__all__ = ['TensorMemo']

# From torch 2.4 on.
_top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)


def _region() -> Any:
    """Stands for the region of activation checkpointing that is being recorded; None outside of all."""
    if _top_hooks is not None:
        hooks = _top_hooks(True)
        return None if hooks is None else id(hooks[0])
    # Older versions only tell whether there is one: hooks cannot be set where a region has set some. Two of
    # them cannot be told apart, so that nothing is handed over inside of any.
    probe = torch.zeros((), requires_grad=True).exp()
    try:
        probe.grad_fn._raw_saved_result.register_hooks(lambda x: x, lambda x: x)
    except RuntimeError:
        return object()
    return None


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured.

    It replays operations alone: a value that was computed outside of it would stay what it was, and one that
    was computed inside is there only once the graph ran.
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _graph_context() -> Tuple:
    """Stands for the part of the autograd graph that is being recorded.

    Activation checkpointing records a region twice, the second time during the backward pass, and what is
    saved for backward has to be the same both times. So nothing is handed from one region to another.
    """
    if not torch.is_grad_enabled():
        return (False,)
    return True, torch._C._current_graph_task_id(), _region()


def _stamp(x: Tensor) -> Tuple:
    return x._version, _capturing(x), _graph_context()


class TensorMemo:
    """One value that was computed from one tensor, for as long as that tensor lives unchanged.

    The tensor is held weakly, and the value is forgotten when it dies, so nothing lives longer than it would
    without the memo. A value that was computed with gradients is not handed to a pass without, nor from one
    region of activation checkpointing to another, nor into a CUDA graph or out of it.

    Examples:
        >>> memo, x = TensorMemo(), torch.ones(2)
        >>> memo.keep(x, 'computed')
        >>> memo.value_of(x)
        'computed'
        >>> _ = x.add_(1)
        >>> memo.value_of(x) is None
        True
    """

    def __init__(self) -> None:
        self._reference: Optional[weakref.ref] = None
        self._stamp: Tuple = ()
        self._value: Any = None

    def value_of(self, x: Tensor) -> Any:
        """The value that was computed from ``x``; None where there is none."""
        if x.is_inference():  # has no version
            return None
        # First and always: with older versions of torch a look at the region is recorded in it, and a region
        # has to be recorded in the same way each time.
        stamp = _stamp(x)
        known = self._reference is not None and self._reference() is x
        return self._value if known and self._stamp == stamp else None

    def keep(self, x: Tensor, value: Any) -> None:
        """Remembers ``value``, which is not None, for ``x``, in place of what was remembered before."""
        if x.is_inference():
            self.clear()
            return
        own = weakref.ref(self)

        def forget(reference):
            memo = own()
            if memo is not None and memo._reference is reference:
                memo.clear()

        self._reference, self._value = weakref.ref(x, forget), value
        self._stamp = _stamp(x)

    def clear(self) -> None:
        """Forgets."""
        self._reference, self._stamp, self._value = None, (), None

    def __getstate__(self):
        return {'_reference': None, '_stamp': (), '_value': None}
