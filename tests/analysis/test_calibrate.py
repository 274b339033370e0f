"""Calibration that counts NaN and Inf instead of ending there, beside the calibration of a run."""

import pytest
import torch
from analysis_toys import ToyBench, toy_recipe

from q3d_plugin import lifecycle
from q3d_plugin.analysis.calibrate import calibrate
from q3d_plugin.analysis.sensitivity import local_errors
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.errors import Q3DError

BEHIND = ['concat', 'head.box.0', 'head.box.2', 'head.heat.0', 'head.heat.2', 'up']
"""The layers that the output of ``down.0`` comes to."""


def state(bench):
    return {k: v.clone() for k, v in bench.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    'changes', [{}, {'smoothquant': {'alpha': 0.5}}, {'activation': {'range': 'dynamic'}}, {'weight': None}]
)
def test_without_nan_it_is_the_calibration_of_a_run(changes):
    recipe = toy_recipe(**changes)
    a, b = ToyBench(), ToyBench()
    a.prepare(recipe)
    # Whatever the model was before.
    b.prepare(toy_recipe(weight={'bits': 3}, smoothquant={'alpha': 1.0}))
    made = calibrate(b, recipe)
    assert made.frames == 3 and not made.nonfinite and not made.left_float and not made.warning()
    assert same(state(a), state(b)) and b.recipe == recipe


def test_a_layer_that_is_given_nan_in_every_frame_stays_float():
    bench = ToyBench()
    bench._float_state['down.0.bias'][0] = float('nan')
    frames = bench.frames('train', 2)
    with pytest.raises(Q3DError, match='NaN or Inf'):
        bench.prepare(bench.recipe, frames)
    made = calibrate(bench, bench.recipe, frames)
    assert sorted(made.nonfinite) == sorted(made.left_float) == BEHIND
    assert all(made.nonfinite[name] == 2 for name in BEHIND)
    assert all(note.endswith('in 2 of 2 calibration frames: left float') for note in made.notes().values())
    switch = Switch(bench.model)
    assert sorted(switch.names) == ['block.add', 'block.conv1', 'block.conv2', 'down.0', 'stem.0']
    local = local_errors(switch, bench.forward, frames)
    assert local['stem.0'].l1 > 0 and local['stem.0'].float_nonfinite == 0
    assert local['down.0'].float_nonfinite == 2 * 8 * 8
    assert local['down.0'].l1 > 0


def test_a_layer_that_is_given_nan_in_some_frames_has_the_range_of_the_others():
    bench, clean = ToyBench(), ToyBench()
    frames = list(bench.frames('train', 3))
    clean.prepare(clean.recipe, [frames[0], frames[2]])
    frames[1] = frames[1].clone()
    frames[1][0, 0, 3, 3] = float('inf')
    made = calibrate(bench, bench.recipe, frames)
    units = [name for name, _ in lifecycle.units(bench.model)]
    assert list(made.nonfinite) == units and made.left_float == ()
    assert set(made.nonfinite.values()) == {1} and made.frames == 3
    assert made.notes()['stem.0'].endswith('in 1 of 3 calibration frames: its range is of the others')
    assert same(state(bench), state(clean))
    assert Switch(bench.model).names == units
