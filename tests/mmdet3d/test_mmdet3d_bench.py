"""The interface of the analysis to MMDetection3D: outputs, frames, metric."""

import pytest
import torch
from mmengine.config import Config

from q3d_plugin import lifecycle
from q3d_plugin.analysis.opening import open_bench
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe

CONFIG = 'configs/mmdet3d/toy_centerpoint_voxel_w8a8.py'


@pytest.fixture(scope='module')
def bench(toy_root, float_checkpoint):
    root, options = f'{toy_root}/', {}
    for loader in ('train', 'val', 'test'):
        options[f'{loader}_dataloader.dataset.data_root'] = root
        options[f'{loader}_dataloader.num_workers'] = '0'
        options[f'{loader}_dataloader.persistent_workers'] = 'False'
    for evaluator in ('val', 'test'):
        options[f'{evaluator}_evaluator.data_root'] = root
        options[f'{evaluator}_evaluator.ann_file'] = f'{root}nuscenes_infos_val.pkl'
    return open_bench(CONFIG, str(float_checkpoint), options)


def test_outputs_are_those_of_the_head_and_can_be_had_again(bench):
    lifecycle.set_enabled(bench.model, False)
    batch = next(iter(bench.frames('val', 1)))
    first, second = bench.forward(batch), bench.forward(batch)
    with torch.no_grad():
        tasks = bench.model.pts_bbox_head(bench.model.extract_feat(batch['inputs'], [{}])[1])
    expected = {f'{i}.0.{k}': v for i, task in enumerate(tasks) for k, v in task[0].items()}
    assert set(first) == set(second) == set(expected)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]) and torch.allclose(first[key], value)
    lifecycle.set_enabled(bench.model, True)


def test_a_recipe_after_others_gives_what_it_gives_alone(bench):
    frames = list(bench.frames('train', 2))
    recipe = Recipe.from_dict({'target': 'simulation', 'calibration': {'frames': 2}})
    bench.prepare(recipe, frames)
    alone = bench.forward(frames[0])
    bench.prepare(
        Recipe.from_dict({'target': 'simulation', 'weight': {'bits': 3}, 'skip': ['pts_neck']}), frames
    )
    other = bench.forward(frames[0])
    bench.prepare(recipe, frames)
    again = bench.forward(frames[0])
    assert all(torch.equal(alone[k], again[k]) for k in alone)
    assert not any(torch.equal(alone[k], other[k]) for k in alone)


def test_partial_passes_of_the_detector(bench):
    frames = list(bench.frames('train', 1))
    bench.prepare(Recipe.from_dict({'target': 'simulation', 'calibration': {'frames': 1}}), frames)
    switch, replay = Switch(bench.model), Replay(bench.model, bench.forward)
    names = ['pts_middle_encoder.conv_out.0', 'pts_backbone.blocks.1.3', 'pts_bbox_head.task_heads.5.vel.1']
    with switch.restored(), torch.no_grad():
        slow, computed = {}, {}
        for name in names:
            switch.only({name})
            slow[name] = bench.forward(frames[0])
        switch.only(())
        with replay.installed():
            replay.record(frames[0])
            for name in names:
                switch.set(name, True)
                found = replay.replay(frames[0], [name])
                switch.set(name, False)
                computed[name] = len(replay.computed)
                assert all(torch.equal(found[k], v) for k, v in slow[name].items()), name
    # A layer of a branch costs itself; one of the backbone nothing that comes before it.
    assert computed[names[2]] == 1
    assert computed[names[1]] < computed[names[0]] < len(switch.names)


@pytest.mark.filterwarnings('ignore')
def test_the_metric_is_the_frameworks(bench, runner, float_checkpoint, tmp_path):
    bench.prepare(Recipe.from_dict({'target': 'simulation', 'mode': 'float'}))
    mine = bench.evaluate(tmp_path / 'kept')
    theirs = runner(float_checkpoint, recipe=dict(mode='float')).test()
    key = 'NuScenes metric/pred_instances_3d_NuScenes/mAP'
    assert mine['mAP'] == pytest.approx(theirs[key]) and set(mine['AP']) == set(bench.classes)
    assert list((tmp_path / 'kept').rglob('results_nusc.json'))


@pytest.mark.parametrize(
    'text, words',
    [
        ('model = dict(type="QuantSECOND")\n', 'no QuantHook'),
        ('x = 1\n', 'no model'),
        ('x = (\n', 'cannot be read'),
    ],
)
def test_configs_that_cannot_be_examined(tmp_path, float_checkpoint, text, words):
    path = tmp_path / 'config.py'
    path.write_text(text)
    with pytest.raises(Q3DError, match=words):
        open_bench(str(path), str(float_checkpoint))


def test_files_that_are_not_there(tmp_path, float_checkpoint):
    with pytest.raises(Q3DError, match='not a file'):
        open_bench('nowhere.py', str(float_checkpoint))
    with pytest.raises(Q3DError, match='not a file'):
        open_bench(CONFIG, str(tmp_path / 'nowhere.pth'))
    with pytest.raises(Q3DError, match='would work'):
        open_bench('config.txt', str(float_checkpoint))


def test_a_run_keeps_its_detections_and_its_record(runner, float_checkpoint, tmp_path):
    made = runner(float_checkpoint, recipe=dict(calibration=dict(frames=2)))
    made.test()
    folder = tmp_path / 'work'
    assert list(folder.rglob('results_nusc.json')) and list(folder.rglob('histograms.json'))
    record = Config.fromfile(str(next(folder.rglob('run.json'))))
    assert record.recipe.calibration.frames == 2 and record.dataset_version == 'v1.0-mini'
