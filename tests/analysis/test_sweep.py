"""Grids, and results that are resumed or refused."""

import json

import pytest

from q3d_plugin.analysis.sweep import (
    AT_RANDOM,
    BY_RANK,
    PROPOSED,
    Results,
    changed,
    curve_of,
    expand,
    heat_map_of,
    known_keys,
    parse_grid,
    skip_entries,
)
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe

MADE_OF = {'checkpoint_sha256': 'a', 'config_sha256': 'b', 'base recipe': {}, 'metric': 'map', 'frames': None}


def test_values_of_a_command_line(tmp_path):
    listed = tmp_path / 'skip.json'
    listed.write_text('["neck", "head"]')
    grid, named = parse_grid(
        ['weight.bits=8,4', 'activation.unsigned=auto,true', f'skip=none,@{listed},neck*,base', 'mode=qat']
    )
    assert grid['weight.bits'] == [8, 4]
    assert grid['activation.unsigned'] == ['auto', True]
    assert grid['skip'] == [[], ['neck', 'head'], ['neck*'], 'base']
    assert named == []


def test_every_key_of_the_recipe_is_known():
    def dotted(value, prefix=''):
        for key, item in value.items():
            yield f'{prefix}{key}'
            if isinstance(item, dict):
                yield from dotted(item, f'{prefix}{key}.')

    assert set(dotted(Recipe().to_dict())) <= set(known_keys())


@pytest.mark.parametrize(
    'argument, near', [('wieght.bits=8', 'weight.bits'), ('activation.bit=8', 'activation.bits')]
)
def test_an_unknown_key_names_the_nearest(argument, near):
    with pytest.raises(Q3DError, match=f'unknown key.*{near}'):
        parse_grid([argument])


def test_a_value_out_of_range_names_the_recipe():
    with pytest.raises(Q3DError, match=r'recipe\.weight\.bits: 99.*weight\.bits=99'):
        expand(Recipe(), *parse_grid(['weight.bits=99']))


def test_grid_and_named_recipes(tmp_path):
    base = Recipe.from_dict({'skip': ['neck']})
    plan = tmp_path / 'plan.py'
    plan.write_text(
        "grid = {'weight.bits': [8, 4], 'skip': ['base', []]}\n"
        "recipes = [dict(name='A4', activation=dict(bits=4)), dict(name='same as the base')]\n"
    )
    entries = expand(base, *parse_grid([str(plan), 'activation.bits=8,none']))
    # The base recipe is in the grid already.
    assert len(entries) == 2 * 2 * 2 + 1
    assert entries[-1].name == 'A4' and entries[-1].recipe.activation.bits == 4
    assert {e.recipe.skip for e in entries} == {('neck',), ()}
    first = entries[0]
    assert first.values == {'weight.bits': 8, 'skip': 'base', 'activation.bits': 8}
    assert first.recipe == base
    assert [e.recipe.activation for e in entries].count(None) == 4


def test_a_section_that_is_none_stays_none():
    plain = Recipe().to_dict()
    assert changed(plain, {'weight.calibrator': 'mse', 'weight.bits': None})['weight'] is None
    assert plain['weight'] is not None


@pytest.mark.parametrize(
    'name, text, words',
    [
        ('plan.py', 'x = 1', 'neither'),
        ('plan.py', 'grid = {"weight.bit": [1]}', 'weight.bits'),
        ('plan.py', 'grid = {"weight.bits": 8}', 'list'),
        ('plan.py', 'raise OSError("broken")', 'broken'),
        ('plan.json', '{', 'no JSON'),
        ('plan.json', '{"recipes": [{"weight": {"bits": 4}}]}', 'no name'),
        ('plan.txt', '', 'key=value'),
    ],
)
def test_files_that_are_no_plan(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(Q3DError, match=words):
        parse_grid([str(path)])


def entries_of(*grid):
    return expand(Recipe(), *parse_grid(grid))


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


def test_skip_lists_grow_along_the_ranking_and_at_random():
    names = [f'layer{i}' for i in range(12)]
    content = {
        'rows': [{'name': n, 'kind': 'Conv2d'} for n in names],
        'skip': {'names': ['layer7', 'layer2']},
    }
    base = Recipe.from_dict({'skip': ['neck']})
    entries = skip_entries(base, content, [0, 2, 5, 99], 2, 'file')
    assert all(e.recipe.skip[0] == 'neck' and e.values == {} for e in entries)
    by_line = {}
    for entry in entries:
        by_line.setdefault(entry.curve['line'], {})[entry.curve['skipped']] = set(entry.recipe.skip[1:])
    # Lists longer than the model has layers are left out; nothing skipped is one recipe for all.
    assert by_line[BY_RANK] == {0: set(), 2: set(names[:2]), 5: set(names[:5])}
    assert by_line[PROPOSED] == {2: {'layer7', 'layer2'}}
    for seed in range(2):
        lists = by_line[f'{AT_RANDOM} {seed}']
        assert set(lists) == {2, 5} and lists[2] < lists[5] and len(lists[5]) == 5
    assert by_line[f'{AT_RANDOM} 0'] != by_line[f'{AT_RANDOM} 1']
    with pytest.raises(Q3DError, match='ranks no layers'):
        skip_entries(base, {'rows': []}, [1], 1, 'file')
    with pytest.raises(Q3DError, match='ranks no layers'):
        skip_entries(base, {'rows': [{'name': 'pts_backbone', 'layers': 3}]}, [1], 1, 'file')


def test_the_curve_is_kept_apart_from_the_map(tmp_path):
    content = {'rows': [{'name': n, 'kind': 'Conv2d'} for n in 'abcd']}
    results = Results(tmp_path / 'sweep.json', MADE_OF)
    for i, entry in enumerate(skip_entries(Recipe(), content, [2, 0], 1, 'file')):
        results.add(entry, {'mAP': i / 10}, 1.0)
    for i, entry in enumerate(expand(Recipe(), *parse_grid(['weight.bits=8,4,2']))):
        if i:
            results.add(entry, {'mAP': 0.5}, 1.0)
    read = Results(tmp_path / 'sweep.json', MADE_OF).content['entries']
    assert curve_of(read, 'mAP') == {BY_RANK: [(0, 0.2), (2, 0.0)], f'{AT_RANDOM} 0': [(0, 0.2), (2, 0.1)]}
    values, _, columns = heat_map_of(read, 'mAP')
    assert values == [[0.5, 0.5]] and columns == ['weight.bits=4', 'weight.bits=2']
