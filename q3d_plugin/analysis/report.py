"""One HTML page of a run. It holds everything inside itself and opens without a network."""

import base64
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Dict, Optional, Tuple

from q3d_plugin.analysis import charts, training_curves
from q3d_plugin.analysis.nuscenes import RINGS, Detections, ap_by_distance
from q3d_plugin.analysis.picture import frame_picture
from q3d_plugin.analysis.run_files import Run, target_of
from q3d_plugin.analysis.sweep import pictures
from q3d_plugin.coverage import counted
from q3d_plugin.errors import Q3DError

__all__ = ['build']

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1080px;padding:0 1em;color:#222}
h1{font-size:1.6em}h2{margin-top:2em;border-bottom:1px solid #ccc}
table{border-collapse:collapse;font-size:13px}
td,th{padding:2px 9px;border-bottom:1px solid #e4e4e4;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}pre{background:#f5f5f5;padding:.8em;overflow:auto}
.missing{color:#777;font-style:italic}.off{color:#b2182b}img{max-width:100%}details{margin:.5em 0}
.bar{background:#92c5de;height:9px;display:inline-block}.tiles{display:flex;flex-wrap:wrap;gap:10px}
.tile{width:196px;font-size:11px;overflow-wrap:anywhere}svg{background:#f7f7f7}.scroll{max-height:32em;overflow:auto}
"""


class _Html(str):
    """Text that is HTML already; all other text is escaped."""


def _text(value: Any, digits: int = 4) -> str:
    if value is None:
        return '–'
    return f'{value:.{digits}f}' if isinstance(value, float) else html.escape(str(value))


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0) -> str:
    """A table whose last ``numbers`` columns are numbers."""

    def cell(value: Any, i: int, tag: str) -> str:
        mark = ' class="n"' if i >= len(header) - numbers else ''
        text = value if isinstance(value, _Html) else _text(value)
        return f'<{tag}{mark}>{text}</{tag}>'

    lines = [f'<tr>{"".join(cell(h, i, "th") for i, h in enumerate(header))}</tr>']
    lines += [f'<tr>{"".join(cell(v, i, "td") for i, v in enumerate(row))}</tr>' for row in rows]
    return f'<table>{"".join(lines)}</table>'


def _image(content: bytes, words: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'


def _missing(words: str) -> str:
    return f'<p class="missing">{html.escape(words)}</p>'


def _results(run: Run) -> str:
    if run.metrics is None:
        return _missing('Not evaluated yet: there are no metrics in this folder.')
    mine, reference = run.metrics, run.float_metrics
    header, rows = ['', 'this run'], [[m, mine.get(m)] for m in ('mAP', 'NDS')]
    if reference:
        header += ['float', 'difference']
        for row in rows:
            other = reference.get(row[0])
            both = row[1] is not None and other is not None
            row += [other, f'{row[1] - other:+.4f}' if both else None]
    out = _table(header, rows, len(header) - 1)
    return out if reference else out + _missing('No float run to compare with; name one by --float.')


def _per_class(run: Run) -> str:
    if not run.metrics or not run.metrics.get('AP'):
        return _missing('No AP by class yet.')
    other = (run.float_metrics or {}).get('AP') or {}
    rows = []
    for name, value in sorted(run.metrics['AP'].items(), key=lambda item: -item[1]):
        bar = _Html(f'<span class="bar" style="width:{round(value * 260)}px"></span>')
        difference = f'{value - other[name]:+.4f}' if name in other else None
        rows.append([name, bar, float(value), other.get(name), difference])
    return _table(['class', '', 'AP', 'float', 'difference'], rows, 3)


def _recipe(run: Run) -> str:
    if run.run is None:
        return _missing('run.json is not there: the run has not got as far as calibration.')
    recipe = run.run.get('recipe')
    keys = ('framework', 'config', 'checkpoint', 'data_root', 'dataset_version', 'predictions')
    facts = [['target', target_of(recipe)], *([k, run.run[k]] for k in keys if run.run.get(k))]
    return _table(['', ''], facts) + f'<pre>{html.escape(json.dumps(recipe, indent=1))}</pre>'


def _coverage(run: Run) -> str:
    if run.coverage is None:
        return _missing('coverage.json is not there: the run has not got as far as calibration.')
    totals = counted([(r['kind'], r.get('note', ''), r['quantized']) for r in run.coverage])
    keys = ('name', 'kind', 'weight', 'activation', 'shared_with', 'note')
    rows = []
    for row in run.coverage:
        cells = [row.get(k) or '' for k in keys]
        if not row['quantized']:
            cells[0] = _Html(f'<span class="off">{html.escape(row["name"])}</span>')
        rows.append(cells)
    header = ['layer', 'type', 'weight', 'input', 'input shared with', 'note']
    return f'<p>{totals.words}.</p><div class="scroll">{_table(header, rows)}</div>'


def _grid_of(row: Mapping[str, Any]) -> str:
    """The integers that an activation is quantized to, and their range."""
    integers = f'{"u" if row["unsigned"] else ""}int{row["bits"]}'
    if row.get('dynamic'):
        return f'{integers}, dynamic range'
    if row.get('amax') is not None:
        return f'{integers}, range {row["amax"]:.4g}'
    # Early runs did not record which ranges were dynamic.
    return 'float' if 'dynamic' in row else 'float, or dynamic range'


def _histogram(row: Mapping[str, Any]) -> str:
    """One activation as an inline picture: counts on a logarithmic scale, and the end of its range in red."""
    counts, top = row['counts'], row['top']
    highest = math.log1p(max(counts)) or 1.0
    width, height = 196.0, 62.0
    step = width / len(counts)
    points = [f'0,{height}']
    for i, count in enumerate(counts):
        y = height * (1 - math.log1p(count) / highest)
        points += [f'{i * step:.1f},{y:.1f}', f'{(i + 1) * step:.1f},{y:.1f}']
    points.append(f'{width},{height}')
    line = ''
    if row.get('amax') and top > 0:
        x = min(row['amax'] / top, 1.0) * width
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="#b2182b" stroke-width="1.5"/>'
    drawn = f'<svg width="{width:.0f}" height="{height:.0f}">'
    drawn += f'<polygon points="{" ".join(points)}" fill="#4393c3"/>{line}</svg>'
    seen = f'seen {row["minimum"]:.4g} to {row["maximum"]:.4g}'
    return f'<div class="tile">{drawn}<br><b>{html.escape(row["name"])}</b><br>{_grid_of(row)}; {seen}</div>'


def _histograms(run: Run) -> str:
    if not run.histograms:
        return _missing('histograms.json is not there: it is written by the run that calibrates.')
    words = (
        '<p>Magnitudes of every distinct input, counts on a logarithmic scale; red: the end of its range.</p>'
    )
    return words + f'<div class="tiles">{"".join(_histogram(r) for r in run.histograms if r["counts"])}</div>'


def _sensitivity(run: Run) -> str:
    if run.sensitivity is None:
        return _missing('No sensitivity.json; q3d sensitivity writes it, --sensitivity names its folder.')
    target = target_of(run.sensitivity.get('recipe'))
    out = _image(
        charts.sensitivity_chart(run.sensitivity['rows'], title=f'target {target}'),
        'sensitivity of the layers',
    )
    skip = run.sensitivity.get('skip')
    if skip and len(skip['errors']) > 1:
        names = ', '.join(map(html.escape, skip['names']))
        out += f'<p>Skip list for a budget of {skip["budget"]:g} ({skip["measure"]}): {names}</p>'
        drawn = charts.skip_curve(skip['lengths'], skip['errors'], skip['budget'], skip['measure'])
        out += _image(drawn, 'error against skipped layers')
    return out


def _sweep(run: Run) -> str:
    if run.sweep is None:
        return _missing('No sweep.json; q3d sweep writes it, --sweep names its folder.')
    entries = run.sweep['entries']
    measures = [
        m for m in ('mAP', 'NDS', 'relative_l1') if any((e.get('result') or {}).get(m) for e in entries)
    ]
    drawn = pictures(run.sweep, measures).items()
    out = ''.join(_image(content, f'{name} of the sweep') for name, content in drawn)
    rows = [
        [e['name'], target_of(e.get('recipe')), *((e.get('result') or {}).get(m) for m in measures)]
        for e in entries
    ]
    return out + _table(['recipe', 'target', *measures], rows, len(measures))


def _training(run: Run) -> str:
    content = run.training
    if not content or not content.get('epochs'):
        return _missing("No training.json: q3d train writes it, where the recipe's mode is qat.")
    epochs = content['epochs']
    out = (
        '<p>Inputs were looked at in a few steps of each epoch, weights at its end; a changed integer is '
        'another one than at the record before.</p>'
    )
    out += _epochs(content)
    if len(epochs) > 1:
        out += _image(training_curves.range_chart(epochs), 'ranges over the epochs')
        out += _image(training_curves.clipping_chart(epochs), 'clipped values over the epochs')
        out += _image(training_curves.progress_chart(content), 'changed weights and metrics over the epochs')
    return f'{out}<details><summary>Every range</summary>{_trained_ranges(epochs)}</details>'


def _share(value: Optional[float]) -> Optional[str]:
    return None if value is None else f'{100 * value:.3g}%'


def _epochs(content: Mapping[str, Any]) -> str:
    """One line for each record and each validation, in their order."""
    lines: Dict[int, Dict[str, Any]] = {}
    for entry in content['epochs']:
        totals = {key: _share(value) for key, value in entry['totals'].items()}
        lines[entry['step']] = {'epoch': entry['epoch'], 'loss': entry['losses'].get('loss'), **totals}
    for entry in content['validations']:
        lines.setdefault(entry['step'], {'epoch': entry['epoch']}).update(mAP=entry['mAP'], NDS=entry['NDS'])
    keys = ('loss', 'clipped_activations', 'clipped_weights', 'changed_codes', 'mAP', 'NDS')
    rows = [[f'{line["epoch"]:.4g}', *(line.get(k) for k in keys)] for _, line in sorted(lines.items())]
    header = ['epochs', 'loss', 'clipped inputs', 'clipped weights', 'changed integers', 'mAP', 'NDS']
    return _table(header, rows, len(header))


def _trained_ranges(epochs: Sequence[Mapping[str, Any]]) -> str:
    first = {(row['name'], row['tensor']): row['range'] for row in epochs[0]['layers']}
    rows = []
    for row in epochs[-1]['layers']:
        start, end = first.get((row['name'], row['tensor'])), row['range']
        ratio = f'{end / start:.3f}' if start and end is not None else None
        shown = [None if v is None else f'{v:.4g}' for v in (start, end)]
        rows.append(
            [row['name'], row['tensor'], *shown, ratio, _share(row['clipped']), _share(row['changed'])]
        )
    header = ['layer', 'tensor', 'range at the start', 'at the end', 'ratio', 'clipped', 'changed integers']
    return f'<div class="scroll">{_table(header, rows, 5)}</div>'


def _float_detections(
    run: Run, found: Detections, data_root: str, version: str
) -> Tuple[Optional[Detections], str]:
    """The detections of the float model, and what is to be said where there are none."""
    if run.float_results is None:
        return None, ' Boxes of the float model are drawn where --float names its run.'
    try:
        return Detections(run.float_results, data_root, version, found.nusc), ''
    except Q3DError as error:
        return None, html.escape(f' No boxes of the float model: {error}')


def _from_detections(run: Run, data_root: Optional[str], version: Optional[str]) -> Dict[str, str]:
    """The sections that need detections and ground truth."""
    facts = run.run or {}
    data_root, version = data_root or facts.get('data_root'), version or facts.get('dataset_version')
    reason = run.no_results
    if not reason and not (data_root and version):
        reason = 'The data set of this run is not known; name it by --data-root and --version.'
    if not reason:
        try:
            found = Detections(run.results, data_root, version)
            distances = ap_by_distance(found)
            reference, note = _float_detections(run, found, data_root, version)
            picture, words = frame_picture(found, reference)
        except Q3DError as error:
            reason = str(error)
        else:
            header = ['class', *(f'{a:g}–{b:g} m' if b < 1e9 else f'{a:g}+ m' for a, b in RINGS)]
            table = _table(header, [[n, *v] for n, v in distances.items()], len(RINGS))
            ranges = (
                '<p>– : no ground truth there (the devkit evaluates each class up to a range of its own).</p>'
            )
            return {
                'distance': table + ranges,
                'frame': f'<p>{words}{note}</p>' + _image(picture, 'camera image and view from above'),
            }
    return {'distance': _missing(reason), 'frame': _missing(reason)}


def build(run: Run, data_root: Optional[str] = None, version: Optional[str] = None) -> str:
    """The page.

    Args:
        run: What was found; parts that are not there are named on the page.
        data_root: Of nuScenes, where the run's own record is not right here.
        version: Of nuScenes.
    """
    more = _from_detections(run, data_root, version)
    sections: Dict[str, Callable[[], str]] = {
        'Results': lambda: _results(run),
        'AP by class': lambda: _per_class(run),
        'AP by distance': lambda: more['distance'],
        'A frame': lambda: more['frame'],
        'Training': lambda: _training(run),
        'Recipe': lambda: _recipe(run),
        'Coverage': lambda: _coverage(run),
        'Sensitivity': lambda: _sensitivity(run),
        'Sweep': lambda: _sweep(run),
        'Activations': lambda: _histograms(run),
    }
    title = html.escape(f'Quantized run: {run.folder.resolve().name}')
    target = '' if run.run is None else f'<p>Target: {html.escape(target_of(run.run.get("recipe")))}</p>'
    body = ''.join(f'<h2>{name}</h2>{section()}' for name, section in sections.items())
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<style>{_STYLE}</style></head><body><h1>{title}</h1>{target}{body}</body></html>'
    )
