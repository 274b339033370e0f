"""BatchNorm in place during training: nothing changes when it comes back, and it folds exactly."""

import copy

import pytest
import torch
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.checkpoints import load_quantizers
from q3d_plugin.layers.model import quantizers
from q3d_plugin.recipe import Recipe
from q3d_plugin.training import QuantTraining
from q3d_plugin.training.norms import norm_parameters, revive_norms, revive_norms_of
from q3d_plugin.transforms.folded_norm import FoldedNorm
from q3d_plugin.transforms.insert import quantize_


def net(frozen=False):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.running_mean.uniform_(-0.3, 0.3), norm.running_var.uniform_(0.5, 2.0)
    model[1].requires_grad_(not frozen)
    return quantize_(model)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3)]


def recipe_of(kind='learned', scale='log2'):
    ranges = dict(weight=kind, activation=kind, scale=scale, lr_factor=10 if scale == 'log2' else 0.1)
    return Recipe.from_dict(
        dict(
            mode='qat',
            target='simulation',
            weight=dict(bits=4),
            activation=dict(bits=6),
            training=dict(ranges=ranges, batch_norm='kept'),
        )
    )


def started(recipe, frozen=False):
    model = net(frozen)
    lifecycle.configure(model, recipe)
    lifecycle.calibrate(model, batches(), model)
    count = revive_norms(model, batches(), model)
    return model, QuantTraining(model, recipe), count


def train(model, training, steps=4):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.dim() == 4], lr=1e-2)
    training.add_to(optimizer)
    for _ in range(steps):
        model.train()
        training.before_step(0.0)
        optimizer.zero_grad()
        model(batches()[0]).square().mean().backward()
        optimizer.step()
    model.eval()
    return optimizer


def test_nothing_changes_when_they_come_back():
    plain = net()
    lifecycle.configure(plain, recipe_of())
    lifecycle.calibrate(plain, batches(), plain)
    model, _, count = started(recipe_of())
    assert count == 2 and len(norm_parameters(model)) == 4
    plain.eval(), model.eval()
    with torch.no_grad():
        for x in batches():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_their_statistics_are_those_of_the_pass():
    model = net()
    lifecycle.configure(model, recipe_of())
    lifecycle.calibrate(model, batches(), model)
    seen = []
    handle = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for x in batches():
            model.eval()(x)
    handle.remove()
    revive_norms(model, batches(), model)
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, values.var(1, unbiased=False), rtol=1e-4, atol=1e-5)


def test_in_training_they_are_batchnorms():
    model, _, _ = started(recipe_of('fixed'))
    reference = nn.BatchNorm2d(4)
    reference.load_state_dict(model[1].state_dict())
    model.train(), reference.train()
    x = model[0](batches()[0])
    torch.testing.assert_close(model[1](x), reference(x))
    torch.testing.assert_close(model[1].state_dict(), reference.state_dict())
    # Without a momentum: the average over all batches.
    reference = nn.BatchNorm2d(6, momentum=None)
    reference.load_state_dict(model[4].state_dict())
    for x in (torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4)):
        torch.testing.assert_close(model[4](x), reference(x))
    torch.testing.assert_close(model[4].state_dict(), reference.state_dict())


@pytest.mark.parametrize('kind, scale', [('learned', 'log2'), ('learned', 'linear'), ('fixed', 'linear')])
def test_whoever_loads_the_checkpoint_folds_them_and_has_the_same_integers(kind, scale):
    model, training, _ = started(recipe_of(kind, scale))
    train(model, training)
    state = model.state_dict()
    folded = net()
    lifecycle.configure(folded, recipe_of(kind, scale))
    folded.load_state_dict(state)
    folded.eval()
    assert not norm_parameters(folded)
    with torch.no_grad():
        for x in batches():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-4)
    for mine, other in zip((model[0], model[3]), (folded[0], folded[3])):
        codes = [
            (u.output_first(u.quantize_weight()).flatten(1) / (u.weight_quantizer.amax[:, None] / 7)).round()
            for u in (mine, other)
        ]
        assert torch.equal(*codes)


def test_a_resume_goes_on_with_them():
    model, training, _ = started(recipe_of())
    optimizer = train(model, training)
    state = copy.deepcopy(model.state_dict())
    again = net()
    lifecycle.configure(again, recipe_of())
    load_quantizers(again, state)
    assert revive_norms_of(again, state) == 2
    second = QuantTraining(again, recipe_of())
    other = torch.optim.Adam([p for p in again.parameters() if p.dim() == 4], lr=1e-2)
    second.add_to(other)
    again.load_state_dict(state)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, way, drives in ((model, optimizer, training), (again, other, second)):
        one.train()
        drives.before_step(0.0)
        way.zero_grad()
        one(batches()[1]).square().mean().backward()
        way.step()
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


def test_they_are_folded_when_the_training_ends():
    model, training, _ = started(recipe_of())
    train(model, training)
    with torch.no_grad():
        expected = [model(x) for x in batches()]
        training.end()
        assert not norm_parameters(model)
        for x, y in zip(batches(), expected):
            torch.testing.assert_close(model(x), y, rtol=1e-3, atol=1e-4)


def test_a_frozen_one_stays_folded():
    model, _, count = started(recipe_of(), frozen=True)
    norms = [m for m in model.modules() if isinstance(m, FoldedNorm)]
    assert count == 1 and [norm.live for norm in norms] == [False, True]
    assert all(q.has_range for q in quantizers(model))
