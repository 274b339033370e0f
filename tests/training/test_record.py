"""The record of a training against plain formulas on what the quantizers were given."""

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from q3d_plugin import lifecycle, numerics
from q3d_plugin.quantizer import Quantizer, Role
from q3d_plugin.recipe import Recipe
from q3d_plugin.straight_through import fake_quantize
from q3d_plugin.training import QuantTraining
from q3d_plugin.training.record import SAMPLES, codes_of, share
from q3d_plugin.transforms.insert import quantize_, share_input

LAYERS = ('left', 'right', 'last')


class Net(nn.Module):
    """Two layers that read one tensor, and a third one behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.last = nn.Conv2d(9, 2, 3)

    def setup_quant(self):
        share_input([self.left, self.right])

    def forward(self, x):
        return self.last(torch.cat([self.left(x), self.right(x)], 1).relu())


def recipe_of(kind='learned', scale='log2', bits=4, **more):
    ranges = dict(weight=kind, activation=kind, scale=scale)
    spec = dict(bits=bits, calibrator='percentile', percentile=99.0)
    weight = dict(bits=bits, calibrator='percentile', percentile=90.0)
    return Recipe.from_dict(
        {
            'mode': 'qat',
            'target': 'simulation',
            'activation': {**spec, **more.pop('activation', {})},
            'weight': weight,
            'training': {'ranges': ranges},
            **more,
        }
    )


def batch(i, count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(i)) * (1 + i)


def trained(recipe, frames=(0, 1)):
    torch.manual_seed(3)
    model = quantize_(Net()).eval()
    lifecycle.configure(model, recipe)
    lifecycle.calibrate(model, [batch(i) for i in frames], model)
    return model.train(), QuantTraining(model, recipe)


def step(model, training, epoch, x, lr=0.02):
    """A step of descent by the sign of the gradient; returns the integers of the weights before it."""
    training.before_step(epoch)
    before = {name: slow_codes(getattr(model, name)) for name in LAYERS}
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad.sign()
                parameter.grad = None
    return before


def captured(model):
    """Has all that is quantized from now on kept, with the range of that time: name -> pairs."""
    seen = {}
    for quantizer in lifecycle.quantizers(model):

        def keep(module, inputs):
            found = seen.setdefault(module, [])
            # What layers share is one tensor.
            if not any(x is inputs[0] for x, _ in found):
                found.append((inputs[0], module.current_range().detach().clone()))

        quantizer.register_forward_pre_hook(keep)
    return seen


def slow_clipped(quantizer, x, amax):
    """How many values get no gradient, and how many there are, by the gradient itself."""
    low, high = numerics.bounds(quantizer.num_bits, quantizer.unsigned)
    x = x.detach().clone().requires_grad_()
    fake_quantize(x, amax, amax.float() / high, None, low, high).sum().backward()
    inside = [low - 0.5 <= v <= high + 0.5 for v in (x.double() * high / amax.double()).flatten().tolist()]
    assert inside == (x.grad != 0).flatten().tolist()
    return len(inside) - sum(inside), len(inside)


def slow_codes(layer):
    """Integers of a weight, from what fake quantization makes of it."""
    quantizer = layer.weight_quantizer
    amax = quantizer.amax.reshape(-1, 1, 1, 1)
    quantized = numerics.fake_quantize(layer.weight.detach(), quantizer.amax, quantizer.num_bits, axis=0)
    return (quantized.double() / (amax.double() / (2 ** (quantizer.num_bits - 1) - 1))).round().int()


@pytest.mark.parametrize(
    ('kind', 'scale'), [('fixed', 'log2'), ('moving', 'log2'), ('learned', 'linear'), ('learned', 'log2')]
)
def test_a_record_says_what_slow_formulas_say(kind, scale):
    model, training = trained(recipe_of(kind, scale))
    seen = captured(model)
    before = None
    for epoch in range(2):
        for i in range(2):
            found = step(model, training, epoch + i / 2, batch(i + 2))
            before = before or found
        record = training.finish_epoch(epoch + 1.0)
        rows = {(row['name'], row['tensor']): row for row in record['layers']}
        assert set(rows) == {('left', 'input'), ('last', 'input'), *((n, 'weight') for n in LAYERS)}
        sums = torch.zeros(2)
        for quantizer, tensors in seen.items():
            if quantizer.role is Role.ACTIVATION:
                counts = torch.tensor([slow_clipped(quantizer, x, amax) for x, amax in tensors]).sum(0)
                row = rows[quantizer.owners[0], 'input']
                assert row['clipped'] == pytest.approx((counts[0] / counts[1]).item())
                assert row['values'] == counts[1] and row['range'] == quantizer.amax.item()
                sums += counts
        assert 0 < record['totals']['clipped_activations'] < 1
        assert record['totals']['clipped_activations'] == pytest.approx((sums[0] / sums[1]).item())
        seen.clear()
        after = {name: slow_codes(getattr(model, name)) for name in LAYERS}
        check_weights(record, model, before, after)
        before = after


def check_weights(record, model, before, after):
    rows = {row['name']: row for row in record['layers'] if row['tensor'] == 'weight'}
    changed = clipped = number = 0
    for name in LAYERS:
        layer, row = getattr(model, name), rows[name]
        weight = layer.weight.detach()
        step_size = layer.weight_quantizer.amax.double() / 7
        outside = sum(
            not -8.5 <= v <= 7.5
            for channel, size in zip(weight.double(), step_size)
            for v in (channel / size).flatten().tolist()
        )
        assert row['clipped'] == pytest.approx(outside / weight.numel())
        assert row['range'] == pytest.approx(layer.weight_quantizer.amax.mean().item())
        clipped, number = clipped + outside, number + weight.numel()
        moved = sum(a != b for a, b in zip(before[name].flatten().tolist(), after[name].flatten().tolist()))
        assert row['changed'] == pytest.approx(moved / weight.numel())
        changed += moved
    assert record['totals']['clipped_weights'] == pytest.approx(clipped / number)
    assert 0 < changed < number
    assert record['totals']['changed_codes'] == pytest.approx(changed / number)


def test_the_first_record_is_that_of_the_model_before_training():
    model, training = trained(recipe_of())
    ranges = {q.owners[0]: q.amax.clone() for q in lifecycle.quantizers(model) if q.role is Role.ACTIVATION}
    codes = step(model, training, 0.0, batch(2))
    first = training.record.first
    assert {r['name']: r['range'] for r in first['layers'] if r['tensor'] == 'input'} == ranges
    assert first['totals']['clipped_activations'] is first['totals']['changed_codes'] is None
    assert first['totals']['clipped_weights'] > 0
    record = training.finish_epoch(0.5)
    moved = {name: (codes[name] != slow_codes(getattr(model, name))).double().mean().item() for name in codes}
    assert {r['name']: r['changed'] for r in record['layers'] if r['tensor'] == 'weight'} == pytest.approx(
        moved
    )
    assert (first['epoch'], record['epoch']) == (0, 0.5)
    assert training.record.first is first


@pytest.mark.parametrize('steps', [1, 3, 7, 8, 9, 20, 101])
def test_a_few_steps_of_an_epoch_are_counted_at_even_distances(steps):
    model, training = trained(recipe_of())
    for epoch in range(2):
        chosen = []
        for i in range(steps):
            training.before_step((epoch * steps + i) / steps)
            counting = {q.counting for q in lifecycle.quantizers(model) if q.role is Role.ACTIVATION}
            assert len(counting) == 1
            chosen += [i] * counting.pop()
        assert len(chosen) == min(SAMPLES, steps)
        gaps = [b - a for a, b in zip(chosen, [*chosen[1:], steps])]
        assert max(gaps) - min(gaps) <= 1
    assert not any(q.counting for q in lifecycle.quantizers(model) if q.role is Role.WEIGHT)


def test_what_validation_and_copies_see_is_not_counted():
    model, training = trained(recipe_of())
    training.before_step(0.0)
    model.eval()(batch(1))
    assert training.finish_epoch(1.0)['totals']['clipped_activations'] is None
    model.train()(batch(1))
    other = copy.deepcopy(model)
    assert not any(q.counting or q.clipped is not None for q in lifecycle.quantizers(other))
    other(batch(5))
    record = training.finish_epoch(2.0)
    assert next(r for r in record['layers'] if r['name'] == 'left')['values'] == batch(1).numel()


def test_weights_alone_are_seen_while_activations_wait():
    recipe = recipe_of()
    model, training = trained(
        Recipe.from_dict({**recipe.to_dict(), 'training': {'schedule': {'activations_from': 1}}})
    )
    step(model, training, 0.0, batch(0))
    totals = training.finish_epoch(1.0)['totals']
    assert totals['clipped_activations'] is None and totals['changed_codes'] > 0


def test_dynamic_ranges_and_running_scales_have_no_record():
    model, training = trained(recipe_of(activation={'range': 'dynamic'}))
    step(model, training, 0.0, batch(0))
    assert {r['tensor'] for r in training.finish_epoch(1.0)['layers']} == {'weight'}
    smooth = {'alpha': 0.5, 'mode': 'dynamic'}
    model, training = trained(recipe_of(smoothquant=smooth))
    step(model, training, 0.0, batch(0))
    kept = {r['name'] for r in training.finish_epoch(1.0)['layers'] if r['tensor'] == 'weight'}
    assert kept == {n for n, m in lifecycle.units(model) if not m.smooth_spec} != set(LAYERS)


@pytest.mark.parametrize(
    'bits, kind', [(2, torch.int8), (8, torch.int8), (9, torch.int16), (16, torch.int16)]
)
def test_integers_take_as_little_memory_as_they_can(bits, kind):
    low, high = numerics.bounds(bits)
    found = torch.tensor([-1e6, low - 1.0, low, 0.0, high, high + 1.0, 1e6])
    codes = codes_of(found, low, high)
    assert codes.dtype is kind
    assert codes.tolist() == [low, low, low, 0, high, high, high]


def test_a_share_of_nothing_is_none():
    assert share(0, 0) is None and share(1, 4) == 0.25


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_counted_as_it_is_quantized(dtype):
    quantizer = Quantizer(recipe_of().activation).train()
    quantizer.set_range(torch.tensor(1.5))
    quantizer.counting = True
    x = torch.randn(4000).to(dtype).requires_grad_()
    quantizer(x).sum().backward()
    assert quantizer.clipped.tolist() == [(x.grad == 0).sum().item(), 4000]


def on_a_rank(rank, folder):
    torch.set_num_threads(1)
    store = f'file://{folder}/store'
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2, timeout=limit)
    model, training = trained(recipe_of('fixed'))
    training.before_step(0.0)
    model(batch(4, 4)[rank : rank * 3 + 1])
    torch.save(training.finish_epoch(1.0), os.path.join(folder, f'{rank}.pt'))
    dist.barrier()
    # Not destroy_process_group(): see test_smooth_ranks.py.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='needs gloo')
def test_two_processes_record_what_one_does(tmp_path):
    mp.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    model, training = trained(recipe_of('fixed'))
    training.before_step(0.0)
    model(batch(4, 4))
    alone = training.finish_epoch(1.0)
    assert alone['totals']['clipped_activations'] > 0
    for rank in range(2):
        record = torch.load(tmp_path / f'{rank}.pt')
        assert record == alone
