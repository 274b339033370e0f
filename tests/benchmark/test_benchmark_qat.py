"""The part ``qat`` of the benchmark on a small network: steps, their memory, the rows."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import nn
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.benchmark import qat
from q3d_plugin.benchmark.allocated import peak_of, size_of
from q3d_plugin.benchmark.peer import peer_model
from q3d_plugin.benchmark.steps import qat_step_of, step_of
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def subject_on(batch, recipe=None):
    """A float network and its quantized twin, as a Subject has them."""
    plain, model = network(), quantize_(network())
    constant = {'constant': torch.ones(1)}
    lifecycle.configure(model, recipe or Recipe())
    lifecycle.calibrate(model, [batch], model)
    return SimpleNamespace(
        adapter=SimpleNamespace(
            heads_of=lambda model: [m for m in model.modules() if hasattr(m, 'decode')],
            forward_of=lambda net: lambda x: {'out': net(x), **constant},
            loss=lambda net, frame: net(frame).abs().sum() if net.training else None,
        ),
        device=torch.device('cpu'),
        inputs=batch,
        annotated=None,
        float_model=plain,
        model=model,
        recipe=Recipe(),
    )


def test_a_step_gives_gradients_and_changes_nothing():
    batch = torch.randn(2, 3, 8, 8)
    subject, seen = subject_on(batch), []
    for model in (subject.float_model, subject.model):
        before = {k: v.clone() for k, v in model.state_dict().items() if 'num_batches' not in k}
        parameter = next(model.parameters())
        handle = parameter.register_hook(lambda grad: seen.append(float(grad.abs().sum())))
        step_of(subject, model)()
        handle.remove()
        after = model.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert not model.training and parameter.grad is None
    assert len(seen) == 2 and all(math.isfinite(s) and s > 0 for s in seen)


def test_the_loss_is_the_detectors_own_where_a_frame_is_annotated():
    subject, seen = subject_on(torch.randn(2, 3, 8, 8)), []
    subject.annotated = torch.randn(1, 3, 6, 6)
    weight = subject.model[3].weight
    weight.register_hook(seen.append)
    step_of(subject, subject.model)()
    assert not subject.model.training
    subject.model(subject.annotated).abs().sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


def test_a_step_trains_the_ranges_of_a_copy():
    subject = subject_on(torch.randn(2, 3, 8, 8))
    for name, ranges in qat.KINDS.items():
        model, step = qat_step_of(subject, ranges)
        kinds = {q.trained for q in lifecycle.quantizers(model)}
        assert kinds == {ranges.activation} and ranges.activation in name.replace('logarithms', '')
        seen = []
        learned = [q.range_parameter for q in lifecycle.quantizers(model) if q.range_parameter is not None]
        for parameter in learned:
            parameter.register_hook(seen.append)
        step()
        assert len(seen) == len(learned) == (4 if ranges.activation == 'learned' else 0)
        assert all(bool(grad.any()) for grad in seen)
        moving = [q.peak is not None for q in lifecycle.quantizers(model) if not q.per_channel]
        assert all(moving) if ranges.activation == 'moving' else not any(moving)
    assert {q.trained for q in lifecycle.quantizers(subject.model)} == {'fixed'}


def test_the_rows_are_steps_and_their_memory_with_targets():
    subject = subject_on(torch.randn(2, 3, 8, 8))
    with tqdm(total=qat.steps(2), disable=True) as bar:
        rows = qat.measure(subject, 2, 0, bar)
    names = [qat.FLOAT_STEP, *qat.KINDS, qat.PEER_STEP]
    for section, targets in (('training', qat.TIME_TARGET), ('memory', qat.MEMORY_TARGET)):
        found = {r.name: r for r in rows if r.section == section}
        assert list(found) == names
        assert found[qat.FLOAT_STEP].ratio == 1 and all(r.ratio > 0 for r in found.values())
        assert {n: r.target for n, r in found.items() if r.target is not None} == {
            name: targets[ranges.activation] for name, ranges in qat.KINDS.items()
        }


def test_the_bar_ends_where_the_rows_do():
    subject = subject_on(torch.randn(2, 3, 8, 8))
    with tqdm(total=qat.steps(1), file=io.StringIO()) as bar:
        qat.measure(subject, 1, 0, bar)
        assert bar.n == bar.total


@pytest.mark.parametrize('unsigned', [False, 'auto'])
def test_the_peer_gives_the_same_numbers_and_gradients(unsigned):
    torch.manual_seed(0)
    batch = torch.randn(2, 3, 8, 8)
    recipe = Recipe.from_dict({'target': 'simulation', 'activation': {'unsigned': unsigned}})
    subject = subject_on(batch, recipe)
    # Nothing lies outside: the peer's gradient stops at the range, ours half a step later.
    for quantizer in lifecycle.quantizers(subject.model):
        quantizer.set_range(quantizer.amax * 2, quantizer.unsigned)
    peer, found = peer_model(subject.model), []
    for model in (subject.model, peer):
        out = model(batch)
        out.square().mean().backward()
        found.append((out.detach(), model[0].weight.grad, model[3].weight.grad))
    for mine, other in zip(*found):
        assert (mine - other).norm() < 1e-3 * other.norm()
    assert all(isinstance(q, TensorQuantizer) for q in lifecycle.quantizers(peer))


def test_memory_is_what_is_there_at_once():
    model = nn.Linear(1, 1)
    own = size_of(model.parameters())
    assert own == 8 and size_of([model.weight, model.weight.view(-1)]) == 4
    x = torch.zeros(1000)
    before = torch.zeros(5000)

    def one_after_the_other():
        for _ in range(5):
            (x + 1).view(10, 100).add_(1)

    def together():
        first = before * 2
        kept = [x + 1, first[:10], before.view(-1)]
        del first
        return kept[0] + kept[0]

    device = torch.device('cpu')
    assert peak_of(one_after_the_other, model, device) == own + 4000
    assert peak_of(together, model, device) == own + 20_000 + 8000


def test_memory_of_a_step_has_activations_and_gradients():
    x = torch.zeros(100, 200)
    model = nn.Sequential(nn.Linear(200, 300, bias=False), nn.Tanh(), nn.Linear(300, 1, bias=False))

    def step():
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)

    weights, hidden = 4 * (200 * 300 + 300), 4 * 100 * 300
    found = peak_of(step, model, torch.device('cpu'))
    # Weights; the hidden layer's output; the gradients of its output and its input; those of the weights.
    assert weights * 2 + hidden <= found <= weights * 2 + 3 * hidden + 4 * 2000
