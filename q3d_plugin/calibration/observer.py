"""The statistics of one tensor over many frames: a histogram of magnitudes that grows and merges exactly."""

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = ['MagnitudeHistogram', 'subsample']

# Tensors above this many elements are sampled for the histogram (never for the smallest and largest value):
# at 2**17 samples a tensor and frame the statistics cost a few per cent of a forward pass.
SAMPLE = 2**17
_PRIMES = (
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
    41,
    43,
    47,
    53,
    59,
    61,
    67,
    71,
    73,
    79,
    83,
    89,
    97,
    101,
    127,
    257,
)


def subsample(x: Tensor, limit: int = SAMPLE) -> Tensor:
    """Every n-th element of a large tensor, flat; the whole tensor, flat, where it is small.

    The step is a prime that divides no dimension, so that no channel, row or column is left out.

    Args:
        x: Any shape.
        limit: At most about this many elements come back.
    """
    flat = x.reshape(-1)
    if flat.numel() <= limit:
        return flat
    wanted = flat.numel() / limit
    for prime in _PRIMES:
        if prime >= wanted and all(size % prime for size in x.shape):
            return flat[::prime]
    return flat[:: math.ceil(wanted)]


class MagnitudeHistogram:
    """Counts of ``|x|`` over ``[0, 2**exponent]``, with the exact smallest and largest value.

    The upper end is a power of two. Where a frame exceeds it, it is doubled and the bins are merged in
    pairs, which loses nothing and gives the same counts in whatever order frames (or ranks) come.

    Attributes:
        bins: Number of bins.
        counts: (bins,) float64 counts, None before the first value.
        exponent: The upper end is ``2**exponent``.
        minimum: Smallest value seen.
        maximum: Largest value seen.
        frames: Number of tensors seen.
    """

    def __init__(self, bins: int = 4096) -> None:
        self.bins = bins
        self.counts: Optional[Tensor] = None
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
        sample = subsample(x).abs().float()
        self.counts += torch.histc(sample, bins=self.bins, min=0.0, max=self.top).double()
        return True

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

    def state(self) -> Tuple:
        """What :meth:`from_state` needs, in types that travel between processes."""
        counts = None if self.counts is None else self.counts.cpu()
        return self.bins, counts, self.exponent, self.minimum, self.maximum, self.frames

    @classmethod
    def from_state(cls, state: Tuple) -> 'MagnitudeHistogram':
        """The histogram that :meth:`state` was taken from."""
        out = cls(state[0])
        _, out.counts, out.exponent, out.minimum, out.maximum, out.frames = state
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
