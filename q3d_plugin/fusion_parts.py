"""BEVFusion's parts as far as they are the same in both frameworks: concatenations, and scales they share.

Liu et al., "BEVFusion: Multi-Task Multi-Sensor Fusion with Unified Bird's-Eye View Representation", 2023. An
adapter puts one of these classes before the float type of its framework. The rules are those of the study
(part B), after NVIDIA's CUDA-BEVFusion: one quantizer for all inputs of a concatenation, whose scale is also
that of the layer that reads the result.
"""

from collections.abc import Sequence
from typing import List, Tuple

from torch import Tensor, nn
from torch.nn import functional as F

from q3d_plugin.layers import QuantConcat
from q3d_plugin.layers.model import units
from q3d_plugin.transforms.sharing import SharedScale

__all__ = ['FRAGILE_HEAD', 'DepthFeatures', 'FloatByDefault', 'TopDownLevels', 'residual_readers']

FRAGILE_HEAD = (
    "transformer decoders are fragile (Q-DETR, CVPR 2023), and NVIDIA's CUDA-BEVFusion has the head in FP16"
)
"""Why a TransFusionHead is float. Xu et al. ("Q-DETR: An Efficient Low-Bit Quantized Detection Transformer",
CVPR 2023) trace the loss of quantized decoders to their queries; NVIDIA's head is in the study, part B."""


class FloatByDefault:
    """A head whose layers stay float unless the recipe includes them by name."""

    def setup_quant(self) -> None:
        for _, unit in units(self):
            unit.float_by_default = FRAGILE_HEAD


class TopDownLevels:
    """GeneralizedLSSFPN: at each level, features of the backbone and those of the level above are
    concatenated."""

    def setup_quant(self) -> None:
        """Makes a concatenation for each level; level i is read by ``lateral_convs[i]``."""
        self.concats = nn.ModuleList(QuantConcat() for _ in self.lateral_convs)
        self.shared_scales = tuple(
            SharedScale(f'level {i} of the neck', (f'concats.{i}', f'lateral_convs.{i}'))
            for i in range(len(self.lateral_convs))
        )

    def fuse(self, levels: Sequence[Tensor], **upsampling) -> Tuple[Tensor, ...]:
        """The levels from fine to coarse, but the last, each joined with what is above it.

        Args:
            levels: (B, C, H, W) features of the backbone, from fine to coarse.
            upsampling: How the level above is brought to the size of a level: arguments of ``interpolate``.
        """
        fused = list(levels)
        for i in reversed(range(len(fused) - 1)):
            above = F.interpolate(fused[i + 1], size=fused[i].shape[2:], **upsampling)
            fused[i] = self.fpn_convs[i](self.lateral_convs[i](self.concats[i]([fused[i], above], dim=1)))
        return tuple(fused[:-1])


class DepthFeatures:
    """DepthLSSTransform: image features are lifted by a distribution over depth, which points help to find.

    Softmax, outer product and pooling stay float; NVIDIA's CUDA-BEVFusion has kernels of its own for them.
    """

    shared_scales = (SharedScale('depth and image features', ('concat', 'depthnet.0')),)

    def setup_quant(self) -> None:
        self.concat = QuantConcat()

    def get_cam_feats(self, x: Tensor, d: Tensor) -> Tensor:
        """Features of each camera, pixel and depth.

        Args:
            x: Features of the images, (B, views, C_in, H, W).
            d: Depths of the points that meet a pixel, metres, else 0: (B, views, 1, image height, width).

        Returns:
            Tensor: (B, views, D, H, W, C).
        """
        frames, size = x.shape[:2], x.shape[-2:]
        x = self.depthnet(self.concat([self.dtransform(d.flatten(0, 1)), x.flatten(0, 1)], dim=1))
        depth = x[:, : self.D].softmax(dim=1)
        x = depth.unsqueeze(1) * x[:, self.D : self.D + self.C].unsqueeze(2)
        return x.view(*frames, self.C, self.D, *size).permute(0, 1, 3, 4, 5, 2)


def residual_readers(stages: Sequence[str], taken: Sequence[int], neck: str, count: int) -> List[SharedScale]:
    """The scales that a residual backbone has in common with the neck behind it.

    The output of a stage that the neck takes is also read by the next stage, by its first convolution and its
    shortcut: the study's groups of ``layer3[0]`` and ``layer4[0]``.

    Args:
        stages: Full names of the stages of the backbone, in order.
        taken: For each level of the neck, the number of the stage that it reads.
        neck: Name of the neck, which has ``concats`` and ``lateral_convs``.
        count: Number of concatenations of the neck.

    Examples:
        >>> scales = residual_readers(['net.layer1', 'net.layer2'], [0, 1], 'neck', 1)
        >>> scales[0].units
        ('net.layer2.0.conv1', 'net.layer2.0.downsample.0', 'neck.concats.0', 'neck.lateral_convs.0')
    """
    scales = []
    for level, stage in list(enumerate(taken))[:count]:
        if stage + 1 < len(stages):
            block = f'{stages[stage + 1]}.0'
            readers = (f'{block}.conv1', f'{block}.downsample.0')
            joined = (f'{neck}.concats.{level}', f'{neck}.lateral_convs.{level}')
            scales.append(SharedScale(f'output of {stages[stage]}', (*readers, *joined), optional=True))
    return scales
