"""Ranges in training: conversions between the kinds, checkpoints, copies, and what ends learning."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from q3d_plugin.errors import Q3DError
from q3d_plugin.quantizer import Quantizer
from q3d_plugin.recipe import ActivationSpec, WeightSpec
from q3d_plugin.straight_through import gradient_scale
from q3d_plugin.trained_range import LOG2_KEY, largest_magnitude

KINDS = (('fixed', False), ('moving', False), ('learned', False), ('learned', True))
AMAX = torch.tensor([0.3, 1.7, 1e-3, 40.0])


def activation(amax=1.5, kind='fixed', log2=False, unsigned=False):
    """A quantizer of an activation with a range."""
    quantizer = Quantizer(ActivationSpec(), name='layer.input_quantizer')
    quantizer.set_range(torch.tensor(amax), unsigned)
    quantizer.train_range(kind, log2)
    return quantizer


def weight(kind='fixed', log2=False):
    """A quantizer of a weight with four output channels."""
    quantizer = Quantizer(WeightSpec(), 4, 0, name='layer.weight_quantizer')
    quantizer.set_range(AMAX)
    quantizer.train_range(kind, log2)
    return quantizer


def names(quantizer):
    return [name for name, _ in quantizer.named_parameters()]


@pytest.mark.parametrize('start', KINDS)
@pytest.mark.parametrize('end', KINDS)
def test_a_conversion_keeps_the_range_and_the_result(start, end):
    x = torch.randn(4, 50)
    for quantizer in (activation(1.5, *start), weight(*start)):
        amax, out = quantizer.amax.clone(), quantizer(x).detach()
        quantizer.train_range(*end)
        assert quantizer.trained == end[0] and quantizer.has_range
        assert_close(quantizer.amax, amax, rtol=1e-6, atol=0)
        assert_close(quantizer(x).detach(), out, rtol=1e-5, atol=1e-6)
        expected = [] if end[0] != 'learned' else [LOG2_KEY if end[1] else '_amax']
        assert names(quantizer) == expected
        parameter = quantizer.range_parameter
        assert (parameter is None) == (not expected)
        assert parameter is None or (parameter.requires_grad and parameter.shape == amax.shape)


@pytest.mark.parametrize(('kind', 'log2'), KINDS)
def test_a_state_has_the_entries_of_a_quantized_checkpoint_in_every_kind(kind, log2):
    quantizer = weight(kind, log2)
    state = quantizer.state_dict()
    assert set(state) == {'_amax', '_state', *([LOG2_KEY] if log2 else [])}
    assert_close(state['_amax'], AMAX, rtol=1e-6, atol=0)


def test_the_range_of_a_state_is_that_of_the_logarithm_now():
    quantizer = weight('learned', True)
    with torch.no_grad():
        quantizer.range_parameter.add_(1.0)
    assert_close(quantizer.state_dict()['_amax'], 2 * AMAX, rtol=1e-6, atol=0)
    assert_close(quantizer.amax, 2 * AMAX, rtol=1e-6, atol=0)
    with torch.no_grad():
        x = torch.full((4, 1), 60.0)
        assert_close(quantizer(x).squeeze(1), 2 * AMAX.clamp(max=30), rtol=1e-2, atol=0)


@pytest.mark.parametrize('source', KINDS)
@pytest.mark.parametrize('target', KINDS)
def test_a_state_loads_into_every_kind(source, target):
    saved, loaded = weight(*source), weight(*target)
    with torch.no_grad():
        parameter = saved.range_parameter
        (saved._amax if parameter is None else parameter).mul_(1.25)
    own = loaded.range_parameter
    # All that a loader reports is that a learned logarithm stands in no state of another kind.
    loaded.load_state_dict(saved.state_dict())
    assert_close(loaded.amax, saved.amax, rtol=1e-6, atol=0)
    # An optimizer holds it.
    assert loaded.range_parameter is own and loaded.trained == target[0]


def test_a_loaded_logarithm_is_the_saved_one_bit_for_bit():
    saved, loaded = weight('learned', True), weight('learned', True)
    with torch.no_grad():
        saved.range_parameter.add_(torch.randn(4))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.range_parameter, saved.range_parameter)
    with torch.no_grad():
        assert torch.equal(loaded.current_range(), saved.range_parameter.exp2())


def test_a_float_state_changes_no_range():
    for kind in KINDS:
        quantizer = weight(*kind)
        quantizer.load_state_dict({}, strict=False)
        assert_close(quantizer.amax, AMAX, rtol=1e-6, atol=0)


@pytest.mark.parametrize(('kind', 'log2'), KINDS)
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_a_copy_learns_on_its_own(kind, log2, copied):
    quantizer = weight(kind, log2)
    quantizer.peak = torch.tensor(3.0)
    other = copied(quantizer)
    assert other.trained == kind and names(other) == names(quantizer)
    assert other.peak is None and quantizer.peak is not None
    with torch.no_grad():
        (other._amax if other.range_parameter is None else other.range_parameter).mul_(0.5)
    assert_close(quantizer.amax, AMAX, rtol=1e-6, atol=0)
    assert not torch.equal(other.amax, quantizer.amax)
    if kind == 'learned':
        other(torch.randn(4, 9)).sum().backward()
        assert other.range_parameter.grad is not None and quantizer.range_parameter.grad is None


@pytest.mark.parametrize('log2', [False, True])
def test_configuring_anew_ends_learning(log2):
    quantizer = activation(1.5, 'learned', log2)
    quantizer.waiting, quantizer.peak = True, torch.tensor(1.0)
    quantizer.configure(ActivationSpec(bits=4), 'again')
    assert (quantizer.trained, names(quantizer), quantizer.has_range) == ('fixed', [], False)
    assert not quantizer.waiting and quantizer.peak is None
    assert set(quantizer.state_dict()) == {'_amax', '_state'}
    with pytest.raises(Q3DError, match='again has no range'):
        quantizer(torch.ones(3))


@pytest.mark.parametrize('log2', [False, True])
def test_a_range_that_somebody_sets_is_fixed(log2):
    for give in (lambda q: setattr(q, 'amax', 2.0), lambda q: q.set_range(torch.tensor(2.0))):
        quantizer = activation(1.5, 'learned', log2)
        give(quantizer)
        assert (quantizer.trained, names(quantizer)) == ('fixed', [])
        assert quantizer.amax == 2.0
        assert quantizer(torch.tensor([9.0])) == 2.0


@pytest.mark.parametrize('log2', [False, True])
def test_a_parameter_without_part_in_a_pass_gets_a_gradient_of_zero(log2):
    def gradient(change, x):
        for quantizer in (activation(1.5, 'learned', log2), weight('learned', log2)):
            quantizer.train()
            change(quantizer)
            given = x.clone().requires_grad_()
            out = quantizer(given)
            assert torch.equal(out, given)
            (out * 3).sum().backward()
            assert torch.equal(given.grad, torch.full_like(given, 3.0))
            grad = quantizer.range_parameter.grad
            assert grad is not None and not grad.any()

    gradient(lambda q: None, torch.zeros(0, 4))
    gradient(lambda q: setattr(q, 'waiting', True), torch.randn(4, 4))
    gradient(lambda q: q.disable(), torch.randn(4, 4))
    gradient(lambda q: q.disable_quant(), torch.randn(4, 4))


def test_nothing_is_tied_without_a_learned_range_or_without_gradients():
    x = torch.randn(3, requires_grad=True)
    assert activation().tied(x) is x and activation(1.5, 'moving').tied(x) is x
    learned = activation(1.5, 'learned')
    with torch.no_grad():
        assert learned.tied(x) is x
    assert learned.tied(x) is not x
    learned.range_parameter.requires_grad_(False)
    assert learned.tied(x) is x


def test_what_waits_is_passed_on_in_training_alone():
    quantizer, x = activation(0.1), torch.tensor([5.0])
    quantizer.waiting = True
    assert quantizer.train()(x) == 5 and quantizer.eval()(x) == pytest.approx(0.1)


@pytest.mark.parametrize('log2', [False, True])
@pytest.mark.parametrize('unsigned', [False, True])
def test_the_gradient_of_the_range_moves_the_step_as_lsq_does(log2, unsigned):
    """Numbers by hand: equation 3 of LSQ for the step, and the chain rule to the logarithm."""
    x = torch.tensor([[0.0637, 0.2312, -9.0, 9.0, 0.0224]])
    high, low = (255, 0) if unsigned else (127, -128)
    step = 0.01
    quantizer = activation(step * high, 'learned', log2, unsigned)
    quantizer(x).sum().backward()
    scaled = x.double() / step
    inside = (scaled.round() >= low) & (scaled.round() <= high)
    of_step = torch.where(inside, scaled.round() - scaled, scaled.round().clamp(low, high)).sum()
    factor = gradient_scale(x, high, None)
    # LSQ steps by its factor times the gradient of the step; the range is the step times its largest integer.
    expected = of_step * factor
    expected = expected * step * torch.log(torch.tensor(2.0)) if log2 else expected * high
    assert_close(quantizer.range_parameter.grad.double(), expected.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('log2', [False, True])
def test_descent_on_the_range_lowers_the_error(log2):
    torch.manual_seed(0)
    x = torch.randn(4, 2000)
    for quantizer in (activation(9.0, 'learned', log2), weight('learned', log2)):
        quantizer.num_bits = 4
        optimizer = torch.optim.Adam([quantizer.range_parameter], lr=0.02)
        errors = []
        for _ in range(150):
            optimizer.zero_grad()
            error = (quantizer(x) - x).square().mean()
            error.backward()
            optimizer.step()
            errors.append(float(error))
        assert errors[-1] < 0.7 * errors[0]


def test_moving_ranges_take_the_largest_of_all_passes_since_the_last_step():
    quantizer = activation(4.0, 'moving').train()
    for value in (1.0, -3.0, 2.0):
        quantizer(torch.tensor([value, 0.5]))
    assert quantizer.peak == 3
    quantizer.move(quantizer.peak, 0.75)
    assert quantizer.peak is None and quantizer.amax == pytest.approx(3.75)
    quantizer.eval()(torch.tensor([100.0]))
    assert quantizer.peak is None


def test_a_tensor_that_several_layers_read_is_quantized_anew_by_a_range_that_moved():
    x = torch.tensor([0.7, 5.0])
    for kind in (('moving', False), ('learned', False), ('learned', True)):
        quantizer = activation(1.0, *kind)
        quantizer.owners = ['a', 'b']
        for _ in range(3):
            out = quantizer(x)
            assert quantizer(x) is out
            assert out[1].item() == pytest.approx(quantizer.amax.item())
            if out.requires_grad:
                out.sum().backward()
            with torch.no_grad():
                parameter = quantizer.range_parameter
                (quantizer._amax if parameter is None else parameter).add_(0.5)


def test_the_largest_magnitude_of_nothing_is_zero_and_of_several_the_largest():
    assert largest_magnitude(torch.zeros(0, 3)) == 0
    assert largest_magnitude(torch.zeros(0), torch.tensor([-3.0, 1.0]), torch.tensor([2.0])) == 3
    assert not largest_magnitude(torch.ones(2, requires_grad=True)).requires_grad


def test_a_model_with_learned_ranges_has_them_among_its_parameters_once():
    quantizer = activation(1.0, 'learned', True)
    model = nn.ModuleList([quantizer, quantizer])
    assert len(list(model.parameters())) == 1
    assert set(model.state_dict()) == {f'{i}.{n}' for i in (0, 1) for n in ('_amax', LOG2_KEY, '_state')}
