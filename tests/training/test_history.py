"""The file of a training, scalars and lines."""

import json
import logging

import pytest

from q3d_plugin.training.history import TrainingHistory, range_ratios, scalars_of, words_of


def row(name, tensor, amax, clipped=None, changed=None):
    return {'name': name, 'tensor': tensor, 'range': amax, 'clipped': clipped, 'changed': changed}


def record(epoch, factor=1.0, clipped=0.25, changed=0.5):
    rows = [
        row('stem', 'input', 2.0, clipped),
        row('head', 'input', 3.0 / factor, clipped and clipped / 10),
        row('head', 'weight', 0.5 * factor**2, 0.0, changed),
    ]
    totals = {'clipped_activations': clipped, 'clipped_weights': 0.0, 'changed_codes': changed}
    return {'epoch': epoch, 'totals': totals, 'layers': rows}


FIRST = record(0, clipped=None, changed=None)


def read(path):
    return json.loads(path.read_text())


def test_the_file_holds_every_epoch_from_the_start(tmp_path):
    path = tmp_path / 'run' / 'training.json'
    history = TrainingHistory(path)
    assert not path.exists()
    for epoch in (1, 2):
        history.add(record(epoch, 1.5**epoch), 10 * epoch, {'loss': 2.0 / epoch}, FIRST)
        found = read(path)
        assert [(e['epoch'], e['step']) for e in found['epochs']] == [(i, 10 * i) for i in range(epoch + 1)]
    assert found['epochs'][2]['losses'] == {'loss': 1.0}
    assert {k: found['epochs'][0][k] for k in FIRST} == FIRST
    history.validated(2, 20, {'mAP': float('nan'), 'NDS': 0.5, 'AP': {}})
    assert read(path)['validations'] == [{'epoch': 2, 'step': 20, 'mAP': None, 'NDS': 0.5}]


def test_a_resumed_training_keeps_what_its_checkpoint_has_behind_it(tmp_path):
    earlier = tmp_path / 'a.json'
    history = TrainingHistory(earlier)
    for epoch in (1, 2, 3):
        history.add(record(epoch, 1 + epoch), 10 * epoch, {}, FIRST)
        history.validated(epoch, 10 * epoch, {'mAP': epoch / 10})
    # Killed in the fourth epoch, resumed from the checkpoint of the second one.
    resumed = TrainingHistory(tmp_path / 'b.json', earlier, 20)
    resumed.add(record(3, 7.0), 30, {}, record(2, 3.0))
    found = read(tmp_path / 'b.json')
    assert [e['step'] for e in found['epochs']] == [0, 10, 20, 30]
    assert found['epochs'][3]['layers'] == record(3, 7.0)['layers']
    assert [v['mAP'] for v in found['validations']] == [0.1, 0.2]
    assert resumed.first['layers'] == FIRST['layers']
    # One that begins anew in the same folder keeps nothing.
    anew = TrainingHistory(earlier, earlier, 0)
    anew.add(record(1), 10, {}, FIRST)
    assert [e['step'] for e in read(earlier)['epochs']] == [0, 10]


@pytest.mark.parametrize('content', ['{"epochs": [', '[]', '{}', '{"epochs": [{}], "validations": []}', None])
def test_a_history_that_cannot_be_read_is_left_behind(tmp_path, content, caplog):
    earlier = tmp_path / 'training.json'
    if content is not None:
        earlier.write_text(content)
    with caplog.at_level(logging.WARNING):
        history = TrainingHistory(earlier, earlier, 20)
    assert 'curves begin where the training is resumed' in caplog.text
    history.add(record(3), 30, {}, record(2), 20)
    assert [e['step'] for e in read(earlier)['epochs']] == [20, 30]


def test_a_disk_that_is_full_does_not_end_the_training(tmp_path, caplog, monkeypatch):
    history = TrainingHistory(tmp_path / 'training.json')
    history.add(record(1), 10)

    def full(path, content):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr('q3d_plugin.training.history.write_json', full)
        history.add(record(2), 20)
    assert 'No space left on device; the training goes on' in caplog.text
    assert [e['step'] for e in read(history.path)['epochs']] == [10]
    history.add(record(3), 30)
    assert [e['step'] for e in read(history.path)['epochs']] == [10, 20, 30]


def test_ranges_are_compared_with_those_at_the_start():
    first = {**FIRST, 'layers': [*FIRST['layers'], row('dead', 'input', 0.0), row('gone', 'input', 1.0)]}
    last = record(3, 2.0)
    last['layers'] += [row('dead', 'input', 0.0), row('new', 'input', 1.0)]
    assert range_ratios(last, first) == {'stem.input': 1.0, 'head.input': 0.5, 'head.weight': 4.0}


def test_scalars_are_totals_and_ranges_without_what_was_not_counted():
    totals = {'q3d/clipped_activations': 0.25, 'q3d/clipped_weights': 0.0, 'q3d/changed_codes': 0.5}
    ranges = {'q3d_ranges/stem.input': 2.0, 'q3d_ranges/head.input': 3.0, 'q3d_ranges/head.weight': 0.5}
    assert scalars_of(record(1)) == {**totals, **ranges}
    assert scalars_of(FIRST) == {'q3d/clipped_weights': 0.0, **ranges}


def test_the_log_names_the_layers_that_stand_out():
    line, ranges = words_of(record(3, 2.0), FIRST)
    assert line == (
        'epoch 3: 25% of the inputs (most: stem 25%) and 0% of the weights are clipped; 50% of the weights '
        '(most: head 50%) have another integer than at the record before'
    )
    assert ranges == (
        'epoch 3: ranges are 0.5 to 4 times those at the start; the one of head.weight moved most'
    )
    (alone,) = words_of(FIRST)
    assert alone.startswith('epoch 0: an unknown share of the inputs and 0% of the weights are clipped')
