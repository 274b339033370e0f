"""The rows of the survey as text."""

from typing import List

from q3d_plugin.text import text_table
from q3d_plugin.zoo.rows import TOLERANCE, Row

__all__ = ['OURS', 'outcome', 'reasons', 'summary', 'table']

OURS = 'OURS'
"""Stands in the table for a failure of this plugin."""

WIDEST = 90
HEADER = ('config', 'layers', 'quantized', 'of weights', 'off - float', 'int8', 'float, and why')


def reasons(row: Row) -> str:
    """The layers that are not quantized and why, on one line."""
    return '; '.join(
        f'{", ".join(f"{n} {kind}" for kind, n in kinds.items())}: {reason}'
        for reason, kinds in row.left.items()
    )


def outcome(row: Row) -> str:
    """What the forward pass showed, on one line; empty where none was tried."""
    if row.ours:
        return OURS
    if row.forward is None:
        return ''
    if row.difference is None:
        return row.forward or 'nothing to compare'
    text = f'{row.difference:.1e} of {row.compared}/{row.comparable} layers'
    if row.rounding:
        exact = f'in double: {row.double:.0e}' if row.double is not None else f'by rounding: {row.jitter:.1e}'
        text += f' ({exact})'
    text += f' (as {row.twin})' if row.twin else ''
    return text + (f', then {row.forward}' if row.forward else '')


def _cells(row: Row) -> List[str]:
    if row.float_build:
        return [row.config, '', '', '', f'float does not build: {row.float_build}', '', '']
    done = f'{row.quantized / max(row.layers, 1):.1%}'
    elements = f'{row.quantized_elements / max(row.elements, 1):.1%}'
    int8 = '' if row.int8 is None else f'{row.int8:.3f}'
    return [row.config, str(row.layers), done, elements, outcome(row), int8, reasons(row)]


def table(rows: List[Row]) -> str:
    """The rows as text, with a line of totals for each framework."""
    text = text_table(HEADER, map(_cells, rows), right=(1, 2, 3, 5), widest=WIDEST)
    return '\n'.join([text, '', *(summary(rows, name) for name in dict.fromkeys(r.framework for r in rows))])


def summary(rows: List[Row], framework: str) -> str:
    """One line about a framework."""
    rows = [r for r in rows if r.framework == framework]
    built = [r for r in rows if not r.float_build]
    quantized = [r for r in built if r.quant_build == '' and not r.ours]
    ran = [r for r in built if r.difference is not None]
    whole = [r for r in ran if r.compared == r.comparable]
    layers, elements = sum(r.layers for r in built), sum(r.elements for r in built)
    return (
        f'{framework}: {len(rows)} configs, {len(built)} built in float, {len(quantized)} of these quantized'
        f'; {len(ran)} ran ({len(whole)} through every layer), {sum(r.same for r in ran)} of these off = '
        f'float within {TOLERANCE:g}, {sum(r.rounding for r in ran)} more but for '
        f'rounding; {sum(r.quantized for r in built)} of {layers} layers quantized '
        f'({sum(r.quantized for r in built) / max(layers, 1):.1%}), '
        f'{sum(r.quantized_elements for r in built) / max(elements, 1):.1%} of the weights; '
        f'{sum(bool(r.ours) for r in rows)} failures of the plugin'
    )
