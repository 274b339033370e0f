"""BatchNorm folding: the quantized structure with a float checkpoint against the float model in eval mode."""

import copy

import pytest
import torch
from torch import nn

from q3d_plugin.checkpoints import check_state_dict
from q3d_plugin.cpu import enable_cpu_mode
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import conventions as conventions_module
from q3d_plugin.lifecycle import set_enabled
from q3d_plugin.transforms.fold import Fold, find_pairs, fold_state_dict, norm_keys
from q3d_plugin.transforms.insert import quantize_

spconv = pytest.importorskip('spconv.pytorch')

enable_cpu_mode()


def without_ranges(root):
    """The quantized structure with every quantizer off: it computes in float."""
    set_enabled(quantize_(root), False)
    return root


def randomize(model):
    """Gives every BatchNorm statistics and parameters that matter, and returns the model in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.affine:
                    module.weight.uniform_(-2, 2)
                    module.bias.normal_()
                if module.track_running_stats:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.01, 4)
    return model.eval()


class Residual(nn.Module):
    """The naming of torchvision's and mmdet's residual blocks."""

    def __init__(self, norm='bn'):
        super().__init__()
        self.norm = norm
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        setattr(self, f'{norm}1', nn.BatchNorm2d(4))
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        setattr(self, f'{norm}2', nn.BatchNorm2d(4))
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        out = getattr(self, f'{self.norm}1')(self.conv1(x)).relu()
        return getattr(self, f'{self.norm}2')(self.conv2(out)) + self.downsample(x)


class Pillar(nn.Module):
    """Linear and norm under the names that pillar feature nets use."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 6, bias=False)
        self.norm = nn.BatchNorm1d(6, eps=1e-3)

    def forward(self, x):
        return self.norm(self.linear(x))


def sequential(*layers):
    return nn.Sequential(*layers)


CASES = {
    'conv1d': (lambda: sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 9)),
    'conv2d': (lambda: sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)), (2, 3, 7, 7)),
    'own_bias': (lambda: sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)), (2, 3, 7, 7)),
    'groups': (lambda: sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 7, 7)),
    'not_affine': (
        lambda: sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)),
        (2, 3, 7, 7),
    ),
    'not_affine_own_bias': (
        lambda: sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
        (2, 3, 7, 7),
    ),
    'conv3d': (lambda: sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3)), (1, 2, 4, 5, 6)),
    'transposed': (
        lambda: sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), nn.BatchNorm2d(6)),
        (1, 4, 5, 5),
    ),
    'transposed_groups': (
        lambda: sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)),
        (1, 4, 5, 5),
    ),
    'transposed3d_groups': (
        lambda: sequential(nn.ConvTranspose3d(4, 6, 2, groups=2, bias=False), nn.BatchNorm3d(6)),
        (1, 4, 3, 3, 3),
    ),
    'linear': (lambda: sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), (8, 5)),
    'several': (
        lambda: sequential(
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU()),
            nn.Conv2d(5, 2, 1),
        ),
        (2, 3, 7, 7),
    ),
    'residual': (Residual, (1, 4, 6, 6)),
    'residual_norm': (lambda: Residual('norm'), (1, 4, 6, 6)),
    'pillar': (Pillar, (9, 5)),
}


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def assert_close(got, expected):
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize('name', CASES)
def test_a_float_model_computes_the_same_after_the_change(name):
    make, shape = CASES[name]
    model = randomize(make())
    quant = without_ranges(copy.deepcopy(model))
    x = torch.randn(shape)
    assert_close(quant(x), model(x))
    assert not batch_norms(quant)
    assert all(m.bias is not None for m in quant.modules() if hasattr(m, 'weight_quantizer'))


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('name', CASES)
def test_a_float_checkpoint_loads_into_the_quantized_structure(name, strict):
    make, shape = CASES[name]
    model = randomize(make())
    quant = without_ranges(make()).eval()
    state = model.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    result = quant.load_state_dict(state, strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(shape)
    assert_close(quant(x), model(x))
    # What was passed in still belongs to the caller.
    assert list(state) == list(before)
    assert all(torch.equal(state[k], v) for k, v in before.items())


@pytest.mark.parametrize('name', CASES)
def test_a_folded_checkpoint_passes_through(name):
    make, shape = CASES[name]
    source = without_ranges(randomize(make()))
    target = without_ranges(make()).eval()
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    set_enabled(target, False)
    x = torch.randn(shape)
    assert torch.equal(target(x), source(x))


def test_below_other_modules_and_in_a_copy_it_loads_the_same():
    def make(quantized):
        part = CASES['several'][0]()
        return nn.ModuleDict(dict(part=without_ranges(part) if quantized else part, head=nn.Conv2d(2, 2, 1)))

    model = randomize(make(False))
    quant = copy.deepcopy(make(True)).eval()
    result = quant.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(2, 3, 7, 7)
    assert_close(quant['part'](x), model['part'](x))
    assert torch.equal(quant['head'].weight, model['head'].weight)


def test_a_structure_in_a_quantized_structure_loads_the_same():
    """A part that was quantized when it was built stands in another one that is quantized later."""

    def make(quantized):
        inner = sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        outer = sequential(
            without_ranges(inner) if quantized else inner, nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
        )
        return without_ranges(outer) if quantized else outer

    model, quant = randomize(make(False)), make(True).eval()
    result = quant.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(1, 3, 4, 4)
    assert_close(quant(x), model(x))


def test_training_a_folded_model_trains_its_weights_and_biases():
    quant = without_ranges(CASES['several'][0]()).train()
    quant(torch.randn(2, 3, 7, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in quant.parameters())


# Sparse.


def sparse_net():
    return spconv.SparseSequential(
        spconv.SubMConv3d(3, 4, 3, bias=False, indice_key='s'),
        nn.BatchNorm1d(4, eps=1e-3),
        nn.ReLU(),
        spconv.SparseConv3d(4, 6, 3, stride=2, padding=1, bias=True, indice_key='d'),
        nn.BatchNorm1d(6),
        spconv.SubMConv3d(6, 5, 1, bias=False),
        nn.BatchNorm1d(5),
        spconv.SparseInverseConv3d(5, 4, 3, bias=False, indice_key='d'),
        nn.BatchNorm1d(4),
    )


def sparse_input(channels=3):
    flat = torch.randperm(2 * 6**3)[:50].sort().values
    axes = [flat // 6**i % 6 for i in (2, 1, 0)]
    indices = torch.stack([flat // 6**3, *axes], dim=1).int()
    return spconv.SparseConvTensor(torch.randn(50, channels), indices, [6] * 3, 2)


@torch.no_grad()
def test_a_sparse_float_checkpoint_loads_into_the_quantized_structure():
    model, x = randomize(sparse_net()), sparse_input()
    changed = without_ranges(copy.deepcopy(model))
    loaded = without_ranges(sparse_net()).eval()
    result = loaded.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    expected = model(x)
    for quant in (changed, loaded):
        assert not batch_norms(quant)
        got = quant(x)
        assert torch.equal(got.indices, expected.indices)
        assert_close(got.features, expected.features)


@torch.no_grad()
@pytest.mark.parametrize('channels', [(3, 4), (5, 5)])
def test_a_checkpoint_of_spconv_1_is_folded_in_its_own_layout(channels):
    """Spconv 1.x has (k, k, k, in, out); a loader permutes it once the fold is done."""

    def make():
        return spconv.SparseSequential(
            spconv.SubMConv3d(*channels, 3, bias=False), nn.BatchNorm1d(channels[1])
        )

    model, quant, x = randomize(make()), without_ranges(make()).eval(), sparse_input(channels[0])
    old = model.state_dict()
    old['0.weight'] = old['0.weight'].permute(1, 2, 3, 4, 0).contiguous()
    check_state_dict(quant, old)
    fold_state_dict(quant, old, '', quant._q3d_folds)
    old['0.weight'] = old['0.weight'].permute(4, 0, 1, 2, 3).contiguous()
    quant.load_state_dict(old)
    assert_close(quant(x).features, model(x).features)


# Checkpoints that do not fit.


def test_the_batchnorm_of_another_width_is_left_for_the_key_check():
    quant = without_ranges(CASES['conv2d'][0]())
    state = sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).state_dict()
    keys = set(state)
    fold_state_dict(quant, state, '', quant._q3d_folds)
    assert set(state) == keys
    with pytest.raises(RuntimeError, match='1.running_mean'):
        quant.load_state_dict(state)


def test_a_checkpoint_without_the_batchnorm_or_without_the_layer_is_left_as_it_is():
    quant = without_ranges(CASES['conv2d'][0]())
    whole = CASES['conv2d'][0]().state_dict()
    for gone in ('0.', '1.'):
        state = {k: v for k, v in whole.items() if not k.startswith(gone)}
        keys = list(state)
        fold_state_dict(quant, state, '', quant._q3d_folds)
        assert list(state) == keys and all(state[k] is whole[k] for k in keys)


def test_other_keys_and_prefixes_are_left_alone():
    quant = without_ranges(CASES['conv2d'][0]())
    whole = CASES['conv2d'][0]().state_dict()
    state = {f'{p}.{k}': v for p in ('mine', 'other') for k, v in whole.items()}
    fold_state_dict(quant, state, 'mine.', quant._q3d_folds)
    assert sorted(k for k in state if k.startswith('mine.')) == ['mine.0.bias', 'mine.0.weight']
    assert all(state[f'other.{k}'] is v for k, v in whole.items())


def test_norm_keys_are_those_of_a_float_checkpoint():
    state = CASES['conv2d'][0]().state_dict()
    assert norm_keys(Fold('0', '1', 1e-5), 'a.') == [f'a.{k}' for k in state if k.startswith('1.')]


# What is a pair.


def test_pairs_of_a_sequential_are_neighbours():
    model = sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.BatchNorm1d(4),
    )
    assert find_pairs(model) == [('0', '1')]


def test_pairs_of_a_sparse_sequential_are_neighbours():
    assert find_pairs(sparse_net()) == [('0', '1'), ('3', '4'), ('5', '6'), ('7', '8')]


def test_pairs_of_residual_blocks_have_one_number():
    expected = [('conv1', 'bn1'), ('conv2', 'bn2'), ('downsample.0', 'downsample.1')]
    assert sorted(find_pairs(Residual())) == expected
    block = Residual()
    block.conv3 = nn.Conv2d(4, 4, 1)
    assert sorted(find_pairs(block)) == expected


def test_names_are_relative_to_the_root():
    model = nn.ModuleDict(dict(a=nn.ModuleDict(dict(b=Pillar()))))
    assert find_pairs(model) == [('a.b.linear', 'a.b.norm')]
    assert find_pairs(model['a']['b']) == [('linear', 'norm')]


def test_modules_that_stand_at_several_places_are_left_alone():
    conv, norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    shared_conv = sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv, nn.BatchNorm2d(4))
    assert find_pairs(shared_conv) == []
    shared_norm = sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), norm)
    assert find_pairs(shared_norm) == []
    model = randomize(shared_conv)
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(without_ranges(copy.deepcopy(model))(x), model(x))


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    'layer, norm',
    [
        (lambda: nn.Conv2d(3, 4, 1), lambda: nn.BatchNorm2d(4, track_running_stats=False)),
        (lambda: nn.Conv2d(3, 4, 1), lambda: nn.BatchNorm2d(3)),
        (lambda: nn.Conv2d(3, 4, 1), lambda: nn.GroupNorm(2, 4)),
        (lambda: nn.Conv2d(3, 4, 1), lambda: nn.InstanceNorm2d(4, track_running_stats=True)),
        (lambda: OwnForward(3, 4, 1), lambda: nn.BatchNorm2d(4)),
        (lambda: nn.Embedding(3, 4), lambda: nn.BatchNorm1d(4)),
    ],
)
def test_what_is_no_convolution_with_fixed_statistics_is_no_pair(layer, norm):
    assert find_pairs(sequential(layer(), norm())) == []


def test_a_checkpoint_in_half_precision_is_folded_in_single():
    reference = randomize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4)))
    state = {k: v.half() if v.dim() > 1 else v for k, v in reference.state_dict().items()}
    reference.load_state_dict(state)
    model = quantize_(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4)))
    model.load_state_dict(state, strict=False)
    factor = reference[1].weight / (reference[1].running_var + reference[1].eps).sqrt()
    expected = reference[0].weight * factor[:, None, None, None]
    torch.testing.assert_close(model[0].weight, expected, rtol=1e-6, atol=1e-7)


def test_a_norm_behind_the_activation_is_no_pair():
    """A block that has conv1, act1 and bn1 runs them in this order."""
    block = nn.Module()
    block.conv1, block.act1, block.bn1 = nn.Conv2d(2, 4, 1), nn.LeakyReLU(), nn.BatchNorm2d(4)
    block.conv2, block.bn2, block.act2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU()
    assert find_pairs(block) == [('conv2', 'bn2')]


def test_pairs_of_what_derives_from_a_sparse_sequential():
    """OpenPCDet's focal backbone has a sequence of its own, which runs its children in their order, too."""

    class SparseSequentialBatchdict(spconv.SparseSequential):
        pass

    made = SparseSequentialBatchdict(spconv.SubMConv3d(2, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU())
    assert find_pairs(made) == [('0', '1')]


def test_a_layer_whose_weight_is_computed_is_no_pair():
    layer = nn.utils.spectral_norm(nn.Conv2d(3, 4, 1))
    assert find_pairs(sequential(layer, nn.BatchNorm2d(4))) == []


class DenseLayer(nn.Module):
    """The naming and the order of DenseNet: normalized before the convolution."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())], 1)


@pytest.fixture
def conventions(monkeypatch):
    """Pairs that are forgotten after the test."""
    monkeypatch.setattr(conventions_module, '_pairs', {})
    return conventions_module.add_conventions


def test_pairs_that_are_handed_in_take_the_place_of_the_rules(conventions):
    class Derived(DenseLayer):
        pass

    conventions(pairs={DenseLayer: lambda block: [('conv1', 'norm2')]})
    for kind in (DenseLayer, Derived):
        model = randomize(sequential(kind(), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)))
        assert find_pairs(model) == [('1', '2'), ('0.conv1', '0.norm2')]
        quant = without_ranges(copy.deepcopy(model))
        x = torch.randn(2, 4, 5, 5)
        assert_close(quant(x), model(x))
        loaded = without_ranges(sequential(kind(), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3))).eval()
        assert not loaded.load_state_dict(model.state_dict()).unexpected_keys
        assert_close(loaded(x), model(x))


def test_pairs_that_name_no_child_are_refused(conventions):
    conventions(pairs={DenseLayer: lambda block: [('conv1', 'nrom2')]})
    with pytest.raises(Q3DError, match=r"pairs of DenseLayer: it has no child 'nrom2'.*'norm2'"):
        find_pairs(DenseLayer())


@pytest.mark.parametrize('kind', [nn.Sequential, nn.Module, spconv.SparseSequential])
def test_pairs_of_what_is_no_block_are_refused(conventions, kind):
    with pytest.raises(Q3DError, match=f'pairs of {kind.__name__}: it is no block type of its own'):
        conventions(pairs={kind: lambda block: []})
    assert find_pairs(sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))) == [('0', '1')]
