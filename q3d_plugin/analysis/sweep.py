"""Results of a sweep: kept in a file that survives an interruption, and shown as tables and pictures."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from q3d_plugin import files, lifecycle
from q3d_plugin.analysis import charts
from q3d_plugin.analysis.measures import OutputError
from q3d_plugin.analysis.plans import AT_RANDOM, BY_RANK, Entry, word_of
from q3d_plugin.analysis.run_files import target_of
from q3d_plugin.bench import Bench
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe
from q3d_plugin.text import text_table

__all__ = [
    'MEASURES',
    'Results',
    'curve_of',
    'digest',
    'heat_map_of',
    'measure_l1',
    'pictures',
    'rows_of',
    'table',
]

MEASURES = {'map': ('mAP', 'NDS'), 'l1': ('relative_l1',)}
"""The measures of a result, by metric: the framework's own, or the error of the raw outputs."""


def curve_of(entries: Sequence[Mapping[str, Any]], measure: str) -> Dict[str, List[Tuple[int, float]]]:
    """The lines of the curve of :func:`skip_entries`: name -> sorted pairs of skipped layers and value.

    Args:
        entries: Of :attr:`Results.content`.
        measure: A key of the results, such as ``'mAP'``.
    """
    lines: Dict[str, List[Tuple[int, float]]] = {}
    for entry in entries:
        curve, value = entry.get('curve'), (entry.get('result') or {}).get(measure)
        if curve is not None and value is not None:
            lines.setdefault(curve['line'], []).append((curve['skipped'], value))
    # All orders begin with nothing skipped, which is measured once.
    start = next((p for p in lines.get(BY_RANK, ()) if p[0] == 0), None)
    for line, points in lines.items():
        if start is not None and line.startswith(AT_RANDOM):
            points.append(start)
    return {line: sorted(points) for line, points in lines.items()}


def digest(content: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class Results:
    """Results of a sweep in a file that is written after each of them.

    Args:
        path: ``sweep.json``; read where it exists.
        made_of: What results depend on beside the recipe: checkpoint, config, base recipe, metric.

    Attributes:
        content: ``made_of``, ``float`` and ``entries`` (name, values, recipe, result, seconds).

    Raises:
        Q3DError: The file is of another model, config, base recipe or metric.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any]) -> None:
        self.path = Path(path)
        made_of = files.plain(made_of)
        self.content: Dict[str, Any] = {'made_of': made_of, 'float': None, 'entries': []}
        if self.path.exists():
            found = files.read_json(self.path, 'sweep')
            if not isinstance(found, Mapping) or not {'made_of', 'entries'} <= set(found):
                raise Q3DError(f'sweep: {str(path)!r} is no result of a sweep; give another --out')
            other = [k for k in made_of if found['made_of'].get(k) != made_of[k]]
            if other:
                words = ', '.join(
                    f'another {k.replace("_sha256", "").replace("_", " ")}'
                    + (f' ({found["made_of"].get(k)} and {made_of[k]})' if k in ('metric', 'frames') else '')
                    for k in other
                )
                raise Q3DError(
                    f'sweep: the results in {str(path)!r} were made with {words}, and cannot go on with '
                    'this; give another --out, or --fresh to begin anew'
                )
            self.content = dict(found)

    def result_of(self, recipe: Recipe) -> Optional[Dict[str, Any]]:
        """The entry of a recipe that has a result."""
        plain = recipe.to_dict()
        done = (e for e in self.content['entries'] if e['recipe'] == plain and e.get('result'))
        return next(done, None)

    def set_float(self, result: Mapping[str, Any]) -> None:
        """Keeps the result of the float model."""
        self.content['float'] = dict(result)
        files.write_json(self.path, self.content)

    def add(self, entry: Entry, result: Optional[Mapping], seconds: float, error: str = '') -> None:
        """Keeps a result, in the place of one of the same recipe that failed.

        Args:
            entry: What was tried.
            result: Of the metric; None where it failed.
            seconds: How long it took.
            error: Why it failed.
        """
        plain = entry.recipe.to_dict()
        self.content['entries'] = [e for e in self.content['entries'] if e['recipe'] != plain]
        made = {'name': entry.name, 'values': entry.values, 'recipe': plain, 'result': result}
        if entry.curve is not None:
            made['curve'] = entry.curve
        self.content['entries'].append({**made, 'seconds': round(seconds, 2), 'error': error})
        files.write_json(self.path, self.content)


def heat_map_of(
    entries: Sequence[Mapping[str, Any]], measure: str
) -> Optional[Tuple[List[List[Optional[float]]], List[str], List[str]]]:
    """Values, row labels and column labels of a map of the results of a grid.

    The key of most values goes across, all combinations of the others down.

    Args:
        entries: Of :attr:`Results.content`.
        measure: A key of the results, such as ``'mAP'``.

    Returns:
        tuple: None where there are not two results with that measure.
    """
    entries = [e for e in entries if (e.get('result') or {}).get(measure) is not None and not e.get('curve')]
    if len(entries) < 2:
        return None
    of_grid = [e for e in entries if e['values']]
    if len(of_grid) < 2:
        targets = [target_of(e.get('recipe')) for e in entries]
        several = len(set(targets)) > 1
        names = [f'{e["name"]} ({t})' if several else e['name'] for e, t in zip(entries, targets)]
        return [[e['result'][measure]] for e in entries], names, [measure]
    entries = of_grid
    keys = list(dict.fromkeys(k for e in entries for k in e['values']))
    words = [{k: word_of(e['values'].get(k), k) for k in keys} for e in entries]
    counts = {k: len({w[k] for w in words}) for k in keys}
    across = max(keys, key=lambda k: counts[k])
    down = [k for k in keys if k != across and counts[k] > 1]
    columns = list(dict.fromkeys(f'{across}={w[across]}' for w in words))
    labels = [', '.join(f'{k}={w[k]}' for k in down) or measure for w in words]
    rows = list(dict.fromkeys(labels))
    values: List[List[Optional[float]]] = [[None] * len(columns) for _ in rows]
    for entry, word, label in zip(entries, words, labels):
        values[rows.index(label)][columns.index(f'{across}={word[across]}')] = entry['result'][measure]
    return values, rows, columns


def measure_l1(bench: Bench, frames: int) -> Callable[[], Dict[str, Any]]:
    """A function that compares the model as it is with the float one, whose outputs are computed here once.

    Args:
        bench: Configured.
        frames: How many frames of the recipe's calibration split.
    """
    spec = bench.recipe.calibration
    batches = list(bench.frames(spec.split, frames, spec.seed))
    lifecycle.set_enabled(bench.model, False)
    references = [{k: v.clone() for k, v in bench.forward(b).items()} for b in batches]

    def measure() -> Dict[str, Any]:
        error = OutputError()
        for reference, batch in zip(references, batches):
            error.add(reference, bench.forward(batch))
        return {'relative_l1': error.relative_l1, 'l1': error.l1, 'nan': error.nan, 'inf': error.inf}

    return measure


def rows_of(content: Mapping[str, Any], metric: str) -> List[Dict[str, Any]]:
    """A line for each recipe: name, target and measures.

    Args:
        content: Of :attr:`Results.content`.
        metric: A key of :data:`MEASURES`.
    """
    return [
        {
            'name': entry['name'],
            'target': target_of(entry.get('recipe')),
            **{m: (entry.get('result') or {}).get(m) for m in MEASURES[metric]},
        }
        for entry in content['entries']
    ]


def table(content: Mapping[str, Any], metric: str) -> str:
    """The results as text, with the difference to float.

    Args:
        content: Of :attr:`Results.content`.
        metric: A key of :data:`MEASURES`.
    """
    measures, reference = MEASURES[metric], content.get('float') or {}
    compared = [m for m in measures if metric == 'map' and reference.get(m) is not None]
    lines = []
    for entry in [{'name': 'float', 'result': reference}, *content['entries']]:
        result = entry.get('result') or {}
        target = target_of(entry['recipe']) if 'recipe' in entry else ''
        line = [entry['name'], target]
        line += ['-' if result.get(m) is None else f'{result[m]:.4f}' for m in measures]
        line += ['-' if result.get(m) is None else f'{result[m] - reference[m]:+.4f}' for m in compared]
        bad = (result.get('nan') or 0) + (result.get('inf') or 0)
        notes = [f'{bad} NaN/Inf' if bad else '', entry.get('error') or '']
        lines.append([*line, '; '.join(filter(None, notes))])
    header = ['recipe', 'target', *measures, *(f'{m} - float' for m in compared), 'note']
    if not any(line[-1] for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    return text_table(header, lines, right=range(2, 2 + len(measures) + len(compared)))


def pictures(content: Mapping[str, Any], measures: Sequence[str]) -> Dict[str, bytes]:
    """Maps of the measures, and curves over the lengths of skip lists: name of the picture -> PNG.

    Args:
        content: Of :attr:`Results.content`.
        measures: Keys of the results; those that no result has are passed over.
    """
    out, entries = {}, content['entries']
    targets = {target_of(e.get('recipe')) for e in entries}
    words = f', target {targets.pop()}' if len(targets) == 1 else ''
    for measure in measures:
        reference = (content.get('float') or {}).get(measure)
        found = heat_map_of(entries, measure)
        if found is not None:
            title = measure + (f' (float {reference:.4f})' if reference is not None else '') + words
            out[measure] = charts.heat_map(*found, title)
        lines = curve_of(entries, measure)
        if lines:
            out[f'skip_{measure}'] = charts.metric_curve(lines, measure, reference)
    return out
