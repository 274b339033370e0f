"""What Quant types add to the parts of OpenPCDet's BEVFusion (``bevfusion.yaml``) and to TransFusionHead."""

from typing import Any, Dict, Tuple

from torch import nn

from q3d_plugin.camera_input import CameraInput
from q3d_plugin.fusion_parts import FloatByDefault, TopDownLevels
from q3d_plugin.layers import QuantConcat
from q3d_plugin.layers.model import quantizers
from q3d_plugin.openpcdet.detector import QuantDetectorMixin
from q3d_plugin.transforms.insert import first_layer, share_input
from q3d_plugin.transforms.sharing import SharedScale

__all__ = ['Detector', 'Fuser', 'Head', 'Neck']

_ADVICE = (
    'DATA_CONFIG.CAMERA_CONFIG.USE_CAMERA: True and the steps image_calibrate and image_normalize give them'
)


class _LooksAtImages:
    """Compares the camera images of every frame with those of calibration.

    Behind the detector mixin, which calibrates by the forward pass of what follows it.
    """

    def forward(self, batch_dict: Dict[str, Any]):
        if getattr(self, 'image_backbone', None) is not None:
            parts = (self.image_backbone, self.neck, self.vtransform)
            ranged = (q for part in parts for q in quantizers(part))
            self.camera_input.check(batch_dict.get('camera_imgs'), ranged)
        return super().forward(batch_dict)


class Detector(QuantDetectorMixin, _LooksAtImages):
    """BevFusion: the map that its head reads has one scale."""

    def __init__(self, model_cfg, num_class, dataset):
        super().__init__(model_cfg=model_cfg, num_class=num_class, dataset=dataset)
        self.camera_input = CameraInput(_ADVICE)

    @property
    def shared_scales(self) -> Tuple[SharedScale, ...]:
        """The concatenation of the decoder, and the layer that reads it."""
        backbone = self._modules.get('backbone_2d')
        extra = len(getattr(backbone, 'deblocks', ())) - len(getattr(backbone, 'blocks', ()))
        reader = f'backbone_2d.deblocks.{len(backbone.blocks)}' if extra > 0 else 'dense_head.shared_conv'
        return (SharedScale('map of the head', ('backbone_2d.concat', reader), optional=True),)


class Neck(TopDownLevels):
    """GeneralizedLSSFPN with a quantizer for each of its concatenations."""

    def forward(self, batch_dict: Dict[str, Any]) -> Dict[str, Any]:
        """Adds ``image_fpn``, made of ``image_features``: both (B, C, H, W) levels from fine to coarse."""
        levels = batch_dict['image_features']
        assert len(levels) == len(self.in_channels)
        batch_dict['image_fpn'] = self.fuse(levels[self.start_level :], mode='bilinear', align_corners=False)
        return batch_dict


class Fuser:
    """ConvFuser with a quantizer for the concatenation of the maps of camera and LiDAR."""

    shared_scales = (SharedScale('maps of camera and LiDAR', ('concat', 'conv.0')),)

    def setup_quant(self) -> None:
        self.concat = QuantConcat()

    def forward(self, batch_dict: Dict[str, Any]) -> Dict[str, Any]:
        """Replaces the map ``spatial_features`` of the LiDAR by the fused one, (B, C, H, W)."""
        maps = [batch_dict['spatial_features_img'], batch_dict['spatial_features']]
        batch_dict['spatial_features'] = self.conv(self.concat(maps, dim=1))
        return batch_dict


class Head(FloatByDefault):
    """TransFusionHead: float unless the recipe includes some of it.

    The branches of its prediction head read one tensor, and so do the projections of its self-attention.
    """

    def setup_quant(self) -> None:
        super().setup_quant()
        branches = self.prediction_head
        share_input(first_layer(getattr(branches, name)) for name in branches.sep_head_dict)
        attention: nn.Module = self.decoder.self_attn
        share_input([attention.q_proj, attention.k_proj, attention.v_proj])
