"""The pass over the data that feeds the observers, and the merging of what several ranks saw."""

from collections.abc import Callable, Iterable
from typing import List

import torch
import torch.distributed as dist
from torch import nn

from q3d_plugin.calibration.observer import MagnitudeHistogram
from q3d_plugin.errors import Q3DError

__all__ = ['any_of_ranks', 'collect', 'merge_ranks']


def collect(
    model: nn.Module, batches: Iterable, forward: Callable, quantizers: List, names: Callable = None
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
    # Not model.train(training) afterwards: parts that were in eval mode by themselves would leave it.
    modes = {m: m.training for m in model.modules()}
    model.eval()
    for quantizer in quantizers:
        quantizer.observe()
    number, problem = 0, None
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
                bad = [q for q in quantizers if not q.finite]
                if bad:
                    frame = names(batch) if names is not None else f'number {number}'
                    more = f' (and of {len(bad) - 1} layers more)' if len(bad) > 1 else ''
                    problem = (
                        f'calibration: NaN or Inf in the input of {bad[0].owners[0]!r}{more} in frame {frame}'
                        ': check the checkpoint and this frame, or skip the layer'
                    )
                    break
                number += 1
    finally:
        for module, training in modes.items():
            module.training = training
    # Every rank has to stop, or the others would wait for this one for ever.
    problem = next((p for p in _from_all_ranks(problem) if p), None)
    if problem:
        raise Q3DError(problem)
    merge_ranks(quantizers)
    return sum(_from_all_ranks(number))


def _from_all_ranks(value) -> List:
    """``value`` of every rank, in the order of ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_of_ranks(flags: List[bool]) -> List[bool]:
    """For each flag whether it is set on any rank; every rank gives as many."""
    return [any(column) for column in zip(*_from_all_ranks(flags))]


def merge_ranks(quantizers: List) -> None:
    """Gives every rank the statistics of all ranks, so that all of them compute the same ranges."""
    everyone = _from_all_ranks([q.observer.state() for q in quantizers])
    if len(everyone) == 1:
        return
    for i, quantizer in enumerate(quantizers):
        merged = MagnitudeHistogram.from_state(everyone[0][i])
        for other in everyone[1:]:
            merged.merge(MagnitudeHistogram.from_state(other[i]))
        quantizer.observer = merged
