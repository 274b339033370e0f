"""Quantized sparse convolutions of mmcv, which Cylinder3D uses whether spconv 2.x is installed or not."""

import copy
from typing import Any

from mmcv.ops import sparse_conv
from torch import Tensor

from q3d_plugin.layers.base import QuantWeightLayer, register
from q3d_plugin.layers.sparse import QuantSparseConvolution

__all__ = ['QuantMMCVSparseConvolution']


class QuantMMCVSparseConvolution(QuantWeightLayer):
    """Any sparse convolution of mmcv with fake-quantized features and weight (one range per output channel).

    The weight is (k, k, k, in, out). mmcv's forward reads ``self.weight``, so the quantized weight stands
    there for as long as it runs.
    """

    family = 'sparse'

    @property
    def weight_axis(self) -> int:
        """The last one."""
        return self.ndim + 1

    @property
    def input_channels(self) -> int:
        return self.in_channels

    @property
    def searchable(self) -> bool:
        """Whether rows of the input can be told: mmcv does not keep the strides that an inverse undoes."""
        return not self.inverse

    def features(self, x: Any) -> Tensor:
        return x.features

    def channel_axis(self, x: Tensor) -> int:
        return 1

    def kernel_view(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, self.in_channels, self.out_channels).permute(2, 1, 0)[None]

    def scale_input(self, weight: Tensor, factor: Tensor) -> Tensor:
        return weight * factor[:, None]

    # Coordinates are those of spconv's convolutions, of which mmcv's are a copy.
    rows_of = QuantSparseConvolution.rows_of
    _reads = QuantSparseConvolution._reads

    def forward(self, input):
        features, weight = self.quantized(input.features)
        if features is not input.features:
            # A shallow copy: the table of indices is that of the whole network.
            input = copy.copy(input)
            input.features = features
        # An entry of the instance's dictionary comes before the parameter of the same name.
        self.__dict__['weight'] = weight
        try:
            return super().forward(input)
        finally:
            del self.__dict__['weight']


def _quantized(float_class):
    """The quantized class of one of mmcv's classes."""
    namespace = {
        '__module__': __name__,
        '__doc__': f'``{float_class.__name__}`` of mmcv with fake-quantized features and weight.',
        'kind': float_class.__name__,
    }
    cls = type(f'Quant{float_class.__name__}', (QuantMMCVSparseConvolution, float_class), namespace)
    globals()[cls.__name__] = register(float_class)(cls)
    __all__.append(cls.__name__)


for _name in (
    'SubMConv2d',
    'SubMConv3d',
    'SparseConv2d',
    'SparseConv3d',
    'SparseConvTranspose2d',
    'SparseConvTranspose3d',
    'SparseInverseConv2d',
    'SparseInverseConv3d',
):
    _quantized(getattr(sparse_conv, _name))
