"""How far a tensor is from its float reference, summed over many frames; NaN and Inf are counted apart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Dict, Optional

import torch
from torch import Tensor

from q3d_plugin.analysis.proposals import align

__all__ = ['ErrorSums', 'OutputError']


@dataclass
class ErrorSums:
    """Sums of one tensor over frames, from which the measures come.

    Elements that are not finite, in the reference or in the approximation, are counted and left out of every
    sum: one NaN must neither hide in a mean nor swallow what the other elements say.

    Attributes:
        elements: Number of elements that were compared.
        l1_sum: Sum of ``|a - r|``.
        reference_l1: Sum of ``|r|``.
        noise: Sum of ``(a - r)^2``.
        signal: Sum of ``r^2``.
        power: Sum of ``a^2``.
        product: Sum of ``a r``.
        nan: NaNs of the approximation.
        inf: Infinities of the approximation.
        float_nonfinite: NaNs and infinities of the reference.
    """

    elements: int = 0
    l1_sum: float = 0.0
    reference_l1: float = 0.0
    noise: float = 0.0
    signal: float = 0.0
    power: float = 0.0
    product: float = 0.0
    nan: int = 0
    inf: int = 0
    float_nonfinite: int = 0

    def add(self, reference: Tensor, approximation: Tensor) -> None:
        """Adds a tensor.

        Args:
            reference: Any shape, floating point.
            approximation: The same shape.
        """
        if reference.numel() == 0:
            return
        r, a = reference.detach().float().reshape(-1), approximation.detach().float().reshape(-1)
        sums = _sums(r, a)
        if not all(math.isfinite(s) for s in sums):
            finite = torch.isfinite(r) & torch.isfinite(a)
            self.nan += int(torch.isnan(a).sum())
            self.inf += int(torch.isinf(a).sum())
            self.float_nonfinite += int((~torch.isfinite(r)).sum())
            # In double: large finite values may have overflowed when they were squared.
            r, a = r[finite].double(), a[finite].double()
            sums = _sums(r, a)
        self.elements += r.numel()
        self.l1_sum += sums[0]
        self.reference_l1 += sums[1]
        self.noise += sums[2]
        self.signal += sums[3]
        self.power += sums[4]
        self.product += sums[5]

    @property
    def l1(self) -> Optional[float]:
        """Mean of ``|a - r|``; None where nothing was compared."""
        return self.l1_sum / self.elements if self.elements else None

    @property
    def relative_l1(self) -> Optional[float]:
        """Sum of ``|a - r|`` over that of ``|r|``; None where the reference is zero or there is none."""
        if self.reference_l1 > 0:
            return self.l1_sum / self.reference_l1
        return 0.0 if self.elements and self.l1_sum == 0 else None

    @property
    def sqnr_db(self) -> Optional[float]:
        """Signal to quantization noise ratio in decibel; None without noise or without signal."""
        if self.noise > 0 and self.signal > 0:
            return 10 * math.log10(self.signal / self.noise)
        return None

    @property
    def cosine(self) -> Optional[float]:
        """Cosine of the angle between the two; None where one of them is zero."""
        if self.signal > 0 and self.power > 0:
            return self.product / math.sqrt(self.signal * self.power)
        return None


def _sums(r: Tensor, a: Tensor) -> tuple:
    difference = a - r
    found = [
        difference.abs().sum(),
        r.abs().sum(),
        difference.square_().sum(),
        r.square().sum(),
        a.square().sum(),
        (a * r).sum(),
    ]
    return tuple(torch.stack(found).double().tolist())


class OutputError:
    """How far a detector's raw outputs are from those of the float model: one :class:`ErrorSums` a tensor.

    The heads of a detector regress metres, logarithms and logits, so a sum over all of them would be that of
    the largest. The measures are means over the tensors instead. Of a head that chooses proposals,
    :mod:`q3d_plugin.analysis.proposals` says what is compared.
    """

    def __init__(self) -> None:
        self.tensors: Dict[str, ErrorSums] = {}

    def add(self, reference: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Adds the outputs for a frame.

        Args:
            reference: Of the float model, by name.
            outputs: Of the quantized model, the same names.
        """
        reference, outputs = align(reference, outputs)
        for name, tensor in reference.items():
            sums = self.tensors.setdefault(name, ErrorSums())
            if outputs[name] is not tensor:
                sums.add(tensor, outputs[name])
            else:
                # Nothing that this output depends on has changed.
                magnitude, count = float(tensor.abs().sum()), tensor.numel()
                if math.isfinite(magnitude):
                    sums.elements += count
                    sums.reference_l1 += magnitude
                else:
                    sums.add(tensor, tensor)

    def _mean(self, measure: str) -> Optional[float]:
        values = [getattr(s, measure) for s in self.tensors.values()]
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    @property
    def l1(self) -> Optional[float]:
        """Mean over the tensors of their mean ``|a - r|``."""
        return self._mean('l1')

    @property
    def relative_l1(self) -> Optional[float]:
        """Mean over the tensors of their relative L1."""
        return self._mean('relative_l1')

    @property
    def nan(self) -> int:
        """NaNs in all outputs."""
        return sum(s.nan for s in self.tensors.values())

    @property
    def inf(self) -> int:
        """Infinities in all outputs."""
        return sum(s.inf for s in self.tensors.values())
