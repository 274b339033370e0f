"""Makes a detector that computes the same in float, but has activation outliers, to try SmoothQuant on.

    q3d spoil-checkpoint CONFIG CHECKPOINT OUT.pth --layers '*backbone*' --factor 50 --share 0.05

Some channels between two layers are multiplied by a factor in the layer that writes them and divided by it in
the layers that read them. An activation has one scale, so that its other channels lose their bits. A
LayerNorm writes channels too, as before the linear layers of a Swin: its weight and bias are multiplied.
CONFIG has Quant types, by which the layers are found; CHECKPOINT is float, and so is OUT.pth, with the same
keys.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch

from q3d_plugin import checkpoints, lifecycle, safe_load
from q3d_plugin.analysis.opening import open_bench
from q3d_plugin.bench import Bench
from q3d_plugin.commands import _common
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import replacing
from q3d_plugin.recipe import matches
from q3d_plugin.shipped import find_shipped
from q3d_plugin.transforms.graph import ChannelGraph, graph_of

TOLERANCE = 1e-3


def watched_graph(bench: Bench, batch) -> ChannelGraph:
    """Who reads which channel, from one forward pass in float."""
    lifecycle.set_enabled(bench.model, False)
    graph = graph_of(bench.model)
    with torch.no_grad(), graph.watching() as watch:
        watch.returned(bench.forward(batch))
    return graph


def choose_factors(
    graph: ChannelGraph, patterns: Sequence[str], factor: float, share: float, seed: int
) -> Tuple[np.ndarray, List[str]]:
    """Which channels are multiplied.

    Args:
        graph: Of the model.
        patterns: The layers whose inputs get outliers.
        factor: By how much.
        share: Share of the channels that can be scaled, at least one of each layer.
        seed: Chooses them.

    Returns:
        tuple: (slots,) factors, and the names of all layers that read a channel that is multiplied.

    Raises:
        Q3DError: No layer, or none with a channel that can be scaled, matches.
    """
    sets, fixed = graph.sets(), graph.fixed()
    produced = np.zeros(len(sets), dtype=bool)
    for name in graph.called:
        produced[sets[graph.written(name)]] = True
    readers = [name for name in graph.called if name in graph.layers]
    meant = [n for n in readers if any(matches(p, n) for p in patterns)]
    if not meant:
        raise Q3DError(
            f'--layers {" ".join(patterns)}: no layer of the model matches, such as {readers[0]!r}'
        )
    draw, by_set = np.random.default_rng(seed), np.ones(len(sets))
    for name in meant:
        slots = graph.read(name)
        roots = np.unique(sets[slots[produced[sets[slots]] & ~fixed[slots]]])
        roots = roots[by_set[roots] == 1]
        if len(roots):
            by_set[draw.choice(roots, max(1, round(share * len(roots))), replace=False)] = factor
    factors = by_set[sets]
    if (factors == 1).all():
        raise Q3DError(f'--layers {" ".join(patterns)}: {graph.reason(graph.read(meant[0]))} ({meant[0]})')
    return factors, [n for n in readers if (factors[graph.read(n)] != 1).any()]


def hold_parts_(graph: ChannelGraph, state: Mapping) -> None:
    """Fixes the channels of layers whose weight is a part of a parameter, as the projections of attention."""
    for name in graph.layers:
        if f'{name}.weight' not in state:
            for slots in (graph.read(name), graph.written(name)):
                graph.fix(slots, f'the weight of {name} is a part of another parameter')


def spoiled(
    bench: Bench, graph: ChannelGraph, factors: np.ndarray, state: Mapping
) -> Dict[str, torch.Tensor]:
    """The float state dict with the factors in it, BatchNorm unfolded as it was."""
    norms = {}
    for prefix, module in bench.model.named_modules():
        dot = prefix + '.' if prefix else ''
        norms.update({f'{dot}{f.layer}': f'{dot}{f.norm}' for f in getattr(module, '_q3d_folds', ())})
    out = dict(state)

    def scaled(key: str, value: torch.Tensor) -> None:
        out[key] = value.to(state[key].dtype).contiguous()

    def scaled_norm(name: str, factor: torch.Tensor) -> None:
        for part in ('weight', 'bias'):
            if f'{name}.{part}' in state:
                scaled(f'{name}.{part}', state[f'{name}.{part}'].double() * factor)

    for name in graph.norms:
        scaled_norm(name, torch.from_numpy(factors[graph.written(name)]))
    for name, layer in graph.layers.items():
        if f'{name}.weight' not in state:
            continue  # held by hold_parts_
        into = torch.from_numpy(1 / factors[graph.read(name)])
        written = torch.from_numpy(factors[graph.written(name)])
        weight = layer.scale_input(state[f'{name}.weight'].double(), into)
        if name in norms and f'{norms[name]}.weight' in state:
            scaled_norm(norms[name], written)
        else:
            weight = layer.scale_output(weight, written)
            if f'{name}.bias' in state:
                scaled(f'{name}.bias', state[f'{name}.bias'].double() * written)
        scaled(f'{name}.weight', weight)
    return out


def difference(bench: Bench, state: Mapping, batch) -> float:
    """Largest difference of the raw outputs in float, relative to the largest value of each output."""
    with torch.no_grad():
        expected = {k: v.clone() for k, v in bench.forward(batch).items()}
        bench.model.load_state_dict(state, strict=False)
        got = bench.forward(batch)
    return max(float((got[k] - v).abs().max() / v.abs().max().clamp_min(1e-12)) for k, v in expected.items())


def main(argv: Optional[List[str]] = None) -> int:
    """Writes the checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('out', type=Path)
    parser.add_argument('--layers', nargs='+', default=['*'], help='layers whose inputs get outliers')
    parser.add_argument('--factor', type=float, default=50, help='default: %(default)s')
    parser.add_argument('--share', type=float, default=0.05, help='of the channels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--set', nargs='+', default=[], metavar='KEY=VALUE', help='changes of the config')
    print(run(parser.parse_args(argv)))
    return 0


def run(args: argparse.Namespace) -> str:
    """Writes the checkpoint; returns what to say about it."""
    if not args.factor > 0 or not 0 < args.share <= 1:
        raise Q3DError(
            f'--factor {args.factor:g} --share {args.share:g}: above 0, and a share up to 1, would work'
        )
    if not args.out.parent.is_dir():
        raise Q3DError(f'{args.out}: the folder {args.out.parent} does not exist')
    bench = open_bench(args.config, args.checkpoint, _common.options_of(args))
    content = safe_load.load(str(find_shipped(args.checkpoint)))
    key = 'state_dict' if 'state_dict' in content else 'model_state'
    if checkpoints.is_quantized_checkpoint(content[key]):
        raise Q3DError(f'checkpoint {args.checkpoint!r} is quantized: a float one would work')
    batch = next(iter(bench.frames('train', 1)))
    graph = watched_graph(bench, batch)
    hold_parts_(graph, content[key])
    factors, names = choose_factors(graph, args.layers, args.factor, args.share, args.seed)
    for name, value in spoiled(bench, graph, factors, content[key]).items():
        content[key][name] = value
    error = difference(bench, content[key], batch)
    if not error < TOLERANCE:
        raise Q3DError(f'the float outputs changed by {error:.2g}: this model cannot be rescaled in this way')
    with replacing(args.out) as temporary:
        torch.save({k: content[k] for k in ('meta', key) if k in content}, temporary)
    return '\n'.join(
        [*names, f'{len(names)} layers have outliers; float outputs differ by {error:.2g}: {args.out}']
    )
