"""The types that are registered in MMDetection3D, as one table: for each float type a ``Quant`` type of the
same arguments.

To add one: a line in :data:`PARTS`; where the forward pass adds or concatenates, or several layers read the
same tensor, a ``setup_quant`` or a forward of its own (``blocks.py``, ``bevfusion.py``). Types of mmdet that
MMDetection3D's detectors use (``mmdet.ResNet``) get their Quant type in MMDetection3D's registry
(``QuantResNet``). Types of ``projects/`` get theirs when they are imported.
"""

from typing import NamedTuple, Optional, Tuple, Type

import mmdet3d
import mmdet3d.models
from mmdet3d.registry import MODELS
from torch import nn

from q3d_plugin.errors import Q3DError
from q3d_plugin.fusion_parts import DepthFeatures
from q3d_plugin.mmdet3d import bevfusion, conventions, mmcv_sparse  # noqa: F401  (make mmcv's modules known)
from q3d_plugin.mmdet3d.blocks import BLOCKS, SECONDFPNForward, SharedAnchorBranches, SharedBranches
from q3d_plugin.mmdet3d.projects import import_bevfusion, when_imported
from q3d_plugin.transforms.insert import quantize_
from q3d_plugin.transforms.sharing import SharedScale, declare_sharing

__all__ = ['BLOCKS', 'PARTS', 'Part', 'quant_name', 'register_parts']


class Part(NamedTuple):
    """A line of the table.

    Attributes:
        base: Name of the float type in MMDetection3D's registry.
        mixin: What its Quant type adds: ``setup_quant``, or a forward of its own.
        children: Of a detector, the children that are parts of no registry, and so are quantized by its own
            Quant type; None where everything below the part is quantized.
        shared_scales: Tensors of different modules below it that have one scale.
        project: Whether the type is one of ``projects/BEVFusion``, which no wheel has.
    """

    base: str
    mixin: Optional[Type] = None
    children: Optional[Tuple[str, ...]] = None
    shared_scales: Tuple[SharedScale, ...] = ()
    project: bool = False


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
    Part('SECONDFPN', SECONDFPNForward),
    Part('mmdet.FPN'),
    Part('DLANeck'),
    Part('PointNetFPNeck'),
    Part('IndoorImVoxelNeck'),
    Part('OutdoorImVoxelNeck'),
    # Dense heads
    Part('CenterHead', SharedBranches),
    Part('Anchor3DHead', SharedAnchorBranches),
    Part('FreeAnchor3DHead', SharedAnchorBranches),
    Part('PartA2RPNHead', SharedAnchorBranches),
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
    # projects/BEVFusion; the detector itself has no layers beside those of its parts
    Part('BEVFusion', bevfusion.Detector, children=(), project=True),
    Part('BEVFusionSparseEncoder', project=True),
    Part('GeneralizedLSSFPN', bevfusion.Neck, project=True),
    Part('LSSTransform', project=True),
    Part('DepthLSSTransform', DepthFeatures, project=True),
    Part('ConvFuser', bevfusion.Fuser, project=True),
    Part('TransFusionHead', bevfusion.Head, project=True),
)


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
        if part.children is None:
            quantize_(self, BLOCKS)
        else:
            children = [getattr(self, name, None) for name in part.children]
            for child in children:
                if child is not None:
                    quantize_(child, BLOCKS)
            if hasattr(self, 'setup_quant'):
                self.setup_quant()
        declare_sharing(self)

    doc = f'``{base.__name__}`` with quantized layers and BatchNorm folded; takes the same arguments.'
    namespace = {'__init__': __init__, '__doc__': doc, '__module__': __name__}
    if part.shared_scales:
        namespace['shared_scales'] = part.shared_scales
    return type(quant_name(part.base), bases, namespace)


def _until_there(part: Part):
    """Stands in the registry for the Quant type of a type that is not there: builds it, or says why not."""
    name = quant_name(part.base)

    def build(*args, **kwargs):
        cls = _registered(part)
        if cls is None and part.project:
            # Not before: the float type may have come from somewhere else, such as a copy of the project.
            import_bevfusion()
            cls = _registered(part)
        if cls is None:
            raise Q3DError(
                f'{name}: this MMDetection3D ({mmdet3d.__version__}) has no type {part.base!r} to quantize'
            )
        return cls(*args, **kwargs)

    build.__name__, build.__module__ = name, __name__
    build._q3d_waits = True
    return build


def _registered(part: Part) -> Optional[Type[nn.Module]]:
    """The Quant type of a line of the table, which is in the registry; None without its float type."""
    base, name = MODELS.get(part.base), quant_name(part.base)
    known = MODELS.module_dict.get(name)
    waits = getattr(known, '_q3d_waits', False)
    if base is None:
        if known is None:
            MODELS.register_module(name=name, module=_until_there(part))
        return None
    if known is None or waits:
        known = globals()[name] = _quant_type(part, base)
        MODELS.register_module(name=name, module=known, force=waits)
    return known


def register_parts() -> None:
    """Registers a Quant type for every line of :data:`PARTS`; harmless when called again.

    Where the float type is not there, the Quant type is one that says so when it is built. Types of
    ``projects/`` come later, when their package is imported.
    """
    for part in PARTS:
        _registered(part)
    when_imported(_register_project)


def _register_project() -> None:
    for part in PARTS:
        if part.project:
            _registered(part)
