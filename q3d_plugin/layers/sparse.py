"""Quantized sparse convolutions of spconv 2.x: statistics and ranges are those of the active voxels."""

import spconv.pytorch as spconv
import torch
from spconv.constants import FILTER_HWIO
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor

from q3d_plugin.layers.base import QuantWeightLayer, register

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

    def quantize_weight(self) -> Tensor:
        if self.weight_quantizer is None:
            return self.weight
        if has_quirky_1x1(self):
            return self.weight_quantizer(self.output_first(self.weight)).t().reshape(self.weight.shape)
        return self.weight_quantizer(self.weight)

    def forward(self, input, add_input=None):
        features = self.quantize_input(input.features)
        x = input if features is input.features else input.replace_feature(features)
        separate = self.bias is not None and (torch.is_grad_enabled() or not features.is_cuda)
        out = self._conv_forward(
            self.training,
            x,
            self.quantize_weight(),
            None if separate else self.bias,
            add_input,
            name=self.name,
            sparse_unique_name=self._sparse_unique_name,
            act_type=self.act_type,
            act_alpha=self.act_alpha,
            act_beta=self.act_beta,
        )
        return out.replace_feature(out.features + self.bias) if separate else out


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
