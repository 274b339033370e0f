"""Quantized additions and concatenations: one quantizer for all inputs, so that they have one scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from q3d_plugin.layers.base import QuantUnit

__all__ = ['QuantAdd', 'QuantConcat']


class QuantAdd(QuantUnit):
    """``a + b`` with both on one grid, as an integer addition needs them.

    The study (part B) and NVIDIA's CUDA-BEVFusion quantize the additions of residual blocks in this way; it
    avoids a conversion of precision around the addition.
    """

    kind = 'Add'

    def __init__(self) -> None:
        super().__init__()
        self._init_unit()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.quantize_input(a) + self.quantize_input(b)


class QuantConcat(QuantUnit):
    """``torch.cat`` of tensors on one grid, so that the result has one scale."""

    kind = 'Concat'

    def __init__(self) -> None:
        super().__init__()
        self._init_unit()

    def forward(self, tensors: Sequence[Tensor], dim: int = 1) -> Tensor:
        return torch.cat([self.quantize_input(t) for t in tensors], dim=dim)
