"""The sparse encoder, whose voxels come in the order x, y, z."""

from mmdet3d.models.layers import make_sparse_convmodule
from mmdet3d.models.middle_encoders import SparseEncoder
from mmdet3d.registry import MODELS
from spconv.pytorch import SparseConvTensor

NORM = dict(type='BN1d', eps=1e-3, momentum=0.01)


@MODELS.register_module()
class BEVFusionSparseEncoder(SparseEncoder):
    def __init__(
        self,
        in_channels,
        sparse_shape,
        order=('conv', 'norm', 'act'),
        norm_cfg=NORM,
        base_channels=16,
        output_channels=128,
        encoder_channels=((16,), (32, 32, 32), (64, 64, 64), (64, 64, 64)),
        encoder_paddings=((1,), (1, 1, 1), (1, 1, 1), ((0, 1, 1), 1, 1)),
        block_type='conv_module',
        return_middle_feats=False,
    ):
        super(SparseEncoder, self).__init__()
        self.sparse_shape, self.stage_num = sparse_shape, len(encoder_channels)
        self.encoder_channels, self.encoder_paddings = encoder_channels, encoder_paddings
        made = dict(norm_cfg=norm_cfg, conv_type='SubMConv3d', indice_key='subm1', padding=1)
        self.conv_input = make_sparse_convmodule(in_channels, base_channels, 3, **made)
        channels = self.make_encoder_layers(
            make_sparse_convmodule, norm_cfg, base_channels, block_type=block_type
        )
        made.update(conv_type='SparseConv3d', indice_key='spconv_down2', padding=0)
        self.conv_out = make_sparse_convmodule(channels, output_channels, (1, 1, 3), stride=(1, 1, 2), **made)

    def forward(self, voxel_features, coors, batch_size):
        x = self.conv_input(SparseConvTensor(voxel_features, coors.int(), self.sparse_shape, batch_size))
        for layer in self.encoder_layers:
            x = layer(x)
        x = self.conv_out(x).dense()
        # (B, C, x, y, z) to (B, C * z, x, y)
        return x.permute(0, 1, 4, 2, 3).contiguous().flatten(1, 2)
