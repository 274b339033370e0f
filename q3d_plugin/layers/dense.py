"""Quantized dense layers: convolutions, transposed convolutions, linear."""

from typing import List, Optional, Tuple

import torch
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


class _Convolution(QuantWeightLayer):
    """The part that convolutions and transposed convolutions have in common."""

    family = 'convolution'

    @property
    def input_channels(self) -> int:
        return self.in_channels

    def channel_axis(self, x: Tensor) -> int:
        return x.dim() - 1 - len(self.kernel_size)

    def _reads(self, place: Tensor) -> Tuple[Tensor, Tensor]:
        """(count, positions, dimensions) coordinates that the outputs at ``place`` read; which are there."""
        raise NotImplementedError

    def _offsets(self, device: torch.device) -> Tensor:
        """(positions, dimensions) coordinates within the kernel, in the order of the weight."""
        axes = [torch.arange(k, device=device) for k in self.kernel_size]
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))

    def rows_of(self, x: Tensor, out: Tensor, places: Tensor) -> Tensor:
        if x.dim() == len(self.kernel_size) + 1:
            x, out = x[None], out[None]
        x = self._padded(x)
        axes: List[Tensor] = []
        for size in (*out.shape[:1:-1], out.shape[0]):
            axes.insert(0, places % size)
            places = places // size
        places = torch.stack(axes, dim=1)
        where, there = self._reads(places[:, 1:])
        there = there & (where >= 0).all(-1) & (where < where.new_tensor(x.shape[2:])).all(-1)
        where = where.masked_fill(~there[..., None], 0)
        rows = x[(places[:, :1], slice(None), *where.unbind(-1))]  # (count, positions, channels)
        return (rows * there[..., None]).transpose(1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        return x


class _QuantConv(_Convolution):
    """Convolutions hold their weight as (out, in / groups, kernel...)."""

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.quantized(input)
        return self._conv_forward(x, weight, self.bias)

    def kernel_view(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)

    def scale_input(self, weight: Tensor, factor: Tensor) -> Tensor:
        return (self.kernel_view(weight) * factor.reshape(self.groups, 1, -1, 1)).reshape(weight.shape)

    def _padded(self, x: Tensor) -> Tensor:
        if self.padding_mode == 'zeros':
            return x
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _reads(self, place: Tensor) -> Tuple[Tensor, Tensor]:
        # Written out for padding='same' too: (last left, last right, ..., first left, first right).
        before = place.new_tensor(self._reversed_padding_repeated_twice[::2][::-1])
        if self.padding_mode != 'zeros':
            before = torch.zeros_like(before)
        start = place * place.new_tensor(self.stride) - before
        where = start[:, None] + self._offsets(place.device) * place.new_tensor(self.dilation)
        return where, torch.ones_like(where[..., 0], dtype=torch.bool)


@register(nn.Conv2d)
class QuantConv2d(_QuantConv, nn.Conv2d):
    """``Conv2d`` with fake-quantized input and weight (one range per output channel)."""

    kind = 'Conv2d'


@register(nn.Conv1d)
class QuantConv1d(_QuantConv, nn.Conv1d):
    """``Conv1d`` with fake-quantized input and weight."""

    kind = 'Conv1d'


@register(nn.Conv3d)
class QuantConv3d(_QuantConv, nn.Conv3d):
    """``Conv3d`` with fake-quantized input and weight."""

    kind = 'Conv3d'


@register(nn.Linear)
class QuantLinear(QuantWeightLayer, nn.Linear):
    """``Linear`` with fake-quantized input and weight (one range per output feature)."""

    kind = 'Linear'

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.quantized(input)
        return F.linear(x, weight, self.bias)


class _QuantConvTranspose(_Convolution):
    """Transposed convolutions hold their weight as (in, out / groups, kernel...)."""

    def kernel_view(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return grouped.transpose(1, 2)

    def scale_input(self, weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))

    def _reads(self, place: Tensor) -> Tuple[Tensor, Tensor]:
        # Input i meets kernel position k at output i * stride - padding + k * dilation.
        start = place + place.new_tensor(self.padding)
        reach = start[:, None] - self._offsets(place.device) * place.new_tensor(self.dilation)
        stride = place.new_tensor(self.stride)
        return reach.div(stride, rounding_mode='floor'), (reach % stride == 0).all(-1)

    def output_first(self, weight: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return grouped.transpose(1, 2).reshape(self.out_channels, -1, *weight.shape[2:])

    def scale_output(self, weight: Tensor, factor: Tensor) -> Tensor:
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        ones = [1] * (weight.dim() - 2)
        return (grouped * factor.reshape(self.groups, 1, -1, *ones)).reshape(weight.shape)

    def _quantized_weight(self, weight: Tensor, amax: Optional[Tensor]) -> Tensor:
        if self.weight_quantizer is None:
            return weight
        rows = self.weight_quantizer(self.output_first(weight), amax=amax)
        grouped = rows.reshape(self.groups, self.out_channels // self.groups, *rows.shape[1:])
        return grouped.transpose(1, 2).reshape(weight.shape)

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
        x, weight = self.quantized(input)
        return F.conv_transpose2d(
            x,
            weight,
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
        x, weight = self.quantized(input)
        return F.conv_transpose3d(
            x,
            weight,
            self.bias,
            self.stride,
            self.padding,
            padding,
            self.groups,
            self.dilation,
        )
