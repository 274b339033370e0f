"""Pictures of results, as PNG. Matplotlib is imported when the first one is drawn."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, Optional, Tuple

from q3d_plugin.errors import Q3DError

__all__ = ['figure', 'heat_map', 'metric_curve', 'panels', 'png', 'sensitivity_chart', 'skip_curve']


def figure(width: float, height: float):
    """A figure with one pair of axes, drawn without a display.

    Raises:
        Q3DError: There is no matplotlib.
    """
    made, (axes,) = panels(width, height)
    return made, axes


def panels(width: float, height: float, widths: Sequence[float] = (1.0,)):
    """A figure with several pairs of axes side by side, drawn without a display.

    Args:
        width: Inches.
        height: Inches.
        widths: Of the axes, in proportion.

    Returns:
        tuple: The figure, and a list of its axes.

    Raises:
        Q3DError: There is no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Q3DError(f'pictures need matplotlib: pip install matplotlib ({error})') from error
    made = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(made)
    drawn = made.subplots(1, len(widths), squeeze=False, gridspec_kw={'width_ratios': list(widths)})
    return made, list(drawn[0])


def png(made, dpi: int = 110) -> bytes:
    """A figure as the content of a PNG file."""
    out = io.BytesIO()
    # Axes of equal scale may stick out of a layout that knows their place before their shape.
    made.savefig(out, format='png', dpi=dpi, bbox_inches='tight')
    return out.getvalue()


def sensitivity_chart(rows: Sequence[Dict[str, Any]], most: int = 40, title: str = '') -> bytes:
    """Bars: the effect of each layer on the outputs, and its own error, the most harmful layer first.

    Args:
        rows: Of ``sensitivity.json``, sorted.
        most: How many rows.
        title: Above it.
    """
    rows = list(rows)[:most]
    made, axes = figure(10, max(2.0, 1.2 + 0.24 * len(rows)))
    places = range(len(rows))
    measures = [('output_relative_l1', 'of the outputs', '#b2182b'), ('relative_l1', 'of its own', '#92c5de')]
    measures = [m for m in measures if any(r.get(m[0]) for r in rows)]
    height = 0.8 / max(len(measures), 1)
    for i, (key, label, colour) in enumerate(measures):
        values = [r.get(key) or 0 for r in rows]
        axes.barh([p + (i - (len(measures) - 1) / 2) * height for p in places], values, height, color=colour)
        axes.barh([0], [0], color=colour, label=label)
    for place, row in zip(places, rows):
        broken = sum(row.get(k) or 0 for k in ('nan', 'inf', 'output_nan', 'output_inf'))
        if broken:
            axes.text(0.99, place, f'{broken} NaN/Inf', transform=axes.get_yaxis_transform(), ha='right')
    axes.set_yticks(list(places), [r['name'] for r in rows], fontsize=7)
    axes.invert_yaxis()
    if any(r.get(m[0]) for m in measures for r in rows):
        axes.set_xscale('log')
    axes.set_xlabel('relative L1 against float, quantized alone')
    axes.set_title(title, fontsize=10, loc='left')
    axes.margins(y=0.5 / max(len(rows), 1))
    axes.grid(axis='x', alpha=0.3)
    if measures:
        # Above the bars, of which it would cover some.
        axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    return png(made)


def skip_curve(
    lengths: Sequence[int], errors: Sequence[Optional[float]], budget: float, measure: str
) -> bytes:
    """The error against the number of layers in a skip list.

    Args:
        lengths: Numbers of layers.
        errors: With so many layers float; None where it is not finite.
        budget: What the error has to come down to.
        measure: What the error is.
    """
    made, axes = figure(6, 3.2)
    errors = [math.nan if e is None or math.isinf(e) else e for e in errors]
    axes.plot(lengths, errors, marker='o', color='#b2182b')
    axes.axhline(budget, color='grey', linestyle='--', linewidth=1)
    axes.text(0, budget, ' budget', va='bottom', fontsize=8, color='grey')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel('layers left float')
    axes.set_ylabel(measure)
    axes.set_ylim(bottom=min([0, *(e for e in errors if not math.isnan(e))]))
    axes.grid(alpha=0.3)
    return png(made)


def metric_curve(
    lines: Mapping[str, Sequence[Tuple[int, float]]], measure: str, reference: Optional[float] = None
) -> bytes:
    """A metric against the number of layers that are left float; lines of one point are marks.

    Args:
        lines: Name -> pairs of skipped layers and value; names that begin alike have one colour.
        measure: Name of the metric.
        reference: That of the float model, drawn as a line across.
    """
    made, axes = figure(7, 4)
    colours: Dict[str, str] = {}
    for name, points in lines.items():
        group = name.rstrip(' 0123456789')
        label = None if group in colours else group
        colour = colours.setdefault(group, f'C{len(colours)}')
        style = '*' if len(points) == 1 else 'o-'
        axes.plot(*zip(*points), style, color=colour, label=label, markersize=12 if style == '*' else 4)
    if reference is not None:
        axes.axhline(reference, color='grey', linestyle='--', label='float')
    axes.set_xlabel('layers left float')
    axes.set_ylabel(measure)
    axes.legend()
    return png(made)


def heat_map(
    values: Sequence[Sequence[Optional[float]]], rows: Sequence[str], columns: Sequence[str], title: str
) -> bytes:
    """A map of numbers, each written into its field; fields without a value stay grey.

    Args:
        values: By row and column.
        rows: Labels.
        columns: Labels.
        title: Above it.
    """
    # A letter of this size is about 0.065 inches wide.
    labels = 0.065 * max(map(len, rows))
    made, axes = figure(2.0 + labels + max(0.9 * len(columns), 0.08 * len(title)), 1.6 + 0.42 * len(rows))
    filled = [[math.nan if v is None else v for v in line] for line in values]
    axes.set_facecolor('#dddddd')
    image = axes.imshow(filled, cmap='viridis', aspect='auto')
    known: List[float] = [v for line in filled for v in line if not math.isnan(v)]
    middle = (min(known) + max(known)) / 2 if known else 0
    for y, line in enumerate(filled):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = 'black' if value > middle else 'white'
                axes.text(x, y, f'{value:.4f}', ha='center', va='center', fontsize=8, color=colour)
    key, equals, _ = columns[0].partition('=')
    if equals and all(c.startswith(f'{key}=') for c in columns):
        # The key stands once, below the values.
        columns = [c[len(key) + 1 :] for c in columns]
        axes.set_xlabel(key, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=20 if len(columns) > 4 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title, fontsize=10)
    made.colorbar(image, ax=axes)
    return png(made)
