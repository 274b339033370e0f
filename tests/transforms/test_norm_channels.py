"""A LayerNorm writes channels: what they are followed through, and what SmoothQuant does with them."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from q3d_plugin import lifecycle
from q3d_plugin.coverage import coverage
from q3d_plugin.layers.matmul import QuantHeadedProduct
from q3d_plugin.layers.window_attention import WindowAttention
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.graph import graph_of
from q3d_plugin.transforms.insert import quantize_


class Between(nn.Module):
    """A LayerNorm and a linear layer on a map (B, H, W, C) with something in between."""

    def __init__(self, between=lambda x: x, norm=None):
        super().__init__()
        self.stem, self.norm, self.out = nn.Linear(3, 6), norm or nn.LayerNorm(6), nn.Linear(6, 2)
        self.between = between

    def forward(self, x):
        return self.out(self.between(self.norm(self.stem(x))))


def maps():
    return torch.randn(2, 7, 9, 3)


def watched(model, *inputs):
    model = quantize_(model).eval()
    lifecycle.set_enabled(model, False)
    graph = graph_of(model)
    with torch.no_grad(), graph.watching() as watch:
        watch.returned(model(*inputs))
    return graph


def windows(x, size=4, shift=2):
    """(B, H, W, C) to shifted windows (windows * B, size * size, C), as Swin makes them."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, size * size, channels)


THROUGH = {
    'nothing': lambda x: x,
    'windows': windows,
    'a map with channels first and back': lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    'a shift': lambda x: x.roll(1, 1),
    'a shift along another axis than the last': lambda x: torch.roll(x, (1, 2), (-2, 0)),
    'relu': F.relu,
}


@pytest.mark.parametrize('name', THROUGH)
def test_the_channels_of_a_norm_are_followed_through(name):
    graph = watched(Between(THROUGH[name]), maps())
    assert (graph.sets()[graph.read('out')] == graph.sets()[graph.written('norm')]).all()
    assert graph.reason(graph.read('out')) == ''
    assert graph.called == ['stem', 'norm', 'out']
    # What the norm reads has to keep its scale, or other means and variances would come out.
    assert graph.reason(graph.written('stem')) == 'it is also read by norm, which normalizes it'
    assert len(graph.read('norm')) == 0


ENDS = {
    'gelu': F.gelu,
    'a shift of the channels': lambda x: torch.roll(x, 1, -1),
    'a shift without axes': lambda x: torch.roll(x, 1),
    'another norm': nn.LayerNorm(6, elementwise_affine=False),
    'a residual addition of something else': lambda x: x + torch.ones(6),
}


@pytest.mark.parametrize('name', ENDS)
def test_the_channels_of_a_norm_end_at(name):
    graph = watched(Between(ENDS[name]), maps())
    assert graph.fixed()[graph.written('norm')].all() and graph.fixed()[graph.read('out')].all()
    assert graph.reason(graph.read('out'))


class Inherited(nn.LayerNorm):
    """A class of its own that computes the same."""


class Doubled(nn.LayerNorm):
    """A class of its own that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ('norm', 'there'),
    [
        (nn.LayerNorm(6), True),
        (Inherited(6), True),
        (Doubled(6), False),
        (nn.LayerNorm(6, elementwise_affine=False), False),
        (nn.LayerNorm((9, 6)), False),
        (nn.GroupNorm(1, 7), False),
    ],
    ids=['plain', 'inherited', 'overridden', 'without a weight', 'over two axes', 'a group norm'],
)
def test_norms_that_multiply_the_last_axis_are_producers(norm, there):
    graph = watched(Between(norm=norm), maps())
    assert ('norm' in graph.norms) == there
    assert graph.fixed()[graph.read('out')].all() != there


def test_norms_that_share_a_weight_write_one_set():
    class Twice(Between):
        def __init__(self):
            super().__init__()
            self.other, self.second = nn.LayerNorm(6), nn.Linear(6, 2)
            self.other.weight, self.other.bias = self.norm.weight, self.norm.bias

        def forward(self, x):
            x = self.stem(x)
            return self.out(self.norm(x)), self.second(self.other(x * 2))

    graph = watched(Twice(), maps())
    sets = graph.sets()
    assert (sets[graph.written('norm')] == sets[graph.written('other')]).all()
    assert (sets[graph.read('out')] == sets[graph.read('second')]).all() and not graph.reason(
        graph.read('out')
    )


class Weighted(nn.Module):
    """Weighted sums over five places; the weights are made of the values, or by a layer of their own."""

    def __init__(self, dependent):
        super().__init__()
        self.values, self.weights, self.out = nn.Linear(3, 6), nn.Linear(3, 5), nn.Linear(6, 2)
        self.product, self.dependent = QuantHeadedProduct(), dependent

    def forward(self, x):
        values, weights = self.values(x), self.weights(x)
        if self.dependent:
            weights = weights + values @ values.transpose(1, 2)
        return self.out(self.product(torch.stack([weights, weights], 1), values))


@pytest.mark.parametrize('dependent', [False, True])
def test_the_values_of_an_attention_pass_their_channels_on(dependent):
    graph = watched(Weighted(dependent), torch.randn(2, 5, 3))
    assert (graph.sets()[graph.read('out')] == graph.sets()[graph.written('values')]).all()
    assert graph.fixed()[graph.read('out')].all() == dependent
    # Its weights are what they are.
    assert graph.reason(graph.written('weights'))
    assert dependent or graph.reason(graph.written('weights')) == 'it is also read by product'


# SmoothQuant on a Swin block.


class Attention(nn.Module):
    """The attributes of mmdet's window attention."""

    def __init__(self, channels=8, heads=2, size=4):
        super().__init__()
        self.num_heads, self.scale, self.window_size = heads, (channels // heads) ** -0.5, (size, size)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads))
        index = torch.arange(size)
        ys, xs = (axis.flatten() for axis in torch.meshgrid(index, index, indexing='ij'))
        between = (ys[:, None] - ys + size - 1) * (2 * size - 1) + (xs[:, None] - xs + size - 1)
        self.register_buffer('relative_position_index', between)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(0.1), nn.Dropout(0.1), nn.Softmax(-1)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scale * torch.einsum('bhnc,bhmc->bhnm', q, k)
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = scores + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        out = torch.einsum('bhnm,bhmc->bnhc', self.attn_drop(self.softmax(scores)), v).flatten(2)
        return self.proj_drop(self.proj(out))


class QuantAttention(WindowAttention, Attention):
    """As an adapter makes it."""


class Block(nn.Module):
    """Two stages of a small Swin: attention in windows and FFN, each behind a norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), Attention()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(32)
        self.fc1, self.fc2, self.merge = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(32, 5, bias=False)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.normal_(norm.weight, 1, 0.5)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.embed(x)
        y = self.attention(windows(self.norm1(x)))
        x = windows(x, shift=0) + y
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.merge(self.norm3(x.reshape(len(x), 4, 32)))


def smoothed(alpha, source=None, include=(), **smoothquant):
    """A float block, its quantized version after calibration with SmoothQuant, and an image."""
    source, x = (source or Block()).eval(), maps() * torch.tensor([1.0, 20.0, 1.0])
    model = quantize_(copy.deepcopy(source), {Attention: QuantAttention}).eval()
    recipe = dict(target='simulation', smoothquant=dict(alpha=alpha, **smoothquant), include=list(include))
    lifecycle.configure(model, Recipe.from_dict(recipe))
    lifecycle.calibrate(model, [x], model)
    return source, model, x


def difference(model, source, x):
    with torch.no_grad():
        expected = source(x)
        return float((model(x) - expected).abs().max() / expected.abs().max())


def test_the_quantized_attention_is_that_of_the_float_one():
    source = Attention().eval()
    model = quantize_(copy.deepcopy(source), {Attention: QuantAttention}).eval()
    lifecycle.set_enabled(model, False)
    x = torch.randn(6, 16, 8)
    for mask in (None, -100.0 * torch.randint(2, (3, 16, 16))):
        torch.testing.assert_close(model(x, mask), source(x, mask), rtol=1e-5, atol=1e-6)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize('include', [[], ['*.query_key'], ['*.attention_value', '*.query_key']])
@pytest.mark.parametrize('alpha', [0.0, 0.5, 1.0, 'search'])
def test_off_is_float_after_smoothing(alpha, include):
    source, model, x = smoothed(alpha, include=include)
    assert difference(model, source, x) > 1e-4
    lifecycle.set_enabled(model, False)
    assert difference(model, source, x) < 1e-5
    if alpha != 'search':
        assert not torch.equal(model.norm1.weight, source.norm1.weight)
        assert not torch.equal(model.norm1.bias, source.norm1.bias)


def test_only_the_input_and_what_follows_gelu_are_multiplied_explicitly():
    source, model, _ = smoothed(0.5)
    explicit = [n for n, u in lifecycle.units(model) if getattr(u, 'smoothing', False)]
    assert explicit == ['embed', 'fc2']
    notes = {r.name: r.note for r in coverage(model)}
    assert notes['embed'].endswith('explicit multiplication: no producer (input of the model)')
    assert notes['fc2'].endswith('explicit multiplication: no producer (it is made by gelu)')
    makers = {r.name: r.smoothquant['producers'] for r in coverage(model) if r.smoothquant}
    assert makers == {
        'embed': [],
        'fc2': [],
        'attention.qkv': ['norm1'],
        'attention.proj': ['attention.qkv'],
        'fc1': ['norm2'],
        'merge': ['norm3'],
    }
    # Queries and keys, whose product has to stay, keep their rows, and values are divided.
    ratio = (model.attention.qkv.bias / source.attention.qkv.bias).detach()
    assert torch.equal(ratio[:16], torch.ones(16)) and not (ratio[16:] == 1).any()


def test_weights_of_a_norm_are_divided_by_the_scale_of_the_paper():
    source, model, x = smoothed(0.7)
    with torch.no_grad():
        read = windows(source.norm1(source.embed(x))).abs().amax((0, 1))
    scale = read**0.7 / source.attention.qkv.weight.detach().abs().amax(0) ** 0.3
    torch.testing.assert_close(model.norm1.weight * scale, source.norm1.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.norm1.bias * scale, source.norm1.bias, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.attention.qkv.weight[:16] / scale, source.attention.qkv.weight[:16])


def test_outliers_in_the_channels_of_norms_are_tamed():
    source = Block().eval()
    x = maps()
    with torch.no_grad():
        expected = source(x)
        for norm, layer in (('norm1', source.attention.qkv), ('norm2', source.fc1), ('norm3', source.merge)):
            for parameter in (getattr(source, norm).weight, getattr(source, norm).bias):
                parameter[2] *= 50
            layer.weight[:, 2] /= 50
        torch.testing.assert_close(source(x), expected, rtol=1e-4, atol=1e-5)
    errors = {}
    for alpha in (None, 0.5):
        model = quantize_(copy.deepcopy(source), {Attention: QuantAttention}).eval()
        recipe = dict(target='simulation', smoothquant=None if alpha is None else dict(alpha=alpha))
        lifecycle.configure(model, Recipe.from_dict(recipe))
        with torch.no_grad():
            lifecycle.calibrate(model, [x], model)
            errors[alpha] = float((model(x) - expected).abs().mean())
    assert errors[0.5] < 0.2 * errors[None]


@pytest.mark.parametrize('extra', ['weight', 'bias'])
def test_a_norm_whose_parameters_are_read_elsewhere_keeps_them(extra):
    class Reads(Block):
        def forward(self, x):
            # No operation on what the norm returned shows it.
            return super().forward(x) + getattr(self.norm2, extra).sum()

    source, model, x = smoothed(0.5, Reads())
    assert torch.equal(getattr(model.norm2, extra), getattr(source.norm2, extra))
    lifecycle.set_enabled(model, False)
    assert difference(model, source, x) < 1e-5


def test_a_norm_without_a_bias_and_one_that_is_called_twice():
    class Bare(Block):
        def __init__(self):
            super().__init__()
            self.norm1.bias = None

        def forward(self, x):
            return super().forward(x) + super().forward(x * 2)

    source, model, x = smoothed(0.5, Bare())
    assert not torch.equal(model.norm1.weight, source.norm1.weight)
    lifecycle.set_enabled(model, False)
    assert difference(model, source, x) < 1e-5


class Decoder(nn.Module):
    """A decoder layer that normalizes behind its additions, as TransFusion's, and two heads."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm1, self.norm2 = (nn.LayerNorm(8) for _ in range(2))
        self.embed, self.fc1, self.fc2 = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Conv1d(8, 2, 1) for _ in range(2))
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight, 1, 0.5)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.embed(x.flatten(1, 2))
        x = self.norm1(x + self.attention(x, x, x)[0])
        x = self.norm2(x + self.fc2(F.relu(self.fc1(x)))).transpose(1, 2)
        return torch.cat([head(x) for head in self.heads], 1)


def test_a_norm_behind_an_addition_takes_the_scale_of_the_heads_alone():
    source, model, x = smoothed(0.5, Decoder())
    lifecycle.set_enabled(model, False)
    assert difference(model, source, x) < 1e-5
    # The first is also added to, and that sum is normalized.
    assert torch.equal(model.norm1.weight, source.norm1.weight)
    makers = {r.name: r.smoothquant['producers'] for r in coverage(model) if r.smoothquant}
    assert makers['heads.0'] == makers['heads.1'] == ['norm2'] and makers['fc1'] == []


def test_a_reader_that_is_not_smoothed_holds_the_norm():
    source, model, _ = smoothed(0.5, overrides=[dict(layers='fc1', alpha=None)])
    assert torch.equal(model.norm2.weight, source.norm2.weight)
    assert not torch.equal(model.norm3.weight, source.norm3.weight)


def test_what_ranks_saw_of_norms_is_merged():
    model = quantize_(Between()).eval()
    lifecycle.set_enabled(model, False)
    graphs = [graph_of(model) for _ in range(2)]
    with torch.no_grad(), graphs[0].watching() as watch:
        watch.returned(model(maps()))
    graphs[1].merge(graphs[0].state())
    assert graphs[1].called == graphs[0].called == ['stem', 'norm', 'out']
    assert np.array_equal(graphs[1].sets(), graphs[0].sets())
    assert np.array_equal(graphs[1].fixed(), graphs[0].fixed())
