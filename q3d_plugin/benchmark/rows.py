"""One line of the benchmark's table, and the names that lines share."""

import dataclasses
from typing import Dict, Optional, Tuple

__all__ = ['FLOAT', 'FOLDED', 'INT8', 'PEER', 'STATISTICS', 'Ranges', 'Row']

FLOAT, FOLDED, STATISTICS, INT8 = (
    'float forward, BatchNorm unfolded',
    'float forward, BatchNorm folded',
    'statistics pass',
    'simulated INT8 forward',
)
PEER = 'pytorch-quantization'

Ranges = Dict[str, Dict[int, float]]
"""Ranges of the activations by calibrator and index of the quantizer."""


@dataclasses.dataclass
class Row:
    """One line of the table.

    Attributes:
        section: ``'time'``, ``'ranges'``, ``'memory'`` or ``'error'``.
        name: What was measured.
        value: The number; None where it could not be measured.
        unit: Of ``value``.
        ratio: Against the float forward, where that means something.
        cpu_ratio: The same in processor time, which other processes on the machine disturb less.
        spread: Smallest and largest ratio of all rounds.
        target: Upper bound of the ratio, or of the value where there is no ratio.
        passed: Whether the target is met; None where there is none.
        note: What a reader has to know to read the number.
        recipe_target: The engine that the recipe is for, which decides what is simulated.
    """

    section: str
    name: str
    value: Optional[float]
    unit: str
    ratio: Optional[float] = None
    cpu_ratio: Optional[float] = None
    spread: Optional[Tuple[float, float]] = None
    target: Optional[float] = None
    passed: Optional[bool] = dataclasses.field(init=False, default=None)
    note: str = ''
    recipe_target: Optional[str] = None

    def __post_init__(self) -> None:
        measured = self.value if self.ratio is None else self.ratio
        if self.target is not None and measured is not None:
            self.passed = measured <= self.target
