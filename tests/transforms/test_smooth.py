"""SmoothQuant: the function is kept, outliers are tamed, and what cannot be smoothed is left as it is."""

import copy
import ctypes
import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from q3d_plugin import checkpoints, lifecycle, numerics
from q3d_plugin.calibration import InputSample, InputStatistics
from q3d_plugin.coverage import coverage
from q3d_plugin.cpu import enable_cpu_mode
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantAdd, QuantConcat, converted
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms import smooth, smooth_search
from q3d_plugin.transforms.graph import ChannelGraph
from q3d_plugin.transforms.insert import quantize_, share_input

spconv = pytest.importorskip('spconv.pytorch')

enable_cpu_mode()

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Chain(nn.Module):
    """Convolutions of all kinds, one behind the other."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 3, padding=1, groups=2),
            nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(6, 4, 2, 2, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, stride=4),
            nn.Flatten(),
            nn.Linear(4 * 25, 5),
        )

    def forward(self, x):
        return self.net(x)


class Blocks(nn.Module):
    """A residual block, two levels that are concatenated, and branches that read one tensor."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.down, self.up = nn.Conv2d(6, 4, 2, 2), nn.ConvTranspose2d(4, 4, 2, 2)
        self.lateral = nn.Conv2d(6, 3, 1)
        self.branches = nn.ModuleList(nn.Conv2d(7, 2, 1) for _ in range(3))
        self.add, self.concat = torch.add, torch.cat

    def setup_quant(self):
        self.add, self.concat = QuantAdd(), QuantConcat()
        share_input(self.branches)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.add(self.conv2(F.relu(self.conv1(x))), x))
        x = F.relu(self.concat([self.lateral(x), self.up(F.relu(self.down(x)))], 1))
        return [branch(x) for branch in self.branches]


class Attention(nn.Module):
    """Attention, whose projections have parts of one weight, between linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.first(x.flatten(2).transpose(1, 2)))
        return self.last(self.attention(x, x, x)[0])


class Voxels(nn.Module):
    """A sparse residual encoder with a dense head."""

    def __init__(self):
        super().__init__()
        self.stem = spconv.SubMConv3d(3, 4, 3, indice_key='a')
        self.conv1 = spconv.SubMConv3d(4, 4, 3, indice_key='a')
        self.down = spconv.SparseConv3d(4, 5, 3, stride=2, padding=1)
        self.head = nn.Conv2d(15, 2, 3, padding=1)
        self.add = torch.add

    def setup_quant(self):
        self.add = QuantAdd()

    def forward(self, x):
        x = self.stem(x)
        x = x.replace_feature(F.relu(x.features))
        y = self.conv1(x)
        x = self.down(x.replace_feature(F.relu(self.add(y.features, x.features))))
        x = x.replace_feature(F.relu(x.features)).dense()
        return self.head(x.view(len(x), -1, *x.shape[3:]))


def images(count=3):
    """Batches of images with a channel that is much larger than the others."""
    return [torch.randn(2, 3, 10, 10) * torch.tensor([1.0, 50.0, 1.0])[:, None, None] for _ in range(count)]


def voxels(count=3):
    out = []
    for _ in range(count):
        place = torch.randperm(216)[:60]
        indices = torch.stack([place * 0, place // 36, place // 6 % 6, place % 6], 1).int()
        features = torch.randn(60, 3) * torch.tensor([1.0, 50.0, 1.0])
        out.append(spconv.SparseConvTensor(features, indices, [6, 6, 6], 1))
    return out


MODELS = {
    'chain': (Chain, images),
    'blocks': (Blocks, images),
    'attention': (Attention, images),
    'voxels': (Voxels, voxels),
}


def made(name, smoothquant=None, **recipe):
    """A float model with quantized layers of the same weights, configured, and its batches."""
    kind, batches = MODELS[name]
    source = kind().eval()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
    model = quantize_(copy.deepcopy(source)).eval()
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', smoothquant=smoothquant, **recipe)))
    return source, model, batches()


def outputs(model, x):
    with torch.no_grad():
        out = model(x)
    return torch.cat([t.flatten() for t in (out if isinstance(out, list) else [out])])


def off(model, x):
    lifecycle.set_enabled(model, False)
    out = outputs(model, x)
    lifecycle.set_enabled(model, True)
    return out


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def explicit(model):
    return [n for n, u in lifecycle.units(model) if getattr(u, 'smoothing', False)]


# The function is kept.


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
@pytest.mark.parametrize('alpha', [*ALPHAS, 'search'])
@pytest.mark.parametrize('name', MODELS)
def test_off_is_float_after_smoothing(name, alpha, mode):
    source, model, batches = made(name, dict(alpha=alpha, mode=mode))
    before = [p.clone() for p in model.parameters()]
    lifecycle.calibrate(model, batches, model)
    if mode == 'static':
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    for x in batches:
        expected = outputs(source, x)
        assert relative(off(model, x), expected) < 1e-4
        # And the model is quantized.
        assert not torch.equal(outputs(model, x), expected)


@pytest.mark.parametrize('name', ['chain', 'blocks', 'voxels'])
def test_only_the_first_layer_has_no_producer(name):
    _, model, batches = made(name, dict(alpha=0.5))
    lifecycle.calibrate(model, batches, model)
    first = next(n for n, _ in lifecycle.units(model))
    assert explicit(model) == [first]
    rows = {r.name: r for r in coverage(model)}
    assert rows[first].note == ('SmoothQuant 0.5, explicit multiplication: no producer (input of the model)')
    assert rows[first].smoothquant == dict(alpha=0.5, mode='static', producers=[], explicit=True)
    for row in rows.values():
        if row.kind not in ('Add', 'Concat') and row.name != first:
            assert row.note.startswith('SmoothQuant 0.5, scale in ') and not row.smoothquant['explicit']
            assert set(row.smoothquant['producers']) < set(rows)
        elif row.name != first:
            assert row.note == '' and row.smoothquant is None


def test_projections_of_one_tensor_take_one_scale_from_the_layer_before():
    _, model, batches = made('attention', dict(alpha=0.5))
    lifecycle.calibrate(model, batches, model)
    # What attention computes from values is no product with one layer's weight.
    assert explicit(model) == ['first', 'attention.out_proj']
    makers = {r.name: r.smoothquant['producers'] for r in coverage(model) if r.smoothquant}
    for part in 'qkv':
        assert makers[f'attention.{part}_proj'] == ['first']
    assert makers['last'] == ['attention.out_proj']


def test_the_table_names_the_layers_that_have_the_scale():
    _, model, batches = made('blocks', dict(alpha=0.5))
    lifecycle.calibrate(model, batches, model)
    makers = {r.name: r.smoothquant['producers'] for r in coverage(model) if r.smoothquant}
    assert makers['conv2'] == ['conv1']
    assert sorted(makers['conv1']) == sorted(makers['lateral']) == ['conv2', 'stem']
    assert sorted(makers['branches.1']) == ['lateral', 'up']


def test_inputs_are_divided_by_the_producer():
    source, model, batches = made('chain', dict(alpha=0.7))
    lifecycle.calibrate(model, batches, model)
    lifecycle.set_enabled(model, False)
    seen = {}
    for net, key in ((source, 'float'), (model, 'smooth')):
        net.net[3].register_forward_pre_hook(lambda m, a, key=key: seen.update({key: a[0]}))
        outputs(net, batches[0])
    # The first batch of the calibration holds the largest values of some channels only.
    largest = torch.zeros(8)
    for x in batches:
        hook = source.net[3].register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
        outputs(source, x)
        hook.remove()
        largest = torch.maximum(largest, seen.pop('x').abs().amax((0, 2, 3)))
    scale = torch.empty(8)
    for c in range(8):
        column = source.net[3].weight[c // 4 * 3 : c // 4 * 3 + 3, c % 4]
        scale[c] = largest[c] ** 0.7 / column.abs().max() ** 0.3 if largest[c] > 0 else 1
    outputs(source, batches[0])
    assert torch.allclose(seen['smooth'] * scale[:, None, None], seen['float'], rtol=1e-3, atol=1e-4)


# The scale.


@pytest.mark.parametrize('alpha', ALPHAS)
def test_the_scale_is_that_of_the_paper(alpha):
    x, w = torch.rand(20) * 30 + 0.01, torch.rand(20) + 0.01
    slow = [float(a) ** alpha / float(b) ** (1 - alpha) for a, b in zip(x, w)]
    assert torch.allclose(numerics.smoothing_scale(x, w, alpha), torch.tensor(slow), rtol=1e-5)


@pytest.mark.parametrize('alpha', ALPHAS)
def test_dead_channels_and_zero_weights_keep_their_scale(alpha):
    x, w = torch.tensor([0.0, 5.0, 0.0, 1e-38, 1e38]), torch.tensor([1.0, 0.0, 0.0, 1e38, 1e-38])
    scale = numerics.smoothing_scale(x, w, alpha)
    assert scale[:3].tolist() == [1, 1, 1]
    assert scale.isfinite().all() and (scale >= 1e-4).all() and (scale <= 1e4).all()


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
@pytest.mark.parametrize('alpha', [0.0, 0.5, 1.0, 'search'])
def test_a_model_with_dead_channels_and_zero_weights_keeps_its_function(alpha, mode):
    source, model, batches = made('chain', dict(alpha=alpha, mode=mode))
    for net, first in ((source, source.net[0]), (model, model.net[0])):
        with torch.no_grad():
            first.weight[2] = 0
            if first.bias is not None:
                first.bias[2] = -1
            else:
                net.net[1].running_mean[2], net.net[1].weight[2], net.net[1].bias[2] = 0, 0, -1
            net.net[3].weight[:, 1] = 0
            net.net[5].weight.zero_()
    for x in batches:
        x[:, 0] = 0
    lifecycle.calibrate(model, batches, model)
    for x in batches:
        assert relative(off(model, x), outputs(source, x)) < 1e-4
        assert outputs(model, x).isfinite().all()


# Outliers: the study's test.


def _outliers(kind):
    """A layer and inputs of which a few channels are 50 times as large."""
    wide = torch.ones(32)
    wide[[3, 11, 20]] = 50
    if kind == 'sparse':
        place = torch.randperm(1000)[:300]
        indices = torch.stack([place * 0, place // 100, place // 10 % 10, place % 10], 1).int()
        x = spconv.SparseConvTensor(torch.randn(300, 32) * wide, indices, [10, 10, 10], 1)
        return spconv.SubMConv3d(32, 16, 3), x
    layer, shape = {
        'conv': (lambda: nn.Conv2d(32, 16, 3, padding=1), (2, 32, 12, 12)),
        'transposed': (lambda: nn.ConvTranspose2d(32, 16, 2, stride=2), (2, 32, 12, 12)),
        'linear': (lambda: nn.Linear(32, 16), (200, 32)),
    }[kind]
    return layer(), torch.randn(shape) * wide.reshape(-1, *[1] * (len(shape) - 2))


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
@pytest.mark.parametrize('alpha', [0.5, 0.75, 1.0, 'search'])
@pytest.mark.parametrize('kind', ['conv', 'transposed', 'linear', 'sparse'])
def test_outliers_of_the_input_cost_a_third_at_most(kind, alpha, mode):
    layer, x = _outliers(kind)
    # Channels with large inputs have small weights, as in a trained layer: all matter alike.
    layer = converted(layer).eval()
    with torch.no_grad():
        wide = (
            layer.features(x)
            .transpose(0, layer.channel_axis(layer.features(x)))
            .flatten(1)
            .std(1)
            .clamp_min(1)
        )
        layer.weight.copy_(layer.scale_input(layer.weight, 1 / wide))
    errors = []
    for smoothquant in (None, dict(alpha=alpha, mode=mode)):
        model = nn.Sequential(copy.deepcopy(layer))
        recipe = dict(smoothquant=smoothquant, activation=dict(calibrator='max'))
        lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
        lifecycle.calibrate(model, [x], model)
        with torch.no_grad():
            got = layer.features(model(x))
            lifecycle.set_enabled(model, False)
            errors.append((got - layer.features(model(x))).abs().mean())
    assert errors[1] * 3 < errors[0]


@pytest.mark.parametrize('alpha', [0.5, 'search'])
@pytest.mark.parametrize('kind', ['conv', 'transposed', 'linear', 'sparse'])
def test_outliers_before_weights_of_any_kind_cost_a_third_at_most(kind, alpha):
    # The weights know nothing of the outliers here, so that alpha 1 would move all of the trouble to them.
    wide = torch.ones(256)
    wide[[3, 120]] = 50
    if kind == 'sparse':
        layer, x = spconv.SubMConv3d(256, 16, 3), voxels(1)[0]
        x = x.replace_feature(torch.randn(60, 256).relu() * wide)
    else:
        layer, shape = {
            'conv': (nn.Conv2d(256, 16, 3, padding=1), (1, 256, 12, 12)),
            'transposed': (nn.ConvTranspose2d(256, 16, 2, stride=2), (1, 256, 12, 12)),
            'linear': (nn.Linear(256, 16), (200, 256)),
        }[kind]
        x = torch.randn(shape).relu() * wide.reshape(-1, *[1] * (len(shape) - 2))
    layer = converted(layer).eval()
    errors = []
    for smoothquant in (None, dict(alpha=alpha)):
        model = nn.Sequential(copy.deepcopy(layer))
        recipe = dict(smoothquant=smoothquant, activation=dict(calibrator='max'))
        lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
        lifecycle.calibrate(model, [x], model)
        with torch.no_grad():
            got = layer.features(model(x))
            lifecycle.set_enabled(model, False)
            errors.append((got - layer.features(model(x))).abs().mean())
    assert errors[1] * 3 < errors[0]


# Who does not agree.


def test_a_skipped_reader_takes_the_scale_at_no_cost():
    source, model, batches = made('blocks', dict(alpha=0.5), skip=['lateral', 'branches.2'])
    lifecycle.calibrate(model, batches, model)
    assert explicit(model) == ['stem']
    assert model.lateral.quantizers() == [] and not torch.equal(model.lateral.weight, source.lateral.weight)
    assert relative(off(model, batches[0]), outputs(source, batches[0])) < 1e-4


def test_a_reader_that_is_not_smoothed_makes_the_multiplication_explicit():
    source, model, batches = made('blocks', dict(alpha=0.5, overrides=[dict(layers='lateral', alpha=None)]))
    lifecycle.calibrate(model, batches, model)
    assert explicit(model) == ['stem', 'conv1', 'down']
    notes = {r.name: r.note for r in coverage(model)}
    assert notes['down'] == (
        'SmoothQuant 0.5, explicit multiplication: it is also read by lateral, which is not smoothed'
    )
    assert notes['lateral'] == '' and model.lateral.smooth_spec is None
    assert relative(off(model, batches[0]), outputs(source, batches[0])) < 1e-4


def test_readers_with_another_alpha_do_not_agree():
    source, model, batches = made('blocks', dict(alpha=0.5, overrides=[dict(layers='down', alpha=0.9)]))
    lifecycle.calibrate(model, batches, model)
    assert explicit(model) == ['stem', 'conv1', 'down', 'lateral']
    notes = {r.name: r.note for r in coverage(model)}
    assert notes['down'].startswith('SmoothQuant 0.9, explicit') and 'have another alpha' in notes['down']
    assert relative(off(model, batches[0]), outputs(source, batches[0])) < 1e-4


def test_explicit_branches_that_read_one_tensor_multiply_it_once():
    _, model, batches = made(
        'blocks', dict(alpha=0.5, layers=['branches']), overrides=[dict(layers='down', weight=None)]
    )
    share = model.branches[0].input_group
    assert share is model.branches[2].input_group
    model.forward = lambda x: [b(torch.sigmoid(x)[:, [0, 1, 2, 0, 1, 2, 0]]) for b in model.branches]
    x = batches[0]

    def together(x):
        x = torch.sigmoid(x)[:, [0, 1, 2, 0, 1, 2, 0]]
        return [b(x) for b in model.branches]

    lifecycle.calibrate(model, batches, together)
    assert len(explicit(model)) == 3
    counted = []
    model.branches[0]._times = lambda *a: (
        counted.append(1) or type(model.branches[0])._times(model.branches[0], *a)
    )
    model.branches[1]._times = lambda *a: (
        counted.append(1) or type(model.branches[1])._times(model.branches[1], *a)
    )
    with torch.no_grad():
        together(x)
    assert len(counted) == 1
    # Nothing stays behind when the input is gone.
    assert all(memo._reference is None for memo in share._memos.values())
    quantizer = model.branches[0].input_quantizer
    assert quantizer is model.branches[2].input_quantizer


def test_branches_that_read_one_tensor_have_one_scale():
    _, model, batches = made('blocks', dict(alpha=0.3))
    source = copy.deepcopy(model)
    lifecycle.calibrate(model, batches, model)
    ratios = [(b.weight / a.weight)[0, :, 0, 0] for a, b in zip(source.branches, model.branches)]
    assert torch.allclose(ratios[0], ratios[1], rtol=1e-4) and torch.allclose(ratios[0], ratios[2], rtol=1e-4)


def test_only_layers_of_the_patterns_are_smoothed():
    _, model, batches = made('chain', dict(alpha=0.5, layers=['net.5', '*.7']))
    lifecycle.calibrate(model, batches, model)
    smoothed = [n for n, u in lifecycle.units(model) if u.smooth_note]
    assert smoothed == ['net.5', 'net.7'] and explicit(model) == []
    assert [k for k in model.state_dict() if 'smooth_' in k] == [
        f'net.{i}.smooth_{k}' for i in (5, 7) for k in ('alpha', 'scale')
    ]


# Code that cannot be watched.


def _squared_elsewhere(x):
    """What an extension does: it takes the memory of a tensor and returns another tensor."""
    values = (ctypes.c_float * x.numel()).from_address(x.data_ptr())
    return torch.tensor(list(values)).reshape(x.shape).square()


class Hidden(nn.Module):
    """What the first layer computes is read by a layer, and by an extension."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return self.third(F.relu(self.second(x)) + _squared_elsewhere(x))


def test_the_probe_finds_readers_that_cannot_be_watched():
    source = Hidden()
    model = quantize_(copy.deepcopy(source)).eval()
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', smoothquant=dict(alpha=0.5))))
    batches = images()
    warnings = []
    # Not a real logger, whose level frameworks change for the whole process.
    logger = types.SimpleNamespace(warning=warnings.append)
    lifecycle.calibrate(model, batches, model, logger=logger)
    assert len(warnings) == 1 and 'cannot be watched' in warnings[0]
    assert relative(off(model, batches[0]), outputs(source, batches[0])) < 1e-4
    assert 'second' in explicit(model)


class HiddenOutput(Hidden):
    def forward(self, x):
        x = self.first(x)
        return [self.second(x), _squared_elsewhere(x)]


def test_the_probe_finds_outputs_that_cannot_be_watched():
    source = HiddenOutput()
    model = quantize_(copy.deepcopy(source)).eval()
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', smoothquant=dict(alpha=0.5))))
    batches = images()
    lifecycle.calibrate(model, batches, model)
    assert relative(off(model, batches[0]), outputs(source, batches[0])) < 1e-4


def test_the_probe_leaves_the_weights_to_the_last_digit():
    _, model, batches = made('blocks', dict(alpha=0.5))
    layers = {n: u for n, u in lifecycle.units(model) if hasattr(u, 'weight')}
    before = [p.clone() for p in model.parameters()]
    lifecycle.set_enabled(model, False)
    graph = ChannelGraph(layers.items())
    with torch.no_grad(), graph.watching() as watch:
        watch.returned(model(batches[0]))
    runs = []

    def run():
        statistics = InputStatistics(layers)
        with statistics.attached(), torch.no_grad():
            out = model(batches[0])
        runs.append([p.clone() for p in model.parameters()])
        return statistics.amax, out

    assert smooth.probe_(graph, layers, run, run()) == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, runs[-1]))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# The search.


def _errors(model, x, expected):
    return ((outputs(model, x) - expected).square().sum() / expected.square().sum()).item()


@pytest.mark.parametrize('name', MODELS)
def test_the_search_takes_the_least_error_of_each_group(name):
    _, model, batches = made(name, dict(alpha='search', grid=[0.1, 0.9]))
    layers = {n: u for n, u in lifecycle.units(model) if hasattr(u, 'weight')}
    statistics = InputStatistics(layers, layers, rows=100)
    graph = ChannelGraph(layers.items())
    lifecycle.set_enabled(model, False)
    with torch.no_grad(), statistics.attached():
        for x in batches:
            with graph.watching() as watch:
                watch.returned(model(x))
    lifecycle.set_enabled(model, True)
    smooth.agree_(graph, layers)
    joint = smooth.joint_amax(graph, layers, statistics.amax)
    assert sorted(n for g in joint.groups for n in g) == sorted(layers)
    errors = smooth_search.sum_errors(layers, joint, statistics)
    alphas = smooth_search.alphas_of(layers, joint, errors)
    tried = smooth_search.candidates([0.1, 0.9])
    assert tried == (None, 0.1, 0.25, 0.5, 0.75, 0.9)
    for group in joint.groups:
        assert len({alphas[n] for n in group}) == 1
        mine = sum(errors[n] for n in group)
        assert mine[tried.index(alphas[group[0]])] <= mine.min()
    # Groups are those of the same channels.
    sets = graph.sets()
    for i, a in enumerate(joint.groups):
        for b in joint.groups[i + 1 :]:
            mine, theirs = (set(sets[graph.read(n)].tolist()) for n in (a[0], b[0]))
            assert not mine & theirs


def test_the_error_of_the_search_is_that_of_the_quantized_layer():
    layer = converted(nn.Conv2d(8, 6, 3, groups=2, bias=False))
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, 8, 6, 6) * torch.linspace(0.1, 9, 8)[:, None, None]
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', activation=dict(calibrator='max'))))
    out = torch.zeros(2, 6, 4, 4)
    rows = layer.rows_of(x, out, torch.arange(32))
    sample = InputSample(rows, torch.ones(32), x.abs().amax((0, 2, 3)), x.min().item())
    scale = torch.rand(8) + 0.2
    got = smooth_search.output_error(layer, sample, [None, scale])
    for mine, s in zip(got, (torch.ones(8), scale)):
        twin = copy.deepcopy(model)
        twin[0].weight.data.copy_(layer.scale_input(layer.weight, s).detach())
        lifecycle.calibrate(twin, [x / s[:, None, None]], twin)
        expected = F.conv2d(x, layer.weight, groups=2)
        with torch.no_grad():
            error = (twin(x / s[:, None, None]) - expected).square().sum() / expected.square().sum()
        assert float(mine) == pytest.approx(float(error), rel=1e-3)


def _calibrated_twin(layer, frames, **activation):
    """A copy of a layer whose range calibration set on ``frames``."""
    twin = nn.Sequential(copy.deepcopy(layer))
    lifecycle.configure(twin, Recipe.from_dict(dict(target='simulation', activation=activation)))
    lifecycle.calibrate(twin, frames, twin)
    return twin


SPECS = [
    dict(calibrator=calibrator, bits=bits, **more)
    for calibrator in ('max', 'mse', 'grid', 'percentile', 'entropy')
    for bits in (4, 8)
    for more in ({}, {'percentile': 99.0} if calibrator == 'percentile' else {'unsigned': False})
] + [dict(range='dynamic'), dict(range='dynamic', bits=4), dict(range='dynamic', unsigned=True)]


@pytest.mark.parametrize('spec', SPECS, ids=lambda s: '-'.join(map(str, s.values())))
@pytest.mark.parametrize('sign', ['relu', 'both'])
def test_the_search_has_the_range_that_calibration_gives(spec, sign):
    """Rows are the whole input here, so both see the same values; frames differ in size and have outliers."""
    layer = converted(nn.Linear(8, 6, bias=False)).eval()
    # Heavy tails, which an entropy search cuts elsewhere than one for the least error.
    frames = [torch.distributions.StudentT(2.0).sample((150, 8)) * size for size in (0.02, 1.0, 5.0)]
    if sign == 'relu' or spec.get('unsigned') is True:
        frames = [f.relu() for f in frames]
    rows, scale = torch.cat(frames), torch.rand(8) + 0.2
    model = nn.Sequential(layer)
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', activation=spec)))
    of_call = torch.cat([f.abs().amax(0).expand(len(f), -1) for f in frames])
    extent = rows.abs().amax(0), rows.min().item()
    sample = InputSample(rows[..., None], torch.ones(len(rows)), *extent, of_call)
    got = smooth_search.output_error(layer, sample, [None, scale])
    for mine, s in zip(got, (torch.ones(8), scale)):
        smoothed = copy.deepcopy(layer)
        smoothed.weight.data.mul_(s)
        twin = _calibrated_twin(smoothed, [f / s for f in frames], **spec)
        with torch.no_grad():
            found = torch.cat([twin(f / s) for f in frames])
            expected = rows @ layer.weight.t()
        error = (found - expected).double().square().sum() / expected.double().square().sum()
        assert float(mine) == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize('activation', [dict(range='dynamic'), dict(calibrator='mse')])
def test_the_alpha_that_is_found_is_the_best_one_of_the_real_layer(activation):
    """Small frames and large ones: what is best for one range of all is not best for a range of each."""
    torch.manual_seed(1)
    layer = converted(nn.Linear(16, 12, bias=False)).eval()
    wide = torch.logspace(-1.5, 1.5, 16)
    with torch.no_grad():
        layer.weight.mul_(wide.flip(0))
    frames = [torch.randn(200, 16) * wide * size for size in (0.01, 1, 30)]
    activation = dict(bits=6, **activation)
    model = nn.Sequential(copy.deepcopy(layer))
    recipe = dict(smoothquant=dict(alpha='search', grid=[0.1, 0.9]), activation=activation)
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
    lifecycle.calibrate(model, frames, model)
    found = None if math.isnan(model[0].smooth_alpha) else round(model[0].smooth_alpha.item(), 4)
    rows, weight = torch.cat(frames), layer.input_amax()
    expected, errors = rows @ layer.weight.t(), {}
    for alpha in smooth_search.candidates([0.1, 0.9]):
        s = torch.ones(16) if alpha is None else numerics.smoothing_scale(rows.abs().amax(0), weight, alpha)
        smoothed = copy.deepcopy(layer)
        smoothed.weight.data.mul_(s)
        twin = _calibrated_twin(smoothed, [f / s for f in frames], **activation)
        with torch.no_grad():
            errors[alpha] = (torch.cat([twin(f / s) for f in frames]) - expected).square().sum().item()
    assert errors[found] <= min(errors.values()) * 1.1


@pytest.mark.parametrize('kind', ['conv', 'transposed', 'linear', 'sparse'])
def test_the_search_is_not_worse_than_any_fixed_alpha_on_its_sample(kind):
    layer, x = _outliers(kind)
    layer = converted(layer).eval()
    model = nn.Sequential(layer)
    lifecycle.configure(
        model, Recipe.from_dict(dict(target='simulation', smoothquant=dict(alpha='search', grid=[0.5])))
    )
    lifecycle.set_enabled(model, False)
    statistics = InputStatistics({'0': layer}, ['0'])
    with torch.no_grad(), statistics.attached():
        model(x)
    lifecycle.set_enabled(model, True)
    graph = ChannelGraph([('0', layer)])
    joint = smooth.joint_amax(graph, {'0': layer}, statistics.amax)
    found = smooth_search.alphas_of(
        {'0': layer}, joint, smooth_search.sum_errors({'0': layer}, joint, statistics)
    )['0']
    weight = layer.input_amax()
    scales = [
        None if a is None else numerics.smoothing_scale(statistics.amax['0'], weight, a)
        for a in (found, None, 0.25, 0.5, 0.75)
    ]
    errors = smooth_search.output_error(layer, statistics.sample('0'), scales)
    assert errors[0] <= errors[1:].min()


def test_the_search_may_find_that_smoothing_does_not_help():
    # Inputs that lie on the integers, and weights too: without a scale there is no error at all.
    layer = converted(nn.Linear(4, 3, bias=False)).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 127, (3, 4)).float())
        layer.weight[:, 0] = 127
    x = torch.randint(0, 255, (500, 4)).float()
    x[0] = 255
    model = nn.Sequential(layer)
    recipe = dict(smoothquant=dict(alpha='search'), activation=dict(calibrator='max'))
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
    lifecycle.calibrate(model, [x], model)
    row = coverage(model)[0]
    assert row.note == 'SmoothQuant off: no alpha lowers the error'
    assert row.smoothquant == dict(alpha=None, mode='static', producers=[], explicit=False)
    assert math.isnan(layer.smooth_alpha) and (layer.smooth_scale == 1).all()


def test_rows_are_a_fair_sample_of_all_calls():
    layer = converted(nn.Linear(1, 1))
    layer.input_quantizer = layer.weight_quantizer = None
    statistics = InputStatistics({'a': layer}, ['a'], rows=3000)
    with statistics.attached():
        for i in range(4):
            layer(torch.full((5, 1), float(i)))
    counts = torch.bincount(statistics.rows['a'].flatten().long(), minlength=4)
    assert counts.sum() == 3000 and (counts - 750).abs().max() < 120


def test_rows_stand_for_all_outputs_though_large_ones_are_chosen_more_often():
    layer = converted(nn.Conv2d(1, 2, 1))
    layer.input_quantizer = layer.weight_quantizer = None
    x = torch.ones(1, 1, 40, 40)
    x[0, 0, 3, 5:9] = 100
    statistics = InputStatistics({'a': layer}, ['a'], rows=1000)
    with statistics.attached():
        layer(x)
    rows, weights = statistics.rows['a'].flatten(), statistics.weights['a']
    large = rows == 100
    assert 0.4 < large.float().mean() < 0.6
    for power in (0, 1, 2):
        estimate = (rows**power * weights).mean()
        assert float(estimate) == pytest.approx(float((x**power).mean()), rel=0.15)


# Bad input.


def test_batches_that_can_be_read_once_are_refused():
    _, model, batches = made('chain', dict(alpha=0.5))
    with pytest.raises(Q3DError, match='can be read once; SmoothQuant reads the batches twice'):
        lifecycle.calibrate(model, iter(batches), model)

    class Hidden:
        def __init__(self):
            self.rest = iter(batches)

        def __iter__(self):
            yield from self.rest

    with pytest.raises(Q3DError, match='Hidden was given, which can be read once'):
        lifecycle.calibrate(model, Hidden(), model)


def test_nan_in_an_input_is_named():
    _, model, batches = made('chain', dict(alpha=0.5))
    batches[1][0, 0, 0, 0] = float('nan')
    with pytest.raises(Q3DError, match=r"NaN or Inf in the input of 'net\.0' .*in frame number 1"):
        lifecycle.calibrate(model, batches, model)


def test_no_batches_are_refused():
    _, model, _ = made('chain', dict(alpha=0.5))
    with pytest.raises(Q3DError, match='not one frame'):
        lifecycle.calibrate(model, [], model)


def test_layers_without_data_are_left_alone():
    source, model, batches = made('chain', dict(alpha=0.5))
    model.idle = quantize_(nn.Conv2d(3, 3, 1))
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', smoothquant=dict())))
    before = model.idle.weight.clone()
    lifecycle.calibrate(model, batches, model)
    assert torch.equal(model.idle.weight, before) and not model.idle.smoothing
    assert coverage(model)[-1].note == 'saw no data during calibration'


# Life.


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
@pytest.mark.parametrize('name', MODELS)
def test_a_checkpoint_gives_the_same_numbers_and_is_not_smoothed_again(name, mode):
    recipe = dict(alpha='search', mode=mode)
    _, source, batches = made(name, recipe)
    lifecycle.calibrate(source, batches, source)
    _, target, _ = made(name, recipe)
    assert not lifecycle.is_calibrated(target)
    state = source.state_dict()
    checkpoints.check_state_dict(target, state)
    target.load_state_dict(state)
    assert lifecycle.is_calibrated(target) and explicit(target) == explicit(source)
    for x in batches:
        assert torch.equal(outputs(target, x), outputs(source, x))
    for mine, theirs in zip(coverage(target), coverage(source)):
        # Which ones share is found in calibration; the ranges are what a checkpoint holds.
        assert mine[:4] == theirs[:4]
        assert mine.note.split(',')[0] == theirs.note.split(',')[0] or 'off' in theirs.note
    # Where no recipe is at hand, the checkpoint describes itself.
    kind, _ = MODELS[name]
    bare = quantize_(kind()).eval()
    bare.load_state_dict(state)
    assert all(torch.equal(outputs(bare, x), outputs(source, x)) for x in batches)


def test_a_float_checkpoint_loads_into_a_smoothed_model_anew():
    source, model, batches = made('chain', dict(alpha=0.5))
    lifecycle.calibrate(model, batches, model)
    lifecycle.configure(model, Recipe.from_dict(dict(target='simulation', smoothquant=dict(alpha=0.5))))
    assert not any(u.smoothing for _, u in lifecycle.units(model))
    checkpoints.check_state_dict(model, source.state_dict())
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if 'smooth' in k]
    assert relative(off(model, batches[0]), outputs(source, batches[0])) < 1e-5


def test_smoothing_again_keeps_the_function():
    source, model, batches = made('blocks', dict(alpha=0.5))
    lifecycle.calibrate(model, batches, model)
    scale = model.stem.smooth_scale.clone()
    lifecycle.calibrate(model, batches, model)
    assert relative(off(model, batches[0]), outputs(source, batches[0])) < 1e-4
    # The second time starts from what the first time left.
    assert not torch.allclose(model.stem.smooth_scale, scale, rtol=1e-3)


@pytest.mark.parametrize('mode', ['static', 'dynamic'])
def test_gradients_reach_every_weight_and_no_scale(mode):
    _, model, batches = made('blocks', dict(alpha=0.5, mode=mode), mode='qat')
    parameters = list(model.parameters())
    lifecycle.calibrate(model, batches, model)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    model.train()
    sum(o.square().mean() for o in model(batches[0])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    assert not any(b.requires_grad for b in model.buffers())


def test_a_copy_of_a_smoothed_model_is_its_own():
    _, model, batches = made('blocks', dict(alpha=0.5))
    lifecycle.calibrate(model, batches, model)
    expected = outputs(model, batches[0])
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, batches[0]), expected)
    twin.stem.smooth_scale.mul_(2)
    assert torch.equal(outputs(model, batches[0]), expected)


def test_mode_float_is_not_smoothed():
    source, model, batches = made('chain', dict(alpha=0.5), mode='float')
    assert relative(outputs(model, batches[0]), outputs(source, batches[0])) < 1e-5
    assert not any(u.smoothing for _, u in lifecycle.units(model))
