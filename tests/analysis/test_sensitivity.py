"""Own errors of one pass and effects of partial passes against layers that are quantized alone by hand."""

import pytest
import torch
from analysis_toys import by_hand, calibrated_bench
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.analysis import sensitivity
from q3d_plugin.analysis.measures import ErrorSums
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantAdd
from q3d_plugin.recipe import Recipe


@pytest.fixture
def bench():
    return calibrated_bench()


def test_own_errors_of_one_pass_are_those_of_each_layer_alone(bench):
    switch = Switch(bench.model)
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
    sums = sensitivity.local_errors(Switch(model), model, batches)['add']
    with torch.no_grad():
        expected = (model.add(a, b).relu() - (a + b).relu()).abs().mean().item()
    assert sums.l1 == pytest.approx(expected, rel=1e-5)
    assert 0 < sums.relative_l1 < 0.02


def test_measuring_leaves_the_model_as_it_was(bench):
    batch = next(iter(bench.frames('val', 1)))
    before = bench.forward(batch)
    switch = Switch(bench.model)
    sensitivity.local_errors(switch, bench.forward, [batch])
    replay = Replay(bench.model, bench.forward)
    sensitivity.output_errors(switch, replay, [batch], {n: {n} for n in switch.names})
    after = bench.forward(batch)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_effect_on_the_outputs_is_that_of_a_model_with_one_quantized_layer(bench):
    switch, batches = Switch(bench.model), list(bench.frames('val', 2))
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
    switch, batches = Switch(bench.model), list(bench.frames('val', 2))
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


def test_groups_by_depth_and_by_pattern():
    names = ['neck.0', 'head.a.0', 'head.b.0']
    by_depth = {'neck.0': ['neck.0'], 'head.a': ['head.a.0'], 'head.b': ['head.b.0']}
    assert sensitivity.groups_of(names, '2') == by_depth
    assert sensitivity.groups_of(names, '*a.0,neck') == {'*a.0': ['head.a.0'], 'neck': ['neck.0']}
    with pytest.raises(Q3DError, match='spine'):
        sensitivity.groups_of(names, 'spine')
    with pytest.raises(Q3DError, match='depth'):
        sensitivity.groups_of(names, ',')
