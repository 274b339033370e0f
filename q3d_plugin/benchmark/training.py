"""The part ``training``: a step of quantization-aware training, and on CUDA everything in half precision."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Dict, List

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from q3d_plugin.benchmark.rows import Row
from q3d_plugin.benchmark.subject import Subject
from q3d_plugin.benchmark.timing import INT8_TARGET, Pass, measure_passes

__all__ = ['NOTES', 'STEP_TARGET', 'measure', 'steps']

STEP_TARGET = 1.35
FLOAT_STEP, QAT_STEP = 'float step, BatchNorm unfolded', 'QAT step'
HALF_FLOAT, HALF_INT8 = 'float forward in float16', 'simulated INT8 forward in float16'
HALF_STEP, HALF_QAT = 'float step in float16', 'QAT step in float16'
NOTES = (
    'A training step is a forward pass in training mode, the mean square of all outputs of the head as the '
    'loss, its gradients, and SGD with a rate of zero, so that the weights stay.',
    'Memory of a step (CUDA alone) is the peak of what is allocated, with weights and gradients.',
)


def steps(repeats: int) -> int:
    """Steps of the progress bar."""
    return (2 + (4 if torch.cuda.is_available() else 0)) * (repeats + 1)


@contextlib.contextmanager
def _training(model: nn.Module, decoding: Sequence[str]) -> Iterator[None]:
    """Training mode inside, with statistics of BatchNorm that stay as they are; afterwards as before.

    The flags of the detector and of its heads themselves stay down: in OpenPCDet they decide whether a loss
    is computed, which needs annotations.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
    model.train()
    for module in (model, *(m for m in model.modules() if any(hasattr(m, name) for name in decoding))):
        module.training = False
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
        model.zero_grad(set_to_none=True)


def step_of(
    model: nn.Module,
    forward: Callable[[Any], Dict[str, torch.Tensor]],
    batch: Any,
    decoding: Sequence[str] = (),
) -> Callable[[], None]:
    """A training step as a function.

    Args:
        model: To train.
        forward: From a batch to the outputs of the head.
        batch: What is trained on.
        decoding: Names of the methods by which heads decode their outputs.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        with _training(model, decoding):
            outputs = [o for o in forward(batch).values() if o.requires_grad]
            sum(o.float().square().mean() for o in outputs).backward()
            optimizer.step()

    return step


def _in_half(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.autocast('cuda', dtype=torch.float16):
            return function()

    return run


def _memory(passes: Dict[str, Pass], device: torch.device) -> List[Row]:
    """Peak memory of each pass on CUDA, and its ratio to that of the reference."""
    peaks = {}
    for name, one in passes.items():
        torch.cuda.reset_peak_memory_stats(device)
        one.function()
        peaks[name] = torch.cuda.max_memory_allocated(device)
    return [
        Row('memory', name, peak / 2**20, 'MiB', peak / peaks[passes[name].reference])
        for name, peak in peaks.items()
    ]


def measure(subject: Subject, repeats: int, entropy_tensors: int, bar: tqdm) -> List[Row]:
    """Training steps, and on CUDA forward passes and steps in float16.

    Args:
        subject: The models and the frame.
        repeats: Rounds that are timed.
        entropy_tensors: Not used.
        bar: Progress.
    """
    decoding = subject.adapter.decoding
    float_step = step_of(subject.float_model, subject.float_forward, subject.inputs, decoding)
    qat_step = step_of(subject.model, subject.forward, subject.inputs, decoding)
    passes = {
        FLOAT_STEP: Pass(float_step, FLOAT_STEP),
        QAT_STEP: Pass(qat_step, FLOAT_STEP, STEP_TARGET),
    }
    rows = measure_passes('training', passes, repeats, subject.device, bar)
    if subject.device.type != 'cuda':
        return rows
    half = {
        HALF_FLOAT: Pass(_in_half(subject.run_float), HALF_FLOAT),
        HALF_INT8: Pass(_in_half(subject.run_int8), HALF_FLOAT, INT8_TARGET['cuda']),
        HALF_STEP: Pass(_in_half(float_step), HALF_STEP),
        HALF_QAT: Pass(_in_half(qat_step), HALF_STEP, STEP_TARGET),
    }
    rows += measure_passes('half', half, repeats, subject.device, bar)
    return rows + _memory({**passes, **half}, subject.device)
