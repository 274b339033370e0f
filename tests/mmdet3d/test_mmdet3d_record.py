"""A training in MMEngine's runner leaves its curves in the log, the visualizer and ``training.json``."""

import json
from pathlib import Path

import pytest

pytest.importorskip('mmdet3d')

from mmengine.hooks import Hook
from mmengine.visualization import Visualizer

from q3d_plugin import lifecycle
from q3d_plugin.quantizer import Role

RECIPE = {'mode': 'qat', 'calibration': {'frames': 2}, 'activation': {'calibrator': 'max'}}
CHANGES = {
    'train_cfg.max_epochs': 2,
    'train_cfg.val_begin': 99,
    'train_dataloader.batch_size': 1,
    'param_scheduler': [dict(type='ConstantLR', factor=1.0)],
    'optim_wrapper.optimizer.lr': 1e-4,
}
METRICS = {'NuScenes metric/a/mAP': 0.25, 'NuScenes metric/a/NDS': 0.5, 'NuScenes metric/a/mATE': 0.3}


def history(runner):
    return json.loads((Path(runner.log_dir) / 'training.json').read_text())


@pytest.fixture
def shown(monkeypatch):
    """The scalars that go to MMEngine's visualizer: pairs of step and scalars; those of ours alone."""
    lines = []

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        if any(name.startswith('q3d') for name in scalar_dict):
            lines.append((step, scalar_dict))

    monkeypatch.setattr(Visualizer, 'add_scalars', add_scalars)
    return lines


def ranges_of(runner):
    found = lifecycle.quantizers(runner.model)
    return {q.owners[0]: q.amax.item() for q in found if q.role is Role.ACTIVATION and q.has_range}


def ranges_in(entry):
    return pytest.approx({r['name']: r['range'] for r in entry['layers'] if r['tensor'] == 'input'})


def test_every_epoch_is_recorded_and_a_resumed_training_goes_on(runner, float_checkpoint, tmp_path, shown):
    first = runner(float_checkpoint, RECIPE, work_dir=tmp_path / 'qat', **CHANGES)
    (hook,) = (h for h in first.hooks if type(h).__name__ == 'QuantHook')
    ranges = []
    first.register_hook(Watch(ranges), priority='LOWEST')
    first.train()
    hook.after_val_epoch(first, METRICS)
    found, length = history(first), len(first.train_dataloader)
    epochs = found['epochs']
    assert [(e['epoch'], e['step']) for e in epochs] == [(i, i * length) for i in range(3)]
    assert len(ranges) == 3 and ranges[0] != ranges[1] != ranges[2]
    for entry, wanted in zip(epochs, ranges):
        assert wanted == ranges_in(entry)
    for entry in epochs[1:]:
        totals = entry['totals']
        assert 0 < totals['changed_codes'] < 1 and 0 <= totals['clipped_weights'] < 1
        assert 0 < totals['clipped_activations'] < 1
    losses = first.message_hub.get_scalar('train/loss').data[0]
    assert len(losses) == 2 * length
    for i, entry in enumerate(epochs[1:]):
        assert entry['losses']['loss'] == pytest.approx(sum(losses[i * length : (i + 1) * length]) / length)
        assert 'task0.loss_heatmap' in entry['losses']
    assert found['validations'] == [{'epoch': 2, 'step': 2 * length, 'mAP': 0.25, 'NDS': 0.5}]

    assert [step for step, _ in shown] == [length, 2 * length]
    for (_, scalars), entry in zip(shown, epochs[1:]):
        wanted = {f'q3d/{name}': value for name, value in entry['totals'].items()}
        wanted.update({f'q3d_ranges/{r["name"]}.{r["tensor"]}': r['range'] for r in entry['layers']})
        assert scalars == pytest.approx(wanted)
    log = next(Path(first.log_dir).glob('*.log')).read_text()
    assert log.count('are clipped; ') == log.count('times those at the start') == 2

    path = tmp_path / 'qat' / 'epoch_1.pth'
    resumed = runner(path, RECIPE, work_dir=tmp_path / 'qat', resume=True, **CHANGES)
    resumed.train()
    again = history(resumed)
    assert again['epochs'][:2] == epochs[:2] and again['validations'] == []
    assert [e['step'] for e in again['epochs']] == [0, length, 2 * length]
    assert ranges_of(resumed) == ranges_in(again['epochs'][2])
    assert 0 < again['epochs'][2]['totals']['changed_codes'] < 1


class Watch(Hook):
    """Looks at the ranges before the first step and after each epoch."""

    def __init__(self, ranges):
        self.ranges = ranges

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if not self.ranges:
            self.ranges.append(ranges_of(runner))

    def after_train_epoch(self, runner):
        self.ranges.append(ranges_of(runner))


def test_a_loop_that_counts_steps_is_recorded_after_each_pass_and_at_its_end(runner, float_checkpoint, shown):
    made = runner(float_checkpoint, RECIPE, **CHANGES)
    length = len(made.build_dataloader(made.cfg.train_dataloader))
    steps = 2 * length + 1
    # A runner makes its loop when it begins to train.
    made._train_loop = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=999)
    made.log_processor.by_epoch = False
    made.train()
    wanted = [length, 2 * length, steps]
    assert [e['step'] for e in history(made)['epochs']] == [0, *wanted]
    assert [e['epoch'] for e in history(made)['epochs']] == pytest.approx([0, 1, 2, 2 + 1 / length])
    assert [step for step, _ in shown] == wanted


def test_validation_on_its_own_leaves_no_history(runner, float_checkpoint, shown):
    made = runner(float_checkpoint, RECIPE, **CHANGES)
    (hook,) = (h for h in made.hooks if type(h).__name__ == 'QuantHook')
    hook.after_val_epoch(made, METRICS)
    assert not (Path(made.log_dir) / 'training.json').exists()
