"""Which tensor carries which channels while a model is watched."""

from collections.abc import Iterator, Mapping
from typing import Any, List, Optional, Set

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from q3d_plugin.transforms.channel_sets import ChannelSets

__all__ = ['Trail', 'Trails', 'tensors_in']


class Trail:
    """The channels that one tensor carries.

    Attributes:
        slots: (C,) slots along ``axis``; ``channel_sets.NOBODY`` where no layer wrote the channel.
        axis: The axis of the channels.
        read: Whether anything was done with the tensor.
    """

    __slots__ = ('axis', 'read', 'slots')

    def __init__(self, slots: np.ndarray, axis: int) -> None:
        self.slots, self.axis, self.read = slots, axis, False


class Trails:
    """The trails of all tensors of one forward pass, and the tensors that hold nothing but zeros.

    Args:
        sets: The sets that slots are united in.

    Attributes:
        ids: Of all tensors that ever had a trail or were zeros; looking there first costs much less.
        all: Every trail.
        ended: Tensors that an operation made which follows no scale, and the name of that operation.
    """

    def __init__(self, sets: ChannelSets) -> None:
        self.sets = sets
        self.zeros = WeakTensorKeyDictionary()
        self.ids: Set[int] = set()
        self.all: List[Trail] = []
        self.ended = WeakTensorKeyDictionary()
        self._trails = WeakTensorKeyDictionary()
        self._whole = WeakTensorKeyDictionary()

    def of(self, x: Any) -> Optional[Trail]:
        """The trail of ``x``; None where it has none, or is no tensor."""
        return self._trails.get(x) if isinstance(x, Tensor) else None

    def looked_at(self, tensor: Tensor) -> Optional[Trail]:
        """The trail of a tensor that is read."""
        trail = self.of(tensor)
        if trail is not None:
            trail.read = True
        return trail

    def are_zeros(self, tensor: Tensor) -> None:
        """Says that ``tensor`` was made as zeros."""
        self.zeros[tensor] = True
        self.ids.add(id(tensor))

    def is_whole(self, view: Tensor, tensor: Tensor) -> None:
        """Says that ``view`` is another name of all of ``tensor``."""
        self._whole[view] = tensor
        self.ids.add(id(view))

    def whole(self, x: Any) -> Any:
        """The tensor that ``x`` is another name of; ``x`` itself where it is not known to be one."""
        return self._whole.get(x, x) if isinstance(x, Tensor) else x

    def follow(self, out: Tensor, slots: np.ndarray, axis: int) -> bool:
        """``out`` carries ``slots`` from now on; False where that cannot be."""
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[axis] != len(slots):
            return False
        old = self._trails.get(out)
        if old is not None:
            # In place: what was there before is the same tensor.
            if old.axis != axis or len(old.slots) != len(slots):
                return False
            self.sets.unite(old.slots, slots)
            return True
        trail = Trail(slots, axis)
        self._trails[out] = trail
        self.ids.add(id(out))
        self.all.append(trail)
        return True


def tensors_in(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Every tensor in a nest of containers, sparse tensors and data samples."""
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or value is None or isinstance(value, (str, bytes, int, float)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif isinstance(getattr(value, 'features', None), Tensor):
        yield value.features
    elif hasattr(value, '__dict__') and not isinstance(value, (type, torch.nn.Module)):
        yield from tensors_in(vars(value), depth - 1)
