"""Who produces what a layer reads, channel by channel, from watching the model run.

SmoothQuant may move a scale from the input of a layer into the layers before it where everything on the way
commutes with a positive factor per channel, and where everybody who reads those channels agrees. Structure
alone does not tell: forward passes are Python. So every operation of some forward passes is looked at (on the
level of ATen) while each tensor carries the channels of the layers that it was made of.

Each layer with a weight has one *slot* for every channel that it reads and for every channel that it writes.
Slots that must have one scale are one set: the output of a convolution and the input of the one behind it,
through ReLU; both inputs and the output of an addition. A set is *free* where nothing that cannot follow a
scale takes part: the input of the model, its outputs, a sigmoid.

A LayerNorm writes channels too: its weight and its bias multiply them last. What it reads keeps its scale.

The sets are in :mod:`~q3d_plugin.transforms.channel_sets`, the channels of each tensor in
:mod:`~q3d_plugin.transforms.channel_trails`, and the operations, a rule for each, in
:mod:`~q3d_plugin.transforms.channel_rules`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.layers.model import units
from q3d_plugin.transforms.channel_rules import OperatorRules
from q3d_plugin.transforms.channel_sets import ChannelSets
from q3d_plugin.transforms.channel_trails import Trails, tensors_in

__all__ = ['ChannelGraph', 'State', 'graph_of', 'place_of', 'tensors_in', 'unwatched']

_unwatched: List[bool] = []


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Operations inside are no part of the model: no watching :class:`ChannelGraph` looks at them."""
    _unwatched.append(True)
    try:
        yield
    finally:
        _unwatched.pop()


class State(NamedTuple):
    """The findings of one rank, in types that travel between processes.

    Attributes:
        labels: (N,) for each slot, a slot of its set.
        reasons: Slot -> why its set has to keep its scale.
        called: Names of the layers in the order of their first calls.
    """

    labels: np.ndarray
    reasons: Dict[int, str]
    called: List[str]


class ChannelGraph(ChannelSets):
    """Sets of channels that have one scale, found by watching forward passes.

    Args:
        layers: Every layer with a weight of a model that can take part, with its name; also those that are
            not to be smoothed.
        norms: Every LayerNorm with a weight, with its name.
        passing: Modules that hand the channels of one of their inputs on, with their names. Their method
            ``channel_source``, called as ``forward`` is, gives that input; each channel of the output has its
            scale, on the same axis.

    Attributes:
        called: Names of layers and norms in the order of their first calls.

    Examples:
        >>> import torch
        >>> from q3d_plugin.transforms.insert import quantize_
        >>> from q3d_plugin.layers.model import set_enabled
        >>> model = quantize_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
        >>> set_enabled(model, False)
        >>> graph = graph_of(model)
        >>> with torch.no_grad(), graph.watching() as watch:
        ...     watch.returned(model(torch.zeros(1, 3, 5, 5)))
        >>> sets = graph.sets()
        >>> bool((sets[graph.written('0')] == sets[graph.read('2')]).all())
        True
        >>> graph.reason(graph.read('2')), graph.reason(graph.read('0'))
        ('', 'no producer (input of the model)')
    """

    def __init__(
        self,
        layers: Sequence[Tuple[str, QuantWeightLayer]],
        norms: Sequence[Tuple[str, nn.LayerNorm]] = (),
        passing: Sequence[Tuple[str, nn.Module]] = (),
    ) -> None:
        self.layers, self.norms, self._passing = dict(layers), dict(norms), dict(passing)
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
        for name, norm in self.norms.items():
            self._read[name] = np.zeros(0, dtype=int)
            self._written[name] = np.arange(count, count + len(norm.weight))
            count += len(norm.weight)
        super().__init__(count)
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
        for name, norm in self.norms.items():
            first = groups.setdefault(place_of(norm.weight), name)
            self.unite(self._written[first], self._written[name])

    def read(self, name: str) -> np.ndarray:
        """(C_in,) slots that the layer reads; none of a norm."""
        return self._read[name]

    def written(self, name: str) -> np.ndarray:
        """(C_out,) slots that the layer or norm writes."""
        return self._written[name]

    def state(self) -> State:
        """The findings so far, for :meth:`merge` on another rank."""
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
        for name, norm in self.norms.items():
            handles.append(norm.register_forward_pre_hook(watch.entering_norm(name), with_kwargs=True))
            handles.append(norm.register_forward_hook(watch.leaving_norm(name), with_kwargs=True))
        for name, module in self._passing.items():
            handles.append(module.register_forward_pre_hook(watch.entering_passing(name), with_kwargs=True))
            handles.append(module.register_forward_hook(watch.leaving_passing(name), with_kwargs=True))
        try:
            with watch.stack:
                watch.stack.enter_context(watch)
                yield watch
        finally:
            for handle in handles:
                handle.remove()
        watch.finish()
        if len(self.called) == len(self.layers) + len(self.norms):
            self.calls = max(self.calls, watch.calls)


class _Watch(TorchDispatchMode):
    """Follows channels through the operations of one forward pass."""

    def __init__(self, graph: ChannelGraph) -> None:
        super().__init__()
        self.graph = graph
        self.trails = Trails(graph)
        self.rules = OperatorRules(self.trails)
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
            self._note_call(name)
            x = layer.features(args[0] if args else next(iter(kwargs.values())))
            trail = self.trails.looked_at(x)
            slots = graph.read(name)
            if trail is None:
                origin = self.trails.ended.get(x)
                origin = 'input of the model' if origin is None else f'it is made by {origin}'
                graph.fix(slots, f'no producer ({origin})')
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
            self.trails.follow(y, slots, layer.channel_axis(y))
            added = args[1] if len(args) > 1 else kwargs.get('add_input')
            if isinstance(getattr(added, 'features', None), Tensor):
                self.rules.add([y, added.features], y)
            activation = getattr(layer, 'act_type', None)
            if activation is not None and str(activation).rpartition('.')[2] not in ('None_', 'ReLU'):
                self.graph.fix(slots, f'the activation in {name} does not follow a scale')
            self._count_call()

        return hook

    def _note_call(self, name: str) -> None:
        if name not in self.graph.called:
            self.graph.called.append(name)

    def _count_call(self) -> None:
        self.calls += 1
        if self.calls == self.graph.calls:
            self.stack.close()

    # Norms.

    def entering_norm(self, name: str):
        def hook(norm, args, kwargs):
            self.inside += 1
            if self.inside > 1:
                return
            self._note_call(name)
            self._fix([args, kwargs], f'it is also read by {name}, which normalizes it')

        return hook

    def leaving_norm(self, name: str):
        def hook(norm, args, kwargs, output):
            self.inside -= 1
            if self.inside:
                return
            self.trails.follow(output, self.graph.written(name), output.dim() - 1)
            self._count_call()

        return hook

    # Modules that hand channels on.

    def entering_passing(self, name: str):
        def hook(module, args, kwargs):
            self.inside += 1
            if self.inside > 1:
                return
            source = module.channel_source(*args, **kwargs)
            self.trails.looked_at(source)
            others = [x for x in tensors_in([args, kwargs]) if x is not source]
            self._fix(others, f'it is also read by {name}')

        return hook

    def leaving_passing(self, name: str):
        def hook(module, args, kwargs, output):
            self.inside -= 1
            trail = None if self.inside else self.trails.of(module.channel_source(*args, **kwargs))
            if trail is not None and not self.trails.follow(output, trail.slots, trail.axis):
                self.graph.fix(trail.slots, f'it is also read by {name}')

        return hook

    def _fix(self, value: Any, reason: str) -> None:
        for tensor in tensors_in(value):
            trail = self.trails.looked_at(tensor)
            if trail is not None:
                self.graph.fix(trail.slots, reason)

    def returned(self, value: Any) -> None:
        """Takes the value that the forward pass returned: those tensors keep their scale."""
        self._fix(value, 'it is an output of the model')

    def finish(self) -> None:
        """Fixes every tensor that nothing was seen to read: who knows what does."""
        for trail in self.trails.all:
            if not trail.read:
                self.graph.fix(trail.slots, 'it is read by something that is not a quantized layer')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.inside and not _unwatched:
            self.rules.operation(func.overloadpacket.__name__, args, kwargs, out)
        return out


def graph_of(model: nn.Module) -> ChannelGraph:
    """The graph of a model with quantized layers, before anything was watched."""
    layers = [(name, unit) for name, unit in units(model) if isinstance(unit, QuantWeightLayer)]
    modules = list(model.named_modules())
    norms = [(name, module) for name, module in modules if _multiplies_last(module)]
    passing = [(name, module) for name, module in modules if hasattr(module, 'channel_source')]
    return ChannelGraph(layers, norms, passing)


def _multiplies_last(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm over the last axis, whose weight and bias its output is made with."""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).forward is nn.LayerNorm.forward
        and len(module.normalized_shape) == 1
        # Neither without a weight nor with one that is computed from something else.
        and module._parameters.get('weight') is not None
    )


def place_of(parameter: Tensor) -> Tuple[int, Tuple[int, ...]]:
    """Where a parameter, or a part of one, lies in memory: tells whether two layers have one weight."""
    return parameter.data_ptr(), tuple(parameter.shape)
