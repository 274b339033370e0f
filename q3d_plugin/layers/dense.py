"""Quantized dense layers: convolutions, transposed convolutions, linear."""

from typing import List, Optional

from torch import Tensor, nn
from torch.nn import functional as F

from q3d_plugin.layers.base import QuantWeightLayer, register

__all__ = [
    'QuantConv1d',
    'QuantConv2d',
    'QuantConv3d',
    'QuantConvTranspose2d',
    'QuantConvTranspose3d',
    'QuantLinear',
]


@register(nn.Conv2d)
class QuantConv2d(QuantWeightLayer, nn.Conv2d):
    """``Conv2d`` with fake-quantized input and weight (one range per output channel)."""

    kind = 'Conv2d'

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantize_input(input), self.quantize_weight(), self.bias)


@register(nn.Conv1d)
class QuantConv1d(QuantWeightLayer, nn.Conv1d):
    """``Conv1d`` with fake-quantized input and weight."""

    kind = 'Conv1d'
    forward = QuantConv2d.forward


@register(nn.Conv3d)
class QuantConv3d(QuantWeightLayer, nn.Conv3d):
    """``Conv3d`` with fake-quantized input and weight."""

    kind = 'Conv3d'
    forward = QuantConv2d.forward


@register(nn.Linear)
class QuantLinear(QuantWeightLayer, nn.Linear):
    """``Linear`` with fake-quantized input and weight (one range per output feature)."""

    kind = 'Linear'

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantize_input(input), self.quantize_weight(), self.bias)


class _QuantConvTranspose(QuantWeightLayer):
    """Transposed convolutions hold their weight as (in, out / groups, kernel...)."""

    def output_first(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).reshape(self.out_channels, -1, *weight.shape[2:])

    def scale_output(self, weight: Tensor, factor: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        ones = [1] * (weight.dim() - 2)
        return (grouped * factor.reshape(self.groups, 1, -1, *ones)).reshape(weight.shape)

    def quantize_weight(self) -> Tensor:
        if self.weight_quantizer is None:
            return self.weight
        rows = self.weight_quantizer(self.output_first(self.weight))
        grouped = rows.reshape(self.groups, self.out_channels // self.groups, *rows.shape[1:])
        return grouped.transpose(1, 2).reshape(self.weight.shape)

    def _padding(self, input: Tensor, output_size: Optional[List[int]], dimensions: int) -> List[int]:
        return self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        )


@register(nn.ConvTranspose2d)
class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """``ConvTranspose2d`` with fake-quantized input and weight (one range per output channel, groups too)."""

    kind = 'ConvTranspose2d'

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        padding = self._padding(input, output_size, 2)
        return F.conv_transpose2d(
            self.quantize_input(input),
            self.quantize_weight(),
            self.bias,
            self.stride,
            self.padding,
            padding,
            self.groups,
            self.dilation,
        )


@register(nn.ConvTranspose3d)
class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """``ConvTranspose3d`` with fake-quantized input and weight (one range per output channel, groups too)."""

    kind = 'ConvTranspose3d'

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        padding = self._padding(input, output_size, 3)
        return F.conv_transpose3d(
            self.quantize_input(input),
            self.quantize_weight(),
            self.bias,
            self.stride,
            self.padding,
            padding,
            self.groups,
            self.dilation,
        )
