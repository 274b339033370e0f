"""Conventions of mmcv's modules that quantization has to know; imported by the adapter."""

from typing import List, Tuple

from mmcv import cnn
from mmcv.cnn.bricks import activation, hsigmoid, hswish, swish, wrappers
from mmcv.ops import sparse_modules
from torch import nn

from q3d_plugin.layers.conventions import add_conventions

__all__ = ['conv_module_pairs']


def conv_module_pairs(module: cnn.ConvModule) -> List[Tuple[str, str]]:
    """The convolution and the norm of a ConvModule, where its own order says that the norm comes next.

    Examples:
        >>> norm = dict(type='BN')
        >>> conv_module_pairs(cnn.ConvModule(3, 4, 1, norm_cfg=norm))
        [('conv', 'bn')]
        >>> conv_module_pairs(cnn.ConvModule(4, 4, 1, norm_cfg=norm, order=('norm', 'conv', 'act')))
        []
    """
    order = module.order
    follows = module.with_norm and order.index('norm') == order.index('conv') + 1
    return [('conv', module.norm_name)] if follows else []


def _modules_of(*files) -> List[type]:
    """The module types that these files of mmcv define."""
    return [
        value
        for file in files
        for value in vars(file).values()
        if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == file.__name__
    ]


add_conventions(
    # They differ from torch's layers in how they treat empty input under old versions of torch.
    wrappers=_modules_of(wrappers),
    sequences=[sparse_modules.SparseSequential],
    activations=_modules_of(activation, hsigmoid, hswish, swish),
    pairs={cnn.ConvModule: conv_module_pairs},
)
