"""The check of folds: what runs in another order than its names say is an error that names both modules."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from q3d_plugin.cpu import enable_cpu_mode
from q3d_plugin.errors import Q3DError
from q3d_plugin.lifecycle import set_enabled, units
from q3d_plugin.transforms.fold import find_pairs
from q3d_plugin.transforms.folded_norm import CHECKS, FoldedNorm, Handover, came_from
from q3d_plugin.transforms.graph import ChannelGraph
from q3d_plugin.transforms.insert import quantize_

spconv = pytest.importorskip('spconv.pytorch')

enable_cpu_mode()


class Block(nn.Module):
    """Two convolutions and two norms of equal widths under the usual names, run in an order of its own."""

    def __init__(self, run, bias=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=bias), nn.BatchNorm2d(4)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def without_ranges(model):
    quantize_(model)
    set_enabled(model, False)
    return model


def randomize(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 4)
    return model.eval()


def image():
    return torch.randn(2, 4, 6, 6)


def folded(model):
    return [m for m in model.modules() if isinstance(m, FoldedNorm)]


def looked_at(model):
    """How many inputs of each folded norm are still to be looked at."""
    return [m.handover.left for m in folded(model)]


def hooks(model):
    return sum(isinstance(h, Handover) for m in model.modules() for h in m._forward_hooks.values())


WRONG = {
    'preactivation': lambda s, x: x + s.conv2(F.relu(s.bn2(s.conv1(F.relu(s.bn1(x)))))),
    'DenseNet': lambda s, x: torch.cat([x, s.conv1(F.relu(s.bn1(x)))], 1),
    'activation between': lambda s, x: s.bn2(s.conv2(s.bn1(F.relu(s.conv1(x))))),
    'activation between, in place': lambda s, x: s.bn2(s.conv2(s.bn1(s.conv1(x).relu_()))),
    'copy of an activation': lambda s, x: s.bn2(s.conv2(s.bn1(F.relu(s.conv1(x)).clone()))),
    'swapped': lambda s, x: s.bn1(s.conv2(F.relu(s.bn2(s.conv1(x))))),
    'behind an addition': lambda s, x: s.bn2(s.conv2(F.relu(s.bn1(s.conv1(x) + x)))),
    'shared norm': lambda s, x: s.bn1(s.conv2(F.relu(s.bn1(s.conv1(x))))),
    'of the input': lambda s, x: s.conv1(x) + s.bn1(x),
}


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('name', WRONG)
def test_an_order_that_the_fold_does_not_know_is_an_error_that_names_both(name, grad):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Block(WRONG[name])).eval()
    x = image()
    expected = model(x)
    quant = without_ranges(randomize(copy.deepcopy(model)))
    with pytest.raises(Q3DError) as caught, torch.set_grad_enabled(grad):
        quant(x)
    number = '2' if name == 'swapped' else '1'
    assert f"'Sequential.1.bn{number}' is a BatchNorm" in str(caught.value)
    assert f"the layer 'Sequential.1.conv{number}'" in str(caught.value)
    assert 'add_conventions(pairs={Block:' in str(caught.value)
    assert expected is not None


def test_the_error_names_the_float_type_of_a_quantized_block():
    class QuantBlock(Block):
        pass

    quant = quantize_(nn.Sequential(Block(WRONG['preactivation'])), {Block: QuantBlock})
    set_enabled(quant, False)
    with pytest.raises(Q3DError, match=r'pairs=\{Block: lambda'):
        quant(image())


@pytest.mark.parametrize('norm_first', [False, True])
def test_a_norm_that_never_runs_is_an_error(norm_first):
    quant = without_ranges(Block(lambda s, x: s.conv2(s.conv1(x)))).eval()
    with pytest.raises(Q3DError, match=r"'Block.bn[12]' is a BatchNorm .* never called"):
        for _ in range(100):
            quant(image()) if norm_first else quant.conv2(image())


RIGHT = {
    'plain': lambda s, x: s.bn2(s.conv2(F.relu(s.bn1(s.conv1(x))))),
    'in place': lambda s, x: s.bn2(s.conv2(s.bn1(s.conv1(x)).relu_())).add_(x),
    'copy': lambda s, x: s.bn2(s.conv2(s.bn1(s.conv1(x).clone()))),
    'channels last': lambda s, x: s.bn2(
        s.conv2(s.bn1(s.conv1(x).contiguous(memory_format=torch.channels_last)))
    ),
    'half': lambda s, x: s.bn1(s.conv1(x).half()),
    'view': lambda s, x: s.bn1(s.conv1(x).flatten(2)[..., None]),
    'some': lambda s, x: s.bn1(s.conv1(x)[1:, :, ::2]),
    'upsampled': lambda s, x: s.bn1(F.interpolate(s.conv1(x), scale_factor=2)),
    'pieces': lambda s, x: (lambda pieces: s.bn1(torch.cat(pieces)))([s.conv1(row[None]) for row in x]),
    'two, then both': lambda s, x: [s.bn1(y) for y in (s.conv1(x), s.conv1(2 * x))][1],
    'checkpoint': lambda s, x: checkpoint(lambda x: s.bn1(s.conv1(x)), x, use_reentrant=False),
    'old checkpoint': lambda s, x: checkpoint(lambda x: s.bn1(s.conv1(x)), x, use_reentrant=True),
    'checkpoint of the norm': lambda s, x: checkpoint(s.bn1, s.conv1(x), use_reentrant=True),
    'new checkpoint of the norm': lambda s, x: checkpoint(s.bn1, s.conv1(x), use_reentrant=False),
}


@pytest.mark.parametrize('mode', ['no_grad', 'inference', 'train'])
@pytest.mark.parametrize('name', RIGHT)
def test_an_order_that_the_fold_knows_passes(name, mode):
    torch.manual_seed(0)
    model = Block(RIGHT[name])
    quant = without_ranges(randomize(copy.deepcopy(model)))
    # Weights of the folded model, so that the comparison sees the same arithmetic.
    expected = Block(RIGHT[name])
    expected.conv1, expected.conv2 = copy.deepcopy(quant.conv1), copy.deepcopy(quant.conv2)
    expected.bn1, expected.bn2 = nn.Identity(), nn.Identity()
    for m in (expected.conv1, expected.conv2):
        m._forward_hooks.clear()
    assert hooks(quant) == 2
    for _ in range(CHECKS + 1):
        x = image().requires_grad_(mode == 'train')
        with torch.inference_mode(mode == 'inference'), torch.set_grad_enabled(mode == 'train'):
            got = quant(x)
            assert torch.equal(got, expected(x))
        if mode == 'train':
            got.float().square().sum().backward()
    done = [m for m in folded(quant) if m.handover.left == 0]
    assert done and hooks(quant) == 2 - len(done)


def test_pillar_encoders_normalize_a_transposed_copy_in_pieces():
    class Pillars(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)

        def forward(self, x):
            pieces = [self.linear(part) for part in x.split(3)]
            x = torch.cat(pieces)
            x = x.permute(0, 2, 1).contiguous()
            return self.norm(x).permute(0, 2, 1)

    model = randomize(Pillars())
    quant = without_ranges(copy.deepcopy(model))
    x = torch.randn(10, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(quant(x), model(x))
    assert looked_at(quant) == [CHECKS - 1]


def test_pieces_that_are_gone_show_nothing():
    """A true alarm of the check is worth less than a false one costs."""
    quant = without_ranges(Block(lambda s, x: s.bn1(torch.cat([s.conv1(row[None]) for row in x])))).eval()
    for _ in range(CHECKS + 1):
        with torch.no_grad():
            quant(image())
    assert looked_at(quant)[0] == CHECKS


def test_empty_input_is_passed_on_and_shows_nothing():
    quant = without_ranges(Block(RIGHT['plain'])).eval()
    assert quant(torch.zeros(0, 4, 6, 6)).shape == (0, 4, 6, 6)
    assert looked_at(quant) == [CHECKS, CHECKS]
    wrong = without_ranges(Block(WRONG['preactivation'])).eval()
    assert wrong(torch.zeros(0, 4, 6, 6)).shape == (0, 4, 6, 6)
    with pytest.raises(Q3DError):
        wrong(image())


def test_it_has_no_state_and_stays_an_identity():
    quant = without_ranges(Block(RIGHT['plain']))
    assert not [k for k in quant.state_dict() if k.startswith('bn')]
    assert not list(quant.bn1.parameters()) and not list(quant.bn1.children())
    assert isinstance(quant.bn1, nn.Identity)
    assert 'FoldedNorm(in Block.conv1)' in repr(quant)


@pytest.mark.parametrize('passes', [0, 1, CHECKS + 1])
@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copy', 'pickle']
)
def test_a_copy_looks_for_itself(copied, passes):
    quant = without_ranges(_Plain()).eval()
    with torch.no_grad():
        for _ in range(passes):
            quant(image())
        twin = copied(quant)
        assert looked_at(twin) == looked_at(quant) and hooks(twin) == hooks(quant)
        before = looked_at(quant)
        for _ in range(CHECKS):
            twin(image())
        assert looked_at(twin) == [0, 0] and hooks(twin) == 0
        assert looked_at(quant) == before
    wrong = copied(without_ranges(_Wrong()).eval())
    with pytest.raises(Q3DError, match='Wrong.bn1'):
        wrong(image())


class _Plain(Block):
    """At the top of the file, so that it can be pickled."""

    def __init__(self):
        super().__init__(None)

    def forward(self, x):
        return RIGHT['plain'](self, x)


class _Wrong(_Plain):
    def forward(self, x):
        return WRONG['preactivation'](self, x)


def test_nothing_is_kept_alive():
    quant = without_ranges(Block(RIGHT['copy'])).eval()
    x = image().requires_grad_()
    out = quant(x)
    nodes = [out.grad_fn]
    del out, nodes
    gc.collect()
    for module in folded(quant):
        assert module.handover._last is None and all(o.tensor() is None for o in module.handover._outputs)


def test_a_trace_has_nothing_of_it():
    quant = without_ranges(Block(RIGHT['copy'])).eval()
    x = image()
    traced = torch.jit.trace(quant, x, check_trace=False)
    assert looked_at(quant) == [CHECKS, CHECKS]
    assert 'eq' not in {node.kind().rpartition('::')[2] for node in traced.inlined_graph.nodes()}
    assert torch.equal(traced(2 * x), quant(2 * x))


def test_channels_are_followed_through_what_it_looks_at():
    quant = without_ranges(Block(RIGHT['copy'])).eval()
    graph = ChannelGraph(units(quant))
    with torch.no_grad(), graph.watching() as watch:
        watch.returned(quant(image()))
    assert looked_at(quant) == [CHECKS - 1, CHECKS - 1]
    assert graph.reason(graph.read('conv2')) == '' and not graph.fixed()[graph.written('conv1')].any()


def test_replicas_in_threads_do_not_disturb_each_other():
    quant = without_ranges(Block(RIGHT['copy'])).eval()
    x, errors = image(), []

    def replica():
        module = quant._replicate_for_data_parallel()
        module._modules = {k: m._replicate_for_data_parallel() for k, m in quant._modules.items()}
        try:
            for _ in range(20):
                with torch.no_grad():
                    RIGHT['copy'](module, torch.randn(2, 4, 6, 6))
        except Q3DError as error:
            errors.append(error)

    threads = [threading.Thread(target=replica) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and looked_at(quant) == [CHECKS, CHECKS]
    quant(x)


# Sparse.


class Sparse(nn.Module):
    """Sparse convolutions whose norms get the features, replaced as both frameworks replace them."""

    def __init__(self, wrong=False):
        super().__init__()
        self.conv1, self.bn1 = spconv.SubMConv3d(3, 3, 3, bias=False), nn.BatchNorm1d(3)
        self.net = spconv.SparseSequential(
            spconv.SparseConv3d(3, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4), nn.ReLU()
        )
        self.wrong = wrong

    def forward(self, x):
        if self.wrong:
            x = x.replace_feature(F.relu(self.bn1(x.features)))
            return self.net(self.conv1(x))
        x = self.conv1(x)
        return self.net(x.replace_feature(F.relu(self.bn1(x.features))))


def voxels(count=50):
    place = torch.randperm(216)[:count].sort().values
    indices = torch.stack([place * 0, place // 36, place // 6 % 6, place % 6], 1).int()
    return spconv.SparseConvTensor(torch.randn(count, 3), indices, [6] * 3, 1)


@torch.no_grad()
def test_features_of_sparse_tensors_are_recognised():
    model = randomize(Sparse())
    quant, x = without_ranges(copy.deepcopy(model)), voxels()
    torch.testing.assert_close(quant(x).features, model(x).features, rtol=1e-4, atol=1e-5)
    assert looked_at(quant) == [CHECKS - 1, CHECKS - 1]
    with pytest.raises(Q3DError, match=r"'Sparse\.bn1' is a BatchNorm .*'Sparse\.conv1'"):
        without_ranges(Sparse(wrong=True))(x)


# The comparison of values.


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_values_of_the_same_channels(dtype):
    y = torch.randn(5, 40).to(dtype)
    x = y.t()[torch.randperm(40)]
    assert came_from(x, [y]) and came_from(x, [y[:, :7], y[:, 7:]]) and came_from(x[:9].double(), [y])
    assert not came_from(x, [y[[1, 0, 2, 3, 4]]]) and not came_from(x, [y[:, :3]]) and not came_from(x, [])
    assert not came_from(x.relu(), [y]) and not came_from(x + 1, [y]) and not came_from(x[:, :4], [y])
    holed = x.clone()
    holed[3] = float('nan')
    assert came_from(holed, [y])


def test_pairs_are_found_where_the_order_says_nothing():
    """The rules alone take the blocks above for ordinary ones: that is what the check is for."""
    assert find_pairs(Block(WRONG['preactivation'])) == [('conv1', 'bn1'), ('conv2', 'bn2')]
