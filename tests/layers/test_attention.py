"""Quantized attention against ``nn.MultiheadAttention``."""

import copy

import pytest
import torch
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.layers import QuantWeightLayer, converted, is_converted
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_

LENGTH, SOURCE, BATCH, DIM, HEADS = 5, 7, 3, 8, 4
MODULES = {
    'plain': {},
    'batch_first': {'batch_first': True},
    'kdim_vdim': {'kdim': 6, 'vdim': 10},
    'no_bias': {'bias': False},
    'bias_kv': {'add_bias_kv': True},
    'zero_attn': {'add_zero_attn': True, 'batch_first': True},
    'everything': {'add_bias_kv': True, 'add_zero_attn': True, 'kdim': 6, 'vdim': 10},
}
CALLS = {
    'defaults': {},
    'no_weights': {'need_weights': False},
    'weights_by_head': {'average_attn_weights': False},
    'boolean_mask': {'attn_mask': 'bool'},
    'float_mask': {'attn_mask': 'float', 'need_weights': False},
    'mask_by_head': {'attn_mask': 'by_head'},
    'padding': {'key_padding_mask': 'bool'},
    'float_padding': {'key_padding_mask': 'float', 'need_weights': False},
    'both': {'attn_mask': 'by_head', 'key_padding_mask': 'float', 'need_weights': False},
}


def attention(**kwargs):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(DIM, HEADS, **kwargs).eval()
    with torch.no_grad():
        # Zero biases would hide that one is forgotten.
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def quantized(module, enabled=False):
    holder = quantize_(nn.Sequential(copy.deepcopy(module)))
    lifecycle.configure(holder, Recipe.from_dict({'target': 'simulation'}))
    lifecycle.set_enabled(holder, enabled)
    return holder


def inputs(module, batched=True):
    widths = (DIM, module.kdim, module.vdim)
    shapes = [(n, BATCH, w) if batched else (n, w) for n, w in zip((LENGTH, SOURCE, SOURCE), widths)]
    made = [torch.randn(shape) for shape in shapes]
    return [x.transpose(0, 1) for x in made] if batched and module.batch_first else made


def arguments(call):
    made = dict(call)
    if 'attn_mask' in made:
        shape = (BATCH * HEADS, LENGTH, SOURCE) if made['attn_mask'] == 'by_head' else (LENGTH, SOURCE)
        mask = torch.rand(shape) > 0.7
        mask[..., 0] = False
        made['attn_mask'] = torch.randn(shape) if made['attn_mask'] == 'float' else mask
    if 'key_padding_mask' in made:
        mask = torch.rand(BATCH, SOURCE) > 0.7
        mask[:, 0] = False
        made['key_padding_mask'] = mask if made['key_padding_mask'] == 'bool' else torch.randn(BATCH, SOURCE)
    return made


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    if expected[1] is None:
        assert got[1] is None
    else:
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings('ignore:Support for mismatched:UserWarning')
@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize('kwargs', MODULES)
def test_off_is_float(kwargs, call):
    module = attention(**MODULES[kwargs])
    quant = quantized(module)[0]
    query, key, value = inputs(module)
    call = arguments(CALLS[call])
    assert_same(quant(query, key, value, **call), module(query, key, value, **call))


@pytest.mark.parametrize('call', ['defaults', 'no_weights', 'weights_by_head', 'boolean_mask'])
def test_unbatched_off_is_float(call):
    module = attention(add_bias_kv=True, batch_first=True)
    query, key, value = inputs(module, batched=False)
    call = {**arguments(CALLS[call]), 'key_padding_mask': torch.arange(SOURCE) > 4}
    assert_same(quantized(module)[0](query, key, value, **call), module(query, key, value, **call))


def test_self_attention_does_not_take_the_fused_kernel():
    """Where query, key and value are one tensor, the float module hands all weights to a fused kernel."""
    module = attention(batch_first=True)
    holder, x = quantized(module), torch.randn(BATCH, LENGTH, DIM)
    with torch.no_grad():
        assert_same(holder[0](x, x, x), module(x, x, x))
        lifecycle.set_enabled(holder, True)
        lifecycle.calibrate(holder, [x], lambda x: holder[0](x, x, x))
        assert not torch.equal(holder[0](x, x, x)[0], module(x, x, x)[0])
    assert all(row.quantized for row in coverage(holder))


def test_dropout_and_gradients_are_those_of_the_float_module():
    module = attention(dropout=0.5, batch_first=True).train()
    holder = quantized(module)
    quant, results = holder[0].train(), []
    query, key, value = inputs(module)
    for m in (module, quant):
        torch.manual_seed(1)
        out = m(query, key, value)[0]
        out.square().sum().backward()
        results.append(out)
    torch.testing.assert_close(results[0], results[1])
    for (name, mine), theirs in zip(quant.named_parameters(), module.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize('kwargs', ['plain', 'kdim_vdim'])
def test_keys_of_the_state_dict_are_those_of_the_float_module(kwargs):
    module = attention(**MODULES[kwargs])
    holder = quantized(module)
    mine = {k for k in holder[0].state_dict() if '_quantizer.' not in k}
    assert mine == set(module.state_dict())
    assert [n for n, _ in holder[0].named_parameters()] == [n for n, _ in module.named_parameters()]
    holder.load_state_dict({f'0.{k}': v + 1 for k, v in module.state_dict().items()}, strict=False)
    for name, parameter in module.named_parameters():
        assert torch.equal(holder[0].get_parameter(name), parameter + 1)


def test_quantized_is_a_float_attention_of_quantized_tensors():
    """By hand: the inputs and the weights on their grids, the float module on those, out_proj apart."""
    module = attention(kdim=6, vdim=10)
    holder = quantized(module, enabled=True)
    quant = holder[0]
    query, key, value = inputs(module)
    lifecycle.calibrate(holder, [None], lambda _: quant(query, key, value))

    def signed(x, amax):
        return torch.fake_quantize_per_tensor_affine(x, float(amax) / 127, 0, -127, 127)

    def by_row(w):
        return torch.stack([signed(row, row.abs().max()) for row in w])

    reference = copy.deepcopy(module)
    with torch.no_grad():
        for name in ('q', 'k', 'v'):
            weight = getattr(reference, f'{name}_proj_weight')
            weight.copy_(by_row(weight))
        # The float module ends with out_proj: the identity shows what goes into it.
        reference.out_proj.weight.copy_(torch.eye(DIM))
        reference.out_proj.bias.zero_()
        given = [
            signed(x, p.input_quantizer._amax)
            for x, p in zip((query, key, value), (quant.q_proj, quant.k_proj, quant.v_proj))
        ]
        before = signed(reference(*given)[0], quant.out_proj.input_quantizer._amax)
        expected = before @ by_row(module.out_proj.weight).T + module.out_proj.bias
        got = quant(query, key, value)[0]
    # A value on the edge of two steps may fall either way.
    assert ((got - expected).abs() > 1e-5).float().mean() < 0.02
    assert not torch.allclose(got, module(query, key, value)[0], atol=1e-5)


def test_life_of_the_projections(tmp_path):
    module = attention()
    holder = quantized(module, enabled=True)
    recipe = Recipe.from_dict(
        {
            'target': 'simulation',
            'skip': ['*.k_proj'],
            'overrides': [{'layers': '*.v_proj', 'weight': {'bits': 4}}],
        }
    )
    lifecycle.configure(holder, recipe)
    batch = inputs(module)
    lifecycle.calibrate(holder, [batch], lambda b: holder[0](*b))
    rows = {r.name: r for r in coverage(holder)}
    assert list(rows) == ['0.out_proj', '0.q_proj', '0.k_proj', '0.v_proj']
    assert rows['0.k_proj'].note == "skipped by '*.k_proj'" and not rows['0.k_proj'].quantized
    assert rows['0.v_proj'].weight == 'int4 per channel' and rows['0.out_proj'].quantized
    checkpoints.save_checkpoint(holder, recipe, tmp_path / 'q.pth')
    state = torch.load(tmp_path / 'q.pth', weights_only=True)['state_dict']
    other = quantized(attention(), enabled=True)
    lifecycle.configure(other, recipe)
    checkpoints.check_state_dict(other, state)
    other.load_state_dict(state)
    assert torch.equal(other[0](*batch)[0], holder[0](*batch)[0])
    # Copies, as EMA makes them, read their own weights.
    copied = copy.deepcopy(other)
    with torch.no_grad():
        copied[0].in_proj_weight.zero_()
    assert not copied[0].q_proj.weight.any() and other[0].q_proj.weight.any()


def test_coverage_of_a_float_attention_names_its_projections():
    rows = coverage(nn.Sequential(attention()))
    assert [(r.name, r.kind, r.quantized) for r in rows] == [
        ('0', 'MultiheadAttention', False),
        ('0.out_proj', 'NonDynamicallyQuantizableLinear', False),
    ]


def test_converting_again_changes_nothing():
    module = converted(attention())
    projection = module.q_proj
    assert converted(module) is module and module.q_proj is projection
    assert is_converted(module) and isinstance(module.out_proj, QuantWeightLayer)


def test_a_layer_whose_forward_is_passed_by_is_not_called_quantized():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.passed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.passed.weight, self.passed.bias)

    for recipe in ({}, {'activation': None}):
        model = quantize_(Bypass())
        lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
        lifecycle.calibrate(model, [torch.randn(3, 4)], model)
        rows = {r.name: r for r in coverage(model)}
        assert rows['used'].quantized and not rows['passed'].quantized
        assert rows['passed'].note == 'saw no data during calibration'


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
def test_projections_are_smoothed_without_changing_the_attention(mode):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 5, 6)
    with torch.no_grad():
        model.first.weight[2] *= 50
        expected = model(x)
        quantize_(model)
        recipe = {'smoothquant': {'alpha': 0.5, 'mode': mode}}
        lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
        lifecycle.calibrate(model, [x], model)
        lifecycle.set_enabled(model, False)
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    rows = {r.name: r for r in coverage(model)}
    assert rows['attention.q_proj'].smoothquant['alpha'] == 0.5
    if mode == 'static':
        # All three read what the first layer writes, which takes their scale.
        for name in 'qkv':
            assert rows[f'attention.{name}_proj'].smoothquant['producers'] == ['first']
