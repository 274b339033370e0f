"""What smoothing needs of every layer type: where its input channels are, what an output is computed from."""

import pytest
import torch
from torch import nn

from q3d_plugin.cpu import enable_cpu_mode
from q3d_plugin.layers import converted

enable_cpu_mode()


def dense(layer, *shape):
    return lambda: (layer(), torch.randn(*shape))


CASES = {
    'conv1d': dense(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 2, 4, 9),
    'conv2d': dense(lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=2), 2, 4, 9, 8),
    'conv2d_oblong': dense(lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)), 2, 4, 9, 8),
    'conv2d_groups': dense(lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), 2, 4, 9, 8),
    'conv2d_depthwise': dense(lambda: nn.Conv2d(4, 8, 3, groups=4), 2, 4, 9, 8),
    'conv2d_same': dense(lambda: nn.Conv2d(4, 6, (4, 3), padding='same'), 2, 4, 9, 8),
    'conv2d_circular': dense(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='circular'), 2, 4, 9, 8),
    'conv2d_no_batch': dense(lambda: nn.Conv2d(4, 6, 3, padding=1), 4, 9, 8),
    'conv3d': dense(lambda: nn.Conv3d(4, 6, 3, stride=(1, 2, 1), padding=(1, 0, 1)), 2, 4, 5, 6, 4),
    'linear': dense(lambda: nn.Linear(4, 6), 5, 7, 4),
    'transposed2d': dense(lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), 2, 4, 5, 4),
    'transposed2d_overlap': dense(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2), 2, 4, 5, 4
    ),
    'transposed2d_groups': dense(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), 2, 4, 5, 4),
    'transposed3d': dense(lambda: nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1), 2, 4, 3, 3, 3),
}


def _add_sparse():
    spconv = pytest.importorskip('spconv.pytorch')

    def voxels(channels, dimensions=3, count=60):
        size = 6 if dimensions == 3 else 12
        flat = torch.randperm(2 * size**dimensions)[:count].sort().values
        axes = [flat // size**i % size for i in reversed(range(dimensions))]
        indices = torch.stack([flat // size**dimensions, *axes], dim=1).int()
        return spconv.SparseConvTensor(torch.randn(count, channels), indices, [size] * dimensions, 2)

    def sparse(layer, dimensions=3):
        return lambda: (layer(), voxels(4, dimensions))

    def inverse():
        with torch.no_grad():
            x = spconv.SparseConv3d(4, 4, 3, stride=2, padding=1, bias=False, indice_key='k')(voxels(4))
        return spconv.SparseInverseConv3d(4, 6, 3, indice_key='k'), x.replace_feature(
            torch.randn_like(x.features)
        )

    CASES.update(
        subm3d=sparse(lambda: spconv.SubMConv3d(4, 6, 3)),
        subm3d_oblong=sparse(lambda: spconv.SubMConv3d(4, 6, (1, 3, 5), bias=False)),
        subm3d_1x1=sparse(lambda: spconv.SubMConv3d(4, 6, 1)),
        subm2d=sparse(lambda: spconv.SubMConv2d(4, 6, 3), 2),
        sparse3d=sparse(lambda: spconv.SparseConv3d(4, 6, 3, stride=2, padding=1)),
        sparse3d_oblong=sparse(lambda: spconv.SparseConv3d(4, 6, (3, 1, 1), stride=(2, 1, 1))),
        sparse3d_dilated=sparse(lambda: spconv.SparseConv3d(4, 6, 2, stride=2, padding=1, dilation=2)),
        sparse3d_1x1=sparse(lambda: spconv.SparseConv3d(4, 6, 1, bias=False)),
        sparse3d_transposed=sparse(lambda: spconv.SparseConvTranspose3d(4, 6, 3, stride=2, padding=1)),
        sparse3d_inverse=inverse,
    )


_add_sparse()


@pytest.fixture(params=CASES)
def case(request):
    layer, x = CASES[request.param]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return converted(layer).eval().requires_grad_(False), x


def scaled(layer, x, factor):
    features = layer.features(x)
    shape = [1] * features.dim()
    shape[layer.channel_axis(features)] = -1
    out = features * factor.reshape(shape)
    return out if features is x else x.replace_feature(out)


def test_what_an_input_channel_is_divided_by_its_weights_are_multiplied_by(case):
    layer, x = case
    expected = layer.features(layer(x))
    factor = torch.rand(4) * 3 + 0.1
    layer.weight.copy_(layer.scale_input(layer.weight, factor))
    got = layer.features(layer(scaled(layer, x, 1 / factor)))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_channels_of_inputs_and_outputs_are_counted_and_found(case):
    layer, x = case
    features, out = layer.features(x), layer.features(layer(x))
    assert features.shape[layer.channel_axis(features)] == layer.input_channels == 4
    assert out.shape[layer.channel_axis(out)] == layer.output_channels


def test_the_largest_weight_of_an_input_channel_is_the_largest_effect_that_it_has(case):
    layer, _ = case
    # All other channels at zero: what is left of the weight is what the channel meets.
    slow = torch.stack([layer.scale_input(layer.weight, torch.eye(4)[c]).abs().max() for c in range(4)])
    assert torch.equal(layer.input_amax(), slow)


def test_rows_times_weight_is_the_output(case):
    layer, x = case
    out = layer(x)
    features = layer.features(out)
    every = features.movedim(layer.channel_axis(features), -1).reshape(-1, layer.output_channels)
    places = torch.randint(len(every), (40,))
    rows = layer.rows_of(x, out, places)
    assert rows.shape[:2] == (40, 4)
    kernel = layer.kernel_view(layer.weight)
    groups, per_group = kernel.shape[0], kernel.shape[2]
    product = torch.einsum('sgck,gock->sgo', rows.reshape(40, groups, per_group, -1), kernel).reshape(40, -1)
    if layer.bias is not None:
        product = product + layer.bias
    assert torch.allclose(product, every[places], rtol=1e-4, atol=1e-4)
