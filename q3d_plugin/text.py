"""Results as text: tables for terminals, logs and Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any, List

__all__ = ['markdown_table', 'text_table']


def text_table(
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    right: Sequence[int] = (),
    widest: int = 1000,
) -> str:
    """A table in columns of equal width, with a rule below its header.

    Args:
        header: Names of the columns.
        rows: Cells of the lines, as many as the header has; None becomes an empty cell.
        right: Numbers of the columns that are set flush right, as figures are.
        widest: No column is wider; longer cells push the rest of their line to the right.

    Examples:
        >>> print(text_table(['layer', 'L1'], [['neck', '0.5'], ['head.0', '12.25']], right=[1]))
        layer      L1
        ------  -----
        neck      0.5
        head.0  12.25
    """
    cells: List[List[str]] = [list(header)]
    cells += [['' if value is None else str(value) for value in row] for row in rows]
    widths = [min(widest, max(len(line[i]) for line in cells)) for i in range(len(header))]
    lines = [
        '  '.join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in cells
    ]
    lines.insert(1, '  '.join('-' * w for w in widths))
    return '\n'.join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown.

    Args:
        header: Names of the columns.
        rows: Cells of the lines, as many as the header has; None becomes an empty cell.

    Examples:
        >>> print(markdown_table(['recipe', 'mAP'], [['W8A8', '57.8'], ['W4A4', None]]))
        | recipe | mAP |
        | --- | --- |
        | W8A8 | 57.8 |
        | W4A4 |  |
    """
    cells = [header, ['---'] * len(header), *rows]
    lines = [' | '.join('' if value is None else str(value) for value in line) for line in cells]
    return '\n'.join(f'| {line} |' for line in lines)
