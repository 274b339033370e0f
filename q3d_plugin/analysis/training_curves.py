"""The curves of a training: ranges, clipped values, changed weights and metrics over the epochs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, Optional, Tuple

from q3d_plugin.analysis.charts import panels, png

__all__ = ['NAMED', 'clipping_chart', 'layer_lines', 'progress_chart', 'range_chart', 'ratio_lines']

NAMED = 6
"""Layers that a picture names and colours: those that stand out. The others are thin grey lines."""

_COLOURS = ('#b2182b', '#e08214', '#1b7837', '#35978f', '#2166ac', '#762a83')
_LONGEST = 66

Lines = Dict[str, List[Tuple[float, float]]]
"""Name of a layer -> pairs of epoch and value."""


def layer_lines(epochs: Sequence[Mapping[str, Any]], tensor: str, key: str) -> Lines:
    """One value of each layer over the epochs; what was not counted is left out.

    Args:
        epochs: Of ``training.json``.
        tensor: ``'input'`` or ``'weight'``.
        key: ``'range'``, ``'clipped'`` or ``'changed'``.
    """
    lines: Lines = {}
    for entry in epochs:
        for row in entry['layers']:
            if row['tensor'] == tensor and row.get(key) is not None:
                lines.setdefault(row['name'], []).append((entry['epoch'], row[key]))
    return lines


def ratio_lines(lines: Lines) -> Lines:
    """Lines divided by their first value; those that begin at zero, or have one point alone, are left out."""
    return {
        name: [(epoch, value / points[0][1]) for epoch, value in points]
        for name, points in lines.items()
        if len(points) > 1 and points[0][1] > 0
    }


def _moved(points: Sequence[Tuple[float, float]]) -> float:
    """How far a ratio went from 1, up or down alike."""
    return max(abs(math.log(value)) if value > 0 else math.inf for _, value in points)


def _highest(points: Sequence[Tuple[float, float]]) -> float:
    return max(value for _, value in points)


def _mean(points: Sequence[Tuple[float, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _short(name: str) -> str:
    """A name without its middle, where it is too long for a legend."""
    if len(name) <= _LONGEST:
        return name
    half = (_LONGEST - 1) // 2
    return f'{name[:half]}…{name[-half:]}'


def _draw(axes, lines: Lines, order, total: Optional[Sequence[Tuple[float, float]]] = None) -> None:
    """Thin lines for all layers, coloured ones for those that stand out, a black one for all together."""
    # One that is zero throughout does not stand out.
    ranks = {name: rank for name, points in lines.items() if (rank := order(points)) > 0}
    named = sorted(ranks, key=ranks.__getitem__, reverse=True)[:NAMED]
    for name, points in lines.items():
        if name not in named:
            style = '-' if len(points) > 1 else '.'
            axes.plot(
                *zip(*points), style, color='#999999', alpha=0.45, linewidth=0.7, markersize=3, zorder=1
            )
    # The legend goes from above to below, as the lines end.
    named.sort(key=lambda name: lines[name][-1][1], reverse=True)
    for name, colour in zip(named, _COLOURS):
        axes.plot(
            *zip(*lines[name]), 'o-', color=colour, linewidth=1.3, markersize=3, label=_short(name), zorder=2
        )
    if total:
        axes.plot(
            *zip(*total),
            'o-',
            color='black',
            linewidth=2.4,
            markersize=4,
            label='all layers together',
            zorder=3,
        )
    others = len(lines) - len(named)
    if others > 0:
        axes.plot(
            [],
            [],
            color='#999999',
            linewidth=0.7,
            label=f'{others} other layers' if named else f'{others} layers',
        )


def _finish(axes, title: str, ylabel: str, epochs: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(title, fontsize=10, loc='left')
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_xlabel('epochs trained', fontsize=9)
    axes.tick_params(labelsize=8)
    first, last = epochs[0]['epoch'], epochs[-1]['epoch']
    room = 0.03 * max(last - first, 1)
    axes.set_xlim(first - room, last + room)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        # Below the lines, of which it would cover some.
        axes.legend(loc='upper left', bbox_to_anchor=(0, -0.17), fontsize=7.5, frameon=False)
    else:
        axes.text(0.5, 0.5, 'not recorded', transform=axes.transAxes, ha='center', color='grey')


def _percent(points: Sequence[Tuple[float, float]]) -> List[Tuple[float, float]]:
    return [(epoch, 100 * value) for epoch, value in points]


def _total(epochs: Sequence[Mapping[str, Any]], key: str) -> List[Tuple[float, float]]:
    known = [(entry['epoch'], entry['totals'].get(key)) for entry in epochs]
    return _percent([(epoch, value) for epoch, value in known if value is not None])


def _pair():
    # The height has a legend's in it.
    return panels(10.4, 5.0, (1, 1))


def range_chart(epochs: Sequence[Mapping[str, Any]]) -> bytes:
    """The ranges of inputs and of weights, relative to those at the start.

    Args:
        epochs: Of ``training.json``.
    """
    made, pair = _pair()
    for axes, tensor, words in zip(pair, ('input', 'weight'), ('inputs', 'weights (mean of the channels)')):
        lines = ratio_lines(layer_lines(epochs, tensor, 'range'))
        _draw(axes, lines, _moved)
        axes.set_yscale('log', base=2)
        values = [value for points in lines.values() for _, value in points if value > 0]
        _mark_ratios(axes, min(values, default=1), max(values, default=1))
        _finish(axes, f'Ranges of {words}', 'range / range at the start', epochs)
    return png(made)


def _mark_ratios(axes, least: float, largest: float) -> None:
    """Ticks as plain numbers, close enough to each other to be read, and an extent of at least 4%."""
    low, high = min(least, 0.98), max(largest, 1.02)
    octaves = math.log2(high / low)
    if octaves < 1:
        width = next(w for w in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / w <= 7)
        ticks = [i * width for i in range(math.ceil(low / width), math.floor(high / width) + 1)]
    else:
        step = next((s for s in (0.25, 0.5, 1, 2, 4, 8) if octaves / s <= 7), 16)
        ends = math.ceil(math.log2(low) / step), math.floor(math.log2(high) / step)
        ticks = [2.0 ** (i * step) for i in range(ends[0], ends[1] + 1)]
    axes.set_yticks(ticks, [f'{t:.3g}' for t in ticks])
    axes.minorticks_off()
    margin = (high / low) ** 0.03
    axes.set_ylim(low / margin, high * margin)
    axes.axhline(1, color='black', linewidth=0.8, linestyle='--', zorder=0)


def clipping_chart(epochs: Sequence[Mapping[str, Any]]) -> bytes:
    """The shares of inputs and of weights that lie outside of their ranges.

    Args:
        epochs: Of ``training.json``.
    """
    made, pair = _pair()
    words = {'input': ('inputs', 'clipped_activations'), 'weight': ('weights', 'clipped_weights')}
    for axes, (tensor, (word, key)) in zip(pair, words.items()):
        found = layer_lines(epochs, tensor, 'clipped')
        _draw(axes, {n: _percent(p) for n, p in found.items()}, _highest, _total(epochs, key))
        axes.set_ylim(bottom=0)
        _finish(axes, f'Clipped {word}', 'clipped values (%)', epochs)
    return png(made)


def progress_chart(content: Mapping[str, Any]) -> bytes:
    """The share of weights that changed their integer in each epoch; and mAP and NDS, or else the loss.

    Args:
        content: Of ``training.json``.
    """
    epochs = content['epochs']
    made, (left, right) = _pair()
    found = layer_lines(epochs, 'weight', 'changed')
    _draw(left, {n: _percent(p) for n, p in found.items()}, _mean, _total(epochs, 'changed_codes'))
    left.set_ylim(bottom=0)
    _finish(left, 'Weights that changed their integer', 'changed since the record before (%)', epochs)
    for name, colour in (('mAP', '#b2182b'), ('NDS', '#2166ac')):
        points = [(v['epoch'], 100 * v[name]) for v in content['validations'] if v.get(name) is not None]
        if points:
            right.plot(*zip(*points), 'o-', color=colour, markersize=4, label=name)
    if right.lines:
        _finish(right, 'Validation', 'points (%)', epochs)
        return png(made)
    points = [(e['epoch'], e['losses'].get('loss')) for e in epochs if e['losses'].get('loss') is not None]
    if points:
        right.plot(*zip(*points), 'o-', color='black', markersize=4, label='loss')
    _finish(right, 'Loss', 'mean over the epoch', epochs)
    return png(made)
