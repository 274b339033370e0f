"""A training as OpenPCDet drives it shows its ranges in ``tb_dict``, the log and ``training.json``."""

import importlib
import json

import pytest
import torch

from q3d_plugin import lifecycle
from q3d_plugin.quantizer import Role
from q3d_plugin.training import QuantTraining

QAT = {
    'MODE': 'qat',
    'CALIBRATION': {'SPLIT': 'train', 'FRAMES': 2},
    'ACTIVATION': {'CALIBRATOR': 'percentile', 'PERCENTILE': 99.0},
}
STEPS = 3


@pytest.fixture
def detector(make, float_file, run_logger, batch):
    """A calibrated detector, in training."""
    made = make(QAT, training=True)
    made.load_params_from_file(str(float_file), run_logger)
    with torch.no_grad():
        made(batch(made))
    return made.train()


@pytest.fixture
def record_class(adapter):
    return importlib.import_module('q3d_plugin.openpcdet.record').RunRecord


def train(detector, training, record, batch, start, end):
    """What OpenPCDet's trainer does; returns what it would write to TensorBoard: step -> scalars."""
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-4)
    training.add_to(optimizer)
    written = {}
    for done in range(start, end):
        training.before_step(done / STEPS)
        loss = detector(batch(detector, done % 3))[0]['loss']
        tb_dict = {'rpn_loss': loss.item(), 'loss_center': loss.detach() / 2, 'time': 4.0}
        shown = record.scalars(done + 1, STEPS, tb_dict)
        assert not set(shown) & set(tb_dict)
        written[done + 1] = {**tb_dict, **shown}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return written


def ours(scalars):
    return {name: value for name, value in scalars.items() if name.startswith('q3d')}


def test_epochs_are_shown_and_go_on_where_a_training_is_resumed(
    detector, record_class, batch, run_logger, tmp_path
):
    training = QuantTraining(detector, detector.quant_recipe)
    folder = str(tmp_path / 'run')
    record = record_class(training, folder, run_logger)
    written = train(detector, training, record, batch, 0, 2 * STEPS + 1)
    assert {step for step, scalars in written.items() if ours(scalars)} == {STEPS, 2 * STEPS}
    found = json.loads((tmp_path / 'run' / 'training.json').read_text())['epochs']
    assert [(e['epoch'], e['step']) for e in found] == [(0, 0), (1, STEPS), (2, 2 * STEPS)]
    for i, entry in enumerate(found[1:]):
        scalars = written[entry['step']]
        totals = {f'q3d/{name}': value for name, value in entry['totals'].items()}
        ranges = {f'q3d_ranges/{r["name"]}.{r["tensor"]}': r['range'] for r in entry['layers']}
        assert ours(scalars) == {**totals, **ranges}
        # TensorBoard takes numbers alone.
        assert all(isinstance(value, float) for value in ours(scalars).values())
        assert 0 < entry['totals']['clipped_activations'] < 1 and entry['totals']['changed_codes'] >= 0
        losses = [written[step]['rpn_loss'] for step in range(i * STEPS + 1, (i + 1) * STEPS + 1)]
        mean = sum(losses) / STEPS
        assert entry['losses'] == pytest.approx({'rpn_loss': mean, 'loss_center': mean / 2}, rel=1e-5)
    log = (tmp_path / 'run' / 'log_eval.txt').read_text()
    assert log.count('QuantDetector: epoch ') == 4 and 'times those at the start' in log

    # Killed in the third epoch, resumed from the checkpoint of the first one.
    resumed = record_class(QuantTraining(detector, detector.quant_recipe), folder, run_logger, STEPS)
    train(detector, resumed._training, resumed, batch, STEPS, 2 * STEPS)
    again = json.loads((tmp_path / 'run' / 'training.json').read_text())['epochs']
    assert again[:2] == found[:2] and [e['step'] for e in again] == [0, STEPS, 2 * STEPS]
    names = {q.owners[0]: q.amax.item() for q in lifecycle.quantizers(detector) if q.role is Role.ACTIVATION}
    # The record is taken in the forward pass, before the last step of the optimizer.
    rows = {r['name']: r['range'] for r in again[2]['layers'] if r['tensor'] == 'input'}
    assert rows == pytest.approx(names, rel=1e-2)


def test_a_run_without_a_folder_is_shown_all_the_same(detector, record_class, batch, run_logger, tmp_path):
    training = QuantTraining(detector, detector.quant_recipe)
    written = train(detector, training, record_class(training, None, run_logger), batch, 0, STEPS)
    assert 'q3d/clipped_weights' in written[STEPS]
    assert not list(tmp_path.rglob('training.json'))
