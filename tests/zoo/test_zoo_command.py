"""The command ``q3d zoo``: on three configs of the wheel, and on a framework whose configs are words."""

import contextlib
import io
import json

import pytest
from zoo_toys import Words

from q3d_plugin.commands import zoo
from q3d_plugin.zoo import survey
from q3d_plugin.zoo.rows import Row, read_rows, write_rows

RUNS = 'pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py'
STOPS = 'votenet/votenet_8xb16_sunrgbd-3d.py'
FAILS = 'spvcnn/spvcnn_w16_8xb2-amp-15e_semantickitti.py'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Exit status, standard output and file of a run over three configs."""
    pytest.importorskip('mmdet3d')
    out = tmp_path_factory.mktemp('zoo') / 'new' / 'zoo.json'
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = zoo.main(['--mmdet3d', '--int8', '--out', str(out), '--only', RUNS, STOPS, FAILS])
    return status, text.getvalue(), out


def rows_of(path):
    return {row['config']: row for row in json.loads(path.read_text())['rows']}


def error_of(capsys):
    """The one line of standard error that the plugin wrote."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('q3d_plugin: ')]
    assert len(lines) == 1
    return lines[0]


def test_a_config_that_runs_is_compared_layer_by_layer(finished):
    status, _, out = finished
    row = rows_of(out)[RUNS]
    assert status == 0 and row['ours'] == '' and row['quant_build'] == ''
    # 1 linear layer of the pillars, 16 convolutions, 3 transposed ones, 3 of the head.
    assert row['quantized'] == row['layers'] == 23 and row['quantized_elements'] == row['elements'] > 4e6
    assert row['forward'] == '' and row['compared'] == row['comparable'] == 23
    assert 0 < row['difference'] < 1e-4
    assert 1e-3 < row['int8'] < 0.5


def test_a_forward_that_stops_says_why(finished):
    row = rows_of(finished[2])[STOPS]
    assert row['quantized'] == row['layers'] > 0 and row['difference'] is None
    # Its points are sampled by an operator that there is for CUDA only.
    assert 'Error' in row['forward'] and row['compared'] == 0 < row['comparable']


def test_a_config_that_does_not_build_in_float_is_no_failure_of_ours(finished):
    row = rows_of(finished[2])[FAILS]
    assert 'Torchsparse' in row['float_build'] and row['quant_build'] is None and row['ours'] == ''


def test_the_table_has_a_line_for_each_and_one_of_totals(finished):
    text = finished[1]
    for config in (RUNS, STOPS, FAILS):
        assert config in text
    total = text.strip().splitlines()[-1]
    assert total.startswith('mmdet3d: 3 configs, 2 built in float, 2 of these quantized; 1 ran')
    assert '0 failures' in total


@pytest.fixture
def words(monkeypatch):
    """The command sees a framework of these configs: ``words('a', 'b')``."""

    def make(*names):
        adapter = Words(names=names)
        monkeypatch.setattr(zoo, 'open_adapter', lambda name, place: adapter)
        return adapter

    return make


def test_resuming_does_what_is_left(words, monkeypatch, tmp_path, capsys):
    words('a', 'b', 'c')
    out = tmp_path / 'zoo.json'
    write_rows(str(out), [Row('words', 'a', ''), Row('words', 'c', '')])
    asked = []

    def in_process(adapter, config, *args):
        asked.append(config)
        return Row(adapter.name, config, 'stopped here')

    monkeypatch.setattr(survey, 'in_process', in_process)
    arguments = ['--mmdet3d', '--out', str(out), '--resume']
    assert zoo.main(arguments) == 0
    assert asked == ['b'] and len(rows_of(out)) == 3
    assert '[2/3] b: float does not build: stopped here' in capsys.readouterr().out
    out.write_text('{"rows": [{"nothing": 1}]}')
    assert zoo.main(arguments) == 2 and '--resume' in error_of(capsys)


def test_the_forward_of_an_equal_model_is_run_once(words, tmp_path, capsys):
    words('a', 'b', 'c', 'unreadable')
    assert zoo.main(['--mmdet3d', '--out', str(tmp_path / 'zoo.json')]) == 0
    rows = rows_of(tmp_path / 'zoo.json')
    assert {c: r['twin'] for c, r in rows.items()} == {'a': '', 'b': 'a', 'c': '', 'unreadable': ''}
    assert rows['b']['difference'] == rows['a']['difference'] and rows['b']['quantized'] == 7
    assert '(as a)' in capsys.readouterr().out


def test_a_failure_of_the_plugin_is_told_and_is_status_1(words, tmp_path, capsys):
    def broken(net):
        raise RuntimeError('broken here')

    words('a').quantize = broken
    assert zoo.main(['--mmdet3d', '--out', str(tmp_path / 'zoo.json')]) == 1
    assert 'broken here' in capsys.readouterr().out


def test_an_infinite_difference_is_a_failure_after_resuming_too(tmp_path):
    row = Row('x', 'y', '', '', forward='', compared=1, difference=float('inf'))
    write_rows(str(tmp_path / 'zoo.json'), [row])
    assert read_rows(str(tmp_path / 'zoo.json')) == [row]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'give --mmdet3d, --openpcdet ROOT, or both'),
        (['--mmdet3d', '{tmp}/none'], 'is not a folder'),
        (['--mmdet3d', '--only', 'none_such/*'], 'none_such'),
        (['--openpcdet', '{tmp}/none'], 'no pcdet/__init__.py'),
        (['--mmdet3d', '--out', '{tmp}/file/zoo.json'], 'is a file, not a folder'),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(tmp_path, capsys, arguments, message):
    pytest.importorskip('mmdet3d')
    (tmp_path / 'file').touch()
    arguments = ['--out', str(tmp_path / 'x.json'), *(a.format(tmp=tmp_path) for a in arguments)]
    assert zoo.main(arguments) == 2 and message in error_of(capsys)
