"""Quantization-aware training by MMDetection3D's runner: optimizer, averages, processes, interruption."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from q3d_plugin import lifecycle
from q3d_plugin.errors import Q3DError
from q3d_plugin.safe_load import load
from q3d_plugin.training.distillation import box_loss, feature_loss, heatmap_loss

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CONFIG = REPOSITORY / 'configs' / 'mmdet3d' / 'toy_centerpoint_voxel_w8a8.py'
RECIPE = {
    'mode': 'qat',
    'target': 'simulation',
    'weight': {'bits': 4},
    'activation': {'bits': 4, 'calibrator': 'max'},
    'calibration': {'frames': 2},
}
SHORT = {
    'train_cfg.max_epochs': 1,
    'train_cfg.val_interval': 99,
    'train_dataloader.batch_size': 1,
    'train_dataloader.dataset.indices': 2,
    'param_scheduler': [dict(type='ConstantLR', factor=1.0)],
    'optim_wrapper.optimizer.lr': 1e-3,
}


def recipe_of(distillation=None, schedule=None, **ranges):
    training = dict(ranges=ranges, schedule=schedule or {}, distillation=distillation)
    return {**copy.deepcopy(RECIPE), 'training': training}


def ranges_of(model):
    return [q.amax.clone() for q in lifecycle.quantizers(model)]


@pytest.mark.parametrize('scale', ['linear', 'log2'])
def test_learned_ranges_move_are_saved_and_go_on_after_a_resume(runner, float_checkpoint, tmp_path, scale):
    # Adam moves each range by the rate: a tenth of that of the weights for ranges of 0.1.
    recipe = recipe_of(scale=scale, lr_factor=10.0 if scale == 'log2' else 0.1)
    first = runner(float_checkpoint, recipe, work_dir=tmp_path / 'qat', **SHORT)
    first.train()
    started = load(str(next((tmp_path / 'qat').rglob('quantized.pth'))))['state_dict']
    path = tmp_path / 'qat' / 'epoch_1.pth'
    saved = load(str(path))  # as plain data: nothing in it runs code
    moved = [
        k for k, v in started.items() if k.endswith('_amax') and not torch.equal(v, saved['state_dict'][k])
    ]
    assert len(moved) > 0.9 * sum(k.endswith('_quantizer._amax') for k in started)
    (group,) = saved['optimizer']['param_groups']
    assert len(group['params']) == len(list(first.model.parameters()))

    more = {**SHORT, 'train_cfg.max_epochs': 2, 'resume': True}
    resumed = runner(path, recipe, work_dir=tmp_path / 'qat', **more)
    state = {}

    class Look(type(resumed.hooks[0]).__mro__[-2]):
        def before_train(self, runner):
            state.update({k: v.clone() for k, v in runner.model.state_dict().items()})
            state['optimizer'] = copy.deepcopy(runner.optim_wrapper.optimizer.state_dict())

    resumed.register_hook(Look(), 'LOWEST')
    resumed.train()
    assert all(torch.equal(state[k], v) for k, v in saved['state_dict'].items())
    for number, mine in state['optimizer']['state'].items():
        assert torch.equal(mine['exp_avg'], saved['optimizer']['state'][number]['exp_avg'])

    tested = runner(path, {**recipe, 'mode': 'ptq', 'training': {}}, work_dir=tmp_path / 'tested')
    tested.test()
    assert not (tmp_path / 'tested' / 'last_quantized').exists()


def test_a_resume_with_another_way_of_training_is_refused(runner, float_checkpoint, tmp_path):
    runner(float_checkpoint, recipe_of(), work_dir=tmp_path / 'qat', **SHORT).train()
    more = {**SHORT, 'train_cfg.max_epochs': 2, 'resume': True}
    path = tmp_path / 'qat' / 'epoch_1.pth'
    with pytest.raises(Q3DError, match=r"recipe\.training\.ranges\.weight: 'learned' and 'fixed'"):
        runner(path, recipe_of(weight='fixed'), work_dir=tmp_path / 'other', **more).train()


def test_an_averaged_model_has_the_ranges_too(runner, float_checkpoint, tmp_path):
    hooks = [
        dict(type='QuantHook', recipe=recipe_of()),
        dict(type='EMAHook', momentum=0.25),
    ]
    made = runner(float_checkpoint, recipe_of(), work_dir=tmp_path / 'ema', custom_hooks=hooks, **SHORT)
    averages = {}

    class Look(type(made.hooks[0]).__mro__[-2]):
        def before_train(self, runner):
            self.steps = []

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.steps.append([p.detach().clone() for p in runner.model.parameters()])

    look = Look()
    made.register_hook(look, 'LOWEST')
    made.train()
    (ema,) = [h for h in made.hooks if type(h).__name__ == 'EMAHook']
    # The first step is copied, the second one averaged with it.
    for name, average, one, two in zip(
        dict(made.model.named_parameters()), ema.ema_model.module.parameters(), *look.steps
    ):
        torch.testing.assert_close(average, 0.75 * one + 0.25 * two, msg=name)
        averages[name] = average
    saved = load(str(tmp_path / 'ema' / 'epoch_1.pth'))['state_dict']
    for name, average in averages.items():
        assert torch.equal(saved[name], average), name
    assert any(name.endswith('_log2_amax') for name in averages)


@pytest.mark.parametrize(
    'changes',
    [
        {'optim_wrapper.accumulative_counts': 2},
        {'optim_wrapper.clip_grad': dict(max_norm=1.0, norm_type=2)},
        {'activation_checkpointing': ['pts_backbone']},
    ],
    ids=['accumulation', 'clipping', 'activation checkpointing'],
)
def test_settings_of_the_framework_work_with_learned_ranges(runner, float_checkpoint, tmp_path, changes):
    made = runner(float_checkpoint, recipe_of(), work_dir=tmp_path / 'qat', **SHORT, **changes)
    steps = []

    class Look(type(made.hooks[0]).__mro__[-2]):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            steps.append(ranges_of(runner.model))

    made.register_hook(Look(), 'LOWEST')
    made.train()
    moved = [not torch.equal(a, b) for a, b in zip(*steps)]
    names = [q.name for q, m in zip(lifecycle.quantizers(made.model), moved) if not m]
    assert sum(moved) > 0.9 * len(moved), names
    assert all(r.isfinite().all() and (r > 0).all() for r in steps[-1])


def test_a_disk_that_is_full_leaves_the_checkpoint_before(runner, float_checkpoint, tmp_path, monkeypatch):
    changes = {**SHORT, 'train_cfg.max_epochs': 2}
    save = torch.save

    def fill(content, file, *args, **kwargs):
        if isinstance(content, dict) and content.get('meta', {}).get('epoch') == 2:
            getattr(file, 'write', lambda _: None)(b'PK')
            raise OSError(28, 'No space left on device')
        save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, 'save', fill)
    with pytest.raises(OSError, match='No space left'):
        runner(float_checkpoint, recipe_of(), work_dir=tmp_path / 'qat', **changes).train()
    assert (tmp_path / 'qat' / 'last_checkpoint').read_text() == str(tmp_path / 'qat' / 'epoch_1.pth')
    monkeypatch.undo()
    again = runner(None, recipe_of(), work_dir=tmp_path / 'qat', **{**changes, 'resume': True})
    again.train()
    assert again.epoch == 2 and load(str(tmp_path / 'qat' / 'epoch_2.pth'))['meta']['epoch'] == 2


def test_a_range_that_reaches_zero_stops_training_before_a_checkpoint(runner, float_checkpoint, tmp_path):
    recipe = recipe_of(scale='linear', lr_factor=1e6)
    made = runner(float_checkpoint, recipe, work_dir=tmp_path / 'qat', **SHORT)
    with pytest.raises(Q3DError, match='the learned range of .*_quantizer'):
        made.train()
    assert not list((tmp_path / 'qat').glob('epoch_*.pth'))


# Distillation.


def test_distillation_compares_with_the_float_model(runner, float_checkpoint, tmp_path, raw_outputs):
    spec = dict(heatmap=2.0, boxes=0.5, features=3.0)
    made = runner(float_checkpoint, recipe_of(spec), work_dir=tmp_path / 'qat', **SHORT)
    seen = []

    class Look(type(made.hooks[0]).__mro__[-2]):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.state = copy.deepcopy(runner.model.state_dict())
            self.batch = runner.model.data_preprocessor(data_batch, True)

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append((self.state, self.batch, {k: float(v) for k, v in outputs.items()}))

    made.register_hook(Look(), 'LOWEST')
    names = {n for n, _ in made.model.named_parameters()}
    made.train()
    state, batch, losses = seen[-1]
    assert not any('teacher' in n for n in state) and names < set(state)

    def outputs(model):
        with torch.no_grad():
            features = model.extract_feat(batch['inputs'], [{}])[1]
            tasks = [task[0] for task in model.pts_bbox_head(features)]
        return features, tasks

    student = made.model
    student.load_state_dict(state)
    mine = outputs(student)
    teacher = runner(float_checkpoint, {**RECIPE, 'mode': 'float'}, work_dir=tmp_path / 'float')
    teacher.model.eval(), teacher.test()
    other = outputs(teacher.model)
    expected = {
        'heatmap': 2 * sum(heatmap_loss(a['heatmap'], b['heatmap']) for a, b in zip(mine[1], other[1])),
        'boxes': 0.5
        * sum(
            box_loss(*({k: v for k, v in t.items() if k != 'heatmap'} for t in (a, b)), b['heatmap'])
            for a, b in zip(mine[1], other[1])
        ),
        'features': 3 * feature_loss(mine[0], other[0]),
    }
    for name, value in expected.items():
        assert losses[f'loss_distill_{name}'] == pytest.approx(value.item(), rel=2e-2), name
    total = sum(v for k, v in losses.items() if 'loss' in k and k != 'loss')
    assert losses['loss'] == pytest.approx(total, rel=1e-4)


def test_a_resume_takes_the_same_teacher(runner, float_checkpoint, tmp_path):
    recipe = recipe_of(dict(features=1.0))
    runner(float_checkpoint, recipe, work_dir=tmp_path / 'qat', **SHORT).train()
    path = tmp_path / 'qat' / 'epoch_1.pth'
    stamped = load(str(path))['meta']['q3d']
    teacher = load(stamped['teacher'])['state_dict']
    more = {**SHORT, 'train_cfg.max_epochs': 2, 'resume': True}
    made = runner(path, recipe, work_dir=tmp_path / 'qat', **more)
    hook = next(h for h in made.hooks if type(h).__name__ == 'QuantHook')
    kept, make = [], hook._make_teacher
    hook._make_teacher = lambda *args: kept.append(make(*args)) or kept[0]
    made.train()
    for name, value in kept[0].named_parameters():
        if '_quantizer' not in name:
            assert torch.equal(value, teacher[name]), name
    # And where it is gone, that is said.
    os.remove(stamped['teacher'])
    with pytest.raises(Q3DError, match='quantized.pth'):
        runner(path, recipe, work_dir=tmp_path / 'qat', **more).train()


def test_a_teacher_of_another_architecture_is_refused(runner, float_checkpoint, tmp_path, build_model):
    path = tmp_path / 'other.pth'
    other = build_model('toy_centerpoint_voxel.py', **{'pts_neck.out_channels': [32, 96]})
    torch.save({'meta': {}, 'state_dict': other.state_dict()}, path)
    made = runner(float_checkpoint, recipe_of(dict(teacher=str(path))), **SHORT)
    with pytest.raises(Q3DError, match='teacher .*of another model'):
        made.train()


# Processes.


def run_ranks(world, folder, toy_root, checkpoint, training, frames=2, dies=False):
    folder.mkdir()
    recipe = {**RECIPE, 'training': training, 'calibration': {'frames': frames}}
    changes = {
        'custom_hooks.0.recipe': recipe,
        'model.pts_bbox_head.type': 'MeanLossHead',
        'load_from': str(checkpoint),
        'work_dir': str(folder / 'work'),
        'launcher': 'pytorch',
        **{k: v for k, v in SHORT.items() if 'scheduler' not in k},
        'param_scheduler': [dict(type='ConstantLR', factor=1.0)],
        'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=1e-3),
        'optim_wrapper.clip_grad': None,
        'train_dataloader.batch_size': 2 // world,
        'train_dataloader.sampler.shuffle': False,
        'model.data_preprocessor.voxel_layer.max_voxels': [5000, 5000],
        **({'dies': True} if dies else {}),
    }
    for name in ('train', 'val', 'test'):
        changes[f'{name}_dataloader.dataset.data_root'] = f'{toy_root}/'
        changes[f'{name}_dataloader.num_workers'] = 0
        changes[f'{name}_dataloader.persistent_workers'] = False
    for name in ('val', 'test'):
        changes[f'{name}_evaluator.data_root'] = f'{toy_root}/'
        changes[f'{name}_evaluator.ann_file'] = f'{toy_root}/nuscenes_infos_val.pkl'
    # Without augmentation, which draws other numbers in other processes.
    pipeline = Config.fromfile(str(CONFIG)).train_pipeline
    drawn = ('GlobalRotScaleTrans', 'RandomFlip3D', 'PointShuffle')
    changes['train_dataloader.dataset.pipeline'] = [s for s in pipeline if s['type'] not in drawn]
    env = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}']
    arguments = [str(HERE / 'qat_ranks.py'), str(CONFIG), str(folder), json.dumps(changes)]
    done = subprocess.run(
        [*command, *arguments], env=env, capture_output=True, text=True, check=False, timeout=300
    )
    if not dies:
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(folder / f'{rank}.pt') for rank in range(world)]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    'frames, ranges',
    [
        # Three frames for two processes, and one: then the other has none.
        (3, dict(scale='linear', lr_factor=1.0)),
        (1, dict(weight='learned', activation='moving')),
    ],
    ids=['linear', 'moving'],
)
def test_two_processes_train_as_one_does(toy_root, float_checkpoint, tmp_path, frames, ranges):
    one, two = (
        run_ranks(world, tmp_path / str(world), toy_root, float_checkpoint, dict(ranges=ranges), frames)
        for world in (1, 2)
    )
    (one,) = one
    for rank in two:
        assert all(torch.equal(a, b) for a, b in zip(one['ranges'], rank['ranges']))
        for name, value in one['parameters'].items():
            torch.testing.assert_close(rank['parameters'][name], value, rtol=1e-5, atol=1e-5, msg=name)
            assert torch.equal(rank['parameters'][name], two[0]['parameters'][name]), name
        for a, b in zip(one['amax'], rank['amax']):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_process_that_dies_in_calibration_ends_the_others(toy_root, float_checkpoint, tmp_path):
    start = time.time()
    done = run_ranks(2, tmp_path / 'dies', toy_root, float_checkpoint, {}, dies=True)
    assert done.returncode != 0 and 'exitcode' in done.stderr and time.time() - start < 120
    assert not list((tmp_path / 'dies').rglob('*.pth'))


# Interruption.


def train_by_command(work_dir, toy_root, checkpoint, epochs, *more, kill_at=''):
    """Runs ``q3d train`` as a user does; kills it as soon as its log has ``kill_at``."""
    options = {
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': 99,
        'train_dataloader.batch_size': 1,
        'optim_wrapper.optimizer.lr': 1e-3,
        'default_hooks.logger.interval': 1,
        'custom_hooks.0.recipe.mode': 'qat',
        'custom_hooks.0.recipe.calibration.frames': 2,
        'load_from': checkpoint,
    }
    for name in ('train', 'val', 'test'):
        options[f'{name}_dataloader.dataset.data_root'] = f'{toy_root}/'
        options[f'{name}_dataloader.num_workers'] = 0
        options[f'{name}_dataloader.persistent_workers'] = False
    for name in ('val', 'test'):
        options[f'{name}_evaluator.data_root'] = f'{toy_root}/'
        options[f'{name}_evaluator.ann_file'] = f'{toy_root}/nuscenes_infos_val.pkl'
    command = [sys.executable, '-m', 'q3d_plugin', 'train', CONFIG, '--work-dir', work_dir, *more]
    command += ['--cfg-options', *(f'{k}={v}' for k, v in options.items() if v is not None)]
    env = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '1'}
    log = Path(f'{work_dir}.log')
    with log.open('w') as f:
        command = [str(c) for c in command]
        process = subprocess.Popen(command, stdout=f, stderr=f, env=env, start_new_session=True)
        while process.poll() is None:
            if kill_at and kill_at in log.read_text():
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.1)
    assert process.returncode == (-signal.SIGKILL if kill_at else 0), log.read_text()[-3000:]


@pytest.mark.slow
def test_a_killed_training_goes_on_as_one_that_was_not(toy_root, float_checkpoint, tmp_path):
    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    train_by_command(killed, toy_root, float_checkpoint, 2, kill_at='Epoch(train) [2][1/3]')
    assert (killed / 'epoch_1.pth').is_file() and not (killed / 'epoch_2.pth').exists()
    whole.mkdir()
    (whole / 'epoch_1.pth').write_bytes((killed / 'epoch_1.pth').read_bytes())
    (whole / 'last_checkpoint').write_text(str(whole / 'epoch_1.pth'))
    states = []
    for folder in (killed, whole):
        train_by_command(folder, toy_root, None, 2, '--resume')
        states.append(load(str(folder / 'epoch_2.pth'))['state_dict'])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=1e-6, msg=name)
