"""QuantHook in MMEngine's runner, on a tiny generated data set."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import converted
from q3d_plugin.quantizer import Stage

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = {'calibration': {'frames': 2}, 'activation': {'calibrator': 'max'}}


def saved(work_dir):
    return Path((Path(work_dir) / 'last_quantized').read_text().strip())


def messages(caplog):
    return '\n'.join(r.getMessage() for r in caplog.records)


def test_ptq_is_saved_and_gives_the_same_numbers_again(runner, float_checkpoint, tmp_path):
    recipe = {**RECIPE, 'skip': ['*task_heads.0.heatmap.1']}
    first = runner(float_checkpoint, recipe)
    metrics = first.test()
    path = saved(first.work_dir)
    assert path.parent == Path(first.log_dir)
    content = torch.load(path, weights_only=True)
    assert content['meta']['q3d']['recipe']['skip'] == recipe['skip']
    assert not [k for k in content['state_dict'] if 'task_heads.0.heatmap.1.' in k and 'quantizer' in k]
    rows = json.loads((Path(first.log_dir) / 'coverage.json').read_text())
    assert [r['name'] for r in rows if not r['quantized']] == ['pts_bbox_head.task_heads.0.heatmap.1']

    again = runner(path, recipe, work_dir=tmp_path / 'again')
    repeated = again.test()
    assert not (tmp_path / 'again' / 'last_quantized').exists()
    assert metrics.keys() == repeated.keys()
    for key, value in metrics.items():
        assert value == repeated[key] or (value != value and repeated[key] != repeated[key]), key
    for a, b in zip(lifecycle.quantizers(first.model), lifecycle.quantizers(again.model)):
        assert a.mode == b.mode and torch.equal(a._amax, b._amax)


def test_a_smoothed_model_is_saved_and_not_smoothed_again(runner, float_checkpoint, tmp_path):
    recipe = {**RECIPE, 'smoothquant': {'alpha': 'search', 'grid': [0.5]}}
    first = runner(float_checkpoint, recipe)
    metrics = first.test()
    rows = json.loads((Path(first.log_dir) / 'coverage.json').read_text())
    smoothed = [r['smoothquant'] for r in rows if r['smoothquant']]
    assert len(smoothed) == 108 and sum(s['explicit'] for s in smoothed) <= 1
    assert {s['alpha'] for s in smoothed} <= {None, 0.25, 0.5, 0.75}

    again = runner(saved(first.work_dir), recipe, work_dir=tmp_path / 'again')
    repeated = again.test()
    for key, value in metrics.items():
        assert value == repeated[key] or (value != value and repeated[key] != repeated[key]), key
    for (name, a), b in zip(first.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all(), name
    with pytest.raises(Q3DError, match=r'another recipe.*recipe\.smoothquant'):
        runner(saved(first.work_dir), RECIPE, work_dir=tmp_path / 'other').test()


def test_the_same_frames_are_chosen_by_seed(runner, float_checkpoint):
    from q3d_plugin.mmdet3d.data import calibration_loader, frame_name
    from q3d_plugin.recipe import CalibrationSpec

    cfg = runner().cfg
    logger = logging.getLogger('test')
    chosen = []
    for seed in (0, 0, 1, 2, 3):
        loader, count = calibration_loader(cfg, CalibrationSpec(frames=2, seed=seed), logger)
        chosen.append(tuple(frame_name(batch) for batch in loader))
        assert count == 2 and len(set(chosen[-1])) == 2
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1
    # The frames are of the training scene, seen through the test pipeline.
    train = {str(i['lidar_points']['lidar_path']) for i in _infos(cfg, 'train')}
    assert {Path(name).name for frames in chosen for name in frames} <= {Path(t).name for t in train}


def _infos(cfg, split):
    import mmengine

    root = cfg.test_dataloader.dataset.data_root
    return mmengine.load(f'{root}nuscenes_infos_{split}.pkl')['data_list']


def test_more_frames_than_there_are_is_said_and_all_are_used(runner, float_checkpoint, caplog):
    made = runner(float_checkpoint, {'calibration': {'frames': 500}})
    made.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        made.call_hook('before_run')
        made.load_or_resume()
        made.call_hook('before_test')
    assert '500 were asked for' in messages(caplog) and 'has 3' in messages(caplog)
    assert Stage.UNCALIBRATED not in {q.stage for q in lifecycle.quantizers(made.model)}


@pytest.mark.parametrize(
    ('recipe', 'words'),
    [
        ({'wieght': {}}, ['recipe.wieght', "'weight'"]),
        ({'weight': {'bits': 0}}, ['recipe.weight.bits', '0', '2 to 16']),
        ({'activation': {'bits': 33}}, ['recipe.activation.bits', '33', '2 to 16']),
        ({'calibration': {'frames': 0}}, ['recipe.calibration.frames', '0', 'from 1']),
    ],
)
def test_a_bad_recipe_fails_while_the_runner_is_made(runner, recipe, words):
    with pytest.raises(ValueError) as error:
        runner(recipe=recipe)
    assert all(word in str(error.value) for word in words)


def test_a_pattern_that_matches_nothing_fails_before_data_is_read(runner, float_checkpoint):
    made = runner(float_checkpoint, {'skip': ['pts_bbox_head.task_heads.0.heatmap.7']})
    with pytest.raises(Q3DError, match=r'recipe.skip\[0\].*heatmap\.7.*did you mean.*heatmap\.1'):
        made.test()


def test_a_recipe_without_quant_types(runner, float_checkpoint):
    made = runner(float_checkpoint, RECIPE, config='toy_centerpoint_voxel.py')
    with pytest.raises(Q3DError, match='Quant type'):
        made.test()


def test_checkpoint_of_another_model(runner, tmp_path, build_model):
    path = tmp_path / 'other.pth'
    torch.save({'state_dict': torch.nn.Linear(3, 3).state_dict()}, path)
    with pytest.raises(Q3DError, match='other.pth.*of another model.*is missing'):
        runner(path, RECIPE).test()
    state = build_model('toy_centerpoint_voxel.py').state_dict()
    key = 'pts_backbone.blocks.0.3.weight'
    state[key] = state[key][:, :-1]
    torch.save({'state_dict': state}, path)
    with pytest.raises(Q3DError, match='has the shape'):
        runner(path, RECIPE).test()


def test_checkpoint_of_openpcdet(runner, tmp_path):
    path = tmp_path / 'other.pth'
    torch.save({'model_state': torch.nn.Linear(3, 3).state_dict(), 'epoch': 20}, path)
    with pytest.raises(Q3DError, match=r'other\.pth.*of OpenPCDet.*--cfg_file'):
        runner(path, RECIPE).test()


def test_truncated_checkpoint(runner, float_checkpoint, tmp_path):
    path = tmp_path / 'cut.pth'
    path.write_bytes(float_checkpoint.read_bytes()[:-2000])
    with pytest.raises(Q3DError, match='cut.pth.*truncated'):
        runner(path, RECIPE).test()


def test_quantized_checkpoint_of_another_recipe(runner, float_checkpoint):
    made = runner(float_checkpoint, RECIPE)
    made.call_hook('before_run')
    made.load_or_resume()
    made.call_hook('before_test')
    other = {**RECIPE, 'weight': {'calibrator': 'mse'}, 'skip': ['pts_neck']}
    words = r"another recipe.*recipe.weight.calibrator: 'max' and 'mse'.*recipe.skip"
    with pytest.raises(Q3DError, match=words):
        runner(saved(made.work_dir), other).test()
    with pytest.raises(Q3DError, match=r"another target: 'tensorrt', and recipe.target is 'openvino'"):
        runner(saved(made.work_dir), {**RECIPE, 'target': 'openvino'}).test()
    # Fewer calibration frames are no other recipe: nothing is calibrated.
    runner(saved(made.work_dir), {**RECIPE, 'calibration': {'frames': 1}}).test()


def test_nan_names_layer_and_frame(runner, float_checkpoint, tmp_path):
    content = torch.load(float_checkpoint, weights_only=True)
    content['state_dict']['pts_backbone.blocks.1.3.weight'][0] = float('nan')
    path = tmp_path / 'nan.pth'
    torch.save(content, path)
    made = runner(path, RECIPE)
    with pytest.raises(Q3DError, match=r'NaN or Inf.*pts_backbone\.blocks\.1\.6.*LIDAR_TOP.*\.bin'):
        made.test()
    assert not (Path(made.work_dir) / 'last_quantized').exists()


def test_a_layer_without_data_is_named_and_left_float(runner, float_checkpoint, caplog):
    made = runner(float_checkpoint, RECIPE)
    made.logger.addHandler(caplog.handler)
    extra = made.model.pts_bbox_head.extra = converted(torch.nn.Conv2d(4, 4, 1))
    # Not in the checkpoint either, so it is put there.
    content = torch.load(float_checkpoint, weights_only=True)
    content['state_dict']['pts_bbox_head.extra.weight'] = extra.weight.detach()
    content['state_dict']['pts_bbox_head.extra.bias'] = extra.bias.detach()
    made.call_hook('before_run')
    made.call_hook('after_load_checkpoint', checkpoint=content)
    with caplog.at_level(logging.WARNING):
        made.call_hook('before_test')
    assert messages(caplog).count('saw no data') == 1 and 'pts_bbox_head.extra' in messages(caplog)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(extra(x), torch.nn.functional.conv2d(x, extra.weight, extra.bias))


def test_work_dir_that_cannot_be_written(float_checkpoint, tmp_path):
    in_the_way = tmp_path / 'file'
    in_the_way.write_text('')
    config = REPOSITORY / 'configs' / 'mmdet3d' / 'toy_centerpoint_voxel_w8a8.py'
    command = [sys.executable, REPOSITORY / 'tools' / 'test.py', config, float_checkpoint]
    done = subprocess.run(
        [*map(str, command), '--work-dir', str(in_the_way / 'work')], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('q3d_plugin: work_dir') and 'Traceback' not in done.stderr


def test_kill_during_calibration_leaves_no_checkpoint(toy_root, float_checkpoint, tmp_path):
    config = REPOSITORY / 'configs' / 'mmdet3d' / 'toy_centerpoint_voxel_w8a8.py'
    data = f'{toy_root}/'
    command = [
        *(sys.executable, REPOSITORY / 'tools' / 'test.py', config, float_checkpoint),
        *('--work-dir', tmp_path / 'work', '--cfg-options', f'train_dataloader.dataset.data_root={data}'),
        *(f'test_dataloader.dataset.data_root={data}', f'test_evaluator.data_root={data}'),
        f'test_evaluator.ann_file={data}nuscenes_infos_val.pkl',
    ]
    log = tmp_path / 'log'
    with log.open('w') as f:
        process = subprocess.Popen([str(c) for c in command], stdout=f, stderr=f, start_new_session=True)
        for _ in range(1200):
            if 'QuantHook: calibrating' in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, log.read_text()[-2000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 'quantized checkpoint saved' not in log.read_text()
    assert not [p for p in (tmp_path / 'work').rglob('*') if p.suffix in ('.pth', '.tmp') or 'last' in p.name]


def test_train_needs_qat_and_a_checkpoint(runner, float_checkpoint):
    with pytest.raises(Q3DError, match="'ptq' does not train"):
        runner(float_checkpoint, RECIPE).train()
    with pytest.raises(Q3DError, match='load_from'):
        runner(None, {**RECIPE, 'mode': 'qat'}).train()


@pytest.mark.parametrize('smoothquant', [None, {'alpha': 0.5}], ids=['plain', 'smoothed'])
def test_qat_trains_saves_resumes_and_is_tested(runner, float_checkpoint, tmp_path, smoothquant):
    recipe = {**RECIPE, 'mode': 'qat', 'smoothquant': smoothquant}
    changes = {
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 99,
        'train_dataloader.batch_size': 1,
        'param_scheduler': [dict(type='ConstantLR', factor=1.0)],
        'optim_wrapper.optimizer.lr': 1e-4,
    }
    first = runner(float_checkpoint, recipe, work_dir=tmp_path / 'qat', **changes)
    before = {n: p.detach().clone() for n, p in first.model.named_parameters()}
    first.train()
    after = dict(first.model.named_parameters())
    moved = [n for n, p in before.items() if not torch.equal(p, after[n].cpu())]
    assert len(moved) > 0.9 * len(before)
    path = tmp_path / 'qat' / 'epoch_1.pth'
    ranges = [q._amax.clone() for q in lifecycle.quantizers(first.model)]

    resumed = runner(
        path, recipe, work_dir=tmp_path / 'qat', **{**changes, 'train_cfg.max_epochs': 2, 'resume': True}
    )
    resumed.train()
    assert resumed.epoch == 2
    for a, q in zip(ranges, lifecycle.quantizers(resumed.model)):
        assert torch.equal(a, q._amax)

    training = {'ranges': {'scale': 'linear'}, 'schedule': {'learn_until': 1.0}}
    for start, given, words in (
        (path, training, r"ranges\.scale: 'log2' and 'linear'.*\.learn_until: None and 1"),
        (float_checkpoint, None, 'cannot resume from it: it has no recipe'),
    ):
        other = {**recipe, **({'training': given} if given else {})}
        other = runner(start, other, work_dir=tmp_path / 'other', **{**changes, 'resume': True})
        with pytest.raises(Q3DError, match=words):
            other.train()

    tested = runner(path, {**recipe, 'mode': 'ptq', 'training': training}, work_dir=tmp_path / 'tested')
    tested.test()
    assert not (tmp_path / 'tested' / 'last_quantized').exists()
