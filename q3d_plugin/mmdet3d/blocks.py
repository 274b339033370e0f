"""Residual blocks and forward passes with additions and concatenations, quantized: what the table of
:mod:`q3d_plugin.mmdet3d.parts` adds to the types of MMDetection3D and mmdet."""

from typing import Dict, Optional, Type

from mmdet.models.backbones import resnet, resnext, swin
from mmdet3d.models.backbones import dla
from mmdet3d.models.dense_heads.centerpoint_head import SeparateHead
from mmdet3d.models.layers.sparse_block import SparseBasicBlock, replace_feature
from mmdet3d.models.necks.imvoxel_neck import ResModule
from torch import Tensor, nn
from torch.utils import checkpoint

from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.layers.window_attention import WindowAttention
from q3d_plugin.transforms.insert import first_layer, share_input

__all__ = ['BLOCKS', 'QuantSparseBasicBlock', 'SECONDFPNForward', 'SharedAnchorBranches', 'SharedBranches']


class QuantSparseBasicBlock(SparseBasicBlock):
    """Residual block of the sparse encoders: its addition has one quantizer for both inputs."""

    def setup_quant(self) -> None:
        """Makes the addition and shares the block's input."""
        self.add = QuantAdd(before_relu=True)
        share_input([self.conv1, self.add if self.downsample is None else first_layer(self.downsample)])

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
    """Residual blocks of mmdet's ResNets: the addition has one quantizer for both inputs, that of the block's
    input where the shortcut is the input itself; a shortcut's convolution shares that of the block's input
    (STUDY part B)."""

    def setup_quant(self) -> None:
        self.add = QuantAdd(before_relu=True)
        if self.downsample is None:
            share_input([self.conv1, self.add])
        # Where the shortcut begins with a pooling, its convolution reads another tensor.
        elif first_layer(self.downsample) is self.downsample[0]:
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
        first = first_layer(self.conv0)
        share_input([first, self.add if self.stride == 1 else first_layer(self.downsample)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.conv0(x))
        return self.activation(self.add(out, self.downsample(x) if self.stride != 1 else x))


class SECONDFPNForward:
    """The concatenation of the levels has one quantizer for all of them."""

    def setup_quant(self) -> None:
        self.concat = QuantConcat()

    def forward(self, x):
        assert len(x) == len(self.in_channels)
        ups = [deblock(x[i]) for i, deblock in enumerate(self.deblocks)]
        return [self.concat(ups, dim=1) if len(ups) > 1 else ups[0]]


class SharedBranches:
    """The first layers of all branches of all tasks read the output of the shared convolution."""

    def setup_quant(self) -> None:
        heads = [h for h in self.task_heads if isinstance(h, SeparateHead)]
        share_input(first_layer(getattr(head, branch)) for head in heads for branch in head.heads)


class SharedAnchorBranches:
    """Classification, box and direction convolutions read the same features."""

    def setup_quant(self) -> None:
        share_input(getattr(self, n) for n in ('conv_cls', 'conv_reg', 'conv_dir_cls') if hasattr(self, n))


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
