"""From statistics to ranges, for all quantizers of a model at once."""

from collections import defaultdict
from collections.abc import Iterable
from typing import List

import torch

from q3d_plugin import numerics

__all__ = ['compute_ranges']


def compute_ranges(quantizers: Iterable) -> List:
    """Sets the range of every activation quantizer that took statistics.

    Quantizers of one calibrator are searched together, as rows of one matrix.

    Args:
        quantizers: Activation quantizers (:class:`q3d_plugin.quantizer.Quantizer`) that are observing.

    Returns:
        list: The quantizers that saw no data, or nothing but zeros; they are left float.
    """
    empty, groups = [], defaultdict(list)
    for quantizer in quantizers:
        if quantizer.observer.frames == 0 or quantizer.observer.amax == 0:
            empty.append(quantizer)
        else:
            groups[(quantizer.spec.calibrator, quantizer.spec.percentile)].append(quantizer)
    for (calibrator, percentile), members in groups.items():
        unsigned = [_is_unsigned(q) for q in members]
        amax = torch.tensor([q.observer.amax for q in members], dtype=torch.float32)
        if calibrator != 'max':
            counts = torch.stack([q.observer.counts.cpu() for q in members])
            top = torch.tensor([q.observer.top for q in members], dtype=torch.float32)
            high = [float(numerics.bounds(q.spec.bits, u)[1]) for q, u in zip(members, unsigned)]
            high = torch.tensor(high)
            if calibrator == 'percentile':
                amax = numerics.search_percentile(counts, top, amax, percentile)
            elif calibrator == 'entropy':
                amax = numerics.search_entropy(counts, top, amax, high)
            else:
                lowest = 0.2 if min(q.spec.bits for q in members) >= 8 else 0.05
                amax = numerics.search_mse(counts, top, amax, high, lowest, light=calibrator == 'grid')
        for quantizer, value, positive in zip(members, amax, unsigned):
            quantizer.set_range(value, positive)
    for quantizer in empty:
        quantizer.leave_float()
    return empty


def _is_unsigned(quantizer) -> bool:
    """What the recipe says, or what was seen: behind a ReLU no value of any frame is negative."""
    if quantizer.spec.unsigned == 'auto':
        return quantizer.observer.minimum >= 0
    return bool(quantizer.spec.unsigned)
