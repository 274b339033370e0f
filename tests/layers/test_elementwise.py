"""Additions and concatenations: one quantizer for all inputs."""

import pytest
import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.calibration.ranges import compute_ranges
from q3d_plugin.layers import QuantAdd, QuantConcat, converted
from q3d_plugin.quantizer import Quantizer
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_, share_input


def prepared(unit, amax=None, **recipe):
    unit.apply_plan(Recipe.from_dict({'target': 'simulation', **(recipe or {})}).plan('unit'), 'unit', {})
    if amax is not None:
        unit.input_quantizer.set_range(torch.tensor(amax))
    return unit


def by_hand(x, amax, high):
    return torch.fake_quantize_per_tensor_affine(x, amax / high, 0, -high - 1, high)


@pytest.mark.parametrize('recipe', [None, dict(skip=['unit']), dict(activation=None)])
def test_without_a_quantizer_they_add_and_concatenate(recipe):
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    add, concat = QuantAdd(), QuantConcat()
    if recipe is not None:
        prepared(add, **recipe)
        prepared(concat, **recipe)
    assert add.quantizers() == [] and concat.quantizers() == []
    assert torch.equal(add(a, b), a + b)
    assert torch.equal(concat([a, b], dim=2), torch.cat([a, b], dim=2))
    assert torch.equal(concat((a, b)), torch.cat([a, b], dim=1))


@pytest.mark.parametrize('bits', [4, 8])
def test_both_inputs_of_an_addition_are_on_one_grid(bits):
    add = prepared(QuantAdd(), 1.5, activation=dict(bits=bits))
    quantizers = [m for m in add.modules() if isinstance(m, Quantizer)]
    assert quantizers == add.quantizers() and len(quantizers) == 1
    a, b = torch.randn(2, 9), torch.randn(2, 9) * 0.1
    high = 2 ** (bits - 1) - 1
    assert torch.equal(add(a, b), by_hand(a, 1.5, high) + by_hand(b, 1.5, high))
    steps = add(a, b) * high / 1.5
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_all_inputs_of_a_concatenation_are_on_one_grid():
    concat = prepared(QuantConcat(), 1.5, activation=dict(bits=4))
    parts = [torch.randn(2, c, 3) * 10**-c for c in range(1, 4)]
    expected = torch.cat([by_hand(p, 1.5, 7) for p in parts], dim=1)
    assert torch.equal(concat(parts, dim=1), expected)
    assert len(concat.quantizers()) == 1


@pytest.mark.parametrize('unit', [QuantAdd, QuantConcat])
def test_statistics_are_of_both_inputs(unit):
    unit = prepared(unit())
    unit.input_quantizer.observe()
    a, b = torch.rand(2, 5), torch.rand(2, 5) * -7
    unit(a, b) if isinstance(unit, QuantAdd) else unit([a, b])
    observer = unit.input_quantizer.observer
    assert observer.frames == 2
    assert (observer.minimum, observer.maximum) == (float(b.min()), float(a.max()))
    assert observer.counts.sum() == 20


def test_adding_a_tensor_to_itself_and_gradients_to_both_inputs():
    add = prepared(QuantAdd(), 100.0)
    a, b = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    add(a, b).sum().backward()
    assert torch.equal(a.grad, torch.ones(6)) and torch.equal(b.grad, torch.ones(6))
    with torch.no_grad():
        assert torch.equal(add(a, a), 2 * by_hand(a, 100.0, 127))


def test_they_have_no_weights_in_a_state_dict():
    add = prepared(QuantAdd(), 2.0)
    assert set(add.state_dict()) == {'input_quantizer._amax', 'input_quantizer._state'}


def test_what_a_concatenation_has_quantized_is_not_quantized_again():
    concat, conv = prepared(QuantConcat()), prepared(converted(torch.nn.Conv2d(5, 2, 1)))
    for unit in (concat, conv):
        unit.input_quantizer.set_range(torch.tensor(3.0), unsigned=True)
    parts = [torch.rand(1, 2, 4, 4) * 3, torch.rand(1, 3, 4, 4) * 3]
    with torch.no_grad():
        whole = concat(parts)
        assert conv.input_quantizer(whole) is whole
        again = conv.input_quantizer(whole.clone())
        torch.testing.assert_close(again, whole, rtol=0, atol=1e-6)
        # Another grid, or another content since, is quantized.
        conv.input_quantizer.set_range(torch.tensor(2.0), unsigned=True)
        assert conv.input_quantizer(whole) is not whole
        conv.input_quantizer.set_range(torch.tensor(3.0), unsigned=True)
        whole.mul_(0.7)
        assert not torch.equal(conv.input_quantizer(whole), whole)
    torch.testing.assert_close(concat(parts), torch.cat([concat.input_quantizer(p) for p in parts], 1))


def test_an_addition_before_a_relu_wastes_no_integers_on_what_the_relu_removes():
    torch.manual_seed(0)
    a, b = torch.randn(400) * 3, torch.rand(400)
    a[:50] = -1000 * torch.rand(50)
    ranges = {}
    for before_relu in (False, True):
        add = prepared(QuantAdd(before_relu), activation=dict(bits=8, calibrator='max'))
        add.input_quantizer.observe()
        assert torch.equal(add(a, b), a + b)
        compute_ranges([add.input_quantizer])
        ranges[before_relu] = float(add.input_quantizer._amax)
    alive = a + b > 0
    assert ranges[True] == pytest.approx(float(torch.stack([a, b]).abs()[:, alive].max()))
    assert ranges[True] < ranges[False] / 50
    # The values that are clipped are those whose sum the ReLU sets to 0: all that is left is rounding.
    error = (add(a, b).relu() - (a + b).relu()).abs().max()
    assert error <= ranges[True] / 127 * 1.001


def test_an_addition_before_a_relu_still_finds_nan():
    add = prepared(QuantAdd(before_relu=True))
    add.input_quantizer.observe()
    add(torch.tensor([1.0, float('nan')]), torch.tensor([1.0, -1.0]))
    assert not add.input_quantizer.finite


@pytest.mark.parametrize('unit', [QuantAdd, QuantConcat])
@pytest.mark.parametrize('grad', [True, False])
def test_a_dynamic_range_is_one_for_all_inputs(unit, grad):
    unit = prepared(unit(), 1.0, activation=dict(range='dynamic'))
    with torch.set_grad_enabled(grad):
        for size in (0.1, 50.0):
            a, b = torch.randn(2, 5) * size, torch.randn(2, 5)
            amax = torch.stack([a, b]).abs().max()
            qa, qb = by_hand(a, float(amax), 127), by_hand(b, float(amax), 127)
            got = unit(a, b) if isinstance(unit, QuantAdd) else unit([a, b])
            assert torch.allclose(got, qa + qb if isinstance(unit, QuantAdd) else torch.cat([qa, qb], 1))


@pytest.mark.parametrize('target', ['tensorrt', 'openvino'])
def test_an_addition_before_a_relu_keeps_negative_inputs_negative(target):
    # The one place that the ReLU removes decides the sign: unsigned, -5 would become 0 and the sum 3.
    add = QuantAdd(before_relu=True)
    add.apply_plan(Recipe.from_dict(dict(target=target)).plan('unit'), 'unit', {})
    a, b = torch.tensor([-5.0, 2.0]), torch.tensor([3.0, 1.0])
    add.input_quantizer.observe()
    add(a, b)
    compute_ranges([add.input_quantizer])
    assert not add.input_quantizer.unsigned
    assert torch.allclose(add(a, b).relu(), (a + b).relu(), atol=0.05)
    # Where neither has negative values, it may be unsigned.
    add.input_quantizer.observe()
    add(a.abs(), b)
    compute_ranges([add.input_quantizer])
    assert add.input_quantizer.unsigned is (target == 'openvino')


@pytest.mark.parametrize('target', ['tensorrt', 'openvino'])
def test_a_layer_that_shares_the_quantizer_of_a_residual_addition_gives_the_range(target):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 3, 1)

        def setup_quant(self):
            self.add = QuantAdd(before_relu=True)
            share_input([self.conv1, self.add])

        def forward(self, x):
            return torch.relu(self.add(5 * self.conv1(x), x))

    block, x = quantize_(Block()).eval(), torch.rand(2, 3, 8, 8)
    recipe = dict(target=target, activation=dict(calibrator='max'))
    lifecycle.configure(block, Recipe.from_dict(recipe))
    lifecycle.calibrate(block, [x, 2 * x], block)
    quantizer = block.add.input_quantizer
    assert quantizer is block.conv1.input_quantizer
    assert quantizer._amax.item() == pytest.approx(2 * x.max().item())
    # The branch has both signs, and what is negative in it must not become 0.
    assert not quantizer.unsigned
    with torch.no_grad():
        branch = 5 * nn.functional.conv2d(x, block.conv1.weight, block.conv1.bias)
        off = block.add(branch, x) <= 0
    assert off[(branch < -x)].all()
