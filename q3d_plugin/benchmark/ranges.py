"""Ranges of the whole model by every calibrator: how long they take, and how well they fit."""

import dataclasses
import statistics
from typing import Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from q3d_plugin import numerics
from q3d_plugin.benchmark.peer import Peer
from q3d_plugin.benchmark.rows import PEER, Ranges, Row
from q3d_plugin.benchmark.subject import Subject, weight_layers
from q3d_plugin.benchmark.timing import seconds
from q3d_plugin.calibration import collect, compute_ranges
from q3d_plugin.layers.model import switched
from q3d_plugin.recipe import CALIBRATORS, WEIGHT_CALIBRATORS

__all__ = ['PEER_METHODS', 'RANGES_TARGET', 'measure_error', 'measure_peer_ranges', 'measure_ranges']

RANGES_TARGET = 3.0
PEER_METHODS = ('max', 'percentile', 'mse', 'entropy')


def measure_ranges(subject: Subject, bar: tqdm) -> Tuple[List[Row], Ranges]:
    """All ranges of the model by each of q3d's calibrators.

    Args:
        subject: Its quantizers are left as they were.
        bar: Progress.

    Returns:
        tuple: Rows, and the ranges of the activations by calibrator and index of the quantizer.
    """
    activations, layers = subject.activations, weight_layers(subject.model)
    with switched(subject.weights, False):
        collect(subject.model, [subject.inputs], subject.forward, activations)
    observers = [q.observer for q in activations]
    before = [(q, q.spec, q._amax.clone(), q.unsigned) for q in subject.quantizers]
    rows, ranges = [], {}

    def weights() -> None:
        for layer in layers:
            layer.calibrate_weight()

    for calibrator in CALIBRATORS:
        bar.set_postfix_str(f'ranges by {calibrator}', refresh=False)
        for_weights = calibrator if calibrator in WEIGHT_CALIBRATORS else 'max'
        for quantizer in subject.quantizers:
            kind = for_weights if quantizer.per_channel else calibrator
            quantizer.spec = dataclasses.replace(quantizer.spec, calibrator=kind)
        for quantizer, observer in zip(activations, observers):
            quantizer.observer = observer
        first = seconds(lambda: compute_ranges(activations), subject.device)
        ranges[calibrator] = {i: q._amax.item() for i, q in enumerate(activations)}
        second = seconds(weights, subject.device)
        note = f'{first:.2f} s activations, {second:.2f} s weights'
        rows.append(Row('ranges', calibrator, first + second, 's', target=RANGES_TARGET, note=note))
        bar.update()
    for quantizer, spec, amax, unsigned in before:
        quantizer.spec = spec
        quantizer.set_range(amax, unsigned)
    return rows, ranges


def measure_peer_ranges(peer: Peer, entropy_tensors: int, bar: tqdm) -> Tuple[List[Row], Ranges]:
    """The same ranges by pytorch-quantization, from the statistics of its last passes.

    Args:
        peer: After :meth:`Peer.run_max` and :meth:`Peer.run_histogram`.
        entropy_tensors: Entropy takes seconds a tensor: on how many to time it.
        bar: Progress.

    Returns:
        tuple: Rows, and the ranges of the activations by method and index of the quantizer.
    """
    device, total = peer.subject.device, len(peer.histograms)
    rows, ranges = [], {}
    weights = seconds(peer.weight_ranges, device)
    chosen = sorted({int(i) for i in np.linspace(0, total - 1, min(entropy_tensors, total))})
    for method in PEER_METHODS:
        name = f'{PEER} {method}'
        bar.set_postfix_str(f'ranges by {name}', refresh=False)
        indices = chosen if method == 'entropy' else range(total)
        found: Dict[int, float] = {}

        def compute(method=method, indices=indices, found=found) -> None:
            for i in indices:
                if method == 'max':
                    found[i] = float(peer.max[i].compute_amax())
                else:
                    found[i] = float(peer.histograms[i].compute_amax(method))

        try:
            taken = seconds(compute, device)
        except (AssertionError, RuntimeError) as error:
            cuda = method == 'mse' and not torch.cuda.is_available()
            reason = 'needs CUDA' if cuda else f'fails: {(str(error).splitlines() or [""])[0]}'
            rows.append(Row('ranges', name, None, 's', note=reason))
        else:
            ranges[method] = found
            if method == 'entropy':
                note = f'per tensor, timed on {len(found)} of {total} activations'
                rows.append(Row('ranges', name, taken / max(len(found), 1), 's a tensor', note=note))
            else:
                note = f'{taken:.2f} s activations, {weights:.2f} s weights (by max)'
                rows.append(Row('ranges', name, taken + weights, 's', note=note))
        bar.update()
    return rows, ranges


def measure_error(subject: Subject, ranges: Ranges, peer_ranges: Ranges, bar: tqdm) -> List[Row]:
    """Squared error of the activations under each set of ranges, relative to the max range's.

    Args:
        subject: Its frame is the one that the ranges are of.
        ranges: Of q3d.
        peer_ranges: Of pytorch-quantization; those of entropy for a part of the tensors.
        bar: Progress.
    """
    bar.set_postfix_str('error of the ranges', refresh=False)
    named = {name: ranges[name] for name in CALIBRATORS}
    subset = peer_ranges.get('entropy', {})
    if subset:
        named['entropy, those tensors'] = {i: ranges['entropy'][i] for i in subset}
    named.update({f'{PEER} {name}': found for name, found in peer_ranges.items() if name != 'max'})
    errors: Dict[str, Dict[int, float]] = {name: {} for name in named}

    def add(index: int, x: Tensor) -> None:
        quantizer = subject.activations[index]
        for name, found in named.items():
            if index in found:
                amax = torch.tensor(found[index], device=x.device)
                out = numerics.fake_quantize(x, amax, quantizer.spec.bits, quantizer.unsigned)
                error = out.sub_(x).square_().sum(dtype=torch.float64).item()
                errors[name][index] = errors[name].get(index, 0.0) + error

    subject.visit(add)
    bar.update()
    rows = []
    for name in named:
        relative = [e / errors['max'][i] for i, e in errors[name].items() if errors['max'][i] > 0]
        if relative:
            spread = (min(relative), max(relative))
            note = f'{len(relative)} tensors'
            rows.append(Row('error', name, statistics.fmean(relative), 'of max', spread=spread, note=note))
    return rows
