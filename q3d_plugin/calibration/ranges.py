"""From statistics to ranges, for all quantizers of a model at once."""

from collections import defaultdict
from collections.abc import Iterable
from typing import List

import torch
from torch import Tensor

from q3d_plugin import numerics
from q3d_plugin.quantizer import Quantizer

__all__ = ['compute_ranges']


def compute_ranges(quantizers: Iterable[Quantizer]) -> List[Quantizer]:
    """Sets the range of every activation quantizer that took statistics.

    Quantizers of one calibrator are searched together, as rows of one matrix.

    Args:
        quantizers: Activation quantizers that are observing.

    Returns:
        list: The quantizers that saw no data, or nothing but zeros; they are left float.
    """
    empty, groups = [], defaultdict(list)
    for quantizer in quantizers:
        if quantizer.observer.frames == 0 or quantizer.observer.amax == 0:
            empty.append(quantizer)
        else:
            # Few bits search a wider grid; a row of another width must not change it.
            few = quantizer.spec.bits < 8
            groups[(quantizer.spec.calibrator, quantizer.spec.percentile, few)].append(quantizer)
    for (calibrator, percentile, few), members in groups.items():
        unsigned = [_is_unsigned(q) for q in members]
        amax = torch.tensor([q.observer.amax for q in members], dtype=torch.float32)
        if calibrator != 'max':
            counts = torch.stack([q.observer.counts.cpu() for q in members])
            means = torch.stack([q.observer.sums.cpu() for q in members]) / counts.clamp_min(1)
            top = torch.tensor([q.observer.top for q in members], dtype=torch.float32)
            high = [float(numerics.bounds(q.spec.bits, u)[1]) for q, u in zip(members, unsigned)]
            high = torch.tensor(high)
            if calibrator == 'percentile':
                amax = numerics.search_percentile(counts, top, amax, percentile)
            elif calibrator == 'entropy':
                amax = numerics.search_entropy(counts, top, amax, high)
            else:
                lowest = 0.05 if few else 0.2
                found = numerics.search_mse(
                    counts, top, amax, high, lowest, light=calibrator == 'grid', means=means
                )
                amax = torch.stack(
                    [_better(q, f, a, u) for q, f, a, u in zip(members, found, amax, unsigned)]
                )
        for quantizer, value, positive in zip(members, amax, unsigned):
            quantizer.set_range(value, positive)
    for quantizer in empty:
        quantizer.leave_float()
    return empty


def _better(quantizer: Quantizer, found: Tensor, amax: Tensor, unsigned: bool) -> Tensor:
    """``found``, unless the largest magnitude has the lower squared error; where all values were kept.

    A histogram can mislead the search where there are few values, by more than the search gains.
    """
    kept = quantizer.observer.kept
    if kept is None:
        return found
    kept = kept.cpu()
    errors = [
        (numerics.fake_quantize(kept, a, quantizer.spec.bits, unsigned) - kept).square().sum()
        for a in (found, amax)
    ]
    return found if errors[0] <= errors[1] else amax


def _is_unsigned(quantizer: Quantizer) -> bool:
    """What the recipe says, or what was seen: behind a ReLU no value of any frame is negative."""
    if quantizer.spec.unsigned == 'auto':
        return quantizer.observer.lowest >= 0
    return bool(quantizer.spec.unsigned)
