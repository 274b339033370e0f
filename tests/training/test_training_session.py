"""A training that is set up before its weights are loaded, as one that is resumed, and one that ends."""

import pytest
import torch
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.recipe import Recipe
from q3d_plugin.training import QuantTraining
from q3d_plugin.transforms.insert import quantize_

KINDS = ('fixed', 'moving', 'linear', 'log2')


def recipe(kind):
    learned = kind in ('linear', 'log2')
    ranges = {'weight': 'learned' if learned else kind, 'activation': 'learned' if learned else kind}
    ranges['scale'] = kind if learned else 'log2'
    return Recipe.from_dict({'mode': 'qat', 'target': 'simulation', 'training': {'ranges': ranges}})


def network(kind, seed=0):
    torch.manual_seed(seed)
    model = quantize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    lifecycle.configure(model, recipe(kind))
    return model


def steps(model, session, optimizer, inputs, first, count):
    for i in range(first, first + count):
        session.before_step(i / 10)
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


def optimizer_of(model):
    return torch.optim.SGD([p for n, p in model.named_parameters() if '_quantizer' not in n], lr=1e-3)


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(kind, inputs, count):
    model = network(kind)
    lifecycle.calibrate(model, [inputs], model)
    session, optimizer = QuantTraining(model.train(), recipe(kind)), optimizer_of(model)
    session.add_to(optimizer)
    steps(model, session, optimizer, inputs, 0, count)
    return model, session, optimizer


@pytest.mark.parametrize('kind', KINDS)
def test_a_training_is_set_up_before_its_weights_are_loaded(kind, inputs):
    model, session, optimizer = trained(kind, inputs, 3)
    state, states = model.state_dict(), optimizer.state_dict()
    state = {k: v.clone() for k, v in state.items()}

    other = network(kind, seed=5).train()
    checkpoints.load_quantizers(other, state)
    resumed, again = QuantTraining(other, recipe(kind)), optimizer_of(other)
    resumed.add_to(again)
    # Whoever loads a state may ask for that of the model first.
    assert other.state_dict().keys() == state.keys()
    other.load_state_dict(state)
    again.load_state_dict(states)
    if kind == 'moving':
        for quantizer in lifecycle.quantizers(model):
            quantizer.peak = None  # a resumed run does not know the last batch
    for run in ((model, session, optimizer), (other, resumed, again)):
        steps(*run, inputs, 3, 3)
    expected = model.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize('kind', KINDS)
def test_ranges_stay_what_they_are_after_the_end(kind, inputs):
    model, session, optimizer = trained(kind, inputs, 3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        output = model.eval()(inputs)
    session.end()
    assert not [n for n, _ in model.named_parameters() if '_quantizer' in n]
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]['params']) == 4
    with torch.no_grad():
        assert torch.equal(model(inputs), output)
        model[0].weight.mul_(2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] * (2 if name == '0.weight' else 1)), name

    # Another training may begin, with the optimizer that there is.
    again = QuantTraining(model.train(), recipe(kind))
    again.add_to(optimizer)
    steps(model, again, optimizer, inputs, 0, 2)
    assert len(again.parameters) == (4 if kind in ('linear', 'log2') else 0)
    assert all(p.grad is not None for p in again.parameters)
