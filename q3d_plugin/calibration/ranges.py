"""From statistics to ranges: of all quantizers of a model at once, or of a sample of a tensor."""

from collections import defaultdict
from collections.abc import Iterable
from typing import List, Optional

import torch
from torch import Tensor

from q3d_plugin import numerics
from q3d_plugin.quantizer import Quantizer
from q3d_plugin.recipe import ActivationSpec

__all__ = ['compute_ranges', 'is_unsigned', 'ranges_of_samples']

_BINS = 4096


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
            spec = quantizer.spec
            # Few bits search a wider grid; a row of another width must not change it.
            groups[(spec.calibrator, spec.percentile, _is_narrow(spec))].append(quantizer)
    for members in groups.values():
        unsigned = [is_unsigned(q.spec, q.observer.lowest) for q in members]
        amax = torch.tensor([q.observer.amax for q in members], dtype=torch.float32)
        if members[0].spec.calibrator != 'max':
            counts = torch.stack([q.observer.counts.cpu() for q in members])
            sums = torch.stack([q.observer.sums.cpu() for q in members])
            top = torch.tensor([q.observer.top for q in members], dtype=torch.float32)
            high = [float(numerics.bounds(q.spec.bits, u)[1]) for q, u in zip(members, unsigned)]
            found = _searched(members[0].spec, counts, sums, top, amax, torch.tensor(high))
            rows = zip(members, found, amax, unsigned)
            amax = torch.stack([_better(q.spec, q.observer.kept, None, f, a, u) for q, f, a, u in rows])
        for quantizer, value, positive in zip(members, amax, unsigned):
            quantizer.set_range(value, positive)
    for quantizer in empty:
        quantizer.leave_float()
    return empty


def ranges_of_samples(
    spec: ActivationSpec, values: Tensor, weights: Tensor, amax: Tensor, unsigned: bool
) -> Tensor:
    """The ranges that :func:`compute_ranges` would give tensors of which samples are at hand.

    Args:
        spec: Of the quantizer of each tensor.
        values: (R, N) values of R tensors.
        weights: (N,) how many values of a tensor each stands for.
        amax: (R,) largest magnitudes of the whole tensors.
        unsigned: Whether the integers start at zero.

    Returns:
        Tensor: (R,) ranges.
    """
    if spec.calibrator == 'max' or not bool((amax > 0).any()):
        return amax
    magnitudes = values.abs()
    # The upper end is a power of two above the largest magnitude, as that of the observer.
    top = torch.ldexp(torch.ones_like(amax), torch.frexp(amax.clamp(2.0**-100, 2.0**125)).exponent)
    index = (magnitudes * (_BINS / top[:, None])).long().clamp_(max=_BINS - 1)
    counts = torch.zeros(len(values), _BINS, dtype=torch.float64, device=values.device)
    counts.scatter_add_(1, index, weights.double().expand_as(values))
    sums = torch.zeros_like(counts).scatter_add_(1, index, magnitudes.double() * weights)
    high = torch.full_like(amax, numerics.bounds(spec.bits, unsigned)[1])
    found = _searched(spec, counts, sums, top, amax, high)
    return torch.stack([_better(spec, v, weights, f, a, unsigned) for v, f, a in zip(values, found, amax)])


def is_unsigned(spec: ActivationSpec, minimum: float) -> bool:
    """Whether the integers of an activation start at zero.

    Args:
        spec: Says so, or ``'auto'``.
        minimum: Smallest value that was seen: behind a ReLU no value of any frame is negative.
    """
    if spec.unsigned == 'auto':
        return bool(minimum >= 0)
    return bool(spec.unsigned)


def _is_narrow(spec: ActivationSpec) -> bool:
    return spec.bits < 8


def _searched(
    spec: ActivationSpec, counts: Tensor, sums: Tensor, top: Tensor, amax: Tensor, high: Tensor
) -> Tensor:
    """(R,) ranges by the calibrator of ``spec`` from (R, B) histograms; see :mod:`q3d_plugin.numerics`."""
    if spec.calibrator == 'percentile':
        return numerics.search_percentile(counts, top, amax, spec.percentile)
    if spec.calibrator == 'entropy':
        return numerics.search_entropy(counts, top, amax, high)
    lowest, light = 0.05 if _is_narrow(spec) else 0.2, spec.calibrator == 'grid'
    means = sums / torch.where(counts > 0, counts, 1.0)
    return numerics.search_mse(counts, top, amax, high, lowest, light=light, means=means)


def _better(
    spec: ActivationSpec,
    values: Optional[Tensor],
    weights: Optional[Tensor],
    found: Tensor,
    amax: Tensor,
    unsigned: bool,
) -> Tensor:
    """``found``, unless a search for the least squared error gave it and ``amax`` has a lower one.

    A histogram can mislead that search where there are few values, by more than the search gains.

    Args:
        spec: Of the quantizer.
        values: The values themselves, or a sample; None where they were not kept.
        weights: How many values each stands for; None for one each.
        found: The range that was found.
        amax: The largest magnitude.
        unsigned: Whether the integers start at zero.
    """
    if values is None or spec.calibrator not in ('mse', 'grid'):
        return found
    values = values.to(found.device)
    errors = []
    for range_ in (found, amax):
        squares = (numerics.fake_quantize(values, range_, spec.bits, unsigned) - values).square()
        errors.append((squares if weights is None else squares * weights).sum())
    return found if errors[0] <= errors[1] else amax
