"""The statistics of one tensor over many frames: a histogram of magnitudes that grows and merges exactly."""

import math
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor

from q3d_plugin.numerics import extremes

__all__ = ['MagnitudeHistogram']

# Elements that are counted at once. On the CPU their copies stay in the cache, and in memory that the process
# has already; each piece is a handful of kernels that a CUDA device has to be given.
PIECE = {'cpu': 2**18, 'cuda': 2**20}
# Tensors up to this size have the sum of each bin taken, larger ones are dense enough to do without.
EXACT = 2**18
# Values of a tensor that are kept as they are, to check a range that was found on the histogram.
KEPT = 2**16


class MagnitudeHistogram:
    """Counts of ``|x|`` over ``[0, 2**exponent]``, with the exact smallest and largest value.

    The upper end is a power of two. Where a frame exceeds it, it is doubled and the bins are merged in
    pairs, which loses nothing and gives the same counts in whatever order frames (or ranks) come.

    Attributes:
        bins: Number of bins.
        counts: (bins,) float64 counts, None before the first value.
        sums: (bins,) float64 sums of the magnitudes in each bin. Of pieces of a large tensor, where values
            are dense in a bin, its centre is summed instead.
        kept: All values, flat, while they are few; then None.
        exponent: The upper end is ``2**exponent``.
        minimum: Smallest value counted.
        maximum: Largest value counted.
        lowest: Smallest value seen, counted or not: what has to be kept negative.
        frames: Number of tensors seen.
    """

    def __init__(self, bins: int = 4096) -> None:
        self.bins = bins
        self.counts: Optional[Tensor] = None
        self.sums: Optional[Tensor] = None
        self.kept: Optional[Tensor] = torch.empty(0)
        self.exponent: Optional[int] = None
        self.minimum = math.inf
        self.maximum = -math.inf
        self.lowest = math.inf
        self.frames = 0

    @property
    def top(self) -> float:
        """Upper end of the histogram."""
        return 2.0**self.exponent

    @property
    def amax(self) -> float:
        """Largest magnitude seen; 0 before the first value."""
        return max(abs(self.minimum), abs(self.maximum)) if self.frames else 0.0

    def update(self, x: Tensor) -> bool:
        """Adds one tensor.

        Args:
            x: Any shape, floating point. An empty tensor is no data and changes nothing.

        Returns:
            bool: False where ``x`` holds NaN or Inf; nothing is added then.
        """
        if x.numel() == 0:
            return True
        x = x.detach()
        low, high = extremes(x).float().tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.frames += 1
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.lowest = min(self.lowest, low)
        largest = max(abs(low), abs(high))
        if self.counts is None:
            self.counts = torch.zeros(self.bins, dtype=torch.float64, device=x.device)
            self.sums = torch.zeros_like(self.counts)
        if largest > 0:
            # frexp gives largest = m * 2**e with 0.5 <= m < 1, so 2**e is above it. The bounds keep 2**e
            # inside float32.
            self._grow(min(max(math.frexp(largest)[1], -100), 126))
        elif self.exponent is None:
            self.exponent = -100
        # In pieces, so that the copies stay small beside the activation itself.
        for piece in x.reshape(-1).split(PIECE.get(x.device.type, PIECE['cuda'])):
            magnitudes = piece.float() if low >= 0 else piece.float().abs()
            counts = self._count(magnitudes, largest).double()
            self.counts += counts
            self.sums += self._sum(magnitudes, counts, x.numel() <= EXACT)
        self._keep(x.reshape(-1) if x.numel() <= KEPT else None)
        return True

    def note_sign(self, x: Tensor) -> None:
        """Looks at a tensor whose values are not counted, but which has to keep its sign when quantized.

        Args:
            x: Any shape, floating point. NaN is passed over: whoever counts the values finds it.
        """
        if x.numel():
            low = float(x.detach().amin())
            self.lowest = self.lowest if math.isnan(low) else min(self.lowest, low)

    def _keep(self, values: Optional[Tensor]) -> None:
        """Adds values as they are, until there are too many; then none are kept."""
        if self.kept is None or values is None or len(self.kept) + len(values) > KEPT:
            self.kept = None
        else:
            # They stay on their device: a copy to the host would wait for it.
            self.kept = torch.cat([self.kept.to(values.device), values.float()])

    def _count(self, magnitudes: Tensor, largest: float) -> Tensor:
        """Histogram of ``magnitudes``, none of which is above ``largest``."""
        exact = self.bins & (self.bins - 1) == 0 and largest < self.top
        # On CUDA, bincount waits for the device, and histc raises where algorithms have to be deterministic.
        fast = exact if magnitudes.device.type == 'cpu' else torch.are_deterministic_algorithms_enabled()
        if not fast:
            return torch.histc(magnitudes, bins=self.bins, min=0.0, max=self.top)
        # Bins whose width is a power of two make the product exact, so that these are the counts of histc,
        # which takes several times as long on CPU.
        index = magnitudes.mul(self.bins / self.top).int()
        return torch.bincount(index if exact else index.clamp_(max=self.bins - 1), minlength=self.bins)

    def _sum(self, magnitudes: Tensor, counts: Tensor, exact: bool) -> Tensor:
        """Sum of the magnitudes in each bin, or of the centres of the bins, which takes no second look."""
        if not exact:
            centres = (torch.arange(self.bins, device=counts.device) + 0.5) * (self.top / self.bins)
            return counts * centres
        index = magnitudes.mul(self.bins / self.top).long().clamp_(max=self.bins - 1)
        return torch.zeros_like(counts).index_add_(0, index, magnitudes.double())

    def _grow(self, exponent: int) -> None:
        """Raises the upper end to at least ``2**exponent``."""
        if self.exponent is None:
            self.exponent = exponent
        times = exponent - self.exponent
        if times > 0:
            self.counts = _merge_bins(self.counts, times)
            self.sums = _merge_bins(self.sums, times)
            self.exponent = exponent

    def merge(self, other: 'MagnitudeHistogram') -> None:
        """Adds what another histogram of the same tensor has seen, on another rank for example."""
        self.lowest = min(self.lowest, other.lowest)
        if other.frames == 0:
            return
        if self.frames == 0:
            self.counts = torch.zeros(self.bins, dtype=torch.float64, device=other.counts.device)
            self.sums = torch.zeros_like(self.counts)
            self.exponent = other.exponent
        self._grow(other.exponent)
        times = self.exponent - other.exponent
        self.counts = self.counts + _merge_bins(other.counts, times).to(self.counts.device)
        self.sums = self.sums + _merge_bins(other.sums, times).to(self.sums.device)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.frames += other.frames
        self._keep(other.kept)

    def compact(self, bins: int = 64) -> Dict[str, Any]:
        """A small copy for pictures, in plain data.

        Args:
            bins: How many, over ``[0, top]``, where ``top`` is little above the largest magnitude.
        """
        out = {'counts': [], 'top': 0.0, 'minimum': 0.0, 'maximum': 0.0, 'frames': self.frames}
        if self.counts is None:
            return out
        used = max(1, min(self.bins, math.ceil(self.amax / self.top * self.bins)))
        group = math.ceil(used / bins)
        counts = self.counts[: group * bins].cpu()
        counts = torch.cat([counts, counts.new_zeros(group * bins - len(counts))]).reshape(-1, group).sum(1)
        shown = math.ceil(used / group)
        out['counts'] = [int(c) for c in counts[:shown]]
        out['top'] = shown * group * self.top / self.bins
        out['minimum'], out['maximum'] = self.minimum, self.maximum
        return out

    def state(self) -> Tuple:
        """What :meth:`from_state` needs, in types that travel between processes."""
        histogram = None if self.counts is None else (self.counts.cpu(), self.sums.cpu())
        kept = None if self.kept is None else self.kept.cpu()
        seen = self.minimum, self.maximum, self.lowest, self.frames
        return self.bins, histogram, self.exponent, *seen, kept

    @classmethod
    def from_state(cls, state: Tuple) -> 'MagnitudeHistogram':
        """The histogram that :meth:`state` was taken from."""
        out = cls(state[0])
        _, histogram, out.exponent, out.minimum, out.maximum, out.lowest, out.frames, out.kept = state
        if histogram is not None:
            out.counts, out.sums = histogram
        return out


def _merge_bins(counts: Tensor, times: int) -> Tensor:
    """Merges bins in groups of ``2**times`` and fills up with empty bins above."""
    if times <= 0:
        return counts
    bins = len(counts)
    group = 2**times
    out = torch.zeros_like(counts)
    if group >= bins:
        out[0] = counts.sum()
    else:
        out[: bins // group] = counts.reshape(-1, group).sum(1)
    return out
