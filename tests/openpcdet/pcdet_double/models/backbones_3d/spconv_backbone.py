"""Sparse backbone with residual blocks."""

from functools import partial

import spconv.pytorch as spconv
from torch import nn

from ...utils.spconv_utils import replace_feature

norm = partial(nn.BatchNorm1d, eps=1e-3, momentum=0.01)


class SparseBasicBlock(spconv.SparseModule):
    def __init__(self, inplanes, planes, stride=1, bias=None, norm_fn=None, downsample=None, indice_key=None):
        super().__init__()
        bias = True if bias is None else bias
        common = dict(kernel_size=3, stride=stride, padding=1, bias=bias, indice_key=indice_key)
        self.conv1, self.bn1 = spconv.SubMConv3d(inplanes, planes, **common), norm_fn(planes)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = spconv.SubMConv3d(planes, planes, **common), norm_fn(planes)
        self.downsample = downsample

    def forward(self, x):
        out = self.conv1(x)
        out = self.conv2(replace_feature(out, self.relu(self.bn1(out.features))))
        identity = x if self.downsample is None else self.downsample(x)
        return replace_feature(out, self.relu(self.bn2(out.features) + identity.features))


class VoxelResBackBone8x(nn.Module):
    def __init__(self, model_cfg, input_channels, grid_size, **kwargs):
        super().__init__()
        self.sparse_shape = grid_size[::-1] + [1, 0, 0]
        submanifold = spconv.SubMConv3d(input_channels, 16, 3, padding=1, bias=False, indice_key='subm1')
        self.conv_input = spconv.SparseSequential(submanifold, norm(16), nn.ReLU())
        inside = 16
        for i, channels in enumerate((16, 32, 64, 128), 1):
            stage = []
            if i > 1:
                padding = (0, 1, 1) if i == 4 else 1
                down = spconv.SparseConv3d(
                    inside, channels, 3, 2, padding, bias=False, indice_key=f'spconv{i}'
                )
                stage = [spconv.SparseSequential(down, norm(channels), nn.ReLU())]
            stage += [
                SparseBasicBlock(channels, channels, norm_fn=norm, indice_key=f'res{i}') for _ in range(2)
            ]
            setattr(self, f'conv{i}', spconv.SparseSequential(*stage))
            inside = channels
        out = spconv.SparseConv3d(128, 128, (3, 1, 1), (2, 1, 1), bias=False, indice_key='spconv_down2')
        self.conv_out = spconv.SparseSequential(out, norm(128), nn.ReLU())
        self.num_point_features = 128

    def forward(self, batch_dict):
        x = spconv.SparseConvTensor(
            features=batch_dict['voxel_features'],
            indices=batch_dict['voxel_coords'].int(),
            spatial_shape=self.sparse_shape,
            batch_size=batch_dict['batch_size'],
        )
        for name in ('conv_input', 'conv1', 'conv2', 'conv3', 'conv4', 'conv_out'):
            x = getattr(self, name)(x)
        batch_dict['encoded_spconv_tensor'] = x
        return batch_dict
