"""Calibration, SmoothQuant, sensitivity and training on CUDA against the CPU."""

import copy

import pytest
import torch
from analysis_toys import ToyBench, toy_recipe
from gpu_toys import calibrated, frames, made, moved
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from q3d_plugin import lifecycle
from q3d_plugin.analysis.sensitivity import float_outputs
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.quantizer import Quantizer

SMOOTH = {
    'static': {'alpha': 0.5},
    'dynamic': {'alpha': 0.5, 'mode': 'dynamic'},
    'search': {'alpha': 'search'},
}


def loss_of(outputs):
    return sum(o.square().mean() for o in outputs)


def stepped(model, batch, context=None, steps=2):
    """The model after some steps of SGD, and the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with context or torch.enable_grad():
            loss = loss_of(model(batch))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


def test_everything_of_a_calibrated_model_is_on_its_device(device):
    model = calibrated(device)
    tensors = [*model.parameters(), *model.buffers()]
    assert len([m for m in model.modules() if isinstance(m, Quantizer)]) > 10
    assert {t.device.type for t in tensors} == {device.type}


@pytest.mark.parametrize('calibrator', ['max', 'percentile', 'mse', 'grid', 'entropy'])
def test_ranges_of_a_model_are_those_of_the_cpu(device, calibrator):
    recipe = dict(activation=dict(calibrator=calibrator))
    here, there = calibrated(**recipe), calibrated(device, **recipe)
    for a, b in zip(lifecycle.quantizers(here), lifecycle.quantizers(there)):
        assert a.name == b.name and a.mode == b.mode
        # Convolutions add in another order, which can move a value to the next bin.
        assert_close(a.amax, b.amax.cpu(), rtol=2e-3, atol=1e-6)


def test_the_same_ranges_give_the_same_outputs(device):
    batch = frames()[0]
    with torch.no_grad():
        expected, found = calibrated()(batch), moved(device)(batch.to(device))
    for a, b in zip(expected, found):
        # A value that lies on a tie may fall on the other side: by one step, at few places.
        assert_close(a, b.cpu(), rtol=0, atol=0.05)
        assert (a - b.cpu()).abs().mean() < 2e-3 * a.abs().mean()


@pytest.mark.parametrize('how', SMOOTH)
@pytest.mark.parametrize('strict', [False, True])
def test_smoothquant_gives_what_it_gives_on_the_cpu(device, how, strict, request):
    if strict:
        request.getfixturevalue('deterministic')
    recipe = dict(smoothquant=SMOOTH[how])
    here, there = calibrated(**recipe), calibrated(device, **recipe)
    batch = frames()[1]
    with torch.no_grad():
        for a, b in zip(here(batch), there(batch.to(device))):
            assert (a - b.cpu()).abs().mean() < 0.02 * a.abs().mean()


def test_sensitivity_measures_what_it_measures_on_the_cpu(device):
    found = []
    for where in ('cpu', device):
        bench = ToyBench(recipe=toy_recipe(weight=dict(bits=4)))
        bench.model.to(where)
        bench.keep_float_state()
        plain = bench.frames
        bench.frames = lambda *a, _f=plain, _w=where: [x.to(_w) for x in _f(*a)]
        bench.prepare(bench.recipe)
        batches = list(bench.frames('val', 2))
        references = float_outputs(Switch(bench.model), bench.forward, batches)
        errors = [
            (a - b).abs().mean() / a.abs().mean()
            for reference, batch in zip(references, batches)
            for a, b in zip(reference.values(), bench.forward(batch).values())
        ]
        found.append(torch.stack(errors).cpu())
    assert_close(found[0], found[1], rtol=0.05, atol=1e-4)
    assert (found[0] > 0).all()


def test_a_training_step_is_that_of_the_cpu(device):
    batch = frames()[0]
    here, there = calibrated(), moved(device)
    expected, found = stepped(here, batch), stepped(there, batch.to(device))
    assert_close(expected, found, rtol=1e-2, atol=1e-4)
    for (name, a), b in zip(here.named_parameters(), there.parameters()):
        assert_close(a, b.cpu(), rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision_trains_and_tests(device, dtype):
    if device.type == 'cpu' and dtype is torch.float16:
        pytest.skip('convolutions of the CPU have no gradients in float16')
    model, batch = moved(device), frames(device)[0]
    with torch.no_grad():
        expected = model(batch)
        with torch.autocast(device.type, dtype=dtype):
            found = model(batch)
    for a, b in zip(expected, found):
        assert b.dtype is dtype
        assert (a - b.float()).abs().mean() < 0.05 * a.abs().mean()
    losses = stepped(model, batch, torch.autocast(device.type, dtype=dtype), steps=3)
    assert losses.isfinite().all() and losses[-1] < losses[0]
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_are_scaled_and_unscaled(cuda):
    model, batch = moved(cuda), frames(cuda)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.cuda.amp.GradScaler(init_scale=1024.0)
    with torch.autocast('cuda', dtype=torch.float16):
        loss = loss_of(model(batch))
    scaler.scale(loss).backward()
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_an_average_of_weights_is_a_quantized_model(device):
    model, batch = moved(device), frames(device)[0]
    average = AveragedModel(model, avg_fn=lambda old, new, _: 0.5 * old + 0.5 * new, use_buffers=False)
    stepped(model, batch)
    average.update_parameters(model)
    with torch.no_grad():
        outputs = average(batch)
    assert all(o.isfinite().all() and o.device.type == device.type for o in outputs)
    kept = [q.amax for q in lifecycle.quantizers(average.module)]
    assert all(torch.equal(a, q.amax) for a, q in zip(kept, lifecycle.quantizers(model)))


def test_a_copy_and_a_checkpoint_compute_the_same(device):
    model, batch = moved(device), frames(device)[0]
    other = made(device)
    other.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    with torch.no_grad():
        for a, b, c in zip(model(batch), copy.deepcopy(model)(batch), other(batch)):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_two_runs_are_the_same_where_algorithms_are_deterministic(device, deterministic):
    batch, found = frames(device)[0], []
    for _ in range(2):
        model = calibrated(device, activation=dict(calibrator='mse'))
        losses = stepped(model, batch)
        found.append([losses, *(t.detach().cpu() for t in model.state_dict().values())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
