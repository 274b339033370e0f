"""mmcv's sparse convolutions, quantized, against float ones whose weight and features were quantized by hand.

mmcv has no CPU version of the operators behind them, so a dense matrix stands in for the table of indices.
"""

import copy

import pytest
import torch
from mmcv.ops import sparse_conv
from torch import nn

import q3d_plugin.mmdet3d  # noqa: F401  (makes the layers known)
from q3d_plugin import lifecycle
from q3d_plugin.layers import converted
from q3d_plugin.mmdet3d.mmcv_sparse import QuantMMCVSparseConvolution
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import apply_recipe

VOXELS = 40


@pytest.fixture
def dense_operators(monkeypatch):
    """Each kernel offset multiplies the features, and a fixed random matrix moves them to the outputs."""
    moves = torch.randn(27, VOXELS, VOXELS, generator=torch.Generator().manual_seed(0)) / VOXELS

    def pairs(indices, *args, **kwargs):
        return indices, torch.zeros(27, 2, 1), torch.zeros(27)

    def convolve(features, weight, *args):
        flat = weight.reshape(-1, *weight.shape[-2:])
        return sum(moves[k] @ features @ w for k, w in enumerate(flat))

    monkeypatch.setattr(sparse_conv.ops, 'get_indice_pairs', pairs)
    monkeypatch.setattr(sparse_conv.Fsp, 'indice_conv', convolve)
    monkeypatch.setattr(sparse_conv.Fsp, 'indice_subm_conv', convolve)


def tensor(channels):
    indices = torch.zeros(VOXELS, 4, dtype=torch.int32)
    indices[:, 1] = torch.arange(VOXELS)
    return sparse_conv.SparseConvTensor(torch.randn(VOXELS, channels), indices, (VOXELS, 1, 1), 1)


CASES = {
    'subm': lambda: sparse_conv.SubMConv3d(3, 5, 3, padding=1, bias=False, indice_key='a'),
    'strided': lambda: sparse_conv.SparseConv3d(3, 5, 3, padding=1),
    'one': lambda: sparse_conv.SubMConv3d(3, 5, 1),
}


@pytest.mark.parametrize('name', CASES)
def test_quantized_is_float_on_quantized_tensors(name, dense_operators):
    torch.manual_seed(0)
    layer = CASES[name]()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    with torch.no_grad():
        # Output channels of different sizes, or one range for all would pass, too.
        layer.weight *= torch.tensor([0.1, 1, 3, 0.5, 2])
    x, model = tensor(3), nn.Sequential(converted(copy.deepcopy(layer)))
    assert isinstance(model[0], QuantMMCVSparseConvolution)
    apply_recipe(model, Recipe.from_dict({'target': 'simulation', 'activation': {'calibrator': 'max'}}))
    lifecycle.set_enabled(model, False)
    assert torch.equal(model(x).features, layer(x).features)
    lifecycle.set_enabled(model, True)
    lifecycle.calibrate(model, [x], model)

    def signed(values, amax):
        return torch.fake_quantize_per_tensor_affine(values, float(amax) / 127, 0, -127, 127)

    before = x.features.clone()
    with torch.no_grad():
        by_channel = [signed(w, w.abs().max()) for w in layer.weight.unbind(-1)]
        layer.weight.copy_(torch.stack(by_channel, dim=-1))
    y = copy.copy(x)
    y.features = signed(x.features, x.features.abs().max())
    torch.testing.assert_close(model(x).features, layer(y).features)
    assert torch.equal(x.features, before)


def test_the_parameter_is_there_again_and_gets_its_gradient(dense_operators):
    layer = converted(CASES['subm']())
    model = nn.Sequential(layer)
    apply_recipe(model, Recipe.from_dict({'target': 'simulation'}))
    lifecycle.calibrate(model, [tensor(3)], model)
    parameter = layer._parameters['weight']
    model(tensor(3)).features.square().sum().backward()
    assert layer.weight is parameter and parameter.grad.abs().sum() > 0


def test_every_class_of_mmcv_is_converted():
    for name in ('SubMConv2d', 'SparseConv2d', 'SparseConvTranspose3d', 'SparseInverseConv3d'):
        made = getattr(sparse_conv, name)(2, 4, 3, **({'indice_key': 'k'} if 'Inverse' in name else {}))
        made = converted(made)
        assert made.output_channels == 4 and made.kind == name
        scaled = made.scale_output(made.weight, torch.arange(4.0))
        assert torch.equal(scaled[..., 2], made.weight[..., 2] * 2)


@pytest.mark.parametrize('name', CASES)
def test_scales_moved_from_the_features_to_the_weight_change_nothing(name, dense_operators):
    layer, x = converted(CASES[name]()), tensor(3)
    lifecycle.set_enabled(layer, False)
    scale = torch.tensor([0.2, 1.0, 7.0])
    with torch.no_grad():
        expected = layer(x).features
        largest = layer.weight.abs().amax(dim=(0, 1, 2, 4))
        assert layer.input_channels == 3 and torch.allclose(layer.input_amax(), largest)
        layer.weight.copy_(layer.scale_input(layer.weight, scale))
        assert torch.allclose(layer.input_amax(), largest * scale)
        x.features = x.features / scale
        assert torch.allclose(layer(x).features, expected, atol=1e-5)
        # kernel_view says how inputs and weights meet: a matrix for each position.
        view = layer.kernel_view(layer.weight)
        flat = layer.weight.reshape(-1, 3, 5)
        assert view.shape == (1, 5, 3, len(flat))
        assert torch.equal(view[0, 4, 2], flat[:, 2, 4])
