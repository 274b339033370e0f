"""The pass over the data that feeds the observers, and the merging of what several ranks saw."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, List

import torch
import torch.distributed as dist
from torch import nn

from q3d_plugin.errors import Q3DError
from q3d_plugin.observer import MagnitudeHistogram
from q3d_plugin.quantizer import Quantizer

__all__ = ['any_of_ranks', 'collect', 'evaluating', 'feed', 'from_all_ranks', 'merge_ranks', 'several_ranks']


def collect(
    model: nn.Module,
    batches: Iterable,
    forward: Callable,
    quantizers: List[Quantizer],
    names: Callable = None,
) -> int:
    """Runs ``forward`` over ``batches`` in eval mode without gradients while ``quantizers`` take statistics.

    Args:
        model: The model; its training mode is restored afterwards.
        batches: What the framework's loader gives; one batch counts as one frame in messages.
        forward: Called with each batch.
        quantizers: Activation quantizers, in the order of the model.
        names: Gives the name of a batch for messages; its number where None.

    Returns:
        int: Number of batches seen, by all ranks together.

    Raises:
        Q3DError: An activation holds NaN or Inf. Layer and frame are named.
    """
    for quantizer in quantizers:
        quantizer.observe()
    number = feed(model, batches, forward, lambda: [q.owners[0] for q in quantizers if not q.finite], names)
    merge_ranks(quantizers)
    return number


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; afterwards every module is in the mode that it was in."""
    # Not model.train(training) afterwards: parts that were in eval mode by themselves would leave it.
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def feed(
    model: nn.Module,
    batches: Iterable,
    forward: Callable,
    bad: Callable[[], List[str]],
    names: Callable = None,
) -> int:
    """Runs ``forward`` over ``batches`` in eval mode without gradients.

    Args:
        model: The model; its training mode is restored afterwards.
        batches: What the framework's loader gives; one batch counts as one frame in messages.
        forward: Called with each batch.
        bad: Asked after each batch for the names of layers whose input held NaN or Inf.
        names: Gives the name of a batch for messages; its number where None.

    Returns:
        int: Number of batches seen, by all ranks together.

    Raises:
        Q3DError: An input holds NaN or Inf. Layer and frame are named.
    """
    number, problem = 0, None
    with evaluating(model):
        for batch in batches:
            forward(batch)
            layers = bad()
            if layers:
                frame = names(batch) if names is not None else f'number {number}'
                more = f' (and of {len(layers) - 1} layers more)' if len(layers) > 1 else ''
                problem = (
                    f'calibration: NaN or Inf in the input of {layers[0]!r}{more} in frame {frame}'
                    ': check the checkpoint and this frame, or skip the layer'
                )
                break
            number += 1
    # Every rank has to stop, or the others would wait for this one for ever.
    problem = next((p for p in from_all_ranks(problem) if p), None)
    if problem:
        raise Q3DError(problem)
    return sum(from_all_ranks(number))


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_all_ranks(value: Any) -> List:
    """``value`` of every rank, in the order of ranks.

    Raises:
        Q3DError: Another process has ended.
    """
    if not several_ranks():
        return [value]
    values = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise Q3DError(
            'calibration: another process has ended, or cannot be reached; its own message says why '
            f'({str(error).splitlines()[0]})'
        ) from error
    return values


def any_of_ranks(flags: List[bool]) -> List[bool]:
    """For each flag whether it is set on any rank; every rank gives as many."""
    return [any(column) for column in zip(*from_all_ranks(flags))]


def merge_ranks(quantizers: List[Quantizer]) -> None:
    """Gives every rank the statistics of all ranks, so that all of them compute the same ranges."""
    everyone = from_all_ranks([q.observer.state() for q in quantizers])
    if len(everyone) == 1:
        return
    for i, quantizer in enumerate(quantizers):
        merged = MagnitudeHistogram.from_state(everyone[0][i])
        for other in everyone[1:]:
            merged.merge(MagnitudeHistogram.from_state(other[i]))
        quantizer.observer = merged
