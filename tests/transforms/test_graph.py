"""Who produces what a layer reads: through which operations channels are followed, and where they end."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from q3d_plugin.lifecycle import set_enabled, units
from q3d_plugin.transforms import graph as graph_module
from q3d_plugin.transforms.channel_rules import OperatorRules
from q3d_plugin.transforms.graph import ChannelGraph
from q3d_plugin.transforms.insert import quantize_, share_input


class Between(nn.Module):
    """Two convolutions with something in between."""

    def __init__(self, between, channels=4, second=None):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), second or nn.Conv2d(channels, 2, 1)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def watched(model, *inputs, calls=1):
    model = quantize_(model).eval()
    set_enabled(model, False)
    layers = [(n, u) for n, u in units(model) if hasattr(u, 'weight')]
    graph = ChannelGraph(layers)
    with torch.no_grad():
        for _ in range(calls):
            with graph.watching() as watch:
                watch.returned(model(*inputs))
    return graph


def pairs(graph, reader, *writers):
    """For each channel that the reader reads, the (writer, channel) pairs that it is one set with."""
    sets = graph.sets()
    return [
        {(w, c) for w in writers for c, s in enumerate(sets[graph.written(w)]) if s == mine}
        for mine in sets[graph.read(reader)]
    ]


def images():
    return torch.randn(2, 3, 6, 6)


def _pillars(x):
    """(N, C, H, W) as rows, scattered to an empty canvas as pillars are."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    canvas = torch.zeros(4, 100)
    canvas[:, torch.arange(len(rows))] = rows.t()
    return torch.stack([canvas], 0).view(1, 4, 10, 10)


def _pillars_through_a_view(x, first=0):
    """The operations of :func:`_pillars` in torch 2.1, where an index with a colon is two of them."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    canvas = torch.zeros(4, 100)
    view = torch.ops.aten.slice(canvas, 0, 0, 2**63 - 1)
    if first:
        view.fill_(first)
    torch.ops.aten.index_put_(view, [None, torch.arange(len(rows))], rows.t())
    return canvas.view(1, 4, 10, 10)


def _voxels(x):
    """(N, C, H, W) as rows, scattered to a dense grid as sparse tensors are."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)
    places = torch.arange(len(rows))
    grid = torch.zeros(1, 9, 8, 4)
    grid[(torch.zeros_like(places), places // 8, places % 8, ...)] = rows
    return grid.permute(0, 3, 1, 2).contiguous()


THROUGH = {
    'nothing': lambda x: x,
    'relu': F.relu,
    'relu in place': lambda x: x.clone().relu_(),
    'leaky relu': lambda x: F.leaky_relu(x, 0.1),
    'prelu': nn.PReLU(4),
    'dropout': nn.Dropout(0.5),
    'a gate of its own': lambda x: x * torch.rand(4, 1, 1),
    'a number': lambda x: 2 * x / 3,
    'max pooling': lambda x: F.max_pool2d(x, 2),
    'average pooling': lambda x: F.adaptive_avg_pool2d(x, 2),
    'nearest': lambda x: F.interpolate(x, scale_factor=2),
    'bilinear': lambda x: F.interpolate(x, size=(7, 5), mode='bilinear'),
    'zero padding': nn.ZeroPad2d(1),
    'there and back': lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, 3).transpose(2, 3),
    'rows': lambda x: x.flatten(2).view(2, 4, 9, 4)[:, :, 1:, ::2],
    'maximum over a row': lambda x: x.max(3, keepdim=True)[0].expand(-1, -1, -1, 5),
    'mean': lambda x: x.mean((2, 3))[..., None].unsqueeze(-1),
    'some of the batch': lambda x: torch.stack([x[1], *x.unbind(0)]).index_select(2, torch.tensor([0, 3])),
    'other type and back': lambda x: x.double().float(),
    'pillars': _pillars,
    'pillars through a view': _pillars_through_a_view,
    'voxels': _voxels,
    'sum with zeros': lambda x: x + torch.zeros(1, 4, 1, 1),
}


@pytest.mark.parametrize('name', THROUGH)
def test_channels_are_followed_through(name):
    graph = watched(Between(THROUGH[name]), images())
    assert pairs(graph, 'second', 'first') == [{('first', c)} for c in range(4)]
    assert graph.reason(graph.read('second')) == ''
    assert not graph.fixed()[graph.written('first')].any()


ENDS = {
    'pillars among ones': lambda x: _pillars_through_a_view(x, first=1),
    'sigmoid': torch.sigmoid,
    'gelu': F.gelu,
    'bias': lambda x: x + 1,
    'tensor bias': lambda x: x + torch.rand(4, 1, 1),
    'square': lambda x: x * x,
    'clamp': lambda x: x.clamp(0, 6),
    'clamp from one': lambda x: x.clamp_min(1),
    'padding with ones': lambda x: F.pad(x, (1, 1), value=1.0),
    'batch norm': nn.BatchNorm2d(4),
    'float convolution': lambda x: F.conv2d(x, torch.rand(4, 4, 1, 1)),
    'softmax': lambda x: x.softmax(1),
    'sum over channels': lambda x: x.sum(1, keepdim=True).expand(-1, 4, -1, -1),
    'channels mixed with the batch': lambda x: x.reshape(4, 2, 6, 6).transpose(0, 1),
    'channels become rows': lambda x: x.transpose(1, 2).reshape(2, 4, 6, 6),
    'out of sight': lambda x: torch.from_numpy(x.numpy() * 1.0),
    'rounded division': lambda x: torch.div(x, 3, rounding_mode='floor'),
    'scatter with addition': lambda x: torch.zeros(2, 4, 6, 6).index_put_(
        (torch.tensor([0, 1]),), x * 2, True
    ),
    'scatter on something': lambda x: torch.ones(2, 4, 6, 6).index_put_((torch.tensor([0]),), x[:1]),
    'written over': lambda x: torch.zeros(2, 4, 6, 6).add_(1).index_put_((torch.tensor([0]),), x[:1]),
}


@pytest.mark.parametrize('name', ENDS)
def test_channels_end_at(name):
    graph = watched(Between(ENDS[name]), images())
    assert graph.fixed()[graph.written('first')].all()
    assert graph.fixed()[graph.read('second')].all()
    assert graph.reason(graph.written('first')) and graph.reason(graph.read('second'))


def test_depths_that_become_channels_share_their_channel():
    # HeightCompression: (N, C, D, H, W) to (N, C * D, H, W).
    def columns(x):
        return x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, 12, 6, 6)

    graph = watched(Between(columns, 12), images())
    assert pairs(graph, 'second', 'first') == [{('first', c // 3)} for c in range(12)]
    assert not graph.fixed()[graph.read('second')].any()


def test_a_flattened_map_shares_its_channel():
    graph = watched(Between(lambda x: x.flatten(1), second=nn.Linear(4 * 36, 5)), images())
    assert pairs(graph, 'second', 'first') == [{('first', c // 36)} for c in range(144)]


def test_the_model_s_input_and_output_are_fixed():
    graph = watched(Between(F.relu), images())
    assert graph.reason(graph.read('first')) == 'no producer (input of the model)'
    assert 'output' in graph.reason(graph.written('second'))


def test_a_returned_tensor_is_fixed_even_if_layers_read_it():
    class Both(Between):
        def forward(self, x):
            x = self.first(x)
            return {'features': [x], 'out': self.second(x)}

    graph = watched(Both(None), images())
    assert graph.reason(graph.written('first')) == 'it is an output of the model'


class Residual(nn.Module):
    """A stem, a block with an addition, and a reader."""

    def __init__(self, shortcut=lambda x: x):
        super().__init__()
        self.stem, self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.shortcut = shortcut

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.out(F.relu(self.conv(x) + self.shortcut(x)))


def test_an_addition_makes_all_of_its_channels_one():
    graph = watched(Residual(), images())
    expected = [{('stem', c), ('conv', c)} for c in range(4)]
    assert pairs(graph, 'out', 'stem', 'conv') == pairs(graph, 'conv', 'stem', 'conv') == expected
    assert not graph.fixed()[graph.read('out')].any()


def test_one_input_of_an_addition_that_cannot_follow_holds_all():
    graph = watched(Residual(torch.tanh), images())
    assert graph.fixed()[graph.read('conv')].all() and graph.fixed()[graph.written('conv')].all()
    assert graph.fixed()[graph.read('out')].all()


class Levels(nn.Module):
    """A concatenation of two levels and of something that no layer computed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 2, 1), nn.ConvTranspose2d(3, 4, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([self.a(x), self.b(x), x[:, :1]], 1))


def test_a_concatenation_has_segments():
    graph = watched(Levels(), images())
    assert pairs(graph, 'out', 'a', 'b') == [
        *({('a', c)} for c in range(2)),
        *({('b', c)} for c in range(4)),
        set(),
    ]
    assert graph.fixed()[graph.read('out')].tolist() == [False] * 6 + [True]


def test_a_part_of_the_channels_is_followed():
    graph = watched(Between(lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1)), images())
    assert pairs(graph, 'second', 'first') == [{('first', c)} for c in (1, 2, 3, 0)]


def test_a_layer_that_is_called_twice_joins_what_it_reads():
    class Twice(Levels):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.out(self.a(x)), self.out(F.relu(self.b(x)))

    graph = watched(Twice(), images())
    assert pairs(graph, 'out', 'a', 'b') == [{('a', c), ('b', c)} for c in range(4)]
    assert not graph.fixed()[graph.read('out')].any()

    class Input(Twice):
        def forward(self, x):
            return self.out(self.a(x)), self.out(torch.cat([x, x[:, :1]], 1))

    graph = watched(Input(), images())
    assert graph.fixed()[graph.read('out')].all() and graph.fixed()[graph.written('a')].all()


def test_declared_groups_and_shared_weights_are_one():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 2, 1) for _ in range(3))

        def forward(self, x):
            return self.a(x), self.b(x.clone())

    model = quantize_(Heads())
    share_input([model.a, model.b])
    model.c.weight = model.a.weight
    graph = ChannelGraph(units(model))
    sets = graph.sets()
    for name in 'bc':
        assert (sets[graph.read(name)] == sets[graph.read('a')]).all()
    assert (sets[graph.written('c')] == sets[graph.written('a')]).all()
    assert not (sets[graph.written('b')] == sets[graph.written('a')]).any()


def test_what_ranks_saw_is_merged():
    model = quantize_(Residual()).eval()
    set_enabled(model, False)
    graphs = [ChannelGraph(units(model)) for _ in range(3)]
    with torch.no_grad():
        for graph, shortcut in zip(graphs, (lambda x: x, torch.tanh, None)):
            if shortcut is not None:
                model.shortcut = shortcut
                with graph.watching() as watch:
                    watch.returned(model(images()))
    states = [g.state() for g in graphs]
    for graph in graphs:
        for state in states:
            graph.merge(state)
    for graph in graphs:
        assert (graph.sets() == graphs[0].sets()).all() and (graph.fixed() == graphs[0].fixed()).all()
        assert graph.called == ['stem', 'conv', 'out']
        assert graph.fixed()[graph.read('out')].all()


def test_sparse_layers_are_followed_through_their_features_to_a_dense_map():
    spconv = pytest.importorskip('spconv.pytorch')

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = spconv.SubMConv3d(3, 4, 3, indice_key='a')
            self.b = spconv.SparseConv3d(4, 5, 3, stride=2, padding=1)
            self.c = nn.Conv2d(5 * 3, 2, 1)

        def forward(self, x):
            x = self.a(x)
            x = self.b(x.replace_feature(F.relu(x.features))).dense()
            return self.c(x.view(len(x), -1, *x.shape[3:]))

    place = torch.randperm(216)[:40]
    indices = torch.stack([place * 0, place // 36, place // 6 % 6, place % 6], 1).int()
    graph = watched(Encoder(), spconv.SparseConvTensor(torch.randn(40, 3), indices, [6, 6, 6], 1))
    assert pairs(graph, 'b', 'a') == [{('a', c)} for c in range(4)]
    assert pairs(graph, 'c', 'b') == [{('b', c // 3)} for c in range(15)]
    assert not graph.fixed()[graph.read('b')].any() and not graph.fixed()[graph.read('c')].any()


def test_watching_changes_nothing():
    model = quantize_(Residual()).eval()
    set_enabled(model, False)
    x = images()
    with torch.no_grad():
        expected = model(x)
        graph = ChannelGraph(units(model))
        with graph.watching() as watch:
            got = model(x)
            watch.returned(got)
        assert torch.equal(got, expected) and torch.equal(model(x), expected)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('late', [False, True], ids=['all at once', 'a second stage later'])
def test_decoding_is_watched_until_every_layer_is_known(late):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.stage = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.decoded, self.second = 0, True

        def forward(self, x):
            x = self.head(self.body(x).relu())
            if self.second:
                x = self.stage(x.relu())
            for _ in range(5):  # NMS has thousands
                x = x.sigmoid()
                self.decoded += 1
            return x

    seen = []

    class Counting(OperatorRules):
        def operation(self, name, *args):
            seen.append(name)
            super().operation(name, *args)

    model = quantize_(Detector()).eval()
    set_enabled(model, False)
    whole, graph, counts = ChannelGraph(units(model)), ChannelGraph(units(model)), []
    with torch.no_grad():
        with whole.watching() as watch:
            watch.returned(model(images()))
        for i in range(3):
            model.second = not late or i > 0
            seen.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(graph_module, 'OperatorRules', Counting)
                with graph.watching() as watch:
                    watch.returned(model(images()))
            counts.append(seen.count('sigmoid'))
    assert counts == ([5, 5, 0] if late else [5, 0, 0])
    assert model.decoded == 20
    assert pairs(graph, 'stage', 'head') == [{('head', c)} for c in range(4)]
    if not late:
        # Without the second stage the head's outputs are decoded, so that their scale stays.
        assert (graph.fixed() == whole.fixed()).all()
        assert not graph.fixed()[graph.read('stage')].any()
    assert (graph.sets() == whole.sets()).all()
