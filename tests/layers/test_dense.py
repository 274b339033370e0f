"""Quantized dense layers against float layers whose input and weight were quantized by hand, row by row."""

import copy

import pytest
import torch
from torch import nn

from q3d_plugin.layers import REGISTRY, QuantWeightLayer, converted, why_not
from q3d_plugin.recipe import LayerPlan, Recipe

mmcv_wrappers = pytest.importorskip('mmcv.cnn.bricks.wrappers')
pytest.importorskip('q3d_plugin.mmdet3d')  # hands mmcv's types in

CASES = {
    'conv1d': (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    'conv1d_groups': (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    'conv2d': (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 8)),
    'conv2d_groups': (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (1, 4, 9, 8)),
    'conv2d_no_bias': (lambda: nn.Conv2d(3, 5, 1, bias=False), (2, 3, 4, 4)),
    'conv2d_reflect': (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode='reflect'), (2, 3, 6, 6)),
    'conv3d': (lambda: nn.Conv3d(2, 4, 3, padding=1), (1, 2, 4, 5, 6)),
    'transposed2d': (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 4)),
    'transposed2d_groups': (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 5, 4),
    ),
    'transposed2d_no_bias': (
        lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4, bias=False),
        (1, 4, 3, 3),
    ),
    'transposed3d': (lambda: nn.ConvTranspose3d(3, 5, 2, stride=2), (1, 3, 2, 3, 4)),
    'transposed3d_groups': (lambda: nn.ConvTranspose3d(4, 6, 3, groups=2, dilation=2), (1, 4, 2, 3, 2)),
    'linear': (lambda: nn.Linear(7, 5), (2, 3, 7)),
    'linear_no_bias': (lambda: nn.Linear(7, 5, bias=False), (6, 7)),
    'mmcv_conv2d': (lambda: mmcv_wrappers.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 6)),
    'mmcv_conv3d': (lambda: mmcv_wrappers.Conv3d(2, 4, 3), (1, 2, 4, 5, 6)),
    'mmcv_transposed2d': (lambda: mmcv_wrappers.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 4)),
    'mmcv_transposed3d': (lambda: mmcv_wrappers.ConvTranspose3d(3, 5, 2), (1, 3, 2, 3, 4)),
    'mmcv_linear': (lambda: mmcv_wrappers.Linear(7, 5), (6, 7)),
}


@pytest.fixture(params=CASES)
def case(request):
    """A float layer, its quantized copy (no quantizers yet) and an input."""
    make, shape = CASES[request.param]
    layer = make()
    with torch.no_grad():
        # Output channels of different sizes, or one range for all would pass, too.
        weight = layer.weight
        weight *= torch.rand(weight.shape[0]).mul(4).add(0.1).reshape(-1, *[1] * (weight.dim() - 1))
        weight *= torch.rand(weight.shape[1]).mul(4).add(0.1).reshape(1, -1, *[1] * (weight.dim() - 2))
    return layer, converted(copy.deepcopy(layer)), torch.randn(shape)


def quantized_by_hand(x, amax, low, high):
    return torch.fake_quantize_per_tensor_affine(x, float(amax) / high, 0, low, high)


def rows_of(layer):
    """Index of each output channel's weights, found by plain counting."""
    if not isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return [(c,) for c in range(layer.weight.shape[0])]
    per_group_in, per_group_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    rows = []
    for c in range(layer.out_channels):
        group, j = c // per_group_out, c % per_group_out
        rows.append((slice(group * per_group_in, (group + 1) * per_group_in), j))
    return rows


def quantized_weight(layer, high):
    weight = layer.weight.detach().clone()
    for row in rows_of(layer):
        weight[row] = quantized_by_hand(weight[row], weight[row].abs().max(), -high - 1, high)
    return weight


def prepare(quant, recipe=None, amax=1.1, unsigned=False):
    """Gives a converted layer its quantizers and ranges."""
    plan = Recipe.from_dict({'target': 'simulation', **(recipe or {})}).plan('layer')
    quant.apply_plan(plan, 'layer', {})
    if quant.input_quantizer is not None:
        quant.input_quantizer.set_range(torch.tensor(amax), unsigned)
    quant.calibrate_weight()
    return quant


def test_conversion_keeps_object_parameters_and_state(case):
    layer, quant, x = case
    before = dict(quant.named_parameters())
    state = quant.state_dict()
    assert converted(quant) is quant
    assert isinstance(quant, QuantWeightLayer) and isinstance(quant, type(layer))
    assert dict(quant.named_parameters()).keys() == before.keys()
    assert all(v is before[k] for k, v in quant.named_parameters())
    assert list(state) == list(layer.state_dict())


@pytest.mark.parametrize('plan', [None, LayerPlan(None, None, 'skipped')], ids=['no plan', 'skipped'])
def test_without_quantizers_it_is_the_float_layer(case, plan):
    layer, quant, x = case
    if plan is not None:
        quant.apply_plan(plan, 'layer', {})
    assert quant.quantizers() == []
    assert torch.equal(quant(x), layer(x))


def test_with_quantizers_off_it_is_the_float_layer(case):
    layer, quant, x = case
    prepare(quant)
    assert not torch.allclose(quant(x), layer(x), rtol=1e-6)
    for quantizer in quant.quantizers():
        quantizer.disable()
    assert torch.equal(quant(x), layer(x))


@pytest.mark.parametrize('unsigned', [False, True], ids=['signed', 'unsigned'])
@pytest.mark.parametrize('weight_bits, bits', [(8, 8), (4, 6)])
@pytest.mark.parametrize('grad', [False, True])
def test_it_is_the_float_layer_of_quantized_input_and_weight(case, weight_bits, bits, unsigned, grad):
    layer, quant, x = case
    prepare(quant, dict(weight=dict(bits=weight_bits), activation=dict(bits=bits)), unsigned=unsigned)
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    before = quant.weight.detach().clone()
    with torch.set_grad_enabled(grad):
        got = quant(x)
    layer.weight.data = quantized_weight(layer, 2 ** (weight_bits - 1) - 1)
    expected = layer(quantized_by_hand(x, 1.1, low, high))
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(quant.weight, before)


def test_only_one_side_is_quantized_where_the_other_stays_float(case):
    layer, quant, x = case
    prepare(quant, dict(weight=None))
    assert torch.allclose(quant(x), layer(quantized_by_hand(x, 1.1, -128, 127)), rtol=1e-5, atol=1e-5)
    prepare(quant, dict(activation=None, weight=dict(bits=4)))
    layer.weight.data = quantized_weight(layer, 7)
    assert torch.allclose(quant(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_gradients_are_those_of_the_quantized_values_inside_the_range(case, training):
    layer, quant, x = case
    prepare(quant, dict(weight=dict(bits=5), activation=dict(bits=6))).train(training)
    x = x.requires_grad_()
    got = quant(x)
    upstream = torch.randn_like(got)
    got.backward(upstream)

    reference_x = quantized_by_hand(x.detach(), 1.1, -32, 31).requires_grad_()
    layer.weight.data = quantized_weight(layer, 15)
    layer(reference_x).backward(upstream)
    steps = (x.detach() * 31 / 1.1).round()
    inside = (steps >= -32) & (steps <= 31)
    assert inside.any() and not inside.all()
    assert torch.allclose(x.grad, reference_x.grad * inside, rtol=1e-4, atol=1e-5)
    assert torch.allclose(quant.weight.grad, layer.weight.grad, rtol=1e-4, atol=1e-5)
    if layer.bias is not None:
        assert torch.allclose(quant.bias.grad, layer.bias.grad, rtol=1e-4, atol=1e-5)


def test_an_optimizer_step_moves_the_float_weight(case):
    _, quant, x = case
    prepare(quant)
    before = quant.weight.detach().clone()
    optimizer = torch.optim.SGD(quant.parameters(), 1e-3)
    quant(x).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(quant.weight).all() and not torch.equal(quant.weight, before)
    # The step was taken from the float weight, not from its image on the grid.
    assert torch.allclose(before - 1e-3 * quant.weight.grad, quant.weight, atol=1e-6)


def test_scale_output_is_scaling_the_output_channels(case):
    layer, quant, x = case
    factor = torch.randn(quant.output_channels)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    shape = [1] * layer(x).dim()
    shape[axis] = -1
    bias = 0 if layer.bias is None else layer.bias.detach().reshape(shape)
    expected = (layer(x) - bias) * factor.reshape(shape)
    layer.weight.data = quant.scale_output(layer.weight.detach(), factor)
    assert torch.allclose(layer(x) - bias, expected, rtol=1e-4, atol=1e-4)


def test_weight_ranges_are_those_of_the_output_channels(case):
    layer, quant, _ = case
    prepare(quant)
    expected = [float(layer.weight.detach()[row].abs().max()) for row in rows_of(layer)]
    assert quant.weight_quantizer._amax.tolist() == expected
    assert (
        len(expected)
        == quant.output_channels
        == layer(case[2]).shape[-1 if isinstance(layer, nn.Linear) else 1]
    )


def test_a_copy_is_independent(case):
    _, quant, x = case
    prepare(quant)
    twin = copy.deepcopy(quant)
    expected = quant(x)
    assert torch.equal(twin(x), expected)
    twin.weight.data.zero_()
    twin.calibrate_weight()
    assert torch.equal(quant(x), expected)


def test_transposed_convolutions_take_an_output_size():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(1, 2, 4, 4)
    quant = converted(copy.deepcopy(layer))
    assert torch.equal(quant(x, output_size=[8, 8]), layer(x, output_size=[8, 8]))


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class Heir(OwnForward):
    pass


class Renamed(nn.Conv2d):
    """A subclass with things of its own, but not its own forward."""

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = 5

    def helper(self):
        return self.extra


@pytest.mark.parametrize('cls', [OwnForward, Heir])
def test_layers_that_compute_in_their_own_way_are_refused_with_the_reason(cls):
    layer = cls(2, 3, 1)
    assert cls.__name__ in why_not(layer) and 'overrides Conv2d.forward' in why_not(layer)
    with pytest.raises(TypeError, match='computes in its own way'):
        converted(layer)
    assert type(layer) is cls


@pytest.mark.parametrize('module', [nn.ReLU(), nn.BatchNorm2d(3), nn.Embedding(3, 3), nn.LSTM(2, 2)])
def test_other_modules_are_refused(module):
    assert why_not(module) == 'no quantized version of this type'
    with pytest.raises(TypeError):
        converted(module)


def test_a_subclass_keeps_what_is_its_own():
    layer = converted(Renamed(2, 3, 1))
    assert isinstance(layer, Renamed) and isinstance(layer, QuantWeightLayer)
    assert layer.helper() == 5 and type(layer).__name__ == 'QuantRenamed'
    assert type(converted(Renamed(2, 3, 1))) is type(layer)


def test_every_registered_dense_type_is_tested_here():
    tested = {type(make()) for make, _ in CASES.values()}
    single = {c for c, quant in REGISTRY.items() if issubclass(quant, QuantWeightLayer)}
    assert {c for c in single if c.__module__.startswith('torch.')} <= tested
