"""Results of the survey: one row for each config, and the file that they are kept in."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Dict, List, Optional

from q3d_plugin.errors import Q3DError
from q3d_plugin.files import write_text

__all__ = ['TOLERANCE', 'Row', 'failures', 'first_line', 'read_rows', 'with_forward_of', 'write_rows']

TOLERANCE = 1e-4
"""The largest relative difference from float, with all quantizers off, that single precision explains."""

DOUBLE_TOLERANCE = 1e-9
"""The same in double precision."""


@dataclasses.dataclass
class Row:
    """The result for one config.

    Attributes:
        framework: ``'mmdet3d'`` or ``'openpcdet'``.
        config: Its path below the folder of configs.
        float_build: Empty where the float model was built, else the framework's reason.
        quant_build: Empty where the quantized model was built; None where there was no float model.
        layers: Convolutions, linear layers and attention projections.
        quantized: How many of these are quantized.
        elements: Elements of all their weights.
        quantized_elements: Elements of the weights of the quantized ones.
        left: Reason -> type -> how many layers are not quantized.
        forward: Empty where the float forward ran to its end, else where it stopped and why; None where it
            was not tried.
        twin: The config whose forward this one's is, because model and frame are the same.
        compared: How many layers the forward reached, of ``comparable`` ones.
        comparable: Layers whose outputs can be compared.
        difference: Largest difference, quantizers off against float, of any layer's output, relative to the
            largest magnitude of that output; None where nothing was compared.
        worst: The layer with that difference.
        double: The same difference in double precision, measured where that in single precision is above the
            tolerance and every layer runs in double: rounding alone vanishes there, a mistake does not.
        jitter: Where it does not, the difference of the float model from itself with the last bit of its
            weights changed at random, which is what folding does to them.
        int8: Relative L2 error of the INT8 outputs: median over the layers.
        ours: The traceback of a failure of this plugin.
        seconds: Time it took.
        memory: Peak resident memory, GiB.
    """

    framework: str
    config: str
    float_build: str = 'not tried'
    quant_build: Optional[str] = None
    layers: int = 0
    quantized: int = 0
    elements: int = 0
    quantized_elements: int = 0
    left: Dict[str, Dict[str, int]] = dataclasses.field(default_factory=dict)
    forward: Optional[str] = None
    twin: str = ''
    compared: int = 0
    comparable: int = 0
    difference: Optional[float] = None
    worst: str = ''
    double: Optional[float] = None
    jitter: Optional[float] = None
    int8: Optional[float] = None
    ours: str = ''
    seconds: float = 0.0
    memory: float = 0.0

    @property
    def same(self) -> bool:
        """Whether off equals float within the tolerance."""
        return self.difference is not None and self.difference < TOLERANCE

    @property
    def rounding(self) -> bool:
        """Whether it does not, but by no more than rounding makes of the float model itself."""
        if self.same or self.difference is None:
            return False
        if self.double is not None:
            return self.double < DOUBLE_TOLERANCE
        return self.jitter is not None and self.difference < 3 * self.jitter


def first_line(error: BaseException, folder: Optional[Path] = None) -> str:
    """The first line of an exception with its type, without the paths of this machine.

    Args:
        error: The exception.
        folder: A folder whose path is left out, too.
    """
    text = ' '.join((str(error).strip().splitlines() or [''])[0].split())
    text = text.replace(os.path.realpath(sys.prefix), '<env>').replace(sys.prefix, '<env>')
    text = text.replace(str(folder), '...') if folder is not None else text
    return f'{type(error).__name__}: {text}'[:200].rstrip(': ')


def with_forward_of(row: Row, twin: Row) -> Row:
    """The row of a config that was only built, with the results of the forward pass of its twin."""
    if row.ours or row.float_build or twin.ours or twin.comparable != row.comparable:
        return row
    fields = ('forward', 'compared', 'difference', 'worst', 'double', 'jitter', 'int8')
    return dataclasses.replace(row, twin=twin.config, **{f: getattr(twin, f) for f in fields})


def failures(rows: List[Row]) -> List[Row]:
    """Rows that show a mistake of the plugin."""
    return [r for r in rows if r.ours or (r.difference is not None and not (r.same or r.rounding))]


def read_rows(path: str) -> List[Row]:
    """The rows of an earlier run.

    Raises:
        Q3DError: The file is no such file.
    """
    try:
        return [Row(**row) for row in json.loads(Path(path).read_text())['rows']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Q3DError(f'--resume: {path!r} is no result of this command: {error}') from error


def write_rows(path: str, rows: List[Row]) -> None:
    """Writes the result; the file appears whole or not at all."""
    # Not write_json, which makes null of the infinite difference that marks a failure.
    write_text(path, json.dumps({'rows': [dataclasses.asdict(r) for r in rows]}, indent=1))
