"""Detectors with activation outliers: the same in float, and other ranges."""

import copy
import types

import pytest
import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.commands import main, spoil_checkpoint
from q3d_plugin.errors import Q3DError
from q3d_plugin.transforms.insert import quantize_


def float_model(norm):
    torch.manual_seed(0)
    layers = []
    for i, o in ((3, 20), (20, 24), (24, 4)):
        layers += [nn.Conv2d(i, o, 3, bias=not norm)] + ([nn.BatchNorm2d(o)] if norm else []) + [nn.ReLU()]
    layers.insert(-1, nn.ConvTranspose2d(4, 6, 2, stride=2))
    model = nn.Sequential(*layers).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand(tensor.shape) + 0.3)
    return model


@pytest.fixture(params=[True, False], ids=['norm', 'bias'])
def case(request):
    """A float model, its quantized version behind the least that a bench is, and a frame."""
    model, x = float_model(request.param), torch.randn(2, 3, 16, 16)
    quantized = quantize_(copy.deepcopy(model))
    bench = types.SimpleNamespace(model=quantized, forward=lambda batch: {'out': quantized(batch)})
    return model, bench, x


def inputs_of(model, x):
    """Largest magnitude of the input of every convolution."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, n=name: seen.update({n: args[0].abs().max()})
                )
            )
    with torch.no_grad():
        out = model(x)
    for handle in handles:
        handle.remove()
    return seen, out


def test_float_outputs_stay_and_the_chosen_inputs_have_outliers(case):
    model, bench, x = case
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    graph = spoil_checkpoint.watched_graph(bench, x)
    factors, spoilt = spoil_checkpoint.choose_factors(graph, [names[1], names[2]], 100, 0.2, seed=3)
    assert spoilt == names[1:]
    # 4 of 20 channels, 5 of 24.
    assert [int((factors[graph.read(n)] == 100).sum()) for n in spoilt] == [4, 5]
    state = spoil_checkpoint.spoiled(bench, graph, factors, model.state_dict())
    assert list(state) == list(model.state_dict())
    before, expected = inputs_of(model, x)
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    after, got = inputs_of(other, x)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    for name in after:
        ratio = float(after[name] / before[name])
        assert ratio > 20 if name in spoilt else ratio == pytest.approx(1, rel=1e-4)
    assert spoil_checkpoint.difference(bench, model.state_dict(), x) < 1e-4
    assert spoil_checkpoint.difference(bench, state, x) < 1e-4
    state[f'{names[0]}.weight'] = state[f'{names[0]}.weight'] * 2
    assert spoil_checkpoint.difference(bench, state, x) > 1e-2


def test_what_cannot_be_scaled_is_named(case):
    model, bench, x = case
    graph = spoil_checkpoint.watched_graph(bench, x)
    with pytest.raises(Q3DError, match='input of the model'):
        spoil_checkpoint.choose_factors(graph, ['0'], 50, 0.1, 0)
    with pytest.raises(Q3DError, match=r"matches, such as '0'"):
        spoil_checkpoint.choose_factors(graph, ['head'], 50, 0.1, 0)


@pytest.mark.parametrize('options', [['--factor', '0'], ['--share', '2'], ['--share', '0']])
def test_numbers_that_mean_nothing_are_refused_before_anything_is_read(tmp_path, capsys, options):
    assert main(['spoil-checkpoint', 'none.py', 'none.pth', str(tmp_path / 'out.pth'), *options]) == 2
    assert '--share' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_w8a8_is_worse_and_smoothquant_mends_it(case):
    from q3d_plugin.recipe import Recipe

    model, bench, x = case
    graph = spoil_checkpoint.watched_graph(bench, x)
    factors, _ = spoil_checkpoint.choose_factors(graph, ['*'], 100, 0.1, seed=0)
    state = spoil_checkpoint.spoiled(bench, graph, factors, model.state_dict())
    with torch.no_grad():
        expected = model(x)
    errors = {}
    for name, weights, smooth in (
        ('plain', model.state_dict(), None),
        ('spoilt', state, None),
        ('smooth', state, 0.5),
    ):
        quantized = quantize_(float_model(any('running' in k for k in state)))
        quantized.load_state_dict(weights)
        recipe = Recipe.from_dict({'smoothquant': None if smooth is None else {'alpha': smooth}})
        lifecycle.configure(quantized, recipe)
        with torch.no_grad():
            lifecycle.calibrate(quantized.eval(), [x], quantized)
            errors[name] = float((quantized(x) - expected).abs().mean())
    assert errors['spoilt'] > 3 * errors['plain']
    assert errors['smooth'] < errors['spoilt'] / 2


class Transformer(nn.Module):
    """Linear layers behind norms, and an attention whose projections have parts of one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(3, 20), nn.LayerNorm(20), nn.LayerNorm(20)
        self.fc1, self.fc2, self.out = nn.Linear(20, 24), nn.Linear(24, 20), nn.Linear(20, 4)
        self.other, self.attention = nn.Linear(3, 20), nn.MultiheadAttention(20, 2, batch_first=True)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.bias)

    def forward(self, points):
        x, y = self.embed(points), self.other(points)
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm1(x))))
        return self.out(self.norm2(x)) + self.out(self.attention(y, y, y)[0].tanh())


def test_norms_get_outliers_by_their_weight_and_bias():
    model, x = Transformer().eval(), torch.randn(2, 9, 3)
    quantized = quantize_(copy.deepcopy(model))
    bench = types.SimpleNamespace(model=quantized, forward=lambda batch: {'out': quantized(batch)})
    graph = spoil_checkpoint.watched_graph(bench, x)
    spoil_checkpoint.hold_parts_(graph, model.state_dict())
    # The second norm is read by a layer that also reads what cannot follow.
    factors, names = spoil_checkpoint.choose_factors(graph, ['*'], 50, 0.1, seed=0)
    assert names == ['fc1']
    with pytest.raises(Q3DError, match=r'the weight of attention.q_proj is a part of another parameter'):
        spoil_checkpoint.choose_factors(graph, ['attention'], 50, 0.1, seed=0)
    state = spoil_checkpoint.spoiled(bench, graph, factors, model.state_dict())
    assert list(state) == list(model.state_dict())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {'norm1.weight', 'norm1.bias', 'fc1.weight'}
    for part in ('weight', 'bias'):
        ratio = state[f'norm1.{part}'] / model.state_dict()[f'norm1.{part}']
        assert sorted(ratio.round().tolist()) == [1.0] * 18 + [50.0] * 2
    assert spoil_checkpoint.difference(bench, model.state_dict(), x) < 1e-5
    assert spoil_checkpoint.difference(bench, state, x) < 1e-5
    state['norm1.bias'] = model.norm1.bias.detach()
    assert spoil_checkpoint.difference(bench, state, x) > 1e-2


def test_a_name_that_is_a_norm_is_no_layer_that_reads():
    model, x = Transformer().eval(), torch.randn(2, 9, 3)
    quantized = quantize_(model)
    bench = types.SimpleNamespace(model=quantized, forward=lambda batch: {'out': quantized(batch)})
    graph = spoil_checkpoint.watched_graph(bench, x)
    with pytest.raises(Q3DError, match=r"no layer of the model matches, such as 'embed'"):
        spoil_checkpoint.choose_factors(graph, ['norm1'], 50, 0.1, seed=0)
