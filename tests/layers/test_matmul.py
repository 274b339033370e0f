"""Products of two activations: float unless they are included, each operand on a grid of its own."""

import pytest
import torch
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.layers.matmul import QuantHeadedProduct, QuantMatMul, QuantOperand
from q3d_plugin.recipe import FAMILIES, TARGETS, Recipe
from q3d_plugin.transforms.insert import quantize_


class Scores(nn.Module):
    """A product between two linear layers, as in attention."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 6), nn.Linear(4, 6)
        self.product = torch.matmul

    def setup_quant(self):
        self.product = QuantMatMul()

    def forward(self, x):
        return self.product(self.q(x), self.k(x).transpose(-2, -1)).softmax(-1)


def made(**recipe):
    """A float model, and its quantized version of the same weights."""
    source = Scores().eval()
    model = Scores()
    model.load_state_dict(source.state_dict())
    model = quantize_(model).eval()
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
    return source, model


def by_hand(x, amax, bits=8):
    high = 2 ** (bits - 1) - 1
    return torch.fake_quantize_per_tensor_affine(x, amax / high, 0, -high - 1, high)


def test_operands_stay_float_unless_the_recipe_includes_them():
    source, model = made(weight=None, skip=['q', 'k'])
    x = torch.randn(2, 5, 4)
    assert model.product.left.quantizers() == model.product.right.quantizers() == []
    assert torch.equal(model(x), source(x))
    rows = {row.name: row for row in coverage(model)}
    for side in ('left', 'right'):
        row = rows[f'product.{side}']
        assert (row.kind, row.quantized) == ('MatMul', False)
        assert row.note == 'float by default: a product of two activations'


@pytest.mark.parametrize(
    ('pattern', 'meant'),
    [
        ('product', {'left', 'right'}),
        ('*.left', {'left'}),
        ('product.right', {'right'}),
        ('*', {'left', 'right'}),
    ],
)
def test_a_pattern_means_the_product_or_one_operand(pattern, meant):
    _, model = made(include=[pattern])
    assert {side for side in ('left', 'right') if getattr(model.product, side).quantizers()} == meant


def test_skip_wins_over_include():
    _, model = made(include=['product'], skip=['product.left'])
    assert not model.product.left.quantizers() and model.product.right.quantizers()


@pytest.mark.parametrize('target', ['tensorrt', 'openvino', 'onnxruntime'])
def test_engines_have_eight_bits_for_operands(target):
    assert QuantOperand.family in FAMILIES
    plans = [Recipe.from_dict(dict(target='simulation', activation=dict(bits=b))).plan('a') for b in (4, 8)]
    problems = [[p.key for p in TARGETS[target].problems(plan, QuantOperand.family)] for plan in plans]
    assert problems == [['activation.bits'], []]


@pytest.mark.parametrize('bits', [4, 8])
def test_each_operand_is_on_a_grid_of_its_own(bits):
    product = QuantMatMul()
    for side in (product.left, product.right):
        plan = Recipe.from_dict(dict(target='simulation', activation=dict(bits=bits))).plan('unit')
        side.apply_plan(plan, 'unit', {})
    product.left.input_quantizer.set_range(torch.tensor(1.0))
    product.right.input_quantizer.set_range(torch.tensor(30.0))
    a, b = torch.rand(2, 3, 5), torch.randn(2, 5, 4) * 10
    expected = by_hand(a, 1.0, bits) @ by_hand(b, 30.0, bits)
    assert torch.allclose(product(a, b), expected, rtol=1e-6, atol=1e-6)
    a.requires_grad_()
    product(a, b).sum().backward()
    # Straight through: as if only the other operand were quantized.
    assert torch.allclose(a.grad, by_hand(b, 30.0, bits).sum(2)[:, None].expand_as(a))


def test_calibration_gives_each_operand_the_range_of_its_own_tensor():
    source, model = made(include=['product'], activation=dict(calibrator='max'))
    x = torch.randn(2, 5, 4)
    lifecycle.calibrate(model, [x], model)
    for layer, side in ((source.q, model.product.left), (source.k, model.product.right)):
        largest = layer(x).detach().abs().max()
        torch.testing.assert_close(side.input_quantizer._amax, largest)
    assert 0 < (model(x) - source(x)).abs().max() < 0.05
    lifecycle.set_enabled(model, False)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(('target', 'unsigned'), [('openvino', True), ('tensorrt', False)])
def test_weights_of_attention_are_unsigned_where_the_engine_has_it(target, unsigned):
    model = nn.Sequential(QuantHeadedProduct())
    recipe = dict(target=target, include=['0.left', '0.right'], activation=dict(calibrator='max'))
    lifecycle.configure(model, Recipe.from_dict(recipe))
    weights, values = torch.randn(2, 2, 5, 5).softmax(-1), torch.randn(2, 5, 8)
    lifecycle.calibrate(model, [0], lambda _: model[0](weights, values))
    assert model[0].left.input_quantizer.unsigned is unsigned
    assert not model[0].right.input_quantizer.unsigned
    assert float(model[0].left.input_quantizer._amax) == pytest.approx(float(weights.max()))


def test_a_checkpoint_has_the_ranges_and_describes_itself():
    recipe = dict(include=['product.right'])
    _, model = made(**recipe)
    x = torch.randn(2, 5, 4)
    lifecycle.calibrate(model, [x], model)
    state = model.state_dict()
    assert {k for k in state if k.startswith('product')} == {
        'product.right.input_quantizer._amax',
        'product.right.input_quantizer._state',
    }
    _, again = made(**recipe)
    checkpoints.check_state_dict(again, state)
    again.load_state_dict(state)
    bare = quantize_(Scores()).eval()
    bare.load_state_dict(state)
    assert torch.equal(again(x), model(x)) and torch.equal(bare(x), model(x))


def test_the_product_by_heads_is_that_of_each_head():
    weights, values = torch.randn(3, 2, 4, 5).softmax(-1), torch.randn(3, 5, 6)
    got = QuantHeadedProduct()(weights, values)
    slow = torch.zeros(3, 4, 6)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        for n in range(4):
            slow[:, n, part] = sum(weights[:, head, n, m, None] * values[:, m, part] for m in range(5))
    assert torch.allclose(got, slow, atol=1e-6)
