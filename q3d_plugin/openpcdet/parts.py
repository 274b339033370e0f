"""The types that are registered in OpenPCDet, as one table: for each float type a ``Quant`` type of the same
arguments.

To add one: a line in :data:`PARTS`; where the forward pass adds or concatenates, or several layers read the
same tensor, a ``setup_quant`` or a forward of its own above it. Types that the OpenPCDet at hand does not
have are passed over.
"""

import importlib
from typing import Dict, List, NamedTuple, Optional, Tuple, Type

from pcdet.models.backbones_2d.base_bev_backbone import BaseBEVBackbone
from pcdet.utils.spconv_utils import replace_feature
from torch import nn

from q3d_plugin.fusion_parts import DepthFeatures
from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.layers.window_attention import WindowAttention
from q3d_plugin.openpcdet import fusion
from q3d_plugin.openpcdet.detector import QuantDetectorMixin
from q3d_plugin.openpcdet.registries import registry_of
from q3d_plugin.transforms.insert import first_layer, quantize_, share_input
from q3d_plugin.transforms.sharing import SharedScale

__all__ = ['BLOCKS', 'PARTS', 'Part', 'register_parts']


class _Residual:
    """Residual block: its addition has one quantizer for both inputs, and whatever reads the block's input
    shares one."""

    def setup_quant(self) -> None:
        self.add = QuantAdd(before_relu=True)
        share_input(self.input_layers())

    def _shortcut(self) -> Optional[nn.Module]:
        # BaseBEVResBackbone has a flag and a layer, the sparse backbones the layer or None.
        if isinstance(self.downsample, nn.Module):
            return self.downsample
        return self.downsample_layer if self.downsample else None

    def input_layers(self) -> List[nn.Module]:
        """What reads the block's input."""
        shortcut = self._shortcut()
        return [self.conv1, self.add if shortcut is None else first_layer(shortcut)]


class _SparseResidual(_Residual):
    def forward(self, x):
        out = self.conv1(x)
        out = replace_feature(out, self.relu(self.bn1(out.features)))
        out = self.conv2(out)
        shortcut = self._shortcut()
        identity = x if shortcut is None else shortcut(x)
        added = self.add(self.bn2(out.features), identity.features)
        return replace_feature(out, self.relu(added))


class _DenseResidual(_Residual):
    def forward(self, x):
        first = getattr(self, 'relu1', None) or self.relu
        last = getattr(self, 'relu2', None) or self.relu
        out = self.bn2(self.conv2(first(self.bn1(self.conv1(x)))))
        shortcut = self._shortcut()
        return last(self.add(out, x if shortcut is None else shortcut(x)))


class _BEVForward:
    """The concatenation of the levels has one quantizer; a level's block and deblock share that of its
    input."""

    def setup_quant(self) -> None:
        if len(self.blocks) > 1:
            self.concat = QuantConcat()
        for block, deblock in zip(self.blocks[1:], self.deblocks):
            # A block pads its input with zeros before its first convolution, which changes no range.
            padded = isinstance(block[0], nn.ZeroPad2d)
            share_input([*_input_layers(block), first_layer(deblock)], one_tensor=not padded)

    def forward(self, data_dict):
        x = data_dict['spatial_features']
        ups = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            ups.append(self.deblocks[i](x) if len(self.deblocks) > 0 else x)
        if len(ups) > 1:
            x = self.concat(ups, dim=1)
        elif ups:
            x = ups[0]
        if len(self.deblocks) > len(self.blocks):
            x = self.deblocks[-1](x)
        data_dict['spatial_features_2d'] = x
        return data_dict


def _input_layers(block: nn.Sequential) -> List[nn.Module]:
    """The layers that read the input of a block of the BEV backbones (one may be behind a padding)."""
    first = next((m for m in block if not isinstance(m, nn.ZeroPad2d)), None)
    return first.input_layers() if isinstance(first, _Residual) else [first_layer(block)]


class _TwoLevelForward:
    """BaseBEVBackboneV1: the concatenation of its two levels has one quantizer."""

    def setup_quant(self) -> None:
        self.concat = QuantConcat()

    def forward(self, data_dict):
        levels = data_dict['multi_scale_2d_features']
        ups = [self.deblocks[0](levels['x_conv4']), self.deblocks[1](self.blocks[1](levels['x_conv5']))]
        data_dict['spatial_features_2d'] = self.blocks[0](self.concat(ups, dim=1))
        return data_dict


class _SharedBranches:
    """The first layers of all branches of all heads read one tensor: the output of the shared convolution."""

    def setup_quant(self) -> None:
        share_input(first_layer(getattr(h, branch)) for h in self.heads_list for branch in h.sep_head_dict)


def _anchor_layers(head) -> List[nn.Module]:
    """The layers of an anchor head that read its features: classification, boxes (several), directions."""
    boxes = list(head.conv_box.values()) if isinstance(head.conv_box, nn.ModuleDict) else [head.conv_box]
    branches = [head.conv_cls, *boxes, head.conv_dir_cls]
    return [first_layer(branch) for branch in branches if branch is not None]


class _SharedAnchorBranches:
    """Classification, box and direction convolutions read the same features."""

    def setup_quant(self) -> None:
        share_input(_anchor_layers(self))


class _SharedAnchorHeads:
    """All branches of all heads read the same features, unless a head has blocks of its own before them."""

    def setup_quant(self) -> None:
        share_input(m for h in self.rpn_heads if not len(h.blocks) for m in _anchor_layers(h))
        for head in self.rpn_heads:
            if len(head.blocks):
                share_input(_anchor_layers(head))
        share_input(m for h in self.rpn_heads if len(h.blocks) for m in _input_layers(h.blocks[0]))


class Part(NamedTuple):
    """A line of the table.

    Attributes:
        section: Where it stands in a model's config: a key of ``registries.REGISTRIES``.
        base: Name of the float type in that registry.
        mixin: What its Quant type adds: ``setup_quant``, or a forward of its own.
        shared_scales: Tensors of different modules below it that have one scale.
    """

    section: str
    base: str
    mixin: Optional[Type] = None
    shared_scales: Tuple[SharedScale, ...] = ()


PARTS = (
    Part('NAME', 'SECONDNet', QuantDetectorMixin),
    Part('NAME', 'SECONDNetIoU', QuantDetectorMixin),
    Part('NAME', 'PointPillar', QuantDetectorMixin),
    Part('NAME', 'PillarNet', QuantDetectorMixin),
    Part('NAME', 'CenterPoint', QuantDetectorMixin),
    Part('NAME', 'VoxelNeXt', QuantDetectorMixin),
    Part('NAME', 'TransFusion', QuantDetectorMixin),
    Part('NAME', 'BevFusion', fusion.Detector),
    Part('NAME', 'PointRCNN', QuantDetectorMixin),
    Part('NAME', 'PartA2Net', QuantDetectorMixin),
    Part('NAME', 'PVRCNN', QuantDetectorMixin),
    Part('NAME', 'PVRCNNPlusPlus', QuantDetectorMixin),
    Part('NAME', 'VoxelRCNN', QuantDetectorMixin),
    Part('NAME', 'CaDDN', QuantDetectorMixin),
    Part('NAME', 'MPPNet', QuantDetectorMixin),
    Part('NAME', 'MPPNetE2E', QuantDetectorMixin),
    Part('VFE', 'PillarVFE'),
    Part('VFE', 'DynPillarVFE'),
    Part('VFE', 'DynamicPillarVFESimple2D'),
    Part('VFE', 'DynamicVoxelVFE'),
    Part('VFE', 'ImageVFE'),
    Part('BACKBONE_3D', 'VoxelBackBone8x'),
    Part('BACKBONE_3D', 'VoxelResBackBone8x'),
    Part('BACKBONE_3D', 'VoxelResBackBone8xVoxelNeXt'),
    Part('BACKBONE_3D', 'VoxelResBackBone8xVoxelNeXt2D'),
    Part('BACKBONE_3D', 'PillarBackBone8x'),
    Part('BACKBONE_3D', 'PillarRes18BackBone8x'),
    Part('BACKBONE_3D', 'UNetV2'),
    Part('BACKBONE_3D', 'VoxelBackBone8xFocal'),
    Part('BACKBONE_3D', 'PointNet2Backbone'),
    Part('BACKBONE_3D', 'PointNet2MSG'),
    Part('BACKBONE_3D', 'DSVT'),
    Part('MAP_TO_BEV', 'Conv2DCollapse'),
    Part('PFE', 'VoxelSetAbstraction'),
    Part('BACKBONE_2D', 'BaseBEVBackbone', _BEVForward),
    Part('BACKBONE_2D', 'BaseBEVBackboneV1', _TwoLevelForward),
    Part('BACKBONE_2D', 'BaseBEVResBackbone', _BEVForward),
    Part('DENSE_HEAD', 'AnchorHeadSingle', _SharedAnchorBranches),
    Part('DENSE_HEAD', 'AnchorHeadMulti', _SharedAnchorHeads),
    Part('DENSE_HEAD', 'CenterHead', _SharedBranches),
    Part('DENSE_HEAD', 'VoxelNeXtHead', _SharedBranches),
    Part('DENSE_HEAD', 'TransFusionHead', fusion.Head),
    Part('POINT_HEAD', 'PointHeadSimple'),
    Part('POINT_HEAD', 'PointHeadBox'),
    Part('POINT_HEAD', 'PointIntraPartOffsetHead'),
    Part('ROI_HEAD', 'SECONDHead'),
    Part('ROI_HEAD', 'PartA2FCHead'),
    Part('ROI_HEAD', 'PVRCNNHead'),
    Part('ROI_HEAD', 'PointRCNNHead'),
    Part('ROI_HEAD', 'VoxelRCNNHead'),
    Part('ROI_HEAD', 'MPPNetHead'),
    Part('ROI_HEAD', 'MPPNetHeadE2E'),
    Part('IMAGE_BACKBONE', 'SwinTransformer'),
    Part('NECK', 'GeneralizedLSSFPN', fusion.Neck),
    Part('VTRANSFORM', 'DepthLSSTransform', DepthFeatures),
    Part('FUSER', 'ConvFuser', fusion.Fuser),
)

# Where a residual block or the like stands, relative to pcdet.models, and what its quantized type adds.
_BLOCKS = (
    ('backbones_3d.spconv_backbone', 'SparseBasicBlock', _SparseResidual),
    ('backbones_3d.spconv_backbone_voxelnext', 'SparseBasicBlock', _SparseResidual),
    ('backbones_3d.spconv_backbone_voxelnext2d', 'SparseBasicBlock', _SparseResidual),
    ('backbones_3d.spconv_backbone_2d', 'SparseBasicBlock', _SparseResidual),
    ('backbones_3d.spconv_unet', 'SparseBasicBlock', _SparseResidual),
    ('backbones_3d.spconv_backbone_2d', 'BasicBlock', _DenseResidual),
    ('backbones_2d.base_bev_backbone', 'BasicBlock', _DenseResidual),
    ('backbones_image.swin', 'WindowMSA', WindowAttention),
)

BLOCKS: Dict[Type[nn.Module], Type[nn.Module]] = {}
"""Float block class -> quantized block class; filled by :func:`register_parts`."""


def _block(name: str, bases: Tuple[Type, ...]) -> Type[nn.Module]:
    # Pickle finds a class by its name.
    globals()[name] = type(name, bases, {'__module__': __name__})
    return globals()[name]


def _find_blocks() -> None:
    for module, name, mixin in _BLOCKS:
        try:
            base = getattr(importlib.import_module(f'pcdet.models.{module}'), name)
        except (ImportError, AttributeError):
            continue
        if base not in BLOCKS:
            BLOCKS[base] = _block(f'Quant{name}_{module.rpartition(".")[2]}', (mixin, base))
    try:
        from pcdet.models.dense_heads.anchor_head_multi import SingleHead
    except ImportError:
        return
    if SingleHead not in BLOCKS:
        # Its forward calls that of its parent BaseBEVBackbone by super(): the quantized one stands between.
        between = _block('_QuantBEV', (_BEVForward, BaseBEVBackbone))
        BLOCKS[SingleHead] = _block('QuantSingleHead', (SingleHead, between))


def _quant_type(part: Part, base: Type[nn.Module]) -> Type[nn.Module]:
    bases = (base,) if part.mixin is None else (part.mixin, base)
    doc = f'``{base.__name__}`` with quantized layers and BatchNorm folded; takes the same arguments.'
    namespace = {'__doc__': doc, '__module__': __name__}
    if part.shared_scales:
        namespace['shared_scales'] = part.shared_scales
    if part.section != 'NAME':

        def __init__(self, *args, **kwargs):
            base.__init__(self, *args, **kwargs)
            quantize_(self, BLOCKS)

        namespace['__init__'] = __init__
    return type(f'Quant{part.base}', bases, namespace)


def register_parts() -> None:
    """Registers a Quant type for every line of :data:`PARTS`; harmless when called again."""
    _find_blocks()
    for part in PARTS:
        registry, name = registry_of(part.section), f'Quant{part.base}'
        if part.base in registry and name not in registry:
            registry[name] = globals()[name] = _quant_type(part, registry[part.base])
