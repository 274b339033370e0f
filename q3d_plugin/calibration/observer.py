"""The statistics of one tensor over many frames: a histogram of magnitudes that grows and merges exactly."""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = ['MagnitudeHistogram']

# Elements that are counted at once.
PIECE = 2**20
# Values kept as they are, to check a range that was found on the histogram.
KEPT = 2**16


class MagnitudeHistogram:
    """Counts of ``|x|`` over ``[0, 2**exponent]``, with the exact smallest and largest value.

    The upper end is a power of two. Where a frame exceeds it, it is doubled and the bins are merged in
    pairs, which loses nothing and gives the same counts in whatever order frames (or ranks) come.

    Attributes:
        bins: Number of bins.
        counts: (bins,) float64 counts, None before the first value.
        kept: Up to 65536 of the values themselves, evenly from all frames; None before the first value.
        exponent: The upper end is ``2**exponent``.
        minimum: Smallest value seen.
        maximum: Largest value seen.
        frames: Number of tensors seen.
    """

    def __init__(self, bins: int = 4096) -> None:
        self.bins = bins
        self.counts: Optional[Tensor] = None
        self.kept: Optional[Tensor] = None
        self.halved = 0
        self.exponent: Optional[int] = None
        self.minimum = math.inf
        self.maximum = -math.inf
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
        low, high = torch.stack(torch.aminmax(x)).float().tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.frames += 1
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        largest = max(abs(low), abs(high))
        if self.counts is None:
            self.counts = torch.zeros(self.bins, dtype=torch.float64, device=x.device)
        if largest > 0:
            # frexp gives largest = m * 2**e with 0.5 <= m < 1, so 2**e is above it. The bounds keep 2**e
            # inside float32.
            self._grow(min(max(math.frexp(largest)[1], -100), 126))
        elif self.exponent is None:
            self.exponent = -100
        # In pieces, so that the copies stay small beside the activation itself.
        for piece in x.reshape(-1).split(PIECE):
            magnitudes = piece.float() if low >= 0 else piece.float().abs()
            self.counts += self._count(magnitudes, largest)
        self._keep(self._drawn(x.reshape(-1)), self.halved)
        return True

    def _drawn(self, values: Tensor) -> Tensor:
        """This frame's share of the values that are kept, by chance (the same in every run)."""
        share = max(1, min(KEPT, len(values)) >> self.halved)
        if share < len(values):
            generator = torch.Generator().manual_seed(self.frames)
            values = values[torch.randint(len(values), (share,), generator=generator).to(values.device)]
        return values.float()

    def _keep(self, values: Tensor, halved: int) -> None:
        """Adds values of which one in ``2**halved`` was taken; halves them all while there are too many."""
        if self.kept is None:
            self.kept, self.halved = values.new_empty(0), halved
        values = values.to(self.kept.device)
        while halved < self.halved:
            values, halved = _half(values, halved), halved + 1
        while self.halved < halved:
            self.kept, self.halved = _half(self.kept, self.halved), self.halved + 1
        self.kept = torch.cat([self.kept, values])
        while len(self.kept) > KEPT:
            self.kept, self.halved = _half(self.kept, self.halved), self.halved + 1

    def _count(self, magnitudes: Tensor, largest: float) -> Tensor:
        """Histogram of ``magnitudes``, none of which is above ``largest``."""
        exact = self.bins & (self.bins - 1) == 0 and largest < self.top
        if magnitudes.device.type != 'cpu' or not exact:
            return torch.histc(magnitudes, bins=self.bins, min=0.0, max=self.top)
        # Bins whose width is a power of two make the product exact, so that these are the counts of histc,
        # which takes several times as long on CPU.
        return torch.bincount(magnitudes.mul(self.bins / self.top).int(), minlength=self.bins)

    def _grow(self, exponent: int) -> None:
        """Raises the upper end to at least ``2**exponent``."""
        if self.exponent is None:
            self.exponent = exponent
        times = exponent - self.exponent
        if times > 0:
            self.counts = _merge_bins(self.counts, times)
            self.exponent = exponent

    def merge(self, other: 'MagnitudeHistogram') -> None:
        """Adds what another histogram of the same tensor has seen, on another rank for example."""
        if other.frames == 0:
            return
        if self.frames == 0:
            self.counts = torch.zeros(self.bins, dtype=torch.float64, device=other.counts.device)
            self.exponent = other.exponent
        self._grow(other.exponent)
        counts = _merge_bins(other.counts, self.exponent - other.exponent)
        self.counts = self.counts + counts.to(self.counts.device)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.frames += other.frames
        self._keep(other.kept, other.halved)

    def state(self) -> Tuple:
        """What :meth:`from_state` needs, in types that travel between processes."""
        counts = None if self.counts is None else self.counts.cpu()
        kept = None if self.kept is None else self.kept.cpu()
        return self.bins, counts, self.exponent, self.minimum, self.maximum, self.frames, kept, self.halved

    @classmethod
    def from_state(cls, state: Tuple) -> 'MagnitudeHistogram':
        """The histogram that :meth:`state` was taken from."""
        out = cls(state[0])
        _, out.counts, out.exponent, out.minimum, out.maximum, out.frames, out.kept, out.halved = state
        return out


def _half(values: Tensor, seed: int) -> Tensor:
    """Half of ``values`` by chance, not every second one: neighbours may be of alternating channels."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    return values[order[: len(values) // 2].to(values.device)]


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
