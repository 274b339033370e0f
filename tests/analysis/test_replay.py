"""Partial passes against whole ones."""

import pytest
import torch
from analysis_toys import DictToy, Toy, ToyBench

from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.sensitivity import Switch


@pytest.fixture(params=[Toy, DictToy])
def bench(request):
    bench = ToyBench(model_class=request.param)
    bench.prepare(bench.recipe)
    return bench


def test_replay_gives_what_a_whole_pass_gives_for_every_layer(bench):
    switch, replay = Switch(bench.model), Replay(bench.model, bench.forward)
    batch = next(iter(bench.frames('val', 1)))
    with switch.restored():
        for base in ((), switch.names):
            slow = {}
            for name in switch.names:
                switch.only(set(base) ^ {name})
                slow[name] = bench.forward(batch)
            switch.only(base)
            with replay.installed():
                replay.record(batch)
                for name in switch.names:
                    switch.set(name, name not in base)
                    outputs = replay.replay(batch, [name])
                    switch.set(name, name in base)
                    for key, value in slow[name].items():
                        assert torch.equal(outputs[key], value), (name, key)


def test_replay_computes_only_what_depends_on_the_change(bench):
    switch, replay = Switch(bench.model), Replay(bench.model, bench.forward)
    batch = next(iter(bench.frames('val', 1)))
    with switch.restored(), replay.installed():
        switch.only(())
        whole = replay.record(batch)
        switch.set('head.box.2', True)
        outputs = replay.replay(batch, ['head.box.2'])
        assert replay.computed == ['head.box.2']
        assert outputs['heat'] is whole['heat']
        assert not torch.equal(outputs['box'], whole['box'])
        # Nothing changed, nothing computed.
        switch.set('head.box.2', False)
        assert torch.equal(replay.replay(batch, [])['box'], whole['box'])
        assert replay.computed == []


def test_another_batch_is_not_taken_for_the_recorded_one(bench):
    replay = Replay(bench.model, bench.forward)
    first, second = bench.frames('val', 2)
    with replay.installed():
        replay.record(first)
        outputs = replay.replay(second, [])
    assert torch.equal(outputs['box'], bench.forward(second)['box'])


def test_a_tensor_that_was_written_into_is_computed_again():
    bench = ToyBench()
    bench.prepare(bench.recipe)
    replay = Replay(bench.model, bench.forward)
    batch = next(iter(bench.frames('val', 1)))
    with replay.installed():
        replay.record(batch)
        batch.add_(1.0)
        outputs = replay.replay(batch, [])
    assert torch.equal(outputs['box'], bench.forward(batch)['box'])


def test_the_model_is_left_as_it_was(bench):
    relus = [m for m in bench.model.modules() if isinstance(m, torch.nn.ReLU)]
    with Replay(bench.model, bench.forward).installed():
        assert not any(m.inplace for m in relus)
        assert any('forward' in m.__dict__ for m in bench.model.modules())
    assert all(m.inplace for m in relus)
    assert not any('forward' in m.__dict__ for m in bench.model.modules())
