"""Quantized sparse convolutions of spconv 2.x: statistics and ranges are those of the active voxels."""

from typing import Any, Optional, Tuple

import spconv.pytorch as spconv
import torch
from spconv.constants import FILTER_HWIO
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor

from q3d_plugin.layers.base import QuantWeightLayer, register
from q3d_plugin.layers.conventions import add_conventions

__all__ = ['QuantSparseConvolution', 'has_quirky_1x1']


def has_quirky_1x1(layer: SparseConvolution) -> bool:
    """Whether this layer reads its (out, 1, 1, 1, in) weight as an (in, out) matrix without transposing it.

    spconv does that for 1x1 convolutions (``weight.view(in_channels, out_channels)``). Float results are
    what they are, but the output channel is then the last axis of that view.
    """
    return bool(layer.conv1x1) and not FILTER_HWIO


class QuantSparseConvolution(QuantWeightLayer):
    """Any ``SparseConvolution`` with fake-quantized features and weight (one range per output channel).

    The weight of spconv 2.x is (out, k, k, k, in). The bias is added to the features after the convolution
    wherever gradients are wanted or the features are on the CPU: spconv's fused bias has no gradient in eval
    mode, and its CPU build refuses one.
    """

    family = 'sparse'

    def output_first(self, weight: Tensor) -> Tensor:
        if has_quirky_1x1(self):
            return weight.reshape(self.in_channels, self.out_channels).t()
        return weight

    def scale_output(self, weight: Tensor, factor: Tensor) -> Tensor:
        if has_quirky_1x1(self):
            return (weight.reshape(-1, self.out_channels) * factor).reshape(weight.shape)
        if weight.shape != self.weight.shape and weight.shape[-1] == self.out_channels:
            # A checkpoint of spconv 1.x, (k, k, k, in, out): its loader permutes it after the fold.
            return weight * factor
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))

    def _quantized_weight(self, weight: Tensor, amax: Optional[Tensor]) -> Tensor:
        if self.weight_quantizer is None:
            return weight
        if has_quirky_1x1(self):
            return self.weight_quantizer(self.output_first(weight), amax=amax).t().reshape(weight.shape)
        return self.weight_quantizer(weight, amax=amax)

    @property
    def input_channels(self) -> int:
        return self.in_channels

    def features(self, x: Any) -> Tensor:
        return x.features

    def channel_axis(self, x: Tensor) -> int:
        return 1

    def kernel_view(self, weight: Tensor) -> Tensor:
        if has_quirky_1x1(self):
            return self.output_first(weight)[None, :, :, None]
        return weight.reshape(self.out_channels, -1, self.in_channels).transpose(1, 2)[None]

    def scale_input(self, weight: Tensor, factor: Tensor) -> Tensor:
        if has_quirky_1x1(self):
            return (weight.reshape(self.in_channels, -1) * factor[:, None]).reshape(weight.shape)
        return weight * factor

    def rows_of(self, x: Any, out: Any, places: Tensor) -> Tensor:
        if self.conv1x1:
            return x.features[places][..., None]
        there, index = _lookup(x, *self._reads(x, out.indices[places].long()))
        return (x.features[index] * there[..., None]).transpose(1, 2)

    def _reads(self, x: Any, places: Tensor) -> Tuple[Tensor, Tensor]:
        """(count, positions, 1 + dimensions) coordinates that outputs at ``places`` read; which can exist."""
        # An inverse convolution undoes another one, whose strides are with the indices that they share.
        rule = x.find_indice_pair(self.indice_key) if self.inverse else self
        stride, padding, dilation = (places.new_tensor(v) for v in (rule.stride, rule.padding, rule.dilation))
        kernel = self.kernel_size
        offsets = torch.cartesian_prod(*(torch.arange(k, device=places.device) for k in kernel))
        offsets = offsets.reshape(-1, len(kernel)) * dilation
        if self.subm:
            padding, stride = places.new_tensor([k // 2 for k in kernel]) * dilation, torch.ones_like(stride)
        if self.inverse or self.transposed:
            reach = (places[:, 1:] + padding)[:, None] - offsets
            where, possible = reach.div(stride, rounding_mode='floor'), (reach % stride == 0).all(-1)
        else:
            where = (places[:, 1:] * stride - padding)[:, None] + offsets
            possible = torch.ones_like(where[..., 0], dtype=torch.bool)
        batch = places[:, :1, None].expand(-1, where.shape[1], 1)
        return torch.cat([batch, where], dim=-1), possible

    def forward(self, input, add_input=None):
        features, weight = self.quantized(input.features)
        x = input if features is input.features else input.replace_feature(features)
        separate = self.bias is not None and (torch.is_grad_enabled() or not features.is_cuda)
        out = self._conv_forward(
            self.training,
            x,
            weight,
            None if separate else self.bias,
            add_input,
            name=self.name,
            sparse_unique_name=self._sparse_unique_name,
            act_type=self.act_type,
            act_alpha=self.act_alpha,
            act_beta=self.act_beta,
        )
        return out.replace_feature(out.features + self.bias) if separate else out


def _lookup(x: Any, where: Tensor, possible: Tensor) -> Tuple[Tensor, Tensor]:
    """Which of the coordinates ``where`` are active voxels of ``x``, and their rows (0 for the others)."""
    sizes = where.new_tensor(x.spatial_shape)
    possible = possible & (where[..., 1:] >= 0).all(-1) & (where[..., 1:] < sizes).all(-1)

    def flat(coordinates):
        number = coordinates[..., 0]
        for i, size in enumerate(x.spatial_shape):
            number = number * int(size) + coordinates[..., i + 1]
        return number

    ordered, order = flat(x.indices.long()).sort()
    wanted = flat(where)
    found = torch.searchsorted(ordered, wanted).clamp_(max=len(ordered) - 1)
    there = possible & (ordered[found] == wanted)
    return there, order[found].masked_fill(~there, 0)


def _quantized(float_class):
    """The quantized class of one of spconv's classes."""
    namespace = {
        '__module__': __name__,
        '__doc__': f'``{float_class.__name__}`` with fake-quantized features and weight.',
        'kind': float_class.__name__,
    }
    cls = type(f'Quant{float_class.__name__}', (QuantSparseConvolution, float_class), namespace)
    globals()[cls.__name__] = register(float_class)(cls)
    __all__.append(cls.__name__)


for _name in (
    'SubMConv1d',
    'SubMConv2d',
    'SubMConv3d',
    'SparseConv1d',
    'SparseConv2d',
    'SparseConv3d',
    'SparseConvTranspose2d',
    'SparseConvTranspose3d',
    'SparseInverseConv2d',
    'SparseInverseConv3d',
):
    _quantized(getattr(spconv, _name))

# It derives from nn.Module, not from nn.Sequential.
add_conventions(sequences=[spconv.SparseSequential])
