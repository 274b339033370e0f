"""Quantized additions and concatenations: one quantizer for all inputs, so that they have one scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from q3d_plugin.layers.base import QuantUnit
from q3d_plugin.quantizer import largest_magnitude

__all__ = ['QuantAdd', 'QuantConcat']


class QuantAdd(QuantUnit):
    """``a + b`` with both on one grid, as an integer addition needs them.

    The study (part B) and NVIDIA's CUDA-BEVFusion quantize the additions of residual blocks in this way; it
    avoids a conversion of precision around the addition.

    Args:
        before_relu: Whether a ReLU follows. The range is then that of the places where the sum is positive.
            Elsewhere the result is 0, and stays 0 whatever the range: ``clip`` is odd and never decreases, so
            ``a <= -b`` gives ``clip(a) <= -clip(b)``. (The branch of a residual block has large negative
            values that the ReLU removes; a range that covers them wastes half of the integers.) Only
            signedness is decided by all places: without negative integers, ``a = -5`` would become 0, and its
            sum with ``b = 3`` positive. Where a layer shares the quantizer, because it reads one of the
            inputs, the range is that of the layer: the branch has a longer tail, which would make the layer's
            input coarse. Its few values beyond are clipped.
    """

    kind = 'Add'

    def __init__(self, before_relu: bool = False) -> None:
        super().__init__()
        self._init_unit()
        self.before_relu = before_relu

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        quantizer = self.input_quantizer
        if self.before_relu and quantizer is not None and quantizer.observing:
            for x in (a, b):
                # Else the sign is settled, or in the statistics.
                if quantizer.spec.unsigned == 'auto' and not quantizer.counted(x):
                    quantizer.observer.note_sign(x)
            return self._observed(a, b)
        if quantizer is not None and quantizer.dynamic:
            amax = largest_magnitude(a, b)
            return quantizer(a, amax=amax) + quantizer(b, amax=amax)
        return self.quantize_input(a) + self.quantize_input(b)

    def _observed(self, a: Tensor, b: Tensor) -> Tensor:
        total, quantizer = a + b, self.input_quantizer
        if quantizer.counted(a) or quantizer.counted(b):
            return total
        # All places that are not known to be at most 0, so that NaN is kept, and found.
        kept = (total <= 0).logical_not_().reshape(-1).nonzero().squeeze(1)
        for x in (a, b):
            quantizer(x.expand_as(total).reshape(-1).index_select(0, kept))
        return total


class QuantConcat(QuantUnit):
    """``torch.cat`` of tensors on one grid, so that the result has one scale."""

    kind = 'Concat'

    def __init__(self) -> None:
        super().__init__()
        self._init_unit()

    def forward(self, tensors: Sequence[Tensor], dim: int = 1) -> Tensor:
        quantizer = self.input_quantizer
        if quantizer is not None and quantizer.dynamic:
            return quantizer(torch.cat(list(tensors), dim=dim))
        if torch.is_grad_enabled() or quantizer is None:
            return torch.cat([self.quantize_input(t) for t in tensors], dim=dim)
        # The same values without a quantized copy of every input: at the neck of a detector, where the
        # largest tensors meet, those copies would be the peak of its memory.
        return quantizer(torch.cat(list(tensors), dim=dim), inplace=True)
