"""SmoothQuant for convolutions: scales move from the inputs of layers into their weights.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
carried from linear layers to convolutions, dense and sparse: for each input channel
``s = max|X|^alpha / max|W|^(1 - alpha)``, the input is divided by it and the weight multiplied. Where the
layers before can be made to produce the divided input (:mod:`q3d_plugin.transforms.graph` tells), it costs
nothing at run time. The search for alpha is in :mod:`q3d_plugin.transforms.smooth_search`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from q3d_plugin import numerics
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.transforms.graph import ChannelGraph, place_of

__all__ = ['Joint', 'Layers', 'agree_', 'joint_amax', 'probe_', 'smooth_']

Layers = Mapping[str, QuantWeightLayer]

_logger = logging.getLogger(__name__)


def agree_(graph: ChannelGraph, layers: Layers) -> None:
    """Fixes every set of channels that some layer reads which cannot have its scale changed.

    A layer without any quantizer agrees to everything: its float weight takes the scale at no cost.

    Args:
        graph: Of ``layers``; changed.
        layers: All layers with a weight.
    """
    first: Dict[int, str] = {}
    for name, layer in layers.items():
        if not layer.quantizers():
            continue
        spec, slots = layer.smooth_spec, graph.read(name)
        if spec is None:
            graph.fix(slots, f'it is also read by {name}, which is not smoothed')
        elif spec.mode != 'static':
            graph.fix(slots, 'dynamic')
        else:
            for slot in slots.tolist():
                other = first.setdefault(graph.find(slot), name)
                if other != name and layers[other].smooth_spec != spec:
                    graph.fix(np.array([slot]), f'{other} and {name} have another alpha')


class Joint(NamedTuple):
    """The extents and groups of layers that have to be scaled alike.

    Attributes:
        x_amax: Name -> (C_in,) largest magnitudes of the input, over all readers of a channel.
        weight_amax: Name -> (C_in,) largest magnitudes of the weights, over all readers of a channel.
        groups: Names of layers that have one alpha, because channels of theirs have one scale.
    """

    x_amax: Dict[str, Tensor]
    weight_amax: Dict[str, Tensor]
    groups: List[List[str]]


def joint_amax(graph: ChannelGraph, layers: Layers, x_amax: Mapping[str, Tensor]) -> Joint:
    """Largest magnitudes of inputs and weights over all layers that read a channel.

    Args:
        graph: Of all layers.
        layers: Those that are smoothed.
        x_amax: Name -> (C_in,) largest magnitudes of the input; layers without are left out.
    """
    names = [name for name in layers if name in x_amax]
    sets = graph.sets()
    specs = {spec: i for i, spec in enumerate(dict.fromkeys(layers[n].smooth_spec for n in names))}
    keys = {n: sets[graph.read(n)] * len(specs) + specs[layers[n].smooth_spec] for n in names}
    size = len(sets) * len(specs)
    device = {n: layers[n].weight.device for n in names}
    largest = []
    for values in (x_amax, {n: layers[n].input_amax().float() for n in names}):
        table = np.zeros(size, dtype=np.float32)
        for n in names:
            np.maximum.at(table, keys[n], values[n].detach().cpu().numpy())
        largest.append({n: torch.from_numpy(table[keys[n]]).to(device[n]) for n in names})
    return Joint(largest[0], largest[1], _joined(keys))


def _joined(keys: Mapping[str, np.ndarray]) -> List[List[str]]:
    """Names in groups: two that have a key in common are in one."""
    group_of: Dict[int, List[str]] = {}
    groups: List[List[str]] = []
    for name, own in keys.items():
        merged = [name]
        for other in {id(group_of[k]): group_of[k] for k in own.tolist() if k in group_of}.values():
            merged = other + merged
            groups = [g for g in groups if g is not other]
        groups.append(merged)
        for member in merged:
            group_of.update(dict.fromkeys(keys[member].tolist(), merged))
    return groups


@torch.no_grad()
def _scale_weights(
    graph: ChannelGraph, layers: Layers, factors: np.ndarray, explicit: Mapping = None
) -> None:
    """Multiplies what each slot meets in the weights that read it, and divides the weights that write it.

    A norm writes by its weight and its bias.

    Args:
        graph: Of ``layers``.
        layers: All layers with a weight.
        factors: (N,) a factor for every slot, one for all slots of a set.
        explicit: Name -> (C_in,) more factors for the weight of one reader.
    """
    done = set()
    for name, layer in layers.items():
        # In place: optimizers and averaged models hold references to the parameters.
        if place_of(layer.weight) in done:
            continue
        done.add(place_of(layer.weight))
        device = layer.weight.device
        into = torch.from_numpy(factors[graph.read(name)]).to(device)
        if explicit and name in explicit:
            into = into * explicit[name].double()
        out = torch.from_numpy(1 / factors[graph.written(name)]).to(device)
        if bool((into != 1).any()) or bool((out != 1).any()):
            weight = layer.scale_output(layer.scale_input(layer.weight.double(), into), out)
            layer.weight.copy_(weight.to(layer.weight.dtype))
            if layer.bias is not None and place_of(layer.bias) not in done:
                done.add(place_of(layer.bias))
                layer.bias.copy_((layer.bias.double() * out).to(layer.bias.dtype))
    for name, norm in graph.norms.items():
        out = torch.from_numpy(1 / factors[graph.written(name)])
        for parameter in (norm.weight, norm.bias):
            if parameter is not None and place_of(parameter) not in done and bool((out != 1).any()):
                done.add(place_of(parameter))
                parameter.copy_((parameter.double() * out.to(parameter.device)).to(parameter.dtype))


def _free(graph: ChannelGraph) -> np.ndarray:
    """(N,) whether the set of each slot has a producer, and may have its scale changed."""
    sets = graph.sets()
    produced = np.zeros(len(sets), dtype=bool)
    for name in graph.called:
        produced[sets[graph.written(name)]] = True
    return produced[sets] & ~graph.fixed()


Seen = Tuple[Mapping[str, Tensor], List[Tensor]]
"""Largest magnitudes of the inputs of layers by name, and what the model returned."""


def probe_(
    graph: ChannelGraph,
    layers: Layers,
    run: Optional[Callable[[], Seen]],
    expected: Optional[Seen],
    gather: Callable = lambda value: [value],
) -> int:
    """Checks the graph by experiment: scales channels by powers of two and looks whether anything changes.

    Code that does not go through ATen cannot be watched (extensions of other packages, NumPy). Powers of two
    change no digit, so that what the model computes has to stay the same to the last one, and the weights
    are what they were afterwards. Where something changes, the sets that are produced before that layer are
    fixed.

    Args:
        graph: Of ``layers``; changed where it was wrong.
        layers: All layers with a weight.
        run: Runs the model on one batch; None on a rank that has none.
        expected: What ``run`` gave before.
        gather: Gives the values of all ranks.

    Returns:
        int: How many times sets had to be fixed.
    """
    fixed = 0
    while True:
        sets, free = graph.sets(), _free(graph)
        factors = 2.0 ** np.random.default_rng(0).integers(-2, 3, len(sets))[sets]
        factors[~free] = 1.0
        wrong = len(graph.called) + 1
        if run is not None and free.any():
            _scale_weights(graph, layers, factors)
            try:
                seen = run()
            finally:
                _scale_weights(graph, layers, 1 / factors)
            wrong = _first_wrong(graph, seen, expected, factors)
        wrong = min(gather(wrong))
        if wrong > len(graph.called):
            return fixed
        fixed += 1
        before = graph.called[:wrong]
        slots = np.concatenate([graph.written(n) for n in before] or [np.zeros(0, dtype=int)])
        if not free[slots].any():
            slots = np.arange(len(sets))
        graph.fix(slots, 'something that cannot be watched reads it too')


def _first_wrong(graph: ChannelGraph, seen: Seen, expected: Seen, factors: np.ndarray) -> int:
    """Place in the order of calls of the first layer whose input is not what it should be."""
    for i, name in enumerate(graph.called):
        if (name in seen[0]) != (name in expected[0]):
            return i
        if name in seen[0]:
            factor = torch.from_numpy(factors[graph.read(name)]).to(seen[0][name].device)
            got, wanted = seen[0][name].double() * factor, expected[0][name].double()
            if not torch.allclose(got, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max())):
                return i
    same = len(seen[1]) == len(expected[1]) and all(
        a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(seen[1], expected[1])
    )
    return len(graph.called) + (1 if same else 0)


@torch.no_grad()
def smooth_(graph: ChannelGraph, layers: Layers, joint: Joint, alphas: Mapping[str, Optional[float]]) -> None:
    """Smooths: weights change in place, scales that nobody takes stay as explicit multiplications.

    What the model computes in float stays the same.

    Args:
        graph: Of ``layers``.
        layers: All layers with a weight.
        joint: From :func:`joint_amax`.
        alphas: From :func:`alphas_of`.
    """
    sets, free = graph.sets(), _free(graph)
    by_set, explicit, writers = np.ones(len(sets)), {}, {}
    for name in graph.called:
        for root in set(sets[graph.written(name)].tolist()):
            writers.setdefault(root, []).append(name)
    for name, alpha in alphas.items():
        layer, slots = layers[name], graph.read(name)
        layer.smooth_alpha.fill_(float('nan') if alpha is None else alpha)
        if alpha is None:
            layer.smooth_note, layer.smooth_producers = 'SmoothQuant off: no alpha lowers the error', ()
        elif layer.smooth_spec.mode == 'dynamic':
            layer.smooth_weight.copy_(joint.weight_amax[name])
            layer.smooth_note = f'SmoothQuant {alpha:g}, dynamic'
        else:
            scale = numerics.smoothing_scale(joint.x_amax[name], joint.weight_amax[name], alpha)
            taken = free[slots]
            by_set[sets[slots[taken]]] = scale.double().cpu().numpy()[taken]
            mine = torch.from_numpy(~taken).to(scale.device)
            explicit[name] = torch.where(mine, scale, torch.ones_like(scale))
            layer.smooth_scale.div_(explicit[name])
            makers = dict.fromkeys(w for r in sets[slots[taken]].tolist() for w in writers[r])
            layer.smooth_producers = tuple(makers)
            layer.smooth_note = _note(alpha, layer, graph.reason(slots[~taken]), int((~taken).sum()))
        layer.refresh_smoothing()
    _scale_weights(graph, layers, by_set[sets], explicit)


def _note(alpha: float, layer: QuantWeightLayer, reason: str, count: int) -> str:
    parts, makers = [f'SmoothQuant {alpha:g}'], layer.smooth_producers
    if makers:
        more = f' and {len(makers) - 2} more' if len(makers) > 2 else ''
        parts.append(f'scale in {", ".join(makers[:2])}{more}')
    if count:
        channels = f' of {count} channels' if makers else ''
        parts.append(f'explicit multiplication{channels}: {reason or "no producer"}')
    return ', '.join(parts)
