"""The study: which sweeps it runs, and the table of them."""

import json
from pathlib import Path

import pytest

from q3d_plugin.analysis.plans import expand, parse_grid
from q3d_plugin.analysis.study import NUSCENES
from q3d_plugin.commands import study
from q3d_plugin.recipe import Recipe
from q3d_plugin.shipped import configs_folder


def sweep(folder, reference, entries):
    folder.mkdir(parents=True)
    rows = [
        {'name': n, 'recipe': {'target': t}, 'result': None if m is None else {'mAP': m, 'NDS': m / 2}}
        for n, t, m in entries
    ]
    (folder / 'sweep.json').write_text(json.dumps({'float': reference, 'entries': rows}))
    return folder


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The commands that the study starts, in an empty folder; each sweep has one result."""
    calls = []

    def q3d(name, *arguments):
        calls.append((name, *arguments))
        if name == 'sweep':
            folder = Path(arguments[arguments.index('--out') + 1])
            sweep(folder, {'mAP': 0.5, 'NDS': 0.4}, [('W8A8', 'tensorrt', 0.25)])
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, 'q3d', q3d)
    return calls


def test_a_line_for_each_recipe_with_what_is_known(tmp_path, capsys):
    entries = [('W8A8', 'tensorrt', 0.25), ('failed', 'openvino', None)]
    a = sweep(tmp_path / 'a', {'mAP': 0.5, 'NDS': 0.4}, entries)
    b = sweep(tmp_path / 'b', {'mAP': 0.7, 'NDS': 0.6}, [('W4A4', None, 0.125)])
    assert study.main(['--table', f'One={a}', f'Two={b}']) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith('| recipe | target | One: mAP | One: NDS | Two: mAP | Two: NDS | the study')
    assert lines[2].startswith('| float |  | 50.00 | 40.00 | 70.00 | 60.00 | 59.22')
    assert lines[3:] == [
        '| W8A8 | tensorrt | 25.00 | 12.50 |  |  |  |  |',
        '| W4A4 | not recorded |  |  | 12.50 | 6.25 |  |  |',
    ]
    assert (a / 'study.md').read_text().splitlines() == lines
    figures = json.loads((a / 'study.json').read_text())['Two']['W4A4']
    assert figures == {'mAP': 0.125, 'NDS': 0.0625, 'target': 'not recorded'}


def test_a_detector_of_ones_own_has_the_recipes_of_its_framework(started, tmp_path, capsys):
    given = ['own/my_w8a8.py', 'my.pth', '--set', 'a=b', '--calibration-frames', '8']
    assert study.main(given) == 0
    recipes = str(configs_folder() / 'mmdet3d' / 'study' / 'recipes.py')
    out = str(Path('work_dirs') / 'study' / 'my_w8a8')
    assert started == [('sweep', *given[:2], '--grid', recipes, '--out', out, *given[2:])]
    assert '| W8A8 | tensorrt | 25.00 | 12.50 |' in capsys.readouterr().out
    assert (tmp_path / out / 'study.md').is_file()
    assert study.main(['own/my_w8a8.yaml', 'my.pth', '--out', 'there']) == 0
    recipes = str(configs_folder() / 'openpcdet' / 'study' / 'recipes.py')
    assert started[1] == ('sweep', 'own/my_w8a8.yaml', 'my.pth', '--grid', recipes, '--out', 'there')


@pytest.mark.parametrize('framework', ['mmdet3d', 'openpcdet'])
def test_the_toys_of_the_plugin_are_there(framework, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = study.toy_sweep_of(framework)
    config, checkpoint, _, recipes, _, out, *rest = made.arguments
    assert all(Path(p).is_file() for p in (config, checkpoint, recipes)) and out == str(made.folder)
    data = f'DATA_CONFIG.DATA_PATH={tmp_path / "data" / "toy_nuscenes"}'
    assert rest == ([] if framework == 'mmdet3d' else ['--set', data])


def test_mistakes_end_with_one_line_and_status_2(started, tmp_path, capsys):
    empty = sweep(tmp_path / 'empty', None, [])
    for given, words in (
        (['--table', str(empty)], 'TITLE=FOLDER'),
        (['--table', f'A={empty}'], 'no result'),
        (['--table', 'A=nowhere'], 'nowhere'),
        (['config.py'], 'no checkpoint'),
        (['--calibration-frames', '8'], 'no checkpoint'),
        (['--fresh'], '--fresh was given'),
    ):
        assert study.main(given) == 2
        error = capsys.readouterr().err
        assert words in error and error.count('\n') == 1
    assert not started


def test_a_command_that_fails_ends_the_study_with_its_status(monkeypatch, capsys):
    assert study.q3d('no such command') != 0
    monkeypatch.setattr(study, 'q3d', lambda *_: 3)
    assert study.main(['config.py', 'x.pth']) == 3
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('framework', ['mmdet3d', 'openpcdet'])
def test_recipes_are_valid_and_those_of_the_study_are_among_them(framework):
    grid, named = parse_grid([str(configs_folder() / framework / 'study' / 'recipes.py')])
    # Whatever the target and the signs of the config are.
    base = Recipe.from_dict({'target': 'tensorrt', 'activation': {'unsigned': False}})
    entries = expand(base, grid, named)
    assert len(entries) == len(named)
    for entry in entries:
        plain = entry.recipe.to_dict()
        widths = {plain[part]['bits'] for part in ('weight', 'activation')}
        dynamic = (plain['smoothquant'] or {}).get('mode') == 'dynamic'
        signed = entry.name.endswith(', signed')
        expected = 'tensorrt' if signed else 'simulation' if dynamic or widths != {8} else 'openvino'
        assert plain['target'] == expected, entry.name
        assert plain['activation']['unsigned'] == (False if signed else 'auto'), entry.name
    assert set(NUSCENES) - {'float'} <= {e.name for e in entries}
    listed = next(e for e in entries if e.name.endswith('listed layers float')).recipe.skip
    # The study's 35 layers: five in each of six heads, two and three more in the first ones.
    prefix = 'dense_head.heads_list' if framework == 'openpcdet' else 'pts_bbox_head.task_heads'
    ends = [p for p in listed if p.startswith(prefix)]
    assert sum(6 if '.*.' in p else 1 for p in ends) == 35
