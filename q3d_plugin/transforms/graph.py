"""Who produces what a layer reads, channel by channel, from watching the model run.

SmoothQuant may move a scale from the input of a layer into the layers before it where everything on the way
commutes with a positive factor per channel, and where everybody who reads those channels agrees. Structure
alone does not tell: forward passes are Python. So every operation of some forward passes is looked at (on the
level of ATen) while each tensor carries the channels of the layers that it was made of.

Each layer with a weight has one *slot* for every channel that it reads and for every channel that it writes.
Slots that must have one scale are one set: the output of a convolution and the input of the one behind it,
through ReLU; both inputs and the output of an addition. A set is *free* where nothing that cannot follow a
scale takes part: the input of the model, its outputs, a sigmoid.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from q3d_plugin.layers import QuantWeightLayer

__all__ = ['ChannelGraph', 'State', 'place_of', 'tensors_in']

_NOBODY = -1
"""In the place of a slot: a channel that no layer with a weight wrote."""

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


class _Trail:
    """Where the channels of one tensor come from.

    Attributes:
        slots: (C,) slots along ``axis``; :data:`_NOBODY` where no layer wrote the channel.
        axis: The axis of the channels.
        read: Whether anything was done with the tensor.
    """

    __slots__ = ('axis', 'read', 'slots')

    def __init__(self, slots: np.ndarray, axis: int) -> None:
        self.slots, self.axis, self.read = slots, axis, False


class State(NamedTuple):
    """What one rank saw, in types that travel between processes.

    Attributes:
        labels: (N,) for each slot, a slot of its set.
        reasons: Slot -> why its set has to keep its scale.
        called: Names of the layers in the order of their first calls.
    """

    labels: np.ndarray
    reasons: Dict[int, str]
    called: List[str]


class ChannelGraph:
    """Sets of channels that have one scale, found by watching forward passes.

    Args:
        layers: Every layer with a weight of a model that can take part, with its name; also those that are
            not to be smoothed.

    Examples:
        >>> from torch import nn
        >>> from q3d_plugin.transforms.insert import quantize_
        >>> from q3d_plugin.lifecycle import set_enabled, units
        >>> model = quantize_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
        >>> set_enabled(model, False)
        >>> graph = ChannelGraph(units(model))
        >>> with graph.watching() as watch:
        ...     watch.returned(model(torch.zeros(1, 3, 5, 5)))
        >>> sets = graph.sets()
        >>> bool((sets[graph.written('0')] == sets[graph.read('2')]).all())
        True
        >>> graph.reason(graph.read('2')), graph.reason(graph.read('0'))
        ('', 'no producer (input of the model)')
    """

    def __init__(self, layers: Sequence[Tuple[str, QuantWeightLayer]]) -> None:
        self.layers = dict(layers)
        self._read: Dict[str, np.ndarray] = {}
        self._written: Dict[str, np.ndarray] = {}
        count = 0
        for name, layer in self.layers.items():
            for slots, size in (
                (self._read, layer.input_channels),
                (self._written, layer.output_channels),
            ):
                slots[name] = np.arange(count, count + size)
                count += size
        self._parent = np.arange(count)
        self._reasons: Dict[int, str] = {}
        self.called: List[str] = []
        self.calls = 0  # of a whole pass, known once every layer was called
        self._unite_by_structure()

    def _unite_by_structure(self) -> None:
        groups: Dict[Any, str] = {}
        for name, layer in self.layers.items():
            # Layers that are declared to read one tensor, and layers that have one weight.
            if layer.input_group is not None:
                first = groups.setdefault(id(layer.input_group), name)
                if len(self._read[first]) == len(self._read[name]):
                    self.unite(self._read[first], self._read[name])
            first = groups.setdefault(place_of(layer.weight), name)
            self.unite(self._read[first], self._read[name])
            self.unite(self._written[first], self._written[name])

    def read(self, name: str) -> np.ndarray:
        """(C_in,) slots that the layer reads."""
        return self._read[name]

    def written(self, name: str) -> np.ndarray:
        """(C_out,) slots that the layer writes."""
        return self._written[name]

    def find(self, slot: int) -> int:
        """The slot that stands for the set of ``slot``."""
        parent, root = self._parent, slot
        while parent[root] != root:
            root = parent[root]
        while parent[slot] != root:
            parent[slot], slot = root, parent[slot]
        return int(root)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes channel i of ``a`` and channel i of ``b`` one set, for every i."""
        for x, y in zip(a.tolist(), b.tolist()):
            if x == y:
                continue
            if x == _NOBODY or y == _NOBODY:
                self.fix(np.array([max(x, y)]), 'no producer (joined with what no layer computed)')
                continue
            x, y = self.find(x), self.find(y)
            if x != y:
                low, high = min(x, y), max(x, y)
                self._parent[high] = low
                reason = self._reasons.pop(high, None)
                if reason is not None:
                    self._reasons.setdefault(low, reason)

    def fix(self, slots: np.ndarray, reason: str) -> None:
        """Says that the sets of ``slots`` have to keep their scale."""
        for slot in slots.tolist():
            if slot != _NOBODY:
                self._reasons.setdefault(self.find(slot), reason)

    def reason(self, slots: np.ndarray) -> str:
        """Why the sets of ``slots`` have to keep their scale, the first reason; empty where they are free."""
        return next((self._reasons[r] for r in map(self.find, slots.tolist()) if r in self._reasons), '')

    def sets(self) -> np.ndarray:
        """(N,) the set of every slot, as the number of one slot of it."""
        return np.array([self.find(slot) for slot in range(len(self._parent))])

    def fixed(self) -> np.ndarray:
        """(N,) whether the set of each slot has to keep its scale."""
        roots = self.sets()
        marks = np.zeros(len(roots), dtype=bool)
        marks[list(self._reasons)] = True
        return marks[roots]

    def state(self) -> State:
        """What was seen, for :meth:`merge` on another rank."""
        return State(self.sets(), dict(self._reasons), list(self.called))

    def merge(self, other: State) -> None:
        """Adds what another rank saw of the same model."""
        self.unite(np.arange(len(other.labels)), other.labels)
        for slot, reason in other.reasons.items():
            self.fix(np.array([slot]), reason)
        self.called += [name for name in other.called if name not in self.called]

    @contextlib.contextmanager
    def watching(self) -> Iterator['_Watch']:
        """Watches one forward pass; what it returns has to be given to ``returned``.

        Once a pass has called every layer, later ones are watched up to the last call: what is done with the
        outputs is known by then, and decoding and NMS have many small operations.
        """
        watch = _Watch(self)
        handles = []
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(watch.entering(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(watch.leaving(name), with_kwargs=True))
        try:
            with watch.stack:
                watch.stack.enter_context(watch)
                yield watch
        finally:
            for handle in handles:
                handle.remove()
        watch.finish()
        if len(self.called) == len(self.layers):
            self.calls = max(self.calls, watch.calls)


class _Watch(TorchDispatchMode):
    """Follows channels through the operations of one forward pass."""

    def __init__(self, graph: ChannelGraph) -> None:
        super().__init__()
        self.graph = graph
        self.trails = WeakTensorKeyDictionary()
        self.zeros = WeakTensorKeyDictionary()
        self.ids: Set[int] = set()  # of all that were ever in one of the two: a look there costs much more
        self.all: List[_Trail] = []
        self.inside = 0
        self.calls = 0
        self.stack = contextlib.ExitStack()

    # Layers.

    def entering(self, name: str):
        def hook(layer, args, kwargs):
            self.inside += 1
            if self.inside > 1:
                return
            graph = self.graph
            if name not in graph.called:
                graph.called.append(name)
            x = layer.features(args[0] if args else next(iter(kwargs.values())))
            trail = self._looked_at(x)
            slots = graph.read(name)
            if trail is None:
                graph.fix(slots, 'no producer (input of the model)')
            elif trail.axis != layer.channel_axis(x) or len(trail.slots) != len(slots):
                graph.fix(trail.slots, f'{name} reads its channels on another axis')
                graph.fix(slots, 'its channels lie on another axis where they are produced')
            else:
                graph.unite(slots, trail.slots)

        return hook

    def leaving(self, name: str):
        def hook(layer, args, kwargs, output):
            self.inside -= 1
            if self.inside:
                return
            y = layer.features(output)
            slots = self.graph.written(name)
            self._follow(y, slots, layer.channel_axis(y))
            added = args[1] if len(args) > 1 else kwargs.get('add_input')
            if isinstance(getattr(added, 'features', None), Tensor):
                self._add([y, added.features], y)
            activation = getattr(layer, 'act_type', None)
            if activation is not None and str(activation).rpartition('.')[2] not in ('None_', 'ReLU'):
                self.graph.fix(slots, f'the activation in {name} does not follow a scale')
            self.calls += 1
            if self.calls == self.graph.calls:
                self.stack.close()

        return hook

    def returned(self, value: Any) -> None:
        """Tells what the forward pass returned: those tensors keep their scale."""
        for tensor in tensors_in(value):
            trail = self._looked_at(tensor)
            if trail is not None:
                self.graph.fix(trail.slots, 'it is an output of the model')

    def finish(self) -> None:
        """Fixes every tensor that nothing was seen to read: who knows what does."""
        for trail in self.all:
            if not trail.read:
                self.graph.fix(trail.slots, 'it is read by something that is not a quantized layer')

    # Operations.

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.inside:
            name = func.overloadpacket.__name__
            if name in _ZEROS or (name == 'full' and args[1] == 0):
                self.zeros[out] = True
                self.ids.add(id(out))
            elif name not in _SILENT:
                self._operation(name, args, kwargs, out)
        return out

    def _operation(self, name: str, args: Tuple, kwargs: Mapping, out: Any) -> None:
        tracked = [t for t in tensors_in([args, kwargs]) if id(t) in self.ids and t in self.trails]
        if not tracked:
            # Whatever is done with zeros, by way of a view too, they may be something else afterwards.
            if args and isinstance(args[0], Tensor) and id(args[0]) in self.ids:
                self.zeros.pop(args[0], None)
            return
        inplace = name.endswith('_') and not name.endswith('__')
        for tensor in tracked:
            # What an operation in place leaves has still to be read.
            if not (inplace and tensor is args[0]):
                self.trails[tensor].read = True
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
                self.graph.fix(self.trails[tensor].slots, f'it is also read by {name}')

    def _follow(self, out: Tensor, slots: np.ndarray, axis: int) -> bool:
        """``out`` carries ``slots`` from now on; False where that cannot be."""
        if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[axis] != len(slots):
            return False
        old = self.trails.get(out)
        if old is not None:
            # In place: what was there before is the same tensor.
            if old.axis != axis or len(old.slots) != len(slots):
                return False
            self.graph.unite(old.slots, slots)
            return True
        trail = _Trail(slots, axis)
        self.trails[out] = trail
        self.ids.add(id(out))
        self.all.append(trail)
        return True

    def _looked_at(self, tensor: Tensor) -> Optional[_Trail]:
        trail = self.trails.get(tensor)
        if trail is not None:
            trail.read = True
        return trail

    def _trail(self, x: Any) -> Optional[_Trail]:
        return self.trails.get(x) if isinstance(x, Tensor) else None

    def _like_first(self, args, kwargs, out) -> bool:
        trail = self._trail(args[0])
        if trail is None or out.dim() != args[0].dim():
            return False
        return self._follow(out, trail.slots, trail.axis)

    def _op__prelu_kernel(self, args, kwargs, out) -> bool:
        return self._trail(args[1]) is None and self._like_first(args, kwargs, out)

    def _op_constant_pad_nd(self, args, kwargs, out) -> bool:
        value = args[2] if len(args) > 2 else kwargs.get('value', 0)
        return value == 0 and self._like_first(args, kwargs, out)

    def _op_clamp_min(self, args, kwargs, out) -> bool:
        return args[1] == 0 and not isinstance(args[1], Tensor) and self._like_first(args, kwargs, out)

    def _op_mul(self, args, kwargs, out) -> bool:
        a, b = self._trail(args[0]), self._trail(args[1])
        if (a is None) == (b is None):
            return False
        trail, x = (a, args[0]) if b is None else (b, args[1])
        axis = trail.axis + out.dim() - x.dim()
        return self._follow(out, trail.slots, axis)

    def _op_div(self, args, kwargs, out) -> bool:
        if 'rounding_mode' in kwargs or self._trail(args[0]) is None:
            return False
        return self._op_mul(args, kwargs, out)

    def _op_add(self, args, kwargs, out) -> bool:
        return self._add(args[:2], out)

    _op_sub = _op_maximum = _op_minimum = _op_add

    def _add(self, inputs, out) -> bool:
        """Both inputs and the output have one scale."""
        if not all(isinstance(x, Tensor) for x in inputs):
            return False
        slots, places = [], set()
        for x in inputs:
            trail = self._trail(x)
            if trail is None:
                if x in self.zeros:
                    continue
                return False
            slots.append(trail.slots)
            places.add((trail.axis + out.dim() - x.dim(), len(trail.slots)))
        if len(places) != 1:
            return False
        for other in slots[1:]:
            self.graph.unite(slots[0], other)
        return self._follow(out, slots[0], places.pop()[0])

    def _op_cat(self, args, kwargs, out) -> bool:
        inputs = [x for x in args[0] if x.dim() == out.dim()]
        dim = (args[1] if len(args) > 1 else kwargs.get('dim', 0)) % out.dim()
        trails = [self._trail(x) for x in inputs]
        axis = next(t.axis for t in trails if t is not None)
        if any(t is not None and t.axis != axis for t in trails):
            return False
        if dim != axis:
            return self._add(inputs, out) if len(inputs) > 1 else self._like_first(inputs, {}, out)
        parts = [np.full(x.shape[axis], _NOBODY) if t is None else t.slots for x, t in zip(inputs, trails)]
        return self._follow(out, np.concatenate(parts), axis)

    def _op_stack(self, args, kwargs, out) -> bool:
        dim = (args[1] if len(args) > 1 else kwargs.get('dim', 0)) % out.dim()
        trails = [self._trail(x) for x in args[0]]
        if any(t is None or t.axis != trails[0].axis or len(t.slots) != len(trails[0].slots) for t in trails):
            return False
        for trail in trails[1:]:
            self.graph.unite(trails[0].slots, trail.slots)
        axis = trails[0].axis
        return self._follow(out, trails[0].slots, axis + (dim <= axis))

    # Views. In row-major order a channel stays one where the product of the axes before it stays.

    def _view(self, args, kwargs, out) -> bool:
        trail, shape = self._trail(args[0]), args[0].shape
        if trail is None or out.numel() == 0:
            return False
        count, before, product = len(trail.slots), int(np.prod(shape[: trail.axis])), 1
        for axis, size in enumerate(out.shape):
            if product == before and size >= count and size % count == 0 and (size > 1 or count == 1):
                # Axes behind the channels may have been joined with them, as (C, D) to (C * D).
                return self._follow(out, np.repeat(trail.slots, size // count), axis)
            product *= size
        return False

    def _op_permute(self, args, kwargs, out) -> bool:
        order = [d % out.dim() for d in args[1]]
        trail = self._trail(args[0])
        return self._follow(out, trail.slots, order.index(trail.axis))

    def _op_transpose(self, args, kwargs, out) -> bool:
        order = list(range(out.dim()))
        a, b = args[1] % out.dim(), args[2] % out.dim()
        order[a], order[b] = b, a
        return self._op_permute((args[0], order), {}, out)

    def _op_t(self, args, kwargs, out) -> bool:
        return out.dim() == 2 and self._op_permute((args[0], [1, 0]), {}, out)

    def _op_unsqueeze(self, args, kwargs, out) -> bool:
        trail = self._trail(args[0])
        return self._follow(out, trail.slots, trail.axis + (args[1] % out.dim() <= trail.axis))

    def _op_squeeze(self, args, kwargs, out) -> bool:
        trail, shape = self._trail(args[0]), args[0].shape
        dims = args[1] if len(args) > 1 else range(len(shape))
        dims = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)}
        gone = [d for d in dims if shape[d] == 1]
        if trail.axis in gone:
            return False
        return self._follow(out, trail.slots, trail.axis - sum(d < trail.axis for d in gone))

    def _op_expand(self, args, kwargs, out) -> bool:
        trail = self._trail(args[0])
        return self._follow(out, trail.slots, trail.axis + out.dim() - args[0].dim())

    def _op_repeat(self, args, kwargs, out) -> bool:
        trail, more = self._trail(args[0]), out.dim() - args[0].dim()
        return self._follow(out, np.tile(trail.slots, args[1][trail.axis + more]), trail.axis + more)

    def _op_slice(self, args, kwargs, out) -> bool:
        trail, x = self._trail(args[0]), args[0]
        dim, start, end, step = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
        if dim % x.dim() != trail.axis:
            return self._like_first(args, kwargs, out)
        return self._follow(out, trail.slots[slice(start, end, step)], trail.axis)

    def _op_select(self, args, kwargs, out) -> bool:
        trail, dim = self._trail(args[0]), args[1] % args[0].dim()
        return dim != trail.axis and self._follow(out, trail.slots, trail.axis - (dim < trail.axis))

    def _op_unbind(self, args, kwargs, out) -> bool:
        dim = args[1] if len(args) > 1 else kwargs.get('dim', 0)
        return all(self._op_select((args[0], dim, i), {}, o) for i, o in enumerate(out))

    def _op_split(self, args, kwargs, out) -> bool:
        trail = self._trail(args[0])
        dim = (args[2] if len(args) > 2 else kwargs.get('dim', 0)) % args[0].dim()
        if dim != trail.axis:
            return all(self._like_first(args, kwargs, o) for o in out)
        ends = np.cumsum([o.shape[dim] for o in out])
        return all(self._follow(o, s, dim) for o, s in zip(out, np.split(trail.slots, ends[:-1])))

    _op_split_with_sizes = _op_split

    def _reduce(self, args, kwargs, out) -> bool:
        trail, x = self._trail(args[0]), args[0]
        dims = args[1] if len(args) > 1 else kwargs.get('dim')
        if trail is None or dims is None or isinstance(dims, Tensor):
            return False
        dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        if not dims or trail.axis in dims:
            return False
        kept = out.dim() == x.dim()
        return self._follow(out, trail.slots, trail.axis - (0 if kept else sum(d < trail.axis for d in dims)))

    # Picking and scattering: pillars and voxels on a grid that was empty.

    def _op_index_select(self, args, kwargs, out) -> bool:
        trail = self._trail(args[0])
        return args[1] % args[0].dim() != trail.axis and self._like_first(args, kwargs, out)

    def _op_index(self, args, kwargs, out) -> bool:
        trail, place = self._trail(args[0]), _one_run(args[1])
        if trail is None or place is None or any(self._trail(i) for i in args[1] if i is not None):
            return False
        start, count, dims = place
        if start <= trail.axis < start + count:
            return False
        return self._follow(out, trail.slots, trail.axis + (dims - count if trail.axis >= start else 0))

    def _op_index_put(self, args, kwargs, out) -> bool:
        target, indices, values = args[:3]
        trail, place = self._trail(values), _one_run(indices)
        adds = len(args) > 3 and args[3]
        if trail is None or place is None or adds or (target not in self.zeros and target not in self.trails):
            return False
        start, count, dims = place
        if values.dim() != target.dim() - count + dims or start <= trail.axis < start + dims:
            return False
        axis = trail.axis + (count - dims if trail.axis >= start else 0)
        done = self._follow(out, trail.slots, axis)
        self.zeros.pop(out, None)
        return done


_MANY = {'split', 'split_with_sizes', 'unbind'}
"""Operations whose rule looks at all of their results."""


def place_of(parameter: Tensor) -> Tuple[int, Tuple[int, ...]]:
    """Where a parameter, or a part of one, lies in memory: tells whether two layers have one weight."""
    return parameter.data_ptr(), tuple(parameter.shape)


def _one_run(indices: Sequence[Optional[Tensor]]) -> Optional[Tuple[int, int, int]]:
    """First axis, number of axes and dimensions of the result of integer indices that stand side by side."""
    given = [i for i, index in enumerate(indices) if index is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        return None
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in given):
        mask = indices[given[0]]
        return (given[0], 1, 1) if len(given) == 1 and mask.dim() == 1 else None
    return given[0], len(given), max(indices[i].dim() for i in given)


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
