"""The cost of quantizing each layer: its own error, and its effect on the detector's outputs.

The measures are those of the study and of common practice: L1, relative L1, SQNR and cosine of a layer's
output against float, and the L1 of the detector's raw outputs with that layer quantized alone.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.analysis.measures import ErrorSums, OutputError
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.bench import Bench
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantUnit
from q3d_plugin.recipe import matches
from q3d_plugin.text import text_table

__all__ = [
    'Row',
    'float_outputs',
    'groups_of',
    'local_errors',
    'measure',
    'output_errors',
    'rows_of',
    'table',
]

_BATCHES = Sequence[Any]
_FORWARD = Callable[[Any], Dict[str, Tensor]]


def _read(unit: QuantUnit, output: Any) -> Tensor:
    """The part of an output that is read: of an addition before a ReLU, what that lets through.

    The range of such an addition covers nothing else, and what it does to the rest is no error.
    """
    tensor = output.features if hasattr(output, 'features') and hasattr(output, 'indices') else output
    return tensor.relu() if getattr(unit, 'before_relu', False) else tensor


def _again(unit: QuantUnit, args: tuple, output: Any) -> tuple:
    """``args`` with the neighbours that a submanifold convolution has just found, to spare the search."""
    if getattr(unit, 'subm', False) and hasattr(output, 'indice_dict'):
        same = args[0].shadow_copy()
        same.indice_dict = dict(output.indice_dict)
        return (same, *args[1:])
    return args


@torch.no_grad()
def local_errors(switch: Switch, forward: _FORWARD, batches: Iterable) -> Dict[str, ErrorSums]:
    """Error of every unit's own output on the float model's input, for all units in one pass.

    Each unit computes twice: in float, which is passed on, and quantized, which is compared. Additions are
    compared behind their ReLU, where one follows.

    Args:
        switch: Of the model.
        forward: Runs the model on a batch.
        batches: Frames.
    """
    sums = {name: ErrorSums() for name in switch.names}
    handles = []

    def comparing(name: str) -> Callable:
        def hook(unit, args, kwargs, output):
            switch.set(name, True)
            try:
                quantized = type(unit).forward(unit, *_again(unit, args, output), **kwargs)
            finally:
                switch.set(name, False)
            sums[name].add(_read(unit, output), _read(unit, quantized))

        return hook

    with switch.restored():
        switch.only(())
        for name in switch.names:
            handles.append(switch.unit(name).register_forward_hook(comparing(name), with_kwargs=True))
        try:
            for batch in batches:
                forward(batch)
        finally:
            for handle in handles:
                handle.remove()
    return sums


@torch.no_grad()
def output_errors(
    switch: Switch,
    replay: Replay,
    batches: _BATCHES,
    variants: Mapping[str, Collection[str]],
    base: Collection[str] = (),
    references: Optional[List[Dict[str, Tensor]]] = None,
    progress: str = '',
) -> Tuple[Dict[str, OutputError], OutputError]:
    """Error of the detector's raw outputs with some units quantized, for many choices of units.

    Args:
        switch: Of the model.
        replay: Of the same model and its forward pass.
        batches: Frames.
        variants: Label -> names of the units that quantize; all others are float.
        base: The units that quantize in the recorded pass. A variant costs what differs from it.
        references: Float outputs of every frame; taken here where None.
        progress: Title of a progress bar; none where empty.

    Returns:
        tuple: Errors by label, and the error of ``base``.
    """
    found = {label: OutputError() for label in variants}
    of_base, base = OutputError(), set(base)
    with (
        switch.restored(),
        replay.installed(),
        tqdm(
            total=len(variants) * len(batches),
            desc=progress,
            unit='pass',
            disable=not progress,
        ) as bar,
    ):
        for i, batch in enumerate(batches):
            if references is None:
                switch.only(())
                reference = replay.forward(batch) if base else None
            else:
                reference = references[i]
            switch.only(base)
            outputs = replay.record(batch)
            reference = outputs if reference is None else reference
            of_base.add(reference, outputs)
            for label, names in variants.items():
                changed = base.symmetric_difference(names)
                for name in changed:
                    switch.set(name, name not in base)
                found[label].add(reference, replay.replay(batch, changed))
                for name in changed:
                    switch.set(name, name in base)
                bar.update()
    return found, of_base


@torch.no_grad()
def float_outputs(switch: Switch, forward: _FORWARD, batches: _BATCHES) -> List[Dict[str, Tensor]]:
    """The raw outputs of the float model for every frame."""
    with switch.restored():
        switch.only(())
        return [forward(batch) for batch in batches]


@dataclass
class Row:
    """One line of the table: a unit, or a group of units, quantized alone.

    Every measure is None where it has no meaning: a group has no output of its own, an error of zero no SQNR.

    Attributes:
        name: Of the unit or the group.
        kind: Of the unit; for a group how many units it has.
        l1: Mean absolute error of its own output.
        relative_l1: The same over the mean absolute value.
        sqnr_db: Signal to quantization noise ratio of its own output.
        cosine: Cosine between its float and its quantized output.
        nan: NaNs in its quantized output.
        inf: Infinities in its quantized output.
        float_nonfinite: NaNs and infinities in its float output.
        output_l1: L1 of the detector's raw outputs.
        output_relative_l1: Relative L1 of the detector's raw outputs.
        output_nan: NaNs in them.
        output_inf: Infinities in them.
        reverse_relative_l1: Relative L1 of the raw outputs with everything quantized but this.
        note: What a reader has to know.
    """

    name: str
    kind: str = ''
    l1: Optional[float] = None
    relative_l1: Optional[float] = None
    sqnr_db: Optional[float] = None
    cosine: Optional[float] = None
    nan: int = 0
    inf: int = 0
    float_nonfinite: int = 0
    output_l1: Optional[float] = None
    output_relative_l1: Optional[float] = None
    output_nan: Optional[int] = None
    output_inf: Optional[int] = None
    reverse_relative_l1: Optional[float] = None
    note: str = ''

    @property
    def broken(self) -> int:
        """Values that are not finite, of its own output and of the detector's."""
        return self.nan + self.inf + self.float_nonfinite + (self.output_nan or 0) + (self.output_inf or 0)

    @property
    def harm(self) -> Tuple:
        """Sorts rows: those with NaN or Inf first, then by the effect on the outputs, then by their own."""
        first = self.output_relative_l1
        second = self.relative_l1
        return (
            self.nan + self.inf + (self.output_nan or 0) + (self.output_inf or 0) > 0,
            -1.0 if first is None else first,
            -1.0 if second is None else second,
        )


def rows_of(
    kinds: Mapping[str, str],
    local: Mapping[str, ErrorSums],
    alone: Mapping[str, OutputError],
    reverse: Mapping[str, OutputError],
    notes: Mapping[str, str],
) -> List[Row]:
    """The table, the most harmful first.

    Args:
        kinds: Name -> kind, for every row there shall be.
        local: Errors of their own outputs, by name; may lack some.
        alone: Errors of the detector's outputs with only that one quantized.
        reverse: The same with everything quantized but that one.
        notes: What is to be said of some.
    """
    rows = []
    for name, kind in kinds.items():
        row = Row(name, kind, note=notes.get(name, ''))
        sums = local.get(name)
        if sums is not None:
            row.l1, row.relative_l1 = sums.l1, sums.relative_l1
            row.sqnr_db, row.cosine = sums.sqnr_db, sums.cosine
            row.nan, row.inf, row.float_nonfinite = sums.nan, sums.inf, sums.float_nonfinite
            if sums.elements == 0 and not row.broken and not row.note:
                row.note = 'saw no data'
        if name in alone:
            error = alone[name]
            row.output_l1, row.output_relative_l1 = error.l1, error.relative_l1
            row.output_nan, row.output_inf = error.nan, error.inf
        if name in reverse:
            row.reverse_relative_l1 = reverse[name].relative_l1
        rows.append(row)
    return sorted(rows, key=lambda r: r.harm, reverse=True)


def groups_of(names: Sequence[str], group: str) -> Dict[str, List[str]]:
    """Units by group.

    Args:
        names: Of the units.
        group: A number of leading parts of the name, or patterns with commas between them, as in the recipe;
            units that no pattern matches are in no group.

    Raises:
        Q3DError: A pattern matches nothing.

    Examples:
        >>> groups_of(['neck.0', 'head.a.0', 'head.b.0'], '1')
        {'neck': ['neck.0'], 'head': ['head.a.0', 'head.b.0']}
    """
    out: Dict[str, List[str]] = {}
    if group.isdigit() and int(group) > 0:
        for name in names:
            out.setdefault('.'.join(name.split('.')[: int(group)]), []).append(name)
        return out
    for pattern in filter(None, group.split(',')):
        members = [n for n in names if matches(pattern, n)]
        if not members:
            raise Q3DError(f'--group: {pattern!r} matches none of the {len(names)} quantized layers')
        out[pattern] = members
    if not out:
        raise Q3DError(
            f"--group: {group!r} was given; a depth such as 1, or patterns such as '*neck*,*head*' would work"
        )
    return out


def measure(
    bench: Bench,
    switch: Switch,
    batches: _BATCHES,
    notes: Mapping[str, str],
    group: Optional[str] = None,
    local: bool = False,
    reverse: bool = False,
    lap: Callable[[str], None] = lambda name: None,
) -> Tuple[List[Row], Optional[OutputError]]:
    """The table of a calibrated detector.

    Args:
        bench: The detector.
        switch: Of its model.
        batches: Frames.
        notes: What is to be said of some layers; a row for each of them, whether it is quantized or not.
        group: Rows of groups of layers, see :func:`groups_of`; of single layers where None.
        local: Whether only the own errors of the layers are wanted, which takes one pass.
        reverse: Whether everything quantized but one is wanted too.
        lap: Called with the name of each part when it is done.

    Returns:
        tuple: Rows, and the error of the outputs with everything quantized where ``reverse`` measured it.

    Raises:
        Q3DError: A pattern of ``group`` matches nothing.
    """
    if group:
        variants = groups_of(switch.names, group)
        kinds, notes = {name: f'{len(members)} layers' for name, members in variants.items()}, {}
    else:
        variants = {name: [name] for name in switch.names}
        found = lifecycle.units(bench.model)
        kinds = {name: unit.kind for name, unit in found if name in variants or name in notes}
    own = {} if group else local_errors(switch, bench.forward, batches)
    lap('own errors')
    if local:
        return rows_of(kinds, own, {}, {}, notes), None
    replay = Replay(bench.model, bench.forward)
    alone, _ = output_errors(switch, replay, batches, variants, progress='quantized alone')
    lap('effect on the outputs')
    if not reverse:
        return rows_of(kinds, own, alone, {}, notes), None
    others = {name: set(switch.names).difference(members) for name, members in variants.items()}
    without, everything = output_errors(switch, replay, batches, others, switch.names, progress='all but one')
    lap('all but one')
    return rows_of(kinds, own, alone, without, notes), everything


_COLUMNS = (
    ('l1', 'L1', '.3g'),
    ('relative_l1', 'rel. L1', '.4f'),
    ('sqnr_db', 'SQNR dB', '.1f'),
    ('cosine', 'cosine', '.5f'),
    ('nan', 'NaN', 'd'),
    ('inf', 'Inf', 'd'),
    ('float_nonfinite', 'bad float', 'd'),
    ('output_l1', 'out L1', '.3g'),
    ('output_relative_l1', 'out rel.', '.5f'),
    ('output_nan', 'out NaN', 'd'),
    ('output_inf', 'out Inf', 'd'),
    ('reverse_relative_l1', 'without it', '.5f'),
)


def table(rows: Sequence[Row]) -> str:
    """The rows as text; columns that say nothing of any of them are left out."""
    shown = [c for c in _COLUMNS if any(getattr(r, c[0]) is not None for r in rows)]
    shown = [c for c in shown if c[2] != 'd' or any(getattr(r, c[0]) for r in rows) or c[0] in ('nan', 'inf')]
    lines = []
    for row in rows:
        values = [(getattr(row, key), form) for key, _, form in shown]
        cells = [None if value is None else format(value, form) for value, form in values]
        lines.append([row.name, row.kind, *cells, row.note])
    header = ['layer', 'type', *(title for _, title, _ in shown), 'note']
    return text_table(header, lines, right=range(2, 2 + len(shown)))
