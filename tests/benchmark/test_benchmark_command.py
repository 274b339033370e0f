"""``q3d benchmark`` on the toy CenterPoint: its table, its file, its error messages. Speed is not tested."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmdet3d')

from q3d_plugin.benchmark.rows import FLOAT, INT8, STATISTICS
from q3d_plugin.benchmark.subject import open_config
from q3d_plugin.commands import benchmark

ROOT = Path(__file__).resolve().parents[2]
TOY = str(ROOT / 'configs' / 'mmdet3d' / 'toy_centerpoint_voxel_w8a8.py')


@pytest.fixture(scope='module')
def frame(tmp_path_factory):
    """A small recorded frame: 3000 points on a bumpy ground."""
    rng = np.random.default_rng(0)
    points = np.zeros((3000, 5), dtype=np.float32)
    points[:, :2] = rng.normal(0, 12, (3000, 2))
    points[:, 2] = rng.normal(-1.6, 0.3, 3000)
    points[:, 3] = rng.integers(0, 256, 3000)
    points[:, 4] = rng.integers(0, 32, 3000)
    path = tmp_path_factory.mktemp('frame') / 'frame.pcd.bin'
    path.write_bytes(points.tobytes())
    return str(path)


@pytest.fixture(scope='module')
def finished(frame, tmp_path_factory):
    """Exit status, standard output and file of one run of the whole benchmark on the toy config."""
    out = tmp_path_factory.mktemp('benchmark') / 'new' / 'folder' / 'benchmark.json'
    options = ['--repeats', '1', '--entropy-tensors', '1', '--threads', str(torch.get_num_threads())]
    # A fixture of a module cannot have capsys.
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = benchmark.main(['ptq', '--config', TOY, '--frame', frame, '--out', str(out), *options])
    return status, text.getvalue(), out


def test_exits_with_0_whatever_the_speed(finished):
    assert finished[0] == 0


def test_table_names_every_row_with_its_target(finished):
    _, text, out = finished
    content = json.loads(out.read_text())
    for row in content['rows']:
        assert row['name'] in text
    targeted = [line for line in text.splitlines() if '<=' in line]
    assert len(targeted) == sum(row['target'] is not None for row in content['rows']) == 11
    # After the target, for a row is named 'statistics pass' whether it passes or not.
    assert all(re.search(r'<= [\d.]+  (pass|MISSED)\b', line) for line in targeted)


def test_file_holds_the_measurements(finished):
    content = json.loads(finished[2].read_text())
    assert content['config'] == 'toy_centerpoint_voxel_w8a8.py'
    assert content['points'] == 3000 and 0 < content['voxels'] <= 3000
    assert content['passed'] is all(row['passed'] is not False for row in content['rows'])
    sections = {}
    for row in content['rows']:
        assert set(row) == {
            'section', 'name', 'value', 'unit', 'ratio', 'cpu_ratio', 'spread', 'target', 'passed', 'note',
            'recipe_target',
        }  # fmt: skip
        sections.setdefault(row['section'], {})[row['name']] = row
    assert set(sections) == {'time', 'ranges', 'memory', 'error'}

    time = sections['time']
    assert time[FLOAT]['ratio'] == 1
    assert time[STATISTICS]['target'] == 1.2 and time[INT8]['target'] == 1.05
    assert all(row['value'] > 0 and row['ratio'] > 0 for row in time.values())

    ranges = sections['ranges']
    for calibrator in ('max', 'percentile', 'mse', 'entropy', 'grid'):
        assert ranges[calibrator]['target'] == 3 and ranges[calibrator]['value'] > 0
    for method in ('max', 'percentile', 'entropy'):
        row = ranges[f'pytorch-quantization {method}']
        assert row['value'] > 0 or row['note'].startswith('fails')
    mse = ranges['pytorch-quantization mse']
    assert (mse['value'] or 0) > 0 if torch.cuda.is_available() else mse['note'] == 'needs CUDA'

    assert len(sections['memory']) == 6
    assert all(row['value'] > 0 for row in sections['memory'].values())
    error = sections['error']
    assert error['max']['value'] == pytest.approx(1)
    assert error['pytorch-quantization percentile']['value'] > 0


def test_nothing_but_the_file_is_left(finished):
    assert [p.name for p in finished[2].parent.iterdir()] == ['benchmark.json']


def test_file_names_no_folder_of_the_machine(finished):
    assert str(ROOT) not in finished[2].read_text()
    assert str(finished[2].parent) not in finished[2].read_text()


def test_every_figure_names_the_target_of_the_recipe(finished):
    target = getattr(open_config(TOY)[2], 'target', None)
    content = json.loads(finished[2].read_text())
    assert content['recipe_target'] == target
    assert all(row['recipe_target'] == target for row in content['rows'])
    assert target is None or f' for {target}: ' in finished[1]


def _bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return str(path)


STRANGE = 'model = dict(type="NoSuch")\ncustom_hooks = [dict(type="QuantHook", recipe=dict())]\n'


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (lambda t: ['--frame', 'nowhere.bin'], "frame 'nowhere.bin' is not a file"),
        (lambda t: ['--frame', _bad(t, 'f.bin', b'123')], 'has 3 bytes'),
        (lambda t: ['--frame', _bad(t, 'f.bin', b'')], 'has 0 bytes'),
        (lambda t: ['--frame', _bad(t, 'f.bin', np.full(20, np.nan, 'f4').tobytes())], 'NaN or Inf'),
        (lambda t: ['--frame', _bad(t, 'f.bin', np.full(20, 500, 'f4').tobytes())], 'point cloud range'),
        (lambda t: ['--config', 'nowhere.py'], "config 'nowhere.py' is not a file"),
        (lambda t: ['--config', _bad(t, 'c.py', 'model = dict(')], 'cannot be read: SyntaxError'),
        (lambda t: ['--config', _bad(t, 'c.py', 'x = 1\n')], 'has no model'),
        (lambda t: ['--config', _bad(t, 'c.py', 'model = dict(pts_bbox_head=dict())\n')], 'no QuantHook'),
        (lambda t: ['--config', _bad(t, 'c.txt', '')], 'a .py file (MMDetection3D) or a .yaml file'),
        (lambda t: ['--config', _bad(t, 'c.py', STRANGE)], 'does not build: KeyError'),
        (lambda t: ['ptk'], "'ptk' is no part of it; did you mean 'ptq'?"),
        (lambda t: ['--data', str(t)], '--data: the training data of the config cannot be read'),
        (lambda t: ['--repeats', '0'], '--repeats: 0 was given'),
        (lambda t: ['--threads', '-1'], '--threads: -1 was given'),
        (lambda t: ['--out', str(t)], 'is a folder'),
        (lambda t: ['--out', _bad(t, 'file', 'x') + '/benchmark.json'], 'is a file, not a folder'),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(frame, tmp_path, capsys, options, words):
    defaults = ['--config', TOY, '--frame', frame, '--out', str(tmp_path / 'out' / 'benchmark.json')]
    assert benchmark.main([*defaults, *options(tmp_path)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('q3d_plugin: ')]
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / 'out').exists()
