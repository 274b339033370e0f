"""``--frame`` of sensitivity and sweep: one frame in place of a data set, also for a head with proposals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip('matplotlib')

from analysis_toys import Toy, ToyBench
from fusion_toys import FusionToy

from q3d_plugin.analysis import opening, proposals
from q3d_plugin.commands import sensitivity, sweep
from q3d_plugin.recipe import Recipe


def batch_of(points):
    """What the toys read, made of 256 points of three numbers."""
    return torch.from_numpy(np.ascontiguousarray(points[:, :3].T)).reshape(1, 3, 16, 16)


class NoDataBench(ToyBench):
    """A toy whose data set is not there."""

    cfg = None
    adapter = SimpleNamespace(frame_batch=lambda cfg, model, frame: batch_of(frame.points))

    def frames_of_split(self, split, count, seed=0):
        raise AssertionError('the data set was asked for')


@pytest.fixture
def points():
    return np.random.default_rng(0).uniform(0, 2, (256, 5)).astype(np.float32)


@pytest.fixture
def call(tmp_path, monkeypatch, points):
    """Runs a command on a toy and a frame: gives the exit status."""
    (tmp_path / 'frame.bin').write_bytes(points.tobytes())
    torch.save({}, tmp_path / 'toy.pth')

    def run(command, *options, model_class=FusionToy):
        bench = NoDataBench(checkpoint=tmp_path / 'toy.pth', model_class=model_class)
        monkeypatch.setattr(opening, 'open_bench', lambda *_: bench)
        given = ['toy.py', str(tmp_path / 'toy.pth'), '--out', str(tmp_path / 'out')]
        return command.main([*given, '--frame', str(tmp_path / 'frame.bin'), *options])

    return run


def test_sensitivity_takes_ranges_and_measures_from_the_frame(call, tmp_path, points, capsys):
    assert call(sensitivity, '--bits', '4', '4', '--target', 'simulation') == 0
    found = json.loads((tmp_path / 'out' / 'sensitivity.json').read_text())
    assert found['frames'] == 1 and found['split'] is None and found['recipe']['calibration']['frames'] == 1
    text = (tmp_path / 'out' / 'table.txt').read_text()
    assert proposals.WORDS in text and 'that was given' in text
    rows = {r['name']: r for r in found['rows']}
    assert {'image.0', 'view.depthnet', 'head.heat', 'head.boxes.dim'} <= set(rows)
    # A layer behind the choice of the proposals has an effect, and it does not depend on their order.
    assert 0 < rows['head.boxes.dim']['output_relative_l1'] < rows['head.shared']['output_relative_l1']
    by_hand = NoDataBench(model_class=FusionToy)
    by_hand.configure(Recipe.from_dict(found['recipe']))
    by_hand.calibrate([batch_of(points)])
    assert by_hand.model.image[0].input_quantizer.amax == pytest.approx(points[:, :3].max(), rel=0.2)


def test_a_detector_without_proposals_has_no_words_about_them(call, tmp_path):
    assert call(sensitivity, '--no-skip-list', model_class=Toy) == 0
    assert 'proposals' not in (tmp_path / 'out' / 'table.txt').read_text()


def test_a_sweep_of_a_frame_compares_raw_outputs(call, tmp_path, capsys):
    assert call(sweep, '--grid', 'activation.bits=8,4', '--metric', 'l1') == 0
    content = json.loads((tmp_path / 'out' / 'sweep.json').read_text())
    assert content['made_of']['frames'] == 'frame.bin'
    eight, four = (e['result']['relative_l1'] for e in content['entries'])
    assert 0 < eight < four
    assert call(sweep, '--grid', 'activation.bits=8,4') == 2
    assert 'one frame has no mAP; --metric l1 would work' in capsys.readouterr().err


@pytest.mark.parametrize('option', [['--keep-map', '0.3'], ['--split', 'val']])
def test_what_needs_a_data_set_is_refused(call, capsys, option):
    assert call(sensitivity, *option) == 2
    assert 'takes the place of the data set' in capsys.readouterr().err
