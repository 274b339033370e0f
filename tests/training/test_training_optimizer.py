"""The group of learned ranges in an optimizer: rate, momentum, decay, schedules, and the way to a file."""

import pytest
import torch
from torch import nn

from q3d_plugin.training.optimizer import add_ranges


def parameters(*values):
    return [nn.Parameter(torch.tensor(v)) for v in values]


def step(optimizer, *all_parameters):
    for p in all_parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_ranges_have_a_rate_of_their_own_and_no_decay():
    (weight,), (range_,) = parameters(1.0), parameters(1.0)
    optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=0.5)
    add_ranges(optimizer, [range_], 3.0)
    step(optimizer, weight, range_)
    assert weight.item() == pytest.approx(1 - 0.1 * (1 + 0.5))
    assert range_.item() == pytest.approx(1 - 0.1 * 3)


@pytest.mark.parametrize('lasting', [True, False])
def test_ranges_that_the_optimizer_has_already_are_moved(lasting):
    (weight,), (range_,) = parameters(1.0), parameters(1.0)
    optimizer = torch.optim.SGD([weight, range_], lr=0.1, weight_decay=0.5)
    add_ranges(optimizer, [range_], 1.0, lasting)
    expected = [[weight], [range_]] if lasting else [[weight, range_]]
    assert [group['params'] for group in optimizer.param_groups] == expected
    step(optimizer, weight, range_)
    assert range_.item() == pytest.approx(0.9)
    assert [group['params'] for group in optimizer.param_groups] == expected


SCHEDULES = {
    'one cycle': lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=12),
    'cosine': lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    'lambda': lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
}


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('first', [True, False], ids=['schedule first', 'ranges first'])
def test_the_rate_follows_that_of_the_weights_whatever_sets_it(schedule, first):
    (weight,), (slow,), (range_,) = parameters(1.0), parameters(1.0), parameters(1.0)
    optimizer = torch.optim.Adam([{'params': [slow], 'lr': 0.01}, {'params': [weight], 'lr': 0.1}])
    seen = []

    def look(optimizer, args, kwargs):
        (group,) = [g for g in optimizer.param_groups if any(p is range_ for p in g['params'])]
        others = [g for g in optimizer.param_groups if g is not group]
        leading = max(others, key=lambda g: g['lr'])
        seen.append((group['lr'], 5 * leading['lr'], group['betas'] == leading['betas'], group['params']))

    if first:
        scheduler = SCHEDULES[schedule](optimizer)
        add_ranges(optimizer, [range_], 5.0)
    else:
        add_ranges(optimizer, [range_], 5.0)
        scheduler = SCHEDULES[schedule](optimizer)
    optimizer.register_step_pre_hook(look)
    for _ in range(10):
        step(optimizer, weight, slow, range_)
        scheduler.step()
    assert len({round(rate, 9) for rate, *_ in seen}) > 5
    for rate, expected, momentum, members in seen:
        assert rate == pytest.approx(expected) and momentum and len(members) == 1


def test_a_factor_of_zero_stops_the_ranges_alone():
    (weight,), (range_,) = parameters(1.0), parameters(1.0)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    group = add_ranges(optimizer, [range_], 5.0)
    step(optimizer, weight, range_)
    before = weight.item(), range_.item()
    group.lr_factor = 0.0
    step(optimizer, weight, range_)
    assert weight.item() != before[0] and range_.item() == before[1]


def test_gradients_are_unscaled_with_those_of_the_weights():
    (weight,), (range_,) = parameters(1.0), parameters(1.0)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    add_ranges(optimizer, [range_], 1.0)
    scaler = torch.amp.GradScaler('cpu', init_scale=8.0)
    scaler.scale(weight + 2 * range_).backward()
    scaler.unscale_(optimizer)
    assert weight.grad == 1 and range_.grad == 2


@pytest.mark.parametrize('lasting', [True, False])
def test_the_state_goes_through_a_file_that_holds_plain_data_alone(tmp_path, lasting):
    def made():
        torch.manual_seed(0)
        found = parameters(1.0), parameters(2.0)
        optimizer = torch.optim.Adam(found[0], lr=0.1)
        add_ranges(optimizer, found[1], 5.0, lasting)
        return optimizer, [*found[0], *found[1]]

    optimizer, some = made()
    for _ in range(3):
        step(optimizer, *some)
    torch.save(optimizer.state_dict(), tmp_path / 'optimizer.pth')
    again, others = made()
    again.load_state_dict(torch.load(tmp_path / 'optimizer.pth', weights_only=True))
    for mine, other in zip(some, others):
        other.data.copy_(mine.data)
    for _ in range(3):
        step(optimizer, *some), step(again, *others)
    assert [p.item() for p in some] == [p.item() for p in others]
