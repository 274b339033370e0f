"""The part ``training`` of the benchmark on a small network: what a step does, and which rows there are."""

import math
from types import SimpleNamespace

import torch
from torch import nn
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.benchmark import training
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def subject_on(batch):
    """A float network and its quantized twin, as a Subject has them."""
    plain, model = network(), quantize_(network())
    lifecycle.configure(model, Recipe())
    lifecycle.calibrate(model, [batch], model)
    return SimpleNamespace(
        adapter=SimpleNamespace(decoding=('decode',)),
        device=torch.device('cpu'),
        inputs=batch,
        float_model=plain,
        float_forward=lambda x: {'out': plain(x), 'constant': torch.ones(1)},
        model=model,
        forward=lambda x: {'out': model(x)},
    )


def test_a_step_gives_gradients_and_changes_nothing():
    batch = torch.randn(2, 3, 8, 8)
    subject, seen = subject_on(batch), []
    for model, forward in ((subject.float_model, subject.float_forward), (subject.model, subject.forward)):
        before = {k: v.clone() for k, v in model.state_dict().items() if 'num_batches' not in k}
        parameter = next(model.parameters())
        handle = parameter.register_hook(lambda grad: seen.append(float(grad.abs().sum())))
        training.step_of(model, forward, batch)()
        handle.remove()
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert not model.training and parameter.grad is None
    assert len(seen) == 2 and all(math.isfinite(s) and s > 0 for s in seen)


def test_the_rows_are_steps_with_a_target():
    subject = subject_on(torch.randn(2, 3, 8, 8))
    with tqdm(total=training.steps(2), disable=True) as bar:
        rows = training.measure(subject, 2, 0, bar)
    assert [r.name for r in rows] == [training.FLOAT_STEP, training.QAT_STEP]
    assert rows[0].ratio == 1 and rows[0].target is None
    assert rows[1].target == training.STEP_TARGET and rows[1].ratio > 0
