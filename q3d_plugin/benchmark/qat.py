"""The part ``qat``: a training step with quantization by kind of range, side by side with float and the peer.

On CUDA it measures in half precision, too.
"""

from collections.abc import Callable
from typing import Any, Dict, List, Tuple

import torch
from torch import nn
from tqdm import tqdm

from q3d_plugin.benchmark.allocated import peak_of
from q3d_plugin.benchmark.peer import peer_model
from q3d_plugin.benchmark.rows import PEER, Row
from q3d_plugin.benchmark.steps import qat_step_of, step_of
from q3d_plugin.benchmark.subject import Subject
from q3d_plugin.benchmark.timing import INT8_TARGET, Pass, measure_passes
from q3d_plugin.recipe import RangesSpec

__all__ = ['KINDS', 'MEMORY_TARGET', 'NOTES', 'TIME_TARGET', 'measure', 'steps']

FLOAT_STEP = 'float step, BatchNorm unfolded'
KINDS = {
    'QAT step, fixed ranges': RangesSpec('fixed', 'fixed', 'linear'),
    'QAT step, moving ranges': RangesSpec('moving', 'moving', 'linear'),
    'QAT step, learned ranges': RangesSpec('learned', 'learned', 'linear'),
    'QAT step, learned logarithms of ranges': RangesSpec('learned', 'learned', 'log2'),
}
PEER_STEP = f'{PEER} step, fixed ranges'
TIME_TARGET = {'fixed': 1.15, 'moving': 1.15, 'learned': 1.25}
MEMORY_TARGET = {'fixed': 1.4, 'moving': 1.4, 'learned': 1.5}
"""Upper bounds of the ratio to a float step, by kind of range."""
HALF_FLOAT, HALF_INT8 = 'float forward in float16', 'simulated INT8 forward in float16'
NOTES = (
    'A training step is a forward pass in training mode, a loss, its gradients, and SGD with a rate of zero, '
    'so that the weights stay; with quantization also what moves the ranges. The loss is the mean square of '
    "all outputs of the head, or with --data the detector's own.",
    'The float step computes statistics of BatchNorm; with quantization BatchNorm is folded.',
    "The peer is a copy of the model whose quantizers compute by pytorch-quantization's TensorQuantizer.",
    'Memory of a step is the peak of what tensors take, with weights and gradients; on the CPU without what '
    'an operation allocates for itself.',
)


def steps(repeats: int) -> int:
    """Steps of the progress bar."""
    passes = len(KINDS) + 2
    half = passes - 1 + 2 if torch.cuda.is_available() else 0
    return (passes + half) * (repeats + 1) + passes


def _in_half(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.autocast('cuda', dtype=torch.float16):
            return function()

    return run


def _memory(
    models: Dict[str, nn.Module], passes: Dict[str, Pass], device: torch.device, bar: tqdm
) -> List[Row]:
    """Peak memory of each pass, and its ratio to that of the reference."""
    peaks = {}
    for name, one in passes.items():
        bar.set_postfix_str(f'memory of {name}', refresh=False)
        peaks[name] = peak_of(one.function, models[name], device)
        bar.update()
    kinds = {name: ranges.activation for name, ranges in KINDS.items()}
    targets = {name: MEMORY_TARGET[kind] for name, kind in kinds.items()}
    rows = []
    for name, peak in peaks.items():
        ratio = peak / peaks[passes[name].reference]
        rows.append(Row('memory', name, peak / 2**20, 'MiB', ratio, target=targets.get(name)))
    return rows


def _passes(subject: Subject) -> Tuple[Dict[str, nn.Module], Dict[str, Pass]]:
    """The models and their steps by name."""
    step = step_of(subject, subject.float_model)
    models, passes = {FLOAT_STEP: subject.float_model}, {FLOAT_STEP: Pass(step, FLOAT_STEP)}
    for name, ranges in KINDS.items():
        models[name], step = qat_step_of(subject, ranges)
        passes[name] = Pass(step, FLOAT_STEP, TIME_TARGET[ranges.activation])
    models[PEER_STEP] = peer = peer_model(subject.model)
    passes[PEER_STEP] = Pass(step_of(subject, peer), FLOAT_STEP, note='peer')
    return models, passes


def measure(subject: Subject, repeats: int, entropy_tensors: int, bar: tqdm) -> List[Row]:
    """Training steps in time and memory, and on CUDA forward passes and steps in float16.

    Args:
        subject: The models and the frame.
        repeats: Rounds that are timed.
        entropy_tensors: Not used.
        bar: Progress.
    """
    models, passes = _passes(subject)
    rows = measure_passes('training', passes, repeats, subject.device, bar)
    if subject.device.type == 'cuda':
        half = {
            HALF_FLOAT: Pass(_in_half(subject.run_float), HALF_FLOAT),
            HALF_INT8: Pass(_in_half(subject.run_int8), HALF_FLOAT, INT8_TARGET['cuda']),
        }
        for name in (FLOAT_STEP, *KINDS):
            one = passes[name]
            half[f'{name}, float16'] = Pass(_in_half(one.function), f'{FLOAT_STEP}, float16', one.target)
        rows += measure_passes('half', half, repeats, subject.device, bar)
    return rows + _memory(models, passes, subject.device, bar)
