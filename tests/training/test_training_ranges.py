"""Ranges of a whole model in training: which become parameters, how the others follow, what is refused."""

import copy

import pytest
import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers.model import quantizers
from q3d_plugin.quantizer import Role
from q3d_plugin.recipe import Recipe
from q3d_plugin.training import QuantTraining
from q3d_plugin.transforms.insert import quantize_, share_input


class Net(nn.Module):
    """Two layers that read the input, and one that reads their sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.a(x) + self.b(x)))


def trained(calibrator='max', recipe=None, **ranges):
    """A calibrated model and its training."""
    torch.manual_seed(0)
    model = quantize_(Net())
    share_input([model.a, model.b])
    recipe = Recipe.from_dict(
        dict(
            mode='qat',
            target='simulation',
            weight=dict(bits=4, calibrator=calibrator),
            activation=dict(bits=4),
            training=dict(ranges=ranges),
            **(recipe or {}),
        )
    )
    lifecycle.configure(model, recipe)
    lifecycle.calibrate(model, [torch.randn(2, 3, 8, 8) for _ in range(3)], model)
    return model, QuantTraining(model.train(), recipe)


def sgd_step(model, training, lr=0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    training.add_to(optimizer)
    training.before_step(0.0)
    optimizer.zero_grad()
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize('scale', ['linear', 'log2'])
def test_learned_ranges_are_parameters_once_each_and_start_where_calibration_left_them(scale):
    model, _ = trained(weight='fixed', activation='fixed')
    expected = [q.amax.clone() for q in quantizers(model)]
    model, training = trained(weight='learned', activation='learned', scale=scale)
    assert len(training.parameters) == len(quantizers(model)) == 5  # two inputs, one of them shared
    assert len({id(p) for p in training.parameters} & {id(p) for p in model.parameters()}) == 5
    for quantizer, amax in zip(quantizers(model), expected):
        torch.testing.assert_close(quantizer.amax, amax, rtol=1e-6, atol=0)


@pytest.mark.parametrize('kind', ['fixed', 'moving', 'learned'])
def test_inputs_and_weights_can_be_trained_differently(kind):
    model, training = trained(weight=kind, activation='learned')
    roles = [q.role for q in quantizers(model) if q.range_parameter is not None]
    assert roles.count(Role.ACTIVATION) == 2 and roles.count(Role.WEIGHT) == (3 if kind == 'learned' else 0)
    assert len(training.parameters) == len(roles)


@pytest.mark.parametrize('calibrator', ['max', 'mse'])
def test_fixed_ranges_of_weights_keep_their_share_of_the_largest_weight(calibrator):
    model, training = trained(calibrator, weight='fixed', activation='fixed')
    layers = [model.a, model.b, model.last]
    shares = [u.weight_quantizer.amax / u.weight.detach().abs().flatten(1).amax(1) for u in layers]
    for _ in range(3):
        sgd_step(model, training)
    model.state_dict()  # whoever takes the state gets ranges of the present weights
    for unit, share in zip(layers, shares):
        largest = unit.weight.detach().abs().flatten(1).amax(1)
        torch.testing.assert_close(unit.weight_quantizer.amax, share * largest, rtol=3e-4, atol=0)


@pytest.mark.parametrize('calibrator', ['max', 'mse'])
def test_a_training_that_is_taken_up_again_goes_on_with_the_same_shares(calibrator):
    model, training = trained(calibrator, weight='fixed', activation='fixed')
    sgd_step(model, training)
    again, second = trained(calibrator, weight='fixed', activation='fixed')
    again.load_state_dict(model.state_dict())
    second.before_step(0.0)
    for mine, other in zip((model.a, model.b, model.last), (again.a, again.b, again.last)):
        assert torch.equal(mine.weight_quantizer.share_of_peak, other.weight_quantizer.share_of_peak)


def test_moving_averages_of_inputs_are_those_of_the_largest_magnitudes():
    model, training = trained(weight='fixed', activation='moving', momentum=0.9)
    expected = [q.amax.clone() for q in (model.a.input_quantizer, model.last.input_quantizer)]
    seen = []
    model.last.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().abs().max()))
    for _ in range(4):
        training.before_step(0.0)
        x = torch.randn(2, 3, 8, 8)
        model(x)
        expected[0] = 0.9 * expected[0] + 0.1 * x.abs().max()
        expected[1] = 0.9 * expected[1] + 0.1 * seen[-1]
    training.before_step(0.0)
    for quantizer, amax in zip((model.a.input_quantizer, model.last.input_quantizer), expected):
        torch.testing.assert_close(quantizer.amax, amax, rtol=1e-6, atol=0)


def test_validation_does_not_move_anything():
    model, training = trained(weight='moving', activation='moving')
    model.eval()
    before = [q.amax.clone() for q in quantizers(model) if q.role is Role.ACTIVATION]
    model(100 * torch.randn(2, 3, 8, 8))
    training.before_step(0.0)
    after = [q.amax for q in quantizers(model) if q.role is Role.ACTIVATION]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_moving_averages_of_weights():
    model, training = trained(weight='moving', activation='fixed', momentum=0.5)
    expected = model.a.weight_quantizer.amax.clone()
    with torch.no_grad():
        model.a.weight.mul_(3)
    for _ in range(2):
        training.before_step(0.0)
        expected = 0.5 * expected + 0.5 * model.a.weight.detach().abs().flatten(1).amax(1)
    torch.testing.assert_close(model.a.weight_quantizer.amax, expected)


def test_the_schedule_says_when():
    schedule = dict(activations_from=1, observe_until=2, learn_until=3)
    model, training = trained(
        weight='learned', activation='moving', momentum=0.0, recipe=None, scale='linear'
    )
    training.spec = Recipe.from_dict(
        dict(mode='qat', training=dict(ranges=dict(activation='moving', momentum=0.0), schedule=schedule))
    ).training
    optimizer = torch.optim.SGD([p for p in model.parameters()], lr=0.1)
    training.add_to(optimizer)
    x, float_input = torch.randn(2, 3, 8, 8), []
    for epoch, waiting, moving, learning in (
        (0.0, True, False, True),
        (0.99, True, False, True),
        (1.0, False, True, True),
        (2.5, False, False, True),
        (3.0, False, False, False),
    ):
        training.before_step(epoch)
        before = model.a.input_quantizer.amax.clone(), model.a.weight_quantizer.amax.clone()
        optimizer.zero_grad()
        model(x * (1 + epoch)).square().mean().backward()
        optimizer.step()
        quantized = model.a.input_quantizer(x)
        assert torch.equal(quantized, x) == waiting, epoch
        training.before_step(epoch)
        assert (not torch.equal(model.a.input_quantizer.amax, before[0])) == moving, epoch
        assert (not torch.equal(model.a.weight_quantizer.amax, before[1])) == learning, epoch
        float_input.append(quantized)
    # In validation everything is quantized, whatever the schedule.
    training.before_step(0.0)
    model.eval()
    assert not torch.equal(model.a.input_quantizer(x), x)


@pytest.mark.parametrize('value', [0.0, -1.0, float('nan'), float('inf')])
def test_a_range_that_is_no_positive_number_stops_whoever_saves(value):
    model, _ = trained(weight='learned', activation='learned', scale='linear')
    with torch.no_grad():
        model.last.weight_quantizer.range_parameter[1] = value
    with pytest.raises(Q3DError, match="learned range of 'last.weight_quantizer' became") as caught:
        model.state_dict()
    assert 'lr_factor' in str(caught.value)


def test_ranges_that_run_with_the_input_are_not_learned():
    recipe = dict(smoothquant=dict(mode='dynamic', layers=['last']))
    model, training = trained(weight='learned', activation='learned', recipe=recipe)
    assert model.last.smooth_spec.mode == 'dynamic'
    assert model.last.weight_quantizer.range_parameter is None
    assert model.a.weight_quantizer.range_parameter is not None
    sgd_step(model, training)


@pytest.mark.parametrize('scale', ['linear', 'log2'])
def test_a_trained_state_is_one_of_ptq_too(scale):
    model, training = trained(weight='learned', activation='learned', scale=scale)
    for _ in range(2):
        sgd_step(model, training)
    plain, _ = trained(weight='fixed', activation='fixed')
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    model.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(x), copied(x))
