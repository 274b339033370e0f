"""How operations of ATen carry channels from their inputs to their outputs, one rule each.

A rule is called with the arguments and the result of its operation. It gives the result a trail and returns
True, or it returns False, where the operation does not follow a scale of its input channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from q3d_plugin.transforms.channel_sets import NOBODY
from q3d_plugin.transforms.channel_trails import Trails, tensors_in

__all__ = ['OperatorRules']

# f(s * x) = s * f(x) for s > 0; the channels stay where they are.
_ELEMENTWISE = {
    'relu',
    'leaky_relu',
    'neg',
    'abs',
    'clone',
    'alias',
    'detach',
    'lift_fresh',
    '_to_copy',
    'contiguous',
}
_SPATIAL = {
    'max_pool2d_with_indices',
    'max_pool3d_with_indices',
    'max_pool2d',
    'avg_pool1d',
    'avg_pool2d',
    'avg_pool3d',
    '_adaptive_avg_pool2d',
    '_adaptive_avg_pool3d',
    'adaptive_max_pool2d',
    'adaptive_max_pool3d',
    'upsample_nearest1d',
    'upsample_nearest2d',
    'upsample_nearest3d',
    'upsample_bilinear2d',
    'upsample_bicubic2d',
    'upsample_trilinear3d',
    'upsample_linear1d',
    '_upsample_nearest_exact2d',
    'reflection_pad2d',
    'replication_pad2d',
}
_VIEWS = {'view', '_unsafe_view', 'reshape', '_reshape_alias'}
_REDUCTIONS = {'amax', 'amin', 'max', 'min', 'sum', 'mean'}
_ZEROS = {'zeros', 'new_zeros', 'zeros_like'}
# They read shapes or nothing at all.
_SILENT = {'_has_compatible_shallow_copy_type', 'is_pinned', 'record_stream', 'empty_like', 'new_empty'}
_SILENT |= {'ones_like', 'new_ones', 'new_zeros', 'zeros_like', 'rand_like', 'new_full', 'full_like'}
_MANY = {'split', 'split_with_sizes', 'unbind'}
"""Operations whose rule looks at all of their results."""


class OperatorRules:
    """Follows channels through the operations of one forward pass.

    Args:
        trails: Which tensors carry which channels; added to.
    """

    def __init__(self, trails: Trails) -> None:
        self._trails = trails

    def operation(self, name: str, args: Tuple, kwargs: Mapping, out: Any) -> None:
        """Takes note of an operation that was done.

        Args:
            name: Of the operation, without its overload.
            args: That it was called with.
            kwargs: That it was called with.
            out: What it returned.
        """
        if name in _ZEROS or (name == 'full' and args[1] == 0):
            self._trails.are_zeros(out)
        elif name not in _SILENT:
            self._follow(name, args, kwargs, out)

    def _follow(self, name: str, args: Tuple, kwargs: Mapping, out: Any) -> None:
        trails = self._trails
        tracked = [t for t in tensors_in([args, kwargs]) if id(t) in trails.ids and trails.of(t) is not None]
        if not tracked:
            if args and isinstance(args[0], Tensor) and id(args[0]) in trails.ids:
                whole = trails.whole(args[0])
                if name == 'slice' and whole in trails.zeros and out.shape == whole.shape:
                    # zeros[:, index] = x takes zeros[:] first in torch 2.1.
                    trails.is_whole(out, whole)
                else:
                    # Whatever is done with zeros, by way of a view too, they may be something else then.
                    trails.zeros.pop(whole, None)
            return
        inplace = name.endswith('_') and not name.endswith('__')
        if inplace and name != 'index_put_' and trails.whole(args[0]) is not args[0]:
            trails.zeros.pop(trails.whole(args[0]), None)
        for tensor in tracked:
            # What an operation in place leaves has still to be read.
            if not (inplace and tensor is args[0]):
                trails.of(tensor).read = True
        plain = name.rstrip('_') if inplace else name
        rule = getattr(self, f'_op_{plain}', None)
        if plain in _ELEMENTWISE | _SPATIAL:
            rule = self._like_first
        elif plain in _VIEWS:
            rule = self._view
        elif plain in _REDUCTIONS:
            rule = self._reduce
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if rule is None or not rule(args, kwargs, out if plain in _MANY else first):
            for tensor in tracked:
                trails.sets.fix(trails.of(tensor).slots, f'it is also read by {name}')
            trails.ended.update(dict.fromkeys(tensors_in(out), plain))

    def _like_first(self, args, kwargs, out) -> bool:
        trail = self._trails.of(args[0])
        if trail is None or out.dim() != args[0].dim():
            return False
        return self._trails.follow(out, trail.slots, trail.axis)

    def _op__prelu_kernel(self, args, kwargs, out) -> bool:
        return self._trails.of(args[1]) is None and self._like_first(args, kwargs, out)

    def _op_constant_pad_nd(self, args, kwargs, out) -> bool:
        value = args[2] if len(args) > 2 else kwargs.get('value', 0)
        return value == 0 and self._like_first(args, kwargs, out)

    def _op_clamp_min(self, args, kwargs, out) -> bool:
        return args[1] == 0 and not isinstance(args[1], Tensor) and self._like_first(args, kwargs, out)

    def _op_mul(self, args, kwargs, out) -> bool:
        a, b = self._trails.of(args[0]), self._trails.of(args[1])
        if (a is None) == (b is None):
            return False
        trail, x = (a, args[0]) if b is None else (b, args[1])
        axis = trail.axis + out.dim() - x.dim()
        return self._trails.follow(out, trail.slots, axis)

    def _op_div(self, args, kwargs, out) -> bool:
        if 'rounding_mode' in kwargs or self._trails.of(args[0]) is None:
            return False
        return self._op_mul(args, kwargs, out)

    def _op_add(self, args, kwargs, out) -> bool:
        return self.add(args[:2], out)

    _op_sub = _op_maximum = _op_minimum = _op_add

    def add(self, inputs: Sequence[Any], out: Tensor) -> bool:
        """The rule of an addition: all inputs and the output have one scale.

        Args:
            inputs: What was added; numbers make it no rule.
            out: The sum.

        Returns:
            bool: Whether ``out`` has a trail now.
        """
        if not all(isinstance(x, Tensor) for x in inputs):
            return False
        slots, places = [], set()
        for x in inputs:
            trail = self._trails.of(x)
            if trail is None:
                if x in self._trails.zeros:
                    continue
                return False
            slots.append(trail.slots)
            places.add((trail.axis + out.dim() - x.dim(), len(trail.slots)))
        if len(places) != 1:
            return False
        for other in slots[1:]:
            self._trails.sets.unite(slots[0], other)
        return self._trails.follow(out, slots[0], places.pop()[0])

    def _op_cat(self, args, kwargs, out) -> bool:
        inputs = [x for x in args[0] if x.dim() == out.dim()]
        dim = (args[1] if len(args) > 1 else kwargs.get('dim', 0)) % out.dim()
        trails = [self._trails.of(x) for x in inputs]
        axis = next(t.axis for t in trails if t is not None)
        if any(t is not None and t.axis != axis for t in trails):
            return False
        if dim != axis:
            return self.add(inputs, out) if len(inputs) > 1 else self._like_first(inputs, {}, out)
        parts = [np.full(x.shape[axis], NOBODY) if t is None else t.slots for x, t in zip(inputs, trails)]
        return self._trails.follow(out, np.concatenate(parts), axis)

    def _op_stack(self, args, kwargs, out) -> bool:
        dim = (args[1] if len(args) > 1 else kwargs.get('dim', 0)) % out.dim()
        trails = [self._trails.of(x) for x in args[0]]
        if any(t is None or t.axis != trails[0].axis or len(t.slots) != len(trails[0].slots) for t in trails):
            return False
        for trail in trails[1:]:
            self._trails.sets.unite(trails[0].slots, trail.slots)
        axis = trails[0].axis
        return self._trails.follow(out, trails[0].slots, axis + (dim <= axis))

    # Views: in row-major order a channel stays one where the product of the axes before it stays.

    def _view(self, args, kwargs, out) -> bool:
        trail, shape = self._trails.of(args[0]), args[0].shape
        if trail is None or out.numel() == 0:
            return False
        count, before, product = len(trail.slots), int(np.prod(shape[: trail.axis])), 1
        for axis, size in enumerate(out.shape):
            if product == before and size >= count and size % count == 0 and (size > 1 or count == 1):
                # Axes behind the channels may have been joined with them, as (C, D) to (C * D).
                return self._trails.follow(out, np.repeat(trail.slots, size // count), axis)
            product *= size
        return False

    def _op_permute(self, args, kwargs, out) -> bool:
        order = [d % out.dim() for d in args[1]]
        trail = self._trails.of(args[0])
        return self._trails.follow(out, trail.slots, order.index(trail.axis))

    def _op_transpose(self, args, kwargs, out) -> bool:
        order = list(range(out.dim()))
        a, b = args[1] % out.dim(), args[2] % out.dim()
        order[a], order[b] = b, a
        return self._op_permute((args[0], order), {}, out)

    def _op_t(self, args, kwargs, out) -> bool:
        return out.dim() == 2 and self._op_permute((args[0], [1, 0]), {}, out)

    def _op_unsqueeze(self, args, kwargs, out) -> bool:
        trail = self._trails.of(args[0])
        return self._trails.follow(out, trail.slots, trail.axis + (args[1] % out.dim() <= trail.axis))

    def _op_squeeze(self, args, kwargs, out) -> bool:
        trail, shape = self._trails.of(args[0]), args[0].shape
        dims = args[1] if len(args) > 1 else range(len(shape))
        dims = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
        gone = [d for d in dims if shape[d] == 1]
        if trail.axis in gone:
            return False
        return self._trails.follow(out, trail.slots, trail.axis - sum(d < trail.axis for d in gone))

    def _op_expand(self, args, kwargs, out) -> bool:
        trail = self._trails.of(args[0])
        return self._trails.follow(out, trail.slots, trail.axis + out.dim() - args[0].dim())

    def _op_repeat(self, args, kwargs, out) -> bool:
        trail, more = self._trails.of(args[0]), out.dim() - args[0].dim()
        return self._trails.follow(out, np.tile(trail.slots, args[1][trail.axis + more]), trail.axis + more)

    def _op_slice(self, args, kwargs, out) -> bool:
        trail, x = self._trails.of(args[0]), args[0]
        dim, start, end, step = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
        if dim % x.dim() != trail.axis:
            return self._like_first(args, kwargs, out)
        return self._trails.follow(out, trail.slots[slice(start, end, step)], trail.axis)

    def _op_select(self, args, kwargs, out) -> bool:
        trail, dim = self._trails.of(args[0]), args[1] % args[0].dim()
        return dim != trail.axis and self._trails.follow(out, trail.slots, trail.axis - (dim < trail.axis))

    def _op_unbind(self, args, kwargs, out) -> bool:
        dim = args[1] if len(args) > 1 else kwargs.get('dim', 0)
        return all(self._op_select((args[0], dim, i), {}, o) for i, o in enumerate(out))

    def _op_split(self, args, kwargs, out) -> bool:
        trail = self._trails.of(args[0])
        dim = (args[2] if len(args) > 2 else kwargs.get('dim', 0)) % args[0].dim()
        if dim != trail.axis:
            return all(self._like_first(args, kwargs, o) for o in out)
        ends = np.cumsum([o.shape[dim] for o in out])
        return all(self._trails.follow(o, s, dim) for o, s in zip(out, np.split(trail.slots, ends[:-1])))

    _op_split_with_sizes = _op_split

    def _reduce(self, args, kwargs, out) -> bool:
        trail, x = self._trails.of(args[0]), args[0]
        dims = args[1] if len(args) > 1 else kwargs.get('dim')
        if trail is None or dims is None or isinstance(dims, Tensor):
            return False
        dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        if not dims or trail.axis in dims:
            return False
        kept = out.dim() == x.dim()
        gone = 0 if kept else sum(d < trail.axis for d in dims)
        return self._trails.follow(out, trail.slots, trail.axis - gone)

    # Picking, moving and scattering: windows that are shifted, pillars and voxels on a grid that was empty.

    def _op_roll(self, args, kwargs, out) -> bool:
        # Without axes the elements move as if there were one axis.
        dims = args[2] if len(args) > 2 else kwargs.get('dims', ())
        dims = [dims] if isinstance(dims, int) else dims
        trail = self._trails.of(args[0])
        moved = {d % out.dim() for d in dims}
        return bool(moved) and trail.axis not in moved and self._like_first(args, kwargs, out)

    def _op_index_select(self, args, kwargs, out) -> bool:
        trail = self._trails.of(args[0])
        return args[1] % args[0].dim() != trail.axis and self._like_first(args, kwargs, out)

    def _op_index(self, args, kwargs, out) -> bool:
        trail, place = self._trails.of(args[0]), _one_run(args[1])
        if trail is None or place is None or any(self._trails.of(i) for i in args[1] if i is not None):
            return False
        start, count, dims = place
        if start <= trail.axis < start + count:
            return False
        more = dims - count if trail.axis >= start else 0
        return self._trails.follow(out, trail.slots, trail.axis + more)

    def _op_index_put(self, args, kwargs, out) -> bool:
        target, indices, values = args[:3]
        trail, place = self._trails.of(values), _one_run(indices)
        target, out = self._trails.whole(target), self._trails.whole(out)
        adds = len(args) > 3 and args[3]
        known = target in self._trails.zeros or self._trails.of(target) is not None
        if trail is None or place is None or adds or not known:
            return False
        start, count, dims = place
        if values.dim() != target.dim() - count + dims or start <= trail.axis < start + dims:
            return False
        axis = trail.axis + (count - dims if trail.axis >= start else 0)
        done = self._trails.follow(out, trail.slots, axis)
        self._trails.zeros.pop(out, None)
        return done


def _one_run(indices: Sequence[Optional[Tensor]]) -> Optional[Tuple[int, int, int]]:
    """First axis, number of axes and dimensions of the result of integer indices that stand side by side."""
    given = [i for i, index in enumerate(indices) if index is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        return None
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in given):
        mask = indices[given[0]]
        return (given[0], 1, 1) if len(given) == 1 and mask.dim() == 1 else None
    return given[0], len(given), max(indices[i].dim() for i in given)
