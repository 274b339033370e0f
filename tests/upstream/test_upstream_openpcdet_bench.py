"""The bench and the benchmark on the real OpenPCDet: set OPENPCDET_ROOT to a checkout to run these."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from q3d_plugin.analysis.calibrate import calibrate
from q3d_plugin.analysis.opening import open_bench
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.commands import benchmark
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.usefixtures('spconv_without_mmdet3d'),
]

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'openpcdet'
CONFIG, CHECKPOINT = (str(CONFIGS / f'toy_centerpoint_voxel{end}') for end in ('_w8a8.yaml', '.pth'))


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    """The toy detector on a data set without frames."""
    before = Path.cwd()
    made = open_bench(CONFIG, CHECKPOINT, {'DATA_CONFIG.DATA_PATH': str(tmp_path_factory.mktemp('empty'))})
    # OpenPCDet reads configs relative to its own folder; nobody else's paths may change by that.
    assert Path.cwd() == before
    return made


@pytest.fixture(scope='module')
def points():
    """A frame: (2000, 5) x, y, z, intensity, time lag."""
    draw = np.random.default_rng(0)
    spread = draw.normal(size=(2000, 3)) * [15, 15, 0.6]
    points = np.concatenate([spread, draw.uniform(0, 255, (2000, 1)), np.zeros((2000, 1))], 1)
    return points.astype(np.float32)


@pytest.fixture(scope='module')
def batch(bench, points):
    item = bench.dataset.prepare_data({'points': points, 'frame_id': 'frame'})
    return bench.prepare_batch(bench.dataset.collate_batch([item]))


def test_raw_outputs_are_those_of_the_heads(bench, batch):
    bench.prepare(Recipe.from_dict({'mode': 'float'}))
    found = bench.forward(batch)
    bench.run(batch)
    expected = bench.model.dense_head.forward_ret_dict['pred_dicts']
    assert set(found) == {f'{i}.{k}' for i, head in enumerate(expected) for k in head}
    assert torch.equal(found['0.center'], expected[0]['center'])


def test_a_recipe_after_others_gives_what_it_gives_alone(bench, batch):
    recipe = Recipe.from_dict({'calibration': {'frames': 1}})
    bench.prepare(recipe, [batch])
    alone = bench.forward(batch)
    bench.prepare(Recipe.from_dict({'target': 'simulation', 'weight': {'bits': 3}}), [batch])
    other = bench.forward(batch)
    bench.prepare(recipe, [batch])
    again = bench.forward(batch)
    assert all(torch.equal(alone[k], again[k]) for k in alone)
    assert not torch.equal(alone['0.hm'], other['0.hm'])


def test_the_calibration_of_the_analysis_is_that_of_a_run(bench, batch):
    recipe = Recipe.from_dict({'calibration': {'frames': 1}})
    bench.prepare(recipe, [batch])
    expected = {k: v.clone() for k, v in bench.model.state_dict().items()}
    assert not calibrate(bench, recipe, [batch]).nonfinite
    assert bench.recipe == bench.model.quant_recipe == recipe
    found = bench.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(v, found[k]) for k, v in expected.items())


def test_partial_passes_are_whole_passes(bench, batch):
    bench.prepare(Recipe.from_dict({'calibration': {'frames': 1}}), [batch])
    switch, replay = Switch(bench.model), Replay(bench.model, bench.forward)
    names = ['backbone_3d.conv2.1.add', 'backbone_2d.blocks.1.4', 'dense_head.heads_list.3.vel.1']
    computed = {}
    with switch.restored(), torch.no_grad():
        slow = {}
        for name in names:
            switch.only({name})
            slow[name] = bench.forward(batch)
        switch.only(())
        with replay.installed():
            replay.record(batch)
            for name in names:
                switch.set(name, True)
                found = replay.replay(batch, [name])
                switch.set(name, False)
                computed[name] = len(replay.computed)
                assert all(torch.equal(found[k], v) for k, v in slow[name].items()), name
    assert computed[names[2]] == 1 < computed[names[1]] < computed[names[0]] < len(switch.names)


def test_an_unknown_key_of_the_config_is_refused(tmp_path):
    with pytest.raises(Q3DError, match='--set.*no such key'):
        open_bench(CONFIG, CHECKPOINT, {'DATA_CONFIG.DATA_PAHT': str(tmp_path)})


def test_a_batch_of_points_is_that_of_the_data_set(bench, batch, points):
    made = bench.adapter.points_batch(bench.model, points)
    assert bench.adapter.voxels(made) == bench.adapter.voxels(batch) > 0
    # The points were shuffled before they were voxelized.
    order = [np.lexsort(b['voxel_coords'].numpy().T) for b in (made, batch)]
    assert torch.equal(made['voxel_coords'][order[0]], batch['voxel_coords'][order[1]])


def test_the_benchmark_measures_it_too(points, tmp_path, capsys):
    points.tofile(tmp_path / 'frame.bin')
    options = ['--frame', str(tmp_path / 'frame.bin'), '--out', str(tmp_path / 'result.json')]
    assert benchmark.main(['--config', CONFIG, '--repeats', '1', '--entropy-tensors', '0', *options]) == 0
    content = json.loads((tmp_path / 'result.json').read_text())
    assert content['config'] == Path(CONFIG).name and content['points'] == 2000 and content['voxels'] > 500
    assert content['activations'] > 50 and content['weights'] > 50
    errors = {row['name']: row['value'] for row in content['rows'] if row['section'] == 'error'}
    assert errors['max'] == pytest.approx(1) and errors['mse'] < 1
