"""Groups that have one scale: declared as data, found by a forward pass, and the two compared."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantAdd, QuantConcat
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_, share_input
from q3d_plugin.transforms.sharing import (
    SharedScale,
    check_sharing,
    declare_sharing,
    found_groups,
    share_scales,
)


class Neck(nn.Module):
    """Two levels, concatenated."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1)

    def setup_quant(self):
        self.concat = QuantConcat()

    def forward(self, x):
        return self.concat([self.a(x), 10 * self.b(x)], dim=1)


class Stage(nn.Module):
    """A residual stage with a shortcut of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.down = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def setup_quant(self):
        self.add = QuantAdd()
        share_input([self.conv1, self.down])

    def forward(self, x):
        return self.add(self.conv2(F.relu(self.conv1(x))), self.down(x))


class Detector(nn.Module):
    """A neck and the next stage, which are quantized as parts of their own."""

    shared_scales = ()

    def __init__(self):
        super().__init__()
        self.neck, self.stage = quantize_(Neck()), quantize_(Stage())

    def forward(self, x):
        return self.stage(self.neck(x))


ONE = SharedScale('neck output', ('neck.concat', 'stage.conv1'))


def detector(*scales, **recipe):
    model = type('Fuser', (Detector,), {'shared_scales': scales})().eval()
    lifecycle.configure(model, Recipe.from_dict({'target': 'simulation', **recipe}))
    return model


def image():
    return torch.randn(2, 4, 6, 6)


def test_a_declared_group_has_one_quantizer_over_a_concatenation():
    model = detector(ONE)
    quantizer = model.neck.concat.input_quantizer
    # What shared an input with one of the group comes with it.
    assert quantizer is model.stage.conv1.input_quantizer is model.stage.down.input_quantizer
    assert quantizer.owners == ['neck.concat', 'stage.conv1', 'stage.down']
    others = [model.neck.a, model.neck.b, model.stage.conv2, model.stage.add]
    assert len({id(u.input_quantizer) for u in others} | {id(quantizer)}) == 5
    assert detector().neck.concat.input_quantizer is not detector().stage.conv1.input_quantizer


def test_its_range_covers_every_tensor_of_the_group():
    model = detector(SharedScale('far apart', ('neck.a', 'stage.conv2')), activation=dict(calibrator='max'))
    plain = copy.deepcopy(model)
    frames = [image() for _ in range(3)]
    seen = []
    lifecycle.set_enabled(plain, False)
    for unit in (plain.neck.a, plain.stage.conv2):
        unit.register_forward_pre_hook(lambda unit, args: seen.append(args[0].abs().max().item()))
    with torch.no_grad():
        for x in frames:
            plain(x)
    lifecycle.calibrate(model, frames, model)
    assert model.neck.a.input_quantizer is model.stage.conv2.input_quantizer
    assert model.neck.a.input_quantizer._amax.item() == pytest.approx(max(seen))
    # Both signs and values above zero alone: the group is signed.
    assert not model.neck.a.input_quantizer.unsigned


def test_what_comes_out_of_the_concatenation_is_not_rounded_again():
    model = detector(ONE)
    x = image()
    lifecycle.calibrate(model, [x], model)
    seen = []
    model.stage.conv1.input_quantizer.register_forward_hook(lambda q, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(x)
    assert len(seen) >= 2
    given, out = seen[-1]
    torch.testing.assert_close(out, given, rtol=0, atol=1e-5)


def test_groups_that_have_a_unit_in_common_are_one():
    model = detector(ONE, SharedScale('more', ('stage.down', 'stage.add')))
    named = dict(lifecycle.units(model))
    one = {n for n, u in named.items() if u.input_quantizer is model.neck.concat.input_quantizer}
    assert one == {'neck.concat', 'stage.conv1', 'stage.down', 'stage.add'}
    assert len({id(named[n].input_group) for n in one}) == 1


def test_nested_declarations_are_joined_whatever_their_order():
    class Outer(nn.Module):
        shared_scales = (SharedScale('outer', ('body.neck.a', 'body.neck.concat')),)

        def __init__(self):
            super().__init__()
            self.body = type('Fuser', (Detector,), {'shared_scales': (ONE,)})()

    model = Outer()
    lifecycle.configure(model, Recipe())
    units = [model.body.neck.a, model.body.neck.concat, model.body.stage.conv1, model.body.stage.down]
    assert len({id(u.input_quantizer) for u in units}) == 1


def test_declaring_again_changes_nothing_and_a_copy_shares_within_itself():
    model = detector(ONE)
    groups = {n: u.input_group for n, u in lifecycle.units(model)}
    declare_sharing(model)
    declare_sharing(model, [ONE])
    assert groups == {n: u.input_group for n, u in lifecycle.units(model)}
    twin = copy.deepcopy(model)
    assert twin.neck.concat.input_quantizer is twin.stage.down.input_quantizer
    assert twin.neck.concat.input_quantizer is not model.neck.concat.input_quantizer


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(Q3DError, match=r"Fuser\.shared_scales: 'x': 'stage\.cnov1' .*'stage\.conv1'"):
        detector(SharedScale('x', ('neck.concat', 'stage.cnov1')))
    with pytest.raises(Q3DError, match=r"'x': neck\.concat alone was given; two or more"):
        detector(SharedScale('x', ('neck.concat', '*.concat')))
    # Where a variant lacks a layer.
    model = detector(SharedScale('x', ('neck.concat', 'stage.conv3'), optional=True))
    assert model.neck.concat.input_group is None


@pytest.mark.parametrize(
    ('override', 'told'),
    [
        (dict(activation=dict(bits=16)), r'activation\.bits 8 and 16'),
        (dict(activation=dict(unsigned=False)), r"activation\.unsigned 'auto' and False"),
        (dict(activation=dict(range='dynamic')), r"activation\.range 'static' and 'dynamic'"),
        (dict(activation=dict(calibrator='max')), r"activation\.calibrator 'mse' and 'max'"),
    ],
)
def test_one_group_cannot_have_two_settings(override, told):
    with pytest.raises(
        Q3DError, match=rf"recipe: .*'neck\.concat' and 'stage\.conv1'.*'neck output'.*{told}"
    ):
        detector(ONE, overrides=[dict(layers='stage', **override)])
    # Every unit by name, and what shares its input with one of them, works.
    model = detector(ONE, overrides=[dict(layers=['stage.conv1', 'stage.down', 'neck.concat'], **override)])
    assert model.neck.concat.input_quantizer is model.stage.down.input_quantizer
    assert detector(overrides=[dict(layers='stage', **override)]) is not None


def test_smoothing_one_layer_of_a_group_is_refused():
    layers = SharedScale('neck output', ('neck.concat', 'stage.conv1', 'stage.conv2'))
    with pytest.raises(Q3DError, match=r"'neck output'\), but smoothquant .*'on' and None"):
        detector(layers, smoothquant=dict(layers=['stage.conv1', 'stage.down']))
    # A concatenation is never smoothed: beside a smoothed layer it has a scale of its own.
    model = detector(ONE, smoothquant=dict(layers=['stage']))
    assert model.neck.concat.input_quantizer is not model.stage.conv1.input_quantizer
    assert model.stage.conv1.input_quantizer is model.stage.down.input_quantizer
    # All of it, or none.
    model = detector(ONE, smoothquant=dict(alpha=0.5))
    x = image()
    lifecycle.set_enabled(model, False)
    expected = model(x)
    lifecycle.set_enabled(model, True)
    lifecycle.calibrate(model, [x], model)
    lifecycle.set_enabled(model, False)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_unit_that_stays_float_takes_no_part():
    model = detector(ONE, skip=['stage.conv1'])
    assert model.stage.conv1.input_quantizer is None
    assert model.neck.concat.input_quantizer is model.stage.down.input_quantizer


def test_a_quantized_checkpoint_of_a_group_runs_where_no_recipe_is():
    model = detector(ONE)
    x = image()
    lifecycle.calibrate(model, [x], model)
    bare = type('Fuser', (Detector,), {'shared_scales': (ONE,)})().eval()
    bare.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(bare(x), model(x))


# Found groups.


def test_readers_of_one_tensor_are_found():
    model = detector()
    lifecycle.set_enabled(model, False)
    x = image()
    groups = [['neck.a', 'neck.b'], ['neck.concat', 'stage.conv1', 'stage.down']]
    assert found_groups(model, lambda: model(x)) == groups
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_tensor_that_was_written_over_is_another_one():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x):
            first = self.a(x)
            return first + self.b(x.add_(1)) + self.c(x)

    model = quantize_(Written()).eval()
    lifecycle.set_enabled(model, False)
    with torch.no_grad():
        assert found_groups(model, lambda: model(image())) == [['b', 'c']]


def test_what_was_declared_is_compared_with_what_was_found():
    model = detector()
    lifecycle.set_enabled(model, False)

    def checked(model):
        with torch.no_grad():
            return check_sharing(model, lambda: model(image()))

    groups = [['neck.a', 'neck.b'], ['neck.concat', 'stage.conv1', 'stage.down']]
    assert checked(model) == (groups, [])
    model = detector(SharedScale('input', ('neck.a', 'neck.b')), ONE)
    lifecycle.set_enabled(model, False)
    assert checked(model) == (groups, [])
    # One scale is not one tensor: that is said of declared scales alone.
    model = Detector().eval()
    share_input([model.neck.a, model.neck.b, model.stage.conv2])
    lifecycle.configure(model, Recipe())
    lifecycle.set_enabled(model, False)
    assert checked(model) == (groups, [['neck.a', 'neck.b', 'stage.conv2']])


# Groups that nothing declares, found in calibration.


def test_calibration_gives_one_scale_to_whatever_reads_the_tensors_of_an_operation():
    one = detector(activation=dict(calibrator='max'))
    apart = copy.deepcopy(one)
    frames = [image() for _ in range(3)]
    seen = []
    lifecycle.set_enabled(apart, False)
    apart.stage.conv1.register_forward_pre_hook(lambda unit, args: seen.append(args[0].abs().max().item()))
    with torch.no_grad():
        for x in frames:
            apart(x)
    lifecycle.calibrate(one, frames, one)
    quantizer = one.neck.concat.input_quantizer
    assert quantizer is one.stage.conv1.input_quantizer is one.stage.down.input_quantizer
    assert sorted(quantizer.owners) == ['neck.concat', 'stage.conv1', 'stage.down']
    assert quantizer._amax.item() == pytest.approx(max(seen))
    assert one.neck.a.input_quantizer is one.neck.b.input_quantizer
    others = {id(u.input_quantizer) for _, u in lifecycle.units(one)}
    assert len(others) == 4  # neck's input, neck's output, conv2 and the addition
    # The numbers of a checkpoint are those of the model, and the next recipe starts anew.
    state = one.state_dict()
    again = detector(activation=dict(calibrator='max'))
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(frames[0]), one(frames[0]))
    lifecycle.configure(one, Recipe.from_dict(dict(target='simulation')))
    assert one.neck.concat.input_quantizer is not one.stage.down.input_quantizer
    assert {name for _, u in lifecycle.units(one) for name in u.input_quantizer.owners} == {
        name for name, _ in lifecycle.units(one)
    }


def test_layers_that_multiply_their_input_keep_a_scale_of_their_own():
    model = detector(smoothquant=dict(alpha=0.5))
    x = image()
    lifecycle.set_enabled(model, False)
    expected = model(x)
    lifecycle.set_enabled(model, True)
    lifecycle.calibrate(model, [x], model)
    assert model.neck.a.smoothing and model.neck.a.input_quantizer is not model.neck.b.input_quantizer
    # The scale of the stage's input went into the neck: concatenation and layers read one tensor.
    assert not model.stage.conv1.smoothing
    assert model.neck.concat.input_quantizer is model.stage.conv1.input_quantizer
    lifecycle.set_enabled(model, False)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class Residual(nn.Module):
    """Two blocks without a declaration; the first one's output is read by three units."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.side = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def setup_quant(self):
        self.add = QuantAdd(before_relu=True)

    def forward(self, x):
        x = F.relu(self.first(x))
        return F.relu(self.add(self.second(x), x)) + self.side(x)


def test_the_shortcut_of_an_addition_shares_with_what_else_reads_it():
    model = quantize_(Residual()).eval()
    lifecycle.configure(model, Recipe.from_dict(dict(target='openvino', activation=dict(calibrator='max'))))
    frames = [image() for _ in range(2)]
    largest = []
    with torch.no_grad():
        for x in frames:
            x = F.relu(F.conv2d(x, model.first.weight, model.first.bias))
            branch = F.conv2d(x, model.second.weight, model.second.bias)
            largest += [x.max().item(), branch[branch + x > 0].abs().max().item()]
    lifecycle.calibrate(model, frames, model)
    units = [model.second, model.side, model.add]
    assert len({id(u.input_quantizer) for u in units}) == 1
    assert model.add.input_quantizer._amax.item() == pytest.approx(max(largest))
    # The branch has negative values that must not become 0 before the sum.
    assert not model.side.input_quantizer.unsigned and model.first.input_quantizer is not units[0]


def test_units_that_are_quantized_differently_stay_apart():
    model = detector(
        overrides=[dict(layers='stage.down', activation=dict(bits=6))], skip=['neck.a'], target='simulation'
    )
    x = image()
    lifecycle.calibrate(model, [x], model)
    assert model.stage.down.input_quantizer is not model.neck.concat.input_quantizer
    assert model.stage.conv1.input_quantizer is model.neck.concat.input_quantizer
    assert model.neck.a.input_quantizer is None
    dynamic = detector(activation=dict(range='dynamic'))
    lifecycle.calibrate(dynamic, [x], dynamic)
    assert dynamic.stage.conv1.input_quantizer is not dynamic.neck.concat.input_quantizer


def test_a_layer_of_several_levels_shares_with_those_that_read_all_of_them():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.box, self.down = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x):
            levels = [x, x[..., ::2], x[..., ::3]]
            return [self.score(level).mean() + self.box(level).mean() for level in levels], self.down(x)

    model = quantize_(Levels()).eval()
    lifecycle.set_enabled(model, False)
    # The range of down is that of one level.
    assert found_groups(model, lambda: model(image())) == [['score', 'box']]


def test_shared_statistics_are_those_of_one_observer_over_all():
    model = detector()
    x = image()
    quantizers = [model.neck.a.input_quantizer, model.stage.conv2.input_quantizer]
    for quantizer, values in zip(quantizers, (x, 3 * x.abs())):
        quantizer.observe()
        quantizer(values)
    peer = copy.deepcopy(quantizers[0])
    peer.observe()
    peer(x), peer(3 * x.abs())
    assert share_scales(model, [['neck.a', 'stage.conv2']]) == [['neck.a', 'stage.conv2']]
    assert model.neck.a.input_quantizer is model.stage.conv2.input_quantizer is quantizers[0]
    torch.testing.assert_close(quantizers[0].observer.counts, peer.observer.counts)
    assert quantizers[0].observer.minimum == peer.observer.minimum
    assert share_scales(model, [['neck.a', 'stage.conv2']]) == []
