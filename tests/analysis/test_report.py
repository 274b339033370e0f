"""The page of a run, finished and not."""

import json
from html.parser import HTMLParser

import pytest

pytest.importorskip('matplotlib')

from analysis_toys import ToyBench, toy_recipe

from q3d_plugin import lifecycle
from q3d_plugin.analysis import report
from q3d_plugin.analysis.run_files import find_run
from q3d_plugin.run_record import write_run

SUMMARY = {'mean_ap': 0.5, 'nd_score': 0.6, 'mean_dist_aps': {'car': 0.7, 'bus': 0.3}}


class Links(HTMLParser):
    """Everything that a page would fetch, and whether its tags are closed."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ('src', 'href') and not v.startswith('data:')]
        if tag not in ('meta', 'img', 'br', 'line', 'polygon'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ('line', 'polygon'):
            assert self.open.pop() == tag


def write(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f'{name}.json').write_text(json.dumps(content))


@pytest.fixture
def run_dir(tmp_path):
    bench = ToyBench()
    bench.prepare(bench.recipe)
    folder = tmp_path / 'run' / '20260101_000000'
    folder.mkdir(parents=True)
    write_run(str(folder), bench.model, bench.recipe, {'framework': 'toy', 'config': '<a&b>.py'})
    return tmp_path / 'run'


def test_an_empty_folder_says_what_is_not_there(tmp_path):
    page = report.build(find_run(tmp_path))
    assert not Links(page).open and not Links(page).fetched
    for words in (
        'Not evaluated yet',
        'run.json is not there',
        'coverage.json is not there',
        'No sweep.json',
    ):
        assert words in page


def test_a_run_that_is_calibrated_but_not_evaluated_shows_what_there_is(run_dir):
    page = report.build(find_run(run_dir))
    assert not Links(page).open and not Links(page).fetched
    assert 'Not evaluated yet' in page
    assert '&lt;a&amp;b&gt;.py' in page and '<a&b>' not in page
    assert '9 of 9 layers quantized, and 2 additions' in page
    # One picture for every distinct input: units that read one tensor share theirs.
    bench = ToyBench()
    bench.prepare(bench.recipe)
    inputs = {id(unit.input_quantizer) for _, unit in lifecycle.units(bench.model)}
    assert page.count('<svg') == len(inputs) < len(lifecycle.units(bench.model)) - 1


def test_a_finished_run_is_compared_with_float(run_dir, tmp_path):
    write(run_dir / 'predictions', metrics_summary=SUMMARY)
    better = {**SUMMARY, 'mean_ap': 0.52, 'mean_dist_aps': {'car': 0.75, 'bus': 0.29}}
    write(tmp_path / 'float', metrics_summary=better)
    page = report.build(find_run(run_dir, tmp_path / 'float'))
    assert not Links(page).open
    assert '0.5000' in page and '0.5200' in page and '-0.0200' in page
    assert '-0.0500' in page and '+0.0100' in page


def test_sensitivity_and_sweep_from_other_folders(run_dir, tmp_path):
    row = {'name': 'stem.0', 'relative_l1': 0.1, 'output_relative_l1': 0.01, 'nan': 3}
    skip = {
        'measure': 'relative L1',
        'names': ['stem.0'],
        'lengths': [0, 1],
        'errors': [0.02, 0.01],
        'budget': 0.01,
        'kept': True,
    }
    write(tmp_path / 'sens', sensitivity={'rows': [row], 'skip': skip})
    entries = [
        {'name': f'weight.bits={b}', 'values': {'weight.bits': b}, 'result': {'mAP': b / 10}} for b in (8, 4)
    ]
    write(tmp_path / 'sweep', sweep={'made_of': {}, 'float': {'mAP': 0.9}, 'entries': entries})
    page = report.build(find_run(run_dir, None, tmp_path / 'sens', tmp_path / 'sweep'))
    assert not Links(page).open and not Links(page).fetched
    assert page.count('data:image/png;base64,') == 3


@pytest.mark.parametrize(
    'activation, words',
    [
        ({'range': 'dynamic', 'unsigned': False}, 'int8, dynamic range'),
        ({'range': 'dynamic', 'unsigned': True}, 'uint8, dynamic range'),
        ({'bits': 6}, 'int6, range '),
    ],
)
def test_inputs_are_named_by_what_they_are_quantized_to(tmp_path, activation, words):
    bench = ToyBench(recipe=toy_recipe(activation=activation))
    bench.prepare(bench.recipe)
    write_run(str(tmp_path), bench.model, bench.recipe, {'framework': 'toy'})
    page = report.build(find_run(tmp_path))
    assert page.count('<svg') == page.count(f'{words}') > 0
    assert 'float; seen' not in page


def test_inputs_of_early_runs_are_not_called_float(run_dir):
    path = next(run_dir.rglob('histograms.json'))
    rows = [{k: v for k, v in row.items() if k != 'dynamic'} for row in json.loads(path.read_text())]
    write(path.parent, histograms=[{**row, 'amax': None} for row in rows])
    page = report.build(find_run(run_dir))
    assert page.count('float, or dynamic range; seen') == len(rows)


def test_the_target_is_shown(run_dir):
    path = next(run_dir.rglob('run.json'))
    record = json.loads(path.read_text())
    for recipe, words in (({'target': 'openvino'}, 'openvino'), ({}, 'not recorded')):
        write(path.parent, run={**record, 'recipe': recipe})
        entries = [{'name': 'W8A8', 'values': {}, 'recipe': recipe, 'result': {'mAP': 0.5}}]
        write(path.parent, sweep={'made_of': {}, 'float': None, 'entries': entries})
        page = report.build(find_run(run_dir))
        assert f'<p>Target: {words}</p>' in page
        assert f'<td>W8A8</td><td>{words}</td>' in page


def test_histograms_hold_every_value_and_end_above_the_largest(run_dir):
    rows = json.loads(next(run_dir.rglob('histograms.json')).read_text())
    stem = next(r for r in rows if r['name'] == 'stem.0')
    # Three frames of 3 x 16 x 16 values.
    assert sum(stem['counts']) == 3 * 3 * 16 * 16
    assert len(stem['counts']) <= 64 and stem['frames'] == 3
    assert (
        max(abs(stem['minimum']), stem['maximum']) <= stem['top'] <= 1.1 * stem['maximum'] + stem['top'] / 32
    )
