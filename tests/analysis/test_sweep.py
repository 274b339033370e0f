"""Results that are resumed or refused, and what is shown of them."""

import json

import pytest
from analysis_toys import toy_recipe

from q3d_plugin.analysis.plans import AT_RANDOM, BY_RANK, expand, parse_grid, skip_entries
from q3d_plugin.analysis.sweep import Results, curve_of, heat_map_of, table
from q3d_plugin.errors import Q3DError

MADE_OF = {'checkpoint_sha256': 'a', 'config_sha256': 'b', 'base recipe': {}, 'metric': 'map', 'frames': None}


def entries_of(*grid):
    return expand(toy_recipe(), *parse_grid(grid))


def test_results_go_on_where_they_stopped(tmp_path):
    path = tmp_path / 'sweep.json'
    first, second = entries_of('weight.bits=8,4')
    results = Results(path, MADE_OF)
    results.set_float({'mAP': 0.9})
    results.add(first, {'mAP': 0.8}, 1.0)
    results.add(second, None, 1.0, 'it failed')
    again = Results(path, MADE_OF)
    assert again.content['float'] == {'mAP': 0.9}
    assert again.result_of(first.recipe)['result'] == {'mAP': 0.8}
    # What failed is tried again, and takes the place of the failure.
    assert again.result_of(second.recipe) is None
    again.add(second, {'mAP': 0.7}, 1.0)
    assert len(json.loads(path.read_text())['entries']) == 2
    assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize(
    'key, word', [('checkpoint_sha256', 'checkpoint'), ('base recipe', 'base recipe'), ('metric', 'metric')]
)
def test_results_of_another_model_or_recipe_are_refused(tmp_path, key, word):
    path = tmp_path / 'sweep.json'
    Results(path, MADE_OF).set_float({'mAP': 0.9})
    before = path.read_text()
    with pytest.raises(Q3DError, match=f'another {word}.*--fresh'):
        Results(path, {**MADE_OF, key: 'other'})
    assert path.read_text() == before


def test_a_file_that_is_no_sweep_is_refused(tmp_path):
    (tmp_path / 'sweep.json').write_text('[]')
    with pytest.raises(Q3DError, match='no result of a sweep'):
        Results(tmp_path / 'sweep.json', MADE_OF)


def test_map_has_every_result_in_its_place():
    entries = entries_of('weight.bits=8,4', 'activation.bits=8,6,4')
    made = []
    for entry in entries[:-1]:
        result = {'mAP': entry.recipe.weight.bits + entry.recipe.activation.bits / 100}
        made.append({'name': entry.name, 'values': entry.values, 'result': result})
    made.append({'name': entries[-1].name, 'values': entries[-1].values, 'result': None})
    values, rows, columns = heat_map_of(made, 'mAP')
    assert rows == ['weight.bits=8', 'weight.bits=4']
    assert columns == ['activation.bits=8', 'activation.bits=6', 'activation.bits=4']
    assert values == [[8.08, 8.06, 8.04], [4.08, 4.06, None]]
    assert heat_map_of(made[:1], 'mAP') is None


def test_the_table_names_targets_differences_and_errors():
    entries = [
        {'name': 'W8A8', 'recipe': {'target': 'tensorrt'}, 'result': {'mAP': 0.25, 'NDS': 0.5}},
        {'name': 'W4A4', 'recipe': {}, 'result': None, 'error': 'it failed'},
    ]
    content = {'float': {'mAP': 0.5, 'NDS': 0.4}, 'entries': entries}
    lines = [line.split() for line in table(content, 'map').splitlines()]
    assert lines[0] == ['recipe', 'target', 'mAP', 'NDS', 'mAP', '-', 'float', 'NDS', '-', 'float', 'note']
    assert lines[2:] == [
        ['float', '0.5000', '0.4000', '+0.0000', '+0.0000'],
        ['W8A8', 'tensorrt', '0.2500', '0.5000', '-0.2500', '+0.1000'],
        ['W4A4', 'not', 'recorded', '-', '-', '-', '-', 'it', 'failed'],
    ]
    entries[1].update(result={'relative_l1': 0.5, 'nan': 2, 'inf': 1}, error='')
    assert table({'entries': entries[1:]}, 'l1').splitlines()[3].endswith('0.5000  3 NaN/Inf')
    # Where nothing is to be said, nothing is.
    assert 'note' not in table({'entries': entries[:1]}, 'map')


def test_recipes_of_several_targets_are_told_apart():
    entries = [
        {'name': 'W8A8', 'values': {}, 'recipe': {'target': t}, 'result': {'mAP': m}}
        for t, m in (('tensorrt', 0.1), ('openvino', 0.2))
    ]
    assert heat_map_of(entries, 'mAP')[1] == ['W8A8 (tensorrt)', 'W8A8 (openvino)']
    assert heat_map_of(entries[:1] * 2, 'mAP')[1] == ['W8A8', 'W8A8']


def test_the_curve_is_kept_apart_from_the_map(tmp_path):
    content = {'rows': [{'name': n, 'kind': 'Conv2d'} for n in 'abcd']}
    results = Results(tmp_path / 'sweep.json', MADE_OF)
    for i, entry in enumerate(skip_entries(toy_recipe(), content, [2, 0], 1, 'file')):
        results.add(entry, {'mAP': i / 10}, 1.0)
    for i, entry in enumerate(expand(toy_recipe(), *parse_grid(['weight.bits=8,4,2']))):
        if i:
            results.add(entry, {'mAP': 0.5}, 1.0)
    read = Results(tmp_path / 'sweep.json', MADE_OF).content['entries']
    assert curve_of(read, 'mAP') == {BY_RANK: [(0, 0.2), (2, 0.0)], f'{AT_RANDOM} 0': [(0, 0.2), (2, 0.1)]}
    values, _, columns = heat_map_of(read, 'mAP')
    assert values == [[0.5, 0.5]] and columns == ['weight.bits=4', 'weight.bits=2']
