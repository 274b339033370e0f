"""What is registered in MMDetection3D, as one table: for each float type a ``Quant`` type of the same
arguments.

To add one: a line in :data:`PARTS`; where the forward pass adds or concatenates, or several layers read the
same tensor, a ``setup_quant`` or a forward of its own above it.
"""

from typing import Dict, NamedTuple, Optional, Type

import mmdet3d.models  # noqa: F401  (fills the registry)
from mmdet3d.models.dense_heads.centerpoint_head import SeparateHead
from mmdet3d.models.layers.sparse_block import SparseBasicBlock, replace_feature
from mmdet3d.registry import MODELS
from torch import nn

from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.transforms.insert import first_layer, quantize_, share_input

__all__ = ['PARTS', 'Part', 'register_parts']


class QuantSparseBasicBlock(SparseBasicBlock):
    """Residual block of the sparse encoders: its addition has one quantizer for both inputs."""

    def setup_quant(self) -> None:
        """Makes the addition and shares the block's input."""
        self.add = QuantAdd(before_relu=True)
        if self.downsample is not None:
            share_input([self.conv1, first_layer(self.downsample)])

    def forward(self, x):
        out = self.conv1(x)
        out = replace_feature(out, self.norm1(out.features))
        out = replace_feature(out, self.relu(out.features))
        out = self.conv2(out)
        out = replace_feature(out, self.norm2(out.features))
        identity = x.features if self.downsample is None else self.downsample(x).features
        out = replace_feature(out, self.add(out.features, identity))
        return replace_feature(out, self.relu(out.features))


class _SECONDFPNForward:
    """The concatenation of the levels has one quantizer for all of them."""

    def setup_quant(self) -> None:
        self.concat = QuantConcat()

    def forward(self, x):
        assert len(x) == len(self.in_channels)
        ups = [deblock(x[i]) for i, deblock in enumerate(self.deblocks)]
        return [self.concat(ups, dim=1) if len(ups) > 1 else ups[0]]


class _SharedBranches:
    """The first layers of all branches of all tasks read the output of the shared convolution."""

    def setup_quant(self) -> None:
        heads = [h for h in self.task_heads if isinstance(h, SeparateHead)]
        share_input(first_layer(getattr(head, branch)) for head in heads for branch in head.heads)


class _SharedAnchorBranches:
    """Classification, box and direction convolutions read the same features."""

    def setup_quant(self) -> None:
        share_input(getattr(self, n) for n in ('conv_cls', 'conv_reg', 'conv_dir_cls') if hasattr(self, n))


class Part(NamedTuple):
    """A line of the table.

    Attributes:
        base: Name of the float type in MMDetection3D's registry.
        mixin: What its Quant type adds: ``setup_quant``, or a forward of its own.
    """

    base: str
    mixin: Optional[Type] = None


PARTS = (
    Part('SparseEncoder'),
    Part('PillarFeatureNet'),
    Part('DynamicPillarFeatureNet'),
    Part('HardVFE'),
    Part('DynamicVFE'),
    Part('SECOND'),
    Part('SECONDFPN', _SECONDFPNForward),
    Part('CenterHead', _SharedBranches),
    Part('Anchor3DHead', _SharedAnchorBranches),
)

BLOCKS: Dict[Type[nn.Module], Type[nn.Module]] = {SparseBasicBlock: QuantSparseBasicBlock}


def _quant_type(part: Part, base: Type[nn.Module]) -> Type[nn.Module]:
    bases = (base,) if part.mixin is None else (part.mixin, base)

    def __init__(self, *args, **kwargs):
        base.__init__(self, *args, **kwargs)
        quantize_(self, BLOCKS)

    doc = f'``{base.__name__}`` with quantized layers and BatchNorm folded; takes the same arguments.'
    name = f'Quant{base.__name__}'
    return type(name, bases, {'__init__': __init__, '__doc__': doc, '__module__': __name__})


def register_parts() -> None:
    """Registers a Quant type for every line of :data:`PARTS`; harmless when called again."""
    for part in PARTS:
        base = MODELS.get(part.base)
        name = f'Quant{part.base}'
        if base is not None and MODELS.get(name) is None:
            cls = _quant_type(part, base)
            globals()[name] = cls
            MODELS.register_module(name=name, module=cls)
