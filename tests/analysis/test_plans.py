"""Grids, named recipes and skip lists as recipes to try."""

import pytest
from analysis_toys import toy_recipe

from q3d_plugin.analysis.plans import (
    AT_RANDOM,
    BY_RANK,
    PROPOSED,
    changed,
    expand,
    parse_grid,
    skip_entries,
)
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe, keys_of


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

    assert set(dotted(Recipe().to_dict())) <= set(keys_of(Recipe))


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
    base = toy_recipe(skip=['neck'])
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
