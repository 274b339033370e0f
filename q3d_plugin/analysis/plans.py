"""Plans of a sweep: grids, named recipes and lists of layers to skip, as recipes to try."""

import copy
import dataclasses
import itertools
import json
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from q3d_plugin import files
from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.recipe import Recipe, keys_of
from q3d_plugin.shipped import find_shipped

__all__ = [
    'AT_RANDOM',
    'BY_RANK',
    'PROPOSED',
    'Entry',
    'changed',
    'expand',
    'parse_grid',
    'read_plan',
    'skip_entries',
    'word_of',
]

BASE = 'base'
"""As a value: what the config's recipe has."""


@dataclass(frozen=True)
class Entry:
    """A recipe to try.

    Attributes:
        name: For tables.
        values: What differs from the base recipe: dotted key -> value; empty for a named recipe.
        recipe: Validated.
        curve: Of recipes with a skip list: ``line`` (how it was chosen) and ``skipped`` (how many layers).
    """

    name: str
    values: Dict[str, Any]
    recipe: Recipe
    curve: Optional[Dict[str, Any]] = None


def _check_key(key: str, place: str) -> None:
    known = keys_of(Recipe)
    if key not in known:
        near = near_matches(key, known)
        tails = [k for k in known if k.rsplit('.', 1)[-1] == key.rsplit('.', 1)[-1]]
        if '; did' not in near and tails:
            near = '; did you mean ' + ', '.join(map(repr, tails)) + '?'
        raise Q3DError(f'{place}: unknown key {key!r}{near}')


def _value(text: str, key: str, folder: Path) -> Any:
    if text.startswith('@'):
        return files.read_json(folder / text[1:], f'--grid: {key}')
    words = {'none': None, 'null': None, 'true': True, 'false': False}
    if text.lower() in words:
        value = words[text.lower()]
        return [] if value is None and key in ('skip', 'overrides') else value
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return [text] if key == 'skip' and text != BASE else text


def parse_grid(arguments: Sequence[str]) -> Tuple[Dict[str, List[Any]], List[Dict[str, Any]]]:
    """The grid and the named recipes of a command line.

    Args:
        arguments: ``key=value,value``, or files: ``.json`` or ``.py``, see :func:`read_plan`. A value is a
            number, ``true``, ``false``, ``none``, a word, ``base`` (what the config has) or ``@file.json``.

    Returns:
        tuple: Dotted key -> values, and recipes with their names.

    Raises:
        Q3DError: A key is unknown, or a file cannot be read.

    Examples:
        >>> parse_grid(['weight.bits=8,4', 'smoothquant.alpha=none,0.5'])[0]['weight.bits']
        [8, 4]
    """
    grid: Dict[str, List[Any]] = {}
    named: List[Dict[str, Any]] = []
    for argument in arguments:
        key, equals, text = argument.partition('=')
        if not equals:
            more, recipes = read_plan(Path(argument))
            grid.update(more)
            named += recipes
            continue
        key = key.lower()
        _check_key(key, '--grid')
        grid[key] = [_value(item, key, Path()) for item in text.split(',')]
    return grid, named


def read_plan(path: Path) -> Tuple[Dict[str, List[Any]], List[Dict[str, Any]]]:
    """Grid and named recipes of a file.

    Args:
        path: A ``.py`` file with variables ``grid`` (dotted key -> list of values) or ``recipes`` (list of
            dictionaries, each with a ``name`` and what changes of the config's recipe, as nested dictionaries
            or dotted keys), or a ``.json`` file with those keys.

    Raises:
        Q3DError: It cannot be read, or has neither, or a key is unknown.
    """
    path = Path(find_shipped(str(path)))
    place = f'--grid {str(path)!r}'
    if path.suffix not in ('.py', '.json'):
        raise Q3DError(f'--grid: {str(path)!r} was given; key=value,value or a .py or .json file would work')
    if not path.is_file():
        raise Q3DError(f'{place}: no such file (looked in {Path.cwd()})')
    if path.suffix == '.json':
        content = files.read_json(path, place)
    else:
        try:
            content = runpy.run_path(str(path))
        except Exception as error:  # whatever a Python file can raise
            raise Q3DError(f'{place}: {type(error).__name__}: {error}') from error
    if not isinstance(content, Mapping) or not (content.get('grid') or content.get('recipes')):
        raise Q3DError(f"{place}: it has neither 'grid' nor 'recipes'")
    grid = {}
    for key, values in (content.get('grid') or {}).items():
        _check_key(key, place)
        if not isinstance(values, (list, tuple)) or not values:
            raise Q3DError(f'{place}: {key}: {values!r} was given; a list of values would work')
        loaded = [isinstance(v, str) and v.startswith('@') for v in values]
        grid[key] = [_value(v, key, path.parent) if at else v for v, at in zip(values, loaded)]
    named = []
    for i, recipe in enumerate(content.get('recipes') or []):
        if not isinstance(recipe, Mapping) or not isinstance(recipe.get('name'), str):
            raise Q3DError(f'{place}: recipes[{i}] has no name')
        named.append(dict(recipe))
    return grid, named


def changed(base: Mapping, values: Mapping[str, Any]) -> Dict[str, Any]:
    """A recipe in plain form with some dotted keys set.

    None for a key inside a section sets the whole section to None, so that ``weight.bits=none`` leaves the
    weights float and ``smoothquant.alpha=none`` smooths nothing; other keys of that section have no meaning
    then.

    Args:
        base: Plain form, see :meth:`q3d_plugin.recipe.Recipe.to_dict`; not changed.
        values: Dotted key -> value; ``'base'`` leaves a key as it is.

    Examples:
        >>> changed({'weight': {'bits': 8}}, {'weight.bits': 4})
        {'weight': {'bits': 4}}
        >>> changed({'weight': {'bits': 8}}, {'weight.bits': None, 'weight.calibrator': 'mse'})
        {'weight': None}
    """
    out = copy.deepcopy(dict(base))
    values = {k: v for k, v in values.items() if not (isinstance(v, str) and v == BASE)}
    # Sections that become None last: no other key may bring them back.
    for key, value in sorted(values.items(), key=lambda item: item[1] is None):
        section, _, inner = key.partition('.')
        if not inner:
            out[section] = value
        elif value is None:
            out[section] = None
        else:
            out[section] = {**(out.get(section) or {}), inner: value}
    return out


def _flat(recipe: Mapping) -> Dict[str, Any]:
    """Nested dictionaries of a named recipe as dotted keys."""
    out = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            out.update({f'{key}.{k}': v for k, v in value.items()})
        else:
            out[key] = value
    return out


def word_of(value: Any, key: str) -> str:
    """A value of a grid as tables and maps name it."""
    if key == 'skip' and isinstance(value, (list, tuple)):
        return f'{len(value)} patterns' if value else 'none'
    if value is None:
        return 'none'
    return str(value).lower() if isinstance(value, bool) else str(value)


def expand(base: Recipe, grid: Mapping[str, Sequence[Any]], named: Sequence[Mapping]) -> List[Entry]:
    """Every recipe of a grid, then the named ones; each recipe once.

    Args:
        base: The config's recipe.
        grid: Dotted key -> values.
        named: Recipes with names.

    Raises:
        Q3DError: A value is out of range; the entry is named.
    """
    plain, entries = base.to_dict(), []
    combinations = [dict(zip(grid, values)) for values in itertools.product(*grid.values())] if grid else []
    wanted = [(', '.join(f'{k}={word_of(v, k)}' for k, v in c.items()), c, c) for c in combinations]
    for recipe in named:
        values = _flat({k: v for k, v in recipe.items() if k != 'name'})
        for key in values:
            _check_key(key, f'recipe {recipe["name"]!r}')
        wanted.append((recipe['name'], {}, values))
    names, seen = set(), set()
    for name, shown, values in wanted:
        try:
            recipe = Recipe.from_dict(changed(plain, values))
        except Q3DError as error:
            raise Q3DError(f'{error} (in the sweep: {name})') from error
        key = json.dumps(recipe.to_dict(), sort_keys=True)
        if key in seen:
            continue
        if name in names:
            name = f'{name} ({len(names)})'
        seen.add(key)
        names.add(name)
        entries.append(Entry(name, dict(shown), recipe))
    if not entries:
        raise Q3DError('--grid: it has not one recipe; such as weight.bits=8,4 would work')
    return entries


PROPOSED = 'proposed by sensitivity'
BY_RANK = 'the most harmful'
AT_RANDOM = 'at random'


def skip_entries(
    base: Recipe, sensitivity: Mapping[str, Any], lengths: Sequence[int], draws: int, place: str
) -> List[Entry]:
    """Recipes that leave more and more layers float: by the ranking, and at random to compare.

    Args:
        base: What the other layers have.
        sensitivity: Content of ``sensitivity.json``.
        lengths: How many layers.
        draws: How many random orders.
        place: The file, for messages.

    Raises:
        Q3DError: The file ranks no layers.
    """
    rows = sensitivity.get('rows') if isinstance(sensitivity, Mapping) else None
    if not rows or not all('name' in row and 'kind' in row for row in rows):
        raise Q3DError(f'--skip-curve: {place!r} ranks no layers; sensitivity.json of q3d sensitivity does')
    names = [row['name'] for row in rows]
    orders = [(BY_RANK, names)]
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(names))
        orders.append((f'{AT_RANDOM} {seed}', [names[i] for i in order]))
    lists = [(line, order[:n]) for n in dict.fromkeys(lengths) for line, order in orders if n <= len(names)]
    proposed = (sensitivity.get('skip') or {}).get('names')
    if proposed:
        # Layers that were float there because no range could be taken are float in what was proposed.
        lists.append((PROPOSED, [*(sensitivity.get('left_float') or []), *proposed]))
    entries, seen = [], set()
    for line, skipped in lists:
        recipe = dataclasses.replace(base, skip=(*base.skip, *sorted(skipped)))
        title = f'{len(skipped)} layers float, {line}' if skipped else 'none left float'
        if recipe.skip not in seen:
            entries.append(Entry(title, {}, recipe, {'line': line, 'skipped': len(skipped)}))
        seen.add(recipe.skip)
    return entries
