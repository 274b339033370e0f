"""The types that are registered in MMDetection3D, as one table: for each float type a ``Quant`` type of the
same arguments.

To add one: a line in :data:`PARTS`; where the forward pass adds or concatenates, or several layers read the
same tensor, a ``setup_quant`` or a forward of its own above it. Types of mmdet that MMDetection3D's detectors
use (``mmdet.ResNet``) get their Quant type in MMDetection3D's registry (``QuantResNet``).
"""

from typing import Dict, NamedTuple, Optional, Tuple, Type

import mmdet3d.models  # noqa: F401  (fills the registry)
from mmdet.models.backbones import resnet, resnext, swin
from mmdet3d.models.backbones import dla
from mmdet3d.models.dense_heads.centerpoint_head import SeparateHead
from mmdet3d.models.layers.sparse_block import SparseBasicBlock, replace_feature
from mmdet3d.models.necks.imvoxel_neck import ResModule
from mmdet3d.registry import MODELS
from torch import Tensor, nn
from torch.utils import checkpoint

from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.layers.window_attention import WindowAttention
from q3d_plugin.mmdet3d import conventions, mmcv_sparse  # noqa: F401  (make mmcv's modules known)
from q3d_plugin.transforms.insert import first_layer, quantize_, share_input
from q3d_plugin.transforms.sharing import SharedScale, declare_sharing

__all__ = ['BLOCKS', 'PARTS', 'Part', 'quant_name', 'register_parts']


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


class _ResNetBlock:
    """Residual blocks of mmdet's ResNets: the addition has one quantizer for both inputs, and the shortcut's
    convolution shares that of the block's input (STUDY part B)."""

    def setup_quant(self) -> None:
        self.add = QuantAdd(before_relu=True)
        # Where the shortcut begins with a pooling, its convolution reads another tensor.
        if self.downsample is not None and first_layer(self.downsample) is self.downsample[0]:
            share_input([self.conv1, self.downsample[0]])

    def forward(self, x: Tensor) -> Tensor:
        def residual(x: Tensor) -> Tensor:
            return self.add(self._branch(x), x if self.downsample is None else self.downsample(x))

        if self.with_cp and x.requires_grad:
            return self.relu(checkpoint.checkpoint(residual, x, use_reentrant=False))
        return self.relu(residual(x))

    def _branch(self, x: Tensor) -> Tensor:
        """The input of the addition beside the shortcut."""
        numbers = [i for i in (1, 2, 3) if hasattr(self, f'conv{i}')]
        for i in numbers:
            x = getattr(self, f'norm{i}')(getattr(self, f'conv{i}')(x))
            x = x if i == numbers[-1] else self.relu(x)
            if getattr(self, 'with_plugins', False):
                x = self.forward_plugin(x, getattr(self, f'after_conv{i}_plugin_names'))
        return x


class _DLABlock:
    """Residual block of DLANet: its shortcut is made by the tree that it stands in."""

    def setup_quant(self) -> None:
        self.add = QuantAdd(before_relu=True)

    def forward(self, x: Tensor, identity: Optional[Tensor] = None) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(self.add(out, x if identity is None else identity))


class _ImVoxelBlock:
    """Residual block of ImVoxelNet's necks."""

    def setup_quant(self) -> None:
        self.add = QuantAdd(before_relu=True)
        if self.stride != 1:
            share_input([first_layer(self.conv0), first_layer(self.downsample)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.conv0(x))
        return self.activation(self.add(out, self.downsample(x) if self.stride != 1 else x))


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
        children: Of a detector, the children that are parts of no registry, and so are quantized by its own
            Quant type; empty where everything below the part is quantized.
        shared_scales: Tensors of different modules below it that have one scale.
    """

    base: str
    mixin: Optional[Type] = None
    children: Tuple[str, ...] = ()
    shared_scales: Tuple[SharedScale, ...] = ()


PARTS = (
    # Voxel encoders and middle encoders
    Part('PillarFeatureNet'),
    Part('DynamicPillarFeatureNet'),
    Part('HardVFE'),
    Part('DynamicVFE'),
    Part('SegVFE'),
    Part('PointFusion'),
    Part('SparseEncoder'),
    Part('SparseEncoderSASSD'),
    Part('SparseUNet'),
    Part('VoxelSetAbstraction'),
    # Backbones
    Part('SECOND'),
    Part('NoStemRegNet'),
    Part('mmdet.ResNet'),
    Part('mmdet.ResNeXt'),
    Part('mmdet.RegNet'),
    Part('mmdet.SwinTransformer'),
    Part('DLANet'),
    Part('PointNet2SASSG'),
    Part('PointNet2SAMSG'),
    Part('MultiBackbone'),
    Part('DGCNNBackbone'),
    Part('Asymm3DSpconv'),
    Part('MinkUNetBackbone'),
    # Necks
    Part('SECONDFPN', _SECONDFPNForward),
    Part('mmdet.FPN'),
    Part('DLANeck'),
    Part('PointNetFPNeck'),
    Part('IndoorImVoxelNeck'),
    Part('OutdoorImVoxelNeck'),
    # Dense heads
    Part('CenterHead', _SharedBranches),
    Part('Anchor3DHead', _SharedAnchorBranches),
    Part('FreeAnchor3DHead', _SharedAnchorBranches),
    Part('PartA2RPNHead', _SharedAnchorBranches),
    Part('ImVoxelHead'),
    Part('ShapeAwareHead'),
    Part('SSD3DHead'),
    Part('VoteHead'),
    Part('PointRPNHead'),
    Part('GroupFree3DHead'),
    Part('FCOSMono3DHead'),
    Part('PGDHead'),
    Part('SMOKEMono3DHead'),
    Part('MonoFlexHead'),
    Part('mmdet.RPNHead'),
    # Heads of the second stage
    Part('PartA2BboxHead'),
    Part('PointRCNNBboxHead'),
    Part('PVRCNNBBoxHead'),
    Part('Batch3DRoIGridExtractor'),
    Part('H3DBboxHead'),
    Part('PrimitiveHead'),
    Part('PointwiseSemanticHead'),
    Part('ForegroundSegmentationHead'),
    Part('mmdet.Shared2FCBBoxHead'),
    # Segmentation heads
    Part('PointNet2Head'),
    Part('PAConvHead'),
    Part('DGCNNHead'),
    Part('Cylinder3DHead'),
    Part('MinkUNetHead'),
    # A detector with a layer of its own
    Part('ImVoteNet', children=('img_mlp',)),
)


def _block(base: Type[nn.Module], mixin: Type) -> Type[nn.Module]:
    # mmdet has several Bottlenecks; pickle finds a class by its name.
    name = f'Quant{base.__name__}_{base.__module__.rpartition(".")[2]}'
    globals()[name] = type(name, (mixin, base), {'__module__': __name__})
    return globals()[name]


BLOCKS: Dict[Type[nn.Module], Type[nn.Module]] = {
    SparseBasicBlock: QuantSparseBasicBlock,
    resnet.BasicBlock: _block(resnet.BasicBlock, _ResNetBlock),
    resnet.Bottleneck: _block(resnet.Bottleneck, _ResNetBlock),
    resnext.Bottleneck: _block(resnext.Bottleneck, _ResNetBlock),
    dla.BasicBlock: _block(dla.BasicBlock, _DLABlock),
    ResModule: _block(ResModule, _ImVoxelBlock),
    swin.WindowMSA: _block(swin.WindowMSA, WindowAttention),
}
"""Float block class -> quantized block class."""


def quant_name(base: str) -> str:
    """The name under which the Quant type of ``base`` is registered.

    Examples:
        >>> quant_name('SECOND'), quant_name('mmdet.ResNet')
        ('QuantSECOND', 'QuantResNet')
    """
    return f'Quant{base.rpartition(".")[2]}'


def _quant_type(part: Part, base: Type[nn.Module]) -> Type[nn.Module]:
    bases = (base,) if part.mixin is None else (part.mixin, base)

    def __init__(self, *args, **kwargs):
        base.__init__(self, *args, **kwargs)
        children = [getattr(self, name, None) for name in part.children]
        for root in (child for child in children if child is not None) if part.children else (self,):
            quantize_(root, BLOCKS)
        declare_sharing(self)

    doc = f'``{base.__name__}`` with quantized layers and BatchNorm folded; takes the same arguments.'
    namespace = {'__init__': __init__, '__doc__': doc, '__module__': __name__}
    if part.shared_scales:
        namespace['shared_scales'] = part.shared_scales
    return type(quant_name(part.base), bases, namespace)


def register_parts() -> None:
    """Registers a Quant type for every line of :data:`PARTS`; harmless when called again."""
    for part in PARTS:
        base, name = MODELS.get(part.base), quant_name(part.base)
        if base is not None and MODELS.get(name) is None:
            cls = _quant_type(part, base)
            globals()[name] = cls
            MODELS.register_module(name=name, module=cls)
