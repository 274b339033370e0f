"""Own errors of one pass and effects of partial passes against layers that are quantized alone by hand."""

import itertools

import pytest
import torch
from analysis_toys import ToyBench
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.analysis import sensitivity
from q3d_plugin.analysis.measures import ErrorSums, OutputError
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantAdd
from q3d_plugin.recipe import Recipe


@pytest.fixture
def bench():
    bench = ToyBench(recipe=Recipe.from_dict({'weight': {'bits': 4}, 'calibration': {'frames': 3}}))
    bench.prepare(bench.recipe)
    return bench


def by_hand(bench, names, batches):
    """Error of the outputs of a fresh model of which only ``names`` have quantizers."""
    everything = [n for n, _ in lifecycle.units(bench.model)]
    plain = {**bench.recipe.to_dict(), 'skip': [n for n in everything if n not in names]}
    other = ToyBench(recipe=Recipe.from_dict(plain))
    other.prepare(other.recipe)
    error = OutputError()
    switch = sensitivity.Switch(bench.model)
    references = sensitivity.float_outputs(switch, bench.forward, batches)
    for reference, batch in zip(references, batches):
        error.add(reference, other.forward(batch))
    return error.relative_l1


def test_own_errors_of_one_pass_are_those_of_each_layer_alone(bench):
    switch = sensitivity.Switch(bench.model)
    batches = list(bench.frames('val', 2))
    found = sensitivity.local_errors(switch, bench.forward, batches)
    assert set(found) == {n for n, _ in lifecycle.units(bench.model)}
    for name in switch.names:
        slow = ErrorSums()
        for batch in batches:
            outputs = []
            handle = switch.unit(name).register_forward_hook(lambda m, a, o, k=outputs: k.append(o.clone()))
            with switch.restored():
                for quantized in ((), {name}):
                    switch.only(quantized)
                    bench.forward(batch)
            handle.remove()
            slow.add(*outputs)
        assert found[name].l1 == pytest.approx(slow.l1, rel=1e-6), name
        assert found[name].cosine == pytest.approx(slow.cosine, rel=1e-6), name
        assert found[name].l1 > 0, name


def test_what_a_relu_removes_is_no_error_of_the_addition_before_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = QuantAdd(before_relu=True)

        def forward(self, batch):
            return {'out': self.add(*batch).relu()}

    torch.manual_seed(0)
    a, b = torch.rand(1000), torch.rand(1000) - 0.5
    b[:300] = -100 * b[:300].abs()  # far below the range of the places where the sum is positive
    model, batches = Block().eval(), [(a, b)]
    lifecycle.configure(model, Recipe.from_dict({}))
    lifecycle.calibrate(model, batches, model)
    sums = sensitivity.local_errors(sensitivity.Switch(model), model, batches)['add']
    with torch.no_grad():
        expected = (model.add(a, b).relu() - (a + b).relu()).abs().mean().item()
    assert sums.l1 == pytest.approx(expected, rel=1e-5)
    assert 0 < sums.relative_l1 < 0.02


def test_measuring_leaves_the_model_as_it_was(bench):
    batch = next(iter(bench.frames('val', 1)))
    before = bench.forward(batch)
    switch = sensitivity.Switch(bench.model)
    sensitivity.local_errors(switch, bench.forward, [batch])
    replay = Replay(bench.model, bench.forward)
    sensitivity.output_errors(switch, replay, [batch], {n: {n} for n in switch.names})
    after = bench.forward(batch)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_effect_on_the_outputs_is_that_of_a_model_with_one_quantized_layer(bench):
    switch, batches = sensitivity.Switch(bench.model), list(bench.frames('val', 2))
    replay = Replay(bench.model, bench.forward)
    names = ['stem.0', 'block.add', 'concat', 'head.heat.0']
    alone, base = sensitivity.output_errors(switch, replay, batches, {n: {n} for n in names})
    assert base.relative_l1 == 0
    for name in names:
        assert alone[name].relative_l1 == pytest.approx(by_hand(bench, [name], batches), rel=1e-5), name
    others = set(switch.names)
    reverse, everything = sensitivity.output_errors(
        switch, replay, batches, {n: others - {n} for n in names}, others
    )
    assert everything.relative_l1 == pytest.approx(by_hand(bench, others, batches), rel=1e-5)
    for name in names:
        expected = by_hand(bench, others - {name}, batches)
        assert reverse[name].relative_l1 == pytest.approx(expected, rel=1e-5), name


def test_nan_of_a_layer_stays_in_its_row(bench):
    bench.model.head.box[2].weight_quantizer._amax[1] = float('nan')
    switch, batches = sensitivity.Switch(bench.model), list(bench.frames('val', 2))
    local = sensitivity.local_errors(switch, bench.forward, batches)
    alone, _ = sensitivity.output_errors(
        switch, Replay(bench.model, bench.forward), batches, {n: {n} for n in switch.names}
    )
    kinds = {n: switch.unit(n).kind for n in switch.names}
    rows = sensitivity.rows_of(kinds, local, alone, {}, {})
    assert rows[0].name == 'head.box.2'
    assert rows[0].nan == rows[0].output_nan == 2 * 16 * 16
    # The other channels of that layer are measured all the same.
    assert 0 < rows[0].relative_l1 < 1
    for row in rows[1:]:
        assert row.broken == 0 and row.l1 > 0 and row.output_l1 > 0, row.name


def test_nan_in_the_float_model_does_not_end_the_calibration():
    bench = ToyBench()
    bench._float_state['down.0.bias'][0] = float('nan')
    frames = bench.frames('train', 2)

    def strict():
        bench.prepare(bench.recipe, frames)

    with pytest.raises(Q3DError, match='NaN or Inf'):
        strict()
    came = sensitivity.calibrate(bench.model, frames, bench.forward, strict)
    assert sorted(came) == ['concat', 'head.box.0', 'head.box.2', 'head.heat.0', 'head.heat.2', 'up']
    switch = sensitivity.Switch(bench.model)
    local = sensitivity.local_errors(switch, bench.forward, frames)
    assert local['stem.0'].l1 > 0 and local['stem.0'].float_nonfinite == 0
    assert local['down.0'].float_nonfinite == 2 * 8 * 8
    assert local['down.0'].l1 > 0


def test_skip_list_keeps_the_budget_with_no_more_layers_than_needed(bench):
    switch, batches = sensitivity.Switch(bench.model), list(bench.frames('val', 2))
    replay = Replay(bench.model, bench.forward)
    alone, _ = sensitivity.output_errors(switch, replay, batches, {n: {n} for n in switch.names})
    ranking = sorted(switch.names, key=lambda n: alone[n].relative_l1, reverse=True)
    everything = set(switch.names)

    def error_without(names):
        return by_hand(bench, everything.difference(names), batches)

    whole = error_without(())
    found = sensitivity.choose_skips(
        switch, replay, batches, ranking, 0.6 * whole, 9, 20, trial_frames=2, progress=False
    )
    assert found.kept
    assert found.lengths[0] == 0 and found.lengths[-1] == len(found.names)
    for length, error in zip(found.lengths, found.errors):
        assert error == pytest.approx(error_without(found.names[:length]), rel=1e-5)
    assert found.errors[0] == pytest.approx(whole, rel=1e-5)
    assert found.errors[-1] == pytest.approx(error_without(found.names), rel=1e-5)
    assert found.errors[-1] <= 0.6 * whole
    # No shorter list of these layers does it.
    for shorter in itertools.combinations(found.names, len(found.names) - 1):
        assert error_without(shorter) > 0.6 * whole
    # A budget that cannot be kept is not said to be.
    short = sensitivity.choose_skips(switch, replay, batches, ranking, 0.0, 2, 1, progress=False)
    assert not short.kept and len(short.names) == 2 and short.lengths == [0, 1, 2]
    assert short.errors[-1] == pytest.approx(error_without(short.names), rel=1e-5)
    assert short.errors[-1] < whole


def test_groups_by_depth_and_by_pattern():
    names = ['neck.0', 'head.a.0', 'head.b.0']
    by_depth = {'neck.0': ['neck.0'], 'head.a': ['head.a.0'], 'head.b': ['head.b.0']}
    assert sensitivity.groups_of(names, '2') == by_depth
    assert sensitivity.groups_of(names, '*a.0,neck') == {'*a.0': ['head.a.0'], 'neck': ['neck.0']}
    with pytest.raises(Q3DError, match='spine'):
        sensitivity.groups_of(names, 'spine')
    with pytest.raises(Q3DError, match='depth'):
        sensitivity.groups_of(names, ',')
