"""The table of the study: all recipes of all sweeps, one line each."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'study_table.py'
CONFIGS = TOOL.parents[1] / 'configs'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('study_table', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep(folder, reference, entries):
    folder.mkdir()
    rows = [{'name': n, 'result': None if m is None else {'mAP': m, 'NDS': m / 2}} for n, m in entries]
    (folder / 'sweep.json').write_text(json.dumps({'float': reference, 'entries': rows}))
    return folder


def test_a_line_for_each_recipe_with_what_is_known(tool, tmp_path, capsys):
    a = sweep(tmp_path / 'a', {'mAP': 0.5, 'NDS': 0.4}, [('W8A8', 0.25), ('failed', None)])
    b = sweep(tmp_path / 'b', {'mAP': 0.7, 'NDS': 0.6}, [('W4A4', 0.125)])
    assert tool.main([f'One={a}', f'Two={b}']) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith('| recipe | One: mAP | One: NDS | Two: mAP | Two: NDS | the study')
    assert lines[2].startswith('| float | 50.00 | 40.00 | 70.00 | 60.00 | 59.22')
    assert lines[3:] == ['| W8A8 | 25.00 | 12.50 |  |  |  |  |', '| W4A4 |  |  | 12.50 | 6.25 |  |  |']
    assert (a / 'study.md').read_text().splitlines() == lines
    assert json.loads((a / 'study.json').read_text())['Two']['W4A4'] == {'mAP': 0.125, 'NDS': 0.0625}


def test_mistakes_end_with_one_line_and_status_2(tool, tmp_path, capsys):
    empty = sweep(tmp_path / 'empty', None, [])
    for given, words in ((str(empty), 'TITLE=FOLDER'), (f'A={empty}', 'no result'), ('A=nowhere', 'nowhere')):
        assert tool.main([given]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize('framework', ['mmdet3d', 'openpcdet'])
def test_recipes_are_valid_and_those_of_the_study_are_among_them(tool, framework):
    from q3d_plugin.analysis.sweep import expand, parse_grid
    from q3d_plugin.recipe import Recipe

    grid, named = parse_grid([str(CONFIGS / framework / 'study' / 'recipes.py')])
    entries = expand(Recipe(), grid, named)
    assert len(entries) == len(named)
    assert set(tool.NUSCENES) - {'float'} <= {e.name for e in entries}
    listed = next(e for e in entries if e.name.endswith('listed layers float')).recipe.skip
    # The study's 35 layers: five in each of six heads, two and three more in the first ones.
    prefix = 'dense_head.heads_list' if framework == 'openpcdet' else 'pts_bbox_head.task_heads'
    ends = [p for p in listed if p.startswith(prefix)]
    assert sum(6 if '.*.' in p else 1 for p in ends) == 35
