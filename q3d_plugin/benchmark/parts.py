"""The parts of the benchmark by name.

To add one: a module with ``steps``, ``measure`` and ``NOTES``, as :mod:`q3d_plugin.benchmark.ptq`, and a line
in :data:`PARTS`.
"""

from collections.abc import Callable
from typing import List, NamedTuple, Tuple

from q3d_plugin.benchmark import ptq, qat
from q3d_plugin.benchmark.rows import Row
from q3d_plugin.errors import Q3DError, near_matches

__all__ = ['PARTS', 'Part', 'chosen_parts']


class Part(NamedTuple):
    """A part of the benchmark.

    Attributes:
        measure: Gives rows; takes the subject, the number of rounds, the number of tensors for slow
            calibrators, and the progress bar.
        steps: Steps of the progress bar, of the number of rounds.
        notes: What a reader has to know.
    """

    measure: Callable[..., List[Row]]
    steps: Callable[[int], int]
    notes: Tuple[str, ...]


PARTS = {
    'ptq': Part(ptq.measure, ptq.steps, ptq.NOTES),
    'qat': Part(qat.measure, qat.steps, qat.NOTES),
}


def chosen_parts(names: List[str]) -> List[Part]:
    """The parts of these names, each once; all of them where there are none.

    Raises:
        Q3DError: There is no such part.
    """
    for name in names:
        if name not in PARTS:
            raise Q3DError(f'benchmark: {name!r} is no part of it{near_matches(name, PARTS)}')
    return [PARTS[name] for name in dict.fromkeys(names or PARTS)]
