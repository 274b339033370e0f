"""The quantized structure: what is converted, which quantizers are one, and what a recipe gives to whom."""

import copy

import pytest
import torch
from torch import nn

from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantAdd, QuantWeightLayer
from q3d_plugin.layers.dense import QuantConv2d, QuantLinear
from q3d_plugin.lifecycle import calibrate, set_enabled
from q3d_plugin.quantizer import Mode, Quantizer
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import _adopt_quantizers, apply_recipe, first_layer, quantize_, share_input


class Heads(nn.Module):
    """Three branches that read one tensor, after a trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 1)
        self.branches = nn.ModuleDict({k: nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)) for k in 'abc'})

    def forward(self, x):
        x = self.trunk(x)
        return [branch[1](x) for branch in self.branches.values()]


def quantized_heads(**recipe):
    model = quantize_(Heads())
    share_input(first_layer(b) for b in model.branches.values())
    apply_recipe(model, Recipe.from_dict({'target': 'simulation', **recipe}))
    return model, [b[1] for b in model.branches.values()]


def test_every_layer_is_converted_in_place_and_computes_the_same():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    layers, parameters = list(model), list(model.parameters())
    assert quantize_(model) is model
    assert all(a is b for a, b in zip(model, layers))
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert isinstance(model[0], QuantConv2d) and isinstance(model[3], QuantLinear)
    assert type(model[1]) is nn.ReLU
    set_enabled(model, False)
    assert torch.equal(model(x), expected)


def test_before_a_recipe_comes_a_forward_is_an_error():
    model = quantize_(Heads())
    with pytest.raises(Q3DError, match=r'trunk\.input_quantizer has no range'):
        model(torch.randn(1, 3, 4, 4))


def test_a_quantized_checkpoint_brings_its_quantizers_where_no_recipe_is():
    source, branches = quantized_heads(
        weight=dict(bits=4),
        skip=['branches.b'],
        overrides=[dict(layers='trunk', activation=dict(bits=12), weight=None)],
    )
    calibrate(source, [torch.randn(1, 3, 6, 6)], source)
    target = quantize_(Heads())
    share_input(first_layer(b) for b in target.branches.values())
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    x = torch.randn(1, 3, 6, 6)
    assert all(torch.equal(a, b) for a, b in zip(target(x), source(x)))
    assert target.trunk.weight_quantizer is None and target.trunk.input_quantizer.num_bits == 12
    assert target.branches['b'][1].quantizers() == []
    assert target.branches['a'][1].input_quantizer is target.branches['c'][1].input_quantizer


def test_a_recipe_is_stronger_than_what_a_checkpoint_brings():
    source, _ = quantized_heads()
    calibrate(source, [torch.randn(1, 3, 6, 6)], source)
    target, branches = quantized_heads(skip=['branches.b'])
    target.load_state_dict(source.state_dict(), strict=False)
    assert branches[1].quantizers() == []
    assert branches[0].input_quantizer.mode is not Mode.UNCALIBRATED


def test_a_float_checkpoint_brings_no_quantizers():
    target = quantize_(Heads())
    before = [m for m in target.modules() if isinstance(m, Quantizer)]
    target.load_state_dict(Heads().state_dict())
    after = [m for m in target.modules() if isinstance(m, Quantizer)]
    assert len(before) == 8 and all(a is b for a, b in zip(before, after))
    assert all(q.mode is Mode.UNCALIBRATED for q in after)


def test_a_layer_alone_is_converted_too():
    layer = quantize_(nn.Linear(2, 3))
    assert isinstance(layer, QuantLinear)
    apply_recipe(layer, Recipe(), 'head')
    assert layer.weight_quantizer.name == 'head.weight_quantizer' or layer.weight_quantizer.owners


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.bn1(self.conv1(x)) + x


class QuantBlock(Block):
    def setup_quant(self):
        # Its layers are quantized ones by now, and there is no BatchNorm any more.
        assert isinstance(self.conv1, QuantConv2d) and not isinstance(self.bn1, nn.BatchNorm2d)
        self.add = QuantAdd()

    def forward(self, x):
        return self.add(self.bn1(self.conv1(x)), x)


class Derived(Block):
    def forward(self, x):
        return x


def test_blocks_become_their_quantized_class_and_are_set_up_once():
    model = nn.Sequential(Block(), Derived(), Block()).eval()
    x = torch.randn(1, 2, 3, 3)
    expected = model(x)
    names = [k for k, _ in model.named_parameters()]
    quantize_(model, {Block: QuantBlock})
    assert [type(m) for m in model] == [QuantBlock, Derived, QuantBlock]
    set_enabled(model, False)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert {k for k, _ in model.named_parameters() if 'bn' not in k and not k.endswith('bias')} == {
        k for k in names if 'bn' not in k
    }
    apply_recipe(model, Recipe())
    assert model[0].add.input_quantizer.owners == ['0.add']


def test_the_recipe_gives_each_layer_its_quantizers_by_name():
    model = quantize_(nn.ModuleDict(dict(a=nn.Conv2d(2, 3, 1), b=nn.Linear(3, 4))))
    recipe = Recipe.from_dict(
        dict(
            target='simulation',
            weight=dict(bits=4),
            overrides=[dict(layers='net.b', activation=dict(bits=16))],
        )
    )
    apply_recipe(model, recipe, 'net.')
    a, b = model['a'], model['b']
    assert (a.weight_quantizer.num_bits, a.input_quantizer.num_bits) == (4, 8)
    assert (b.weight_quantizer.num_bits, b.input_quantizer.num_bits) == (4, 16)
    assert a.weight_quantizer.per_channel and len(a.weight_quantizer._amax) == 3
    assert a.input_quantizer.owners == ['net.a']
    assert a.input_quantizer.name == 'net.a.input_quantizer'


def test_skipped_layers_have_no_quantizer_at_all():
    model, branches = quantized_heads(skip=['branches.b'])
    assert branches[1].quantizers() == []
    assert not any(isinstance(m, Quantizer) for m in branches[1].modules())
    assert branches[1].float_reason == "skipped by 'branches.b'"
    assert 'branches.b.1.weight_quantizer._amax' not in model.state_dict()
    assert len(branches[0].quantizers()) == 2 and branches[0].float_reason == ''
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(branches[1](x), nn.functional.conv2d(x, branches[1].weight, branches[1].bias))


def test_none_in_the_recipe_leaves_one_side_float():
    _, branches = quantized_heads(
        overrides=[dict(layers='branches.a', weight=None), dict(layers='branches.b', activation=None)]
    )
    assert branches[0].weight_quantizer is None and branches[0].input_quantizer is not None
    assert branches[1].weight_quantizer is not None and branches[1].input_quantizer is None


def test_layers_that_read_the_same_share_one_quantizer():
    model, branches = quantized_heads()
    quantizer = branches[0].input_quantizer
    assert all(b.input_quantizer is quantizer for b in branches)
    assert quantizer.owners == ['branches.a.1', 'branches.b.1', 'branches.c.1'] and quantizer.shared
    assert model.trunk.input_quantizer is not quantizer and not model.trunk.input_quantizer.shared
    assert len({id(b.weight_quantizer) for b in branches}) == 3


def test_a_shared_tensor_is_counted_once_in_the_statistics():
    model, branches = quantized_heads()
    branches[0].input_quantizer.observe()
    model.trunk.input_quantizer.disable()
    for quantizer in model.modules():
        if isinstance(quantizer, Quantizer) and quantizer.per_channel:
            quantizer.disable()
    with torch.no_grad():
        model(torch.randn(1, 3, 5, 5))
    assert branches[0].input_quantizer.observer.counts.sum() == 4 * 25


def test_an_override_ends_the_sharing_for_its_layers():
    _, branches = quantized_heads(overrides=[dict(layers='branches.b', activation=dict(bits=16))])
    a, b, c = (x.input_quantizer for x in branches)
    assert a is c and b is not a
    assert a.owners == ['branches.a.1', 'branches.c.1'] and b.owners == ['branches.b.1']
    assert not b.shared


def test_an_override_of_the_weight_alone_keeps_the_input_shared():
    _, branches = quantized_heads(overrides=[dict(layers='branches.b', weight=dict(bits=4))])
    assert len({id(b.input_quantizer) for b in branches}) == 1
    assert [b.weight_quantizer.num_bits for b in branches] == [8, 4, 8]


def test_a_second_recipe_takes_the_place_of_the_first_and_keeps_the_quantizers():
    model, branches = quantized_heads()
    old = branches[0].input_quantizer
    apply_recipe(model, Recipe.from_dict(dict(target='simulation', skip=['branches.a'])))
    assert branches[0].quantizers() == []
    assert branches[1].input_quantizer is branches[2].input_quantizer is old
    assert branches[1].input_quantizer.owners == ['branches.b.1', 'branches.c.1']


def test_a_copied_model_shares_within_itself():
    model, branches = quantized_heads()
    twin = copy.deepcopy(model)
    inputs = [b[1].input_quantizer for b in twin.branches.values()]
    assert inputs[0] is inputs[1] is inputs[2] is not branches[0].input_quantizer


def test_share_input_passes_over_what_is_not_quantized():
    linear = quantize_(nn.Linear(2, 2))
    share_input([nn.ReLU(), linear, None, nn.Conv2d(1, 1, 1)])
    assert linear.input_group is not None


def test_first_layer_is_the_first_with_a_weight():
    model = quantize_(
        nn.Sequential(nn.ReLU(), nn.Sequential(nn.Identity(), nn.Linear(2, 2)), nn.Linear(2, 3))
    )
    assert first_layer(model) is model[1][1]
    assert first_layer(model[2]) is model[2]
    assert first_layer(nn.ReLU()) is None


def test_quantizing_twice_keeps_the_folds_of_the_first_time():
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    model = make().eval()
    model[1].running_var.uniform_(0.5, 2)
    twice = quantize_(quantize_(make())).eval()
    result = twice.load_state_dict(model.state_dict())
    assert not result.unexpected_keys
    x = torch.randn(1, 3, 4, 4)
    set_enabled(twice, False)
    assert torch.allclose(twice(x), model(x), atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_quantizers_come_to_the_device_of_the_layer_and_state_dicts_have_one_entry_each(dtype):
    model = quantize_(Heads().to(dtype))
    apply_recipe(model, Recipe())
    state = model.state_dict()
    layers = [n for n, m in model.named_modules() if isinstance(m, QuantWeightLayer)]
    for name in layers:
        for kind in ('input', 'weight'):
            assert f'{name}.{kind}_quantizer._amax' in state and f'{name}.{kind}_quantizer._state' in state
    assert len(state) == len(layers) * 6


class Sum(nn.Module):
    """A layer and an addition, which has no parameter that would tell its device."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def setup_quant(self):
        self.add = QuantAdd()

    def forward(self, x):
        return self.add(self.conv(x), x)


@pytest.mark.parametrize('shared', [False, True])
def test_quantizers_of_a_recipe_are_made_where_the_model_is(shared):
    model = quantize_(Sum())
    if shared:
        share_input([model.conv, model.add])
    model.to('meta')
    apply_recipe(model, Recipe())
    made = [m for m in model.modules() if isinstance(m, Quantizer)]
    assert len(made) == 2 if shared else 3
    assert {b.device.type for q in made for b in q.buffers()} == {'meta'}


def test_quantizers_of_a_checkpoint_are_made_where_the_model_is():
    source = quantize_(Sum())
    apply_recipe(source, Recipe())
    calibrate(source, [torch.randn(1, 3, 4, 4)], source)
    model = quantize_(Sum()).to('meta')
    # Not by load_state_dict, which would also read the buffers, and on this device nothing can be read.
    _adopt_quantizers(model, source.state_dict(), '')
    made = [m for m in model.modules() if isinstance(m, Quantizer)]
    assert len(made) == 3 and {b.device.type for q in made for b in q.buffers()} == {'meta'}
