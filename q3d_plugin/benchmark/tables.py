"""The rows of the benchmark as text."""

from collections.abc import Sequence
from typing import List, Optional

from q3d_plugin.benchmark.rows import Row
from q3d_plugin.text import text_table

__all__ = ['table']

TITLES = {
    'time': ('forward pass', 'of float', 'in CPU s'),
    'training': ('training step', 'of float', 'in CPU s'),
    'half': ('in float16', 'of float', 'in CPU s'),
    'ranges': ('all ranges of the model', '', ''),
    'memory': ('peak memory', 'of float', ''),
    'error': ('error of the ranges', '', ''),
}
"""Section -> the headers of its first column, of the ratio and of the ratio in processor time."""

VERDICTS = {None: '', True: 'pass', False: 'MISSED'}


def _number(value: Optional[float], digits: int = 3) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _cells(row: Row) -> List[str]:
    digits = 1 if row.unit == 'MiB' else 3
    value = '-' if row.value is None else f'{_number(row.value, digits)} {row.unit}'
    spread = '' if row.spread is None else '..'.join(_number(s, 2) for s in row.spread)
    target = '' if row.target is None else f'<= {row.target:g}'
    ratios = [_number(row.ratio), _number(row.cpu_ratio)]
    return [row.name, value, *ratios, spread, target, VERDICTS[row.passed], row.note]


def _section(rows: Sequence[Row], section: str) -> str:
    """The table of a section; columns without a cell are left out."""
    title, *ratios = TITLES[section]
    header = [title, '', *ratios, 'spread', 'target', '', '']
    cells = [_cells(row) for row in rows]
    kept = [i for i in range(len(header)) if any(line[i] for line in cells)]
    right = [new for new, old in enumerate(kept) if 0 < old < 6]
    return text_table([header[i] for i in kept], [[line[i] for i in kept] for line in cells], right)


def table(rows: List[Row], headline: str, notes: Sequence[str] = ()) -> str:
    """The rows as a table for each section, with the notes and the number of missed targets below.

    Args:
        rows: Of one run.
        headline: The first line.
        notes: Lines below the tables.
    """
    parts = [headline]
    for section in TITLES:
        members = [r for r in rows if r.section == section]
        if members:
            parts.append(_section(members, section))
    missed = sum(r.passed is False for r in rows)
    verb = 'target is' if missed == 1 else 'targets are'
    last = f'{missed} {verb} missed' if missed else 'every target is met'
    return '\n\n'.join([*parts, '\n'.join([*notes, last])])
