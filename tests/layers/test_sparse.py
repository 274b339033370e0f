"""Quantized sparse convolutions against spconv's float layers with features and weight quantized by hand."""

import copy

import pytest
import torch
from torch import nn

from q3d_plugin.cpu import enable_cpu_mode
from q3d_plugin.layers import REGISTRY, QuantWeightLayer, converted, why_not
from q3d_plugin.recipe import Recipe

spconv = pytest.importorskip('spconv.pytorch')

enable_cpu_mode()


def sparse_tensor(channels, dimensions=3, count=60):
    """A batch of two with random active voxels."""
    size = 6 if dimensions == 3 else 12
    flat = torch.randperm(2 * size**dimensions)[:count].sort().values
    axes = [flat // size**i % size for i in reversed(range(dimensions))]
    indices = torch.stack([flat // size**dimensions, *axes], dim=1).int()
    return spconv.SparseConvTensor(torch.randn(count, channels), indices, [size] * dimensions, 2)


def shrunk(channels):
    """What a strided convolution leaves, for the inverse convolution to undo."""
    with torch.no_grad():
        down = spconv.SparseConv3d(2, channels, 3, stride=2, padding=1, bias=False, indice_key='down')
        x = down(sparse_tensor(2))
    return x.replace_feature(torch.randn_like(x.features))


CASES = {
    'subm3d': (lambda: spconv.SubMConv3d(3, 5, 3, bias=False), lambda: sparse_tensor(3)),
    'subm3d_bias': (lambda: spconv.SubMConv3d(3, 5, 3, bias=True), lambda: sparse_tensor(3)),
    'subm3d_1x1': (lambda: spconv.SubMConv3d(3, 5, 1, bias=False), lambda: sparse_tensor(3)),
    'subm2d_bias': (lambda: spconv.SubMConv2d(3, 5, 3, bias=True), lambda: sparse_tensor(3, 2)),
    'conv3d': (
        lambda: spconv.SparseConv3d(3, 5, 3, stride=2, padding=1, bias=False),
        lambda: sparse_tensor(3),
    ),
    'conv3d_bias': (
        lambda: spconv.SparseConv3d(3, 5, (3, 1, 1), stride=(2, 1, 1), bias=True),
        lambda: sparse_tensor(3),
    ),
    'conv3d_1x1_bias': (lambda: spconv.SparseConv3d(3, 5, 1, bias=True), lambda: sparse_tensor(3)),
    'conv3d_1x1_square': (lambda: spconv.SparseConv3d(4, 4, 1, bias=False), lambda: sparse_tensor(4)),
    'conv2d_bias': (
        lambda: spconv.SparseConv2d(3, 5, 3, stride=2, padding=1, bias=True),
        lambda: sparse_tensor(3, 2),
    ),
    'inverse3d': (
        lambda: spconv.SparseInverseConv3d(4, 5, 3, indice_key='down', bias=False),
        lambda: shrunk(4),
    ),
    'inverse3d_bias': (
        lambda: spconv.SparseInverseConv3d(4, 5, 3, indice_key='down', bias=True),
        lambda: shrunk(4),
    ),
    'transposed3d': (
        lambda: spconv.SparseConvTranspose3d(3, 5, 3, stride=2, padding=1, bias=True),
        lambda: sparse_tensor(3),
    ),
}


def by_hand(x, amax, low, high):
    return torch.fake_quantize_per_tensor_affine(x, float(amax) / high, 0, low, high)


def is_1x1(layer):
    return layer.weight.numel() == layer.in_channels * layer.out_channels


def quantized_weight(layer, high):
    """Row by row; spconv multiplies features with the view (in, out) of a 1x1 weight."""
    weight = layer.weight.detach().clone()
    if is_1x1(layer):
        matrix = weight.view(layer.in_channels, layer.out_channels)
        rows = [matrix[:, c] for c in range(layer.out_channels)]
    else:
        rows = [weight[c] for c in range(layer.out_channels)]
    for row in rows:
        row.copy_(by_hand(row.clone(), row.abs().max(), -high - 1, high))
    return weight


@pytest.fixture(params=CASES)
def case(request):
    """A float layer, its quantized copy (no quantizers yet) and an input."""
    make, make_input = CASES[request.param]
    layer = make().eval()
    with torch.no_grad():
        layer.weight.normal_().mul_(
            torch.rand(layer.weight.shape[0]).mul(4).add(0.1).reshape(-1, *[1] * (layer.weight.dim() - 1))
        )
        if layer.bias is not None:
            layer.bias.normal_()
    return layer, converted(copy.deepcopy(layer)), make_input()


def prepare(quant, recipe=None, amax=1.1, unsigned=False):
    quant.apply_plan(Recipe.from_dict({'target': 'simulation', **(recipe or {})}).plan('layer'), 'layer', {})
    if quant.input_quantizer is not None:
        quant.input_quantizer.set_range(torch.tensor(amax), unsigned)
    quant.calibrate_weight()
    return quant


def test_without_quantizers_it_is_the_float_layer(case):
    layer, quant, x = case
    assert isinstance(quant, QuantWeightLayer) and isinstance(quant, type(layer))
    with torch.no_grad():
        expected, got = layer(x), quant(x)
    assert torch.equal(got.indices, expected.indices)
    assert torch.allclose(got.features, expected.features, rtol=1e-6, atol=1e-6)
    prepare(quant, dict(skip=['layer']))
    assert quant.quantizers() == []
    with torch.no_grad():
        assert torch.allclose(quant(x).features, expected.features, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('unsigned', [False, True], ids=['signed', 'unsigned'])
@pytest.mark.parametrize('weight_bits, bits', [(8, 8), (4, 6)])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_it_is_the_float_layer_of_quantized_features_and_weight(case, weight_bits, bits, unsigned, training):
    layer, quant, x = case
    quant.train(training)
    prepare(quant, dict(weight=dict(bits=weight_bits), activation=dict(bits=bits)), unsigned=unsigned)
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    before, features_before = quant.weight.detach().clone(), x.features.clone()
    with torch.set_grad_enabled(training):
        got = quant(x)
    layer.weight.data = quantized_weight(layer, 2 ** (weight_bits - 1) - 1)
    with torch.no_grad():
        expected = layer(x.replace_feature(by_hand(x.features, 1.1, low, high)))
        plain = layer(x)
    assert torch.equal(got.indices, expected.indices)
    assert torch.allclose(got.features, expected.features, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got.features, plain.features, rtol=1e-3, atol=1e-3)
    assert torch.equal(quant.weight, before) and torch.equal(x.features, features_before)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_gradients_are_those_of_the_quantized_values_inside_the_range(case, training):
    layer, quant, x = case
    prepare(quant, dict(weight=dict(bits=5), activation=dict(bits=6))).train(training)
    features = x.features.clone().requires_grad_()
    got = quant(x.replace_feature(features)).features
    upstream = torch.randn_like(got)
    got.backward(upstream)

    # The reference runs in training mode: spconv's own bias has no gradient in eval mode. The bias itself
    # adds the same to all voxels, so its gradient is the sum of what comes from above.
    layer.train()
    layer.weight.data = quantized_weight(layer, 15)
    reference = by_hand(features.detach(), 1.1, -32, 31).requires_grad_()
    layer(x.replace_feature(reference)).features.backward(upstream)
    steps = (features.detach() * 31 / 1.1).round()
    inside = (steps >= -32) & (steps <= 31)
    assert inside.any() and not inside.all()
    assert torch.allclose(features.grad, reference.grad * inside, rtol=1e-4, atol=1e-4)
    assert torch.allclose(quant.weight.grad, layer.weight.grad, rtol=1e-4, atol=1e-4)
    if quant.bias is not None:
        assert torch.allclose(quant.bias.grad, upstream.sum(0), rtol=1e-4, atol=1e-4)


def test_weight_ranges_are_those_of_the_output_channels(case):
    layer, quant, x = case
    prepare(quant)
    assert quant.output_channels == layer.out_channels
    # Whatever the layout: an output channel whose weights are scaled to zero has a range of zero.
    with torch.no_grad():
        factor = torch.zeros(layer.out_channels)
        factor[1] = 1
        kept = quant.weight_quantizer._amax.clone()
        quant.weight.copy_(quant.scale_output(quant.weight, factor))
    quant.calibrate_weight()
    assert torch.equal(quant.weight_quantizer._amax, kept * factor)
    with torch.no_grad():
        out = quant(x).features - (0 if quant.bias is None else quant.bias)
    assert out[:, 1].abs().max() > 0.01 and torch.allclose(out[:, 0::2], torch.zeros(()), atol=1e-6)


def test_scale_output_is_scaling_the_output_channels(case):
    layer, quant, x = case
    factor = torch.randn(layer.out_channels)
    bias = 0 if layer.bias is None else layer.bias
    with torch.no_grad():
        expected = (layer(x).features - bias) * factor
        layer.weight.copy_(quant.scale_output(layer.weight, factor))
        assert torch.allclose(layer(x).features - bias, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_share_an_indice_key_stay_compatible():
    float_layers = spconv.SparseSequential(
        spconv.SubMConv3d(3, 4, 3, bias=False, indice_key='s'),
        nn.ReLU(),
        spconv.SubMConv3d(4, 4, 3, bias=False, indice_key='s'),
        spconv.SparseConv3d(4, 6, 3, 2, 1, bias=False, indice_key='d'),
        spconv.SparseInverseConv3d(6, 4, 3, bias=False, indice_key='d'),
    )
    quant_layers = copy.deepcopy(float_layers)
    for module in quant_layers:
        if not why_not(module):
            converted(module)
    x = sparse_tensor(3)
    with torch.no_grad():
        assert torch.allclose(quant_layers(x).features, float_layers(x).features, atol=1e-6)


def test_statistics_are_of_the_active_voxels_only():
    layer = prepare(converted(spconv.SubMConv3d(3, 4, 3)))
    layer.input_quantizer.observe()
    x = sparse_tensor(3)
    x = x.replace_feature(x.features.abs() + 1)
    with torch.no_grad():
        layer(x)
    observer = layer.input_quantizer.observer
    assert observer.counts.sum() == x.features.numel()
    assert observer.minimum == float(x.features.min()) >= 1


def test_a_subclass_with_its_own_forward_is_refused_with_the_reason():
    class Own(spconv.SubMConv3d):
        def forward(self, input):
            return super().forward(input)

    assert 'Own computes in its own way' in why_not(Own(2, 3, 3))
    with pytest.raises(TypeError, match='overrides SubMConv3d.forward'):
        converted(Own(2, 3, 3))


def test_every_convolution_of_spconv_is_registered():
    names = [f'{kind}{n}d' for kind in ('SubMConv', 'SparseConv') for n in (1, 2, 3)]
    names += [f'{kind}{n}d' for kind in ('SparseConvTranspose', 'SparseInverseConv') for n in (2, 3)]
    for name in names:
        float_class = getattr(spconv, name)
        assert issubclass(REGISTRY[float_class], float_class)
        assert REGISTRY[float_class].kind == name
