"""What Quant types add to the types of MMDetection3D's ``projects/BEVFusion``, none of which it imports."""

from collections.abc import Sequence
from typing import List, Tuple

from torch import Tensor, nn

from q3d_plugin.camera_input import CameraInput
from q3d_plugin.fusion_parts import FloatByDefault, TopDownLevels, residual_readers
from q3d_plugin.layers import QuantConcat
from q3d_plugin.layers.model import quantizers
from q3d_plugin.transforms.insert import first_layer, share_input
from q3d_plugin.transforms.sharing import SharedScale

__all__ = ['Detector', 'Fuser', 'Head', 'Neck']

_ADVICE = (
    'the pipeline has to load them (BEVLoadMultiViewImageFromFiles) and to pack them (Pack3DDetInputs with '
    "keys=['img', 'points']), and the data set's modality has use_camera=True"
)


class Detector:
    """BEVFusion: knows which tensors of different parts have one scale, and looks at the camera images."""

    def setup_quant(self) -> None:
        """Names the scales that parts have in common, and takes note of images from now on."""
        self.shared_scales = (*self._camera_scales(), *self._map_scales())
        if self.img_backbone is not None:
            self.camera_input = CameraInput(_ADVICE)

    def _camera_scales(self) -> List[SharedScale]:
        """Stages of a ResNet (mmdet's, and those derived from it) with the concatenations of the neck."""
        stages = [f'img_backbone.{name}' for name in getattr(self.img_backbone, 'res_layers', ())]
        if not stages or not isinstance(self.img_neck, TopDownLevels):
            return []
        taken = self.img_backbone.out_indices[self.img_neck.start_level :]
        return residual_readers(stages, taken, 'img_neck', len(self.img_neck.concats))

    def _map_scales(self) -> List[SharedScale]:
        """Levels of the decoder, each read by its next block and its deblock, and the map that the head
        reads."""
        scales = [SharedScale('map of the head', ('pts_neck.concat', 'bbox_head.shared_conv'), True)]
        for i in range(len(getattr(self.pts_backbone, 'blocks', ())) - 1):
            readers = (f'pts_backbone.blocks.{i + 1}.0', f'pts_neck.deblocks.{i}')
            scales.append(SharedScale(f'level {i} of the decoder', readers, optional=True))
        return scales

    def extract_feat(self, batch_inputs_dict, batch_input_metas, **kwargs):
        """The map that the head reads; of a frame with other images than in calibration an error."""
        if self.img_backbone is not None:
            parts = (self.img_backbone, self.img_neck, self.view_transform)
            ranged = (q for part in parts for q in quantizers(part))
            self.camera_input.check(batch_inputs_dict.get('imgs'), ranged)
        return super().extract_feat(batch_inputs_dict, batch_input_metas, **kwargs)


class Neck(TopDownLevels):
    """GeneralizedLSSFPN with a quantizer for each of its concatenations."""

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """The fused levels, from fine to coarse.

        Args:
            inputs: (B, C, H, W) features of the backbone, from fine to coarse.
        """
        assert len(inputs) == len(self.in_channels)
        return self.fuse(inputs[self.start_level :], **self.upsample_cfg)


class Fuser:
    """ConvFuser, a sequence that begins with the concatenation of the maps of camera and LiDAR."""

    shared_scales = (SharedScale('maps of camera and LiDAR', ('concat', '0')),)

    def setup_quant(self) -> None:
        """Puts the concatenation before the convolution, whose name does not change."""
        layers = list(self.named_children())
        for name, _ in layers:
            delattr(self, name)
        self.concat = QuantConcat()
        for name, layer in layers:
            self.add_module(name, layer)

    def forward(self, inputs: List[Tensor]) -> Tensor:
        """The fused map, (B, C, H, W).

        Args:
            inputs: The maps of camera and LiDAR.
        """
        return nn.Sequential.forward(self, inputs)


class Head(FloatByDefault):
    """TransFusionHead: float unless the recipe includes some of it.

    The branches of a prediction head read one tensor.
    """

    def setup_quant(self) -> None:
        super().setup_quant()
        for head in self.prediction_heads:
            share_input(first_layer(getattr(head, branch)) for branch in head.heads)
