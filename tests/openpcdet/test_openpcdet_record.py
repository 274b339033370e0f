"""A training as OpenPCDet drives it shows its ranges in ``tb_dict``, the log and ``training.json``."""

import json
import logging

import pytest
import torch

from q3d_plugin import lifecycle
from q3d_plugin.quantizer import Role

QAT = {
    'MODE': 'qat',
    'CALIBRATION': {'SPLIT': 'train', 'FRAMES': 2},
    'ACTIVATION': {'CALIBRATOR': 'percentile', 'PERCENTILE': 99.0},
}
STEPS = 3
"""Frames of the training, and so steps of an epoch."""


@pytest.fixture
def losses(monkeypatch, adapter):
    """Has the double's detector return losses as OpenPCDet's do; lists the ``tb_dict`` of each step."""
    given = []
    centerpoint = adapter.pcdet_models.detectors.__all__['CenterPoint']
    forward = centerpoint.forward

    def with_losses(self, batch_dict):
        out = forward(self, batch_dict)
        if self.training:
            loss = out[0]['loss'].detach()
            out[1].update(rpn_loss=loss.item(), loss_center=loss / 2, time=4.0)
            given.append(dict(out[1]))
        return out

    monkeypatch.setattr(centerpoint, 'forward', with_losses)
    return given


def train(detector, optimizer, batch, count):
    """Makes steps as OpenPCDet's trainer does; returns what it would write to TensorBoard in each."""
    written = []
    for index in range(count):
        detector.train()
        ret_dict, tb_dict, _ = detector(batch(detector, index % STEPS))
        optimizer.zero_grad()
        ret_dict['loss'].backward()
        optimizer.step()
        written.append(tb_dict)
    return written


def ours(scalars):
    return {name: value for name, value in scalars.items() if name.startswith('q3d')}


def begin(make, float_file, logger):
    detector = make(QAT, training=True)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-4)
    detector.load_params_from_file(str(float_file), logger)
    return detector.train(), optimizer


def history(tmp_path):
    return json.loads((tmp_path / 'run' / 'training.json').read_text())['epochs']


def test_epochs_are_shown_and_go_on_where_a_training_is_resumed(
    make, float_file, run_logger, batch, losses, tmp_path
):
    detector, optimizer = begin(make, float_file, run_logger)
    written = train(detector, optimizer, batch, STEPS)
    saved = {
        'model_state': {k: v.clone() for k, v in detector.state_dict().items()},
        'optimizer_state': optimizer.state_dict(),
        'epoch': 1,
        'it': STEPS,
    }
    torch.save(saved, tmp_path / 'checkpoint_epoch_1.pth')
    written += train(detector, optimizer, batch, STEPS + 1)
    assert [i + 1 for i, scalars in enumerate(written) if ours(scalars)] == [STEPS, 2 * STEPS]
    found = history(tmp_path)
    assert [(e['epoch'], e['step']) for e in found] == [(0, 0), (1, STEPS), (2, 2 * STEPS)]
    for i, entry in enumerate(found[1:]):
        scalars = written[entry['step'] - 1]
        totals = {f'q3d/{name}': value for name, value in entry['totals'].items()}
        ranges = {f'q3d_ranges/{r["name"]}.{r["tensor"]}': r['range'] for r in entry['layers']}
        assert ours(scalars) == {**totals, **ranges}
        # TensorBoard takes numbers alone.
        assert all(isinstance(value, float) for value in ours(scalars).values())
        assert {k: v for k, v in scalars.items() if not k.startswith('q3d')} == losses[entry['step'] - 1]
        assert 0 < entry['totals']['clipped_activations'] < 1 and entry['totals']['changed_codes'] >= 0
        mean = sum(one['rpn_loss'] for one in losses[i * STEPS : (i + 1) * STEPS]) / STEPS
        assert entry['losses'] == pytest.approx({'rpn_loss': mean, 'loss_center': mean / 2}, rel=1e-5)
    log = (tmp_path / 'run' / 'log_eval.txt').read_text()
    assert log.count('QuantDetector: epoch ') == 4 and 'times those at the start' in log

    # Killed in the third epoch, resumed from the checkpoint of the first one.
    again = make(QAT, training=True)
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-4)
    again.load_params_with_optimizer(
        str(tmp_path / 'checkpoint_epoch_1.pth'), optimizer=optimizer, logger=run_logger
    )
    train(again, optimizer, batch, STEPS)
    repeated = history(tmp_path)
    assert repeated[:2] == found[:2] and [e['step'] for e in repeated] == [0, STEPS, 2 * STEPS]
    ranges = {q.owners[0]: q.amax.item() for q in lifecycle.quantizers(again) if q.role is Role.ACTIVATION}
    # The record is taken in the forward pass, before the last step of the optimizer.
    rows = {r['name']: r['range'] for r in repeated[2]['layers'] if r['tensor'] == 'input'}
    assert rows == pytest.approx(ranges, rel=1e-2)


def test_a_run_without_a_folder_is_shown_all_the_same(make, float_file, batch, losses, tmp_path):
    detector, optimizer = begin(make, float_file, logging.getLogger('without-a-file'))
    written = train(detector, optimizer, batch, STEPS)
    assert 'q3d/clipped_weights' in written[-1] and len(losses) == STEPS
    assert not list(tmp_path.rglob('training.json'))
