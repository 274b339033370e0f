"""What each quantized layer costs: its own error, its effect on the detector's outputs, and a skip list.

The measures are those of the study and of common practice: L1, relative L1, SQNR and cosine of a layer's
output against float, and the L1 of the detector's raw outputs with that layer quantized alone.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.analysis.measures import ErrorSums, OutputError
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.calibration import compute_ranges
from q3d_plugin.errors import Q3DError
from q3d_plugin.layers import QuantUnit, QuantWeightLayer
from q3d_plugin.quantizer import Mode
from q3d_plugin.recipe import matches

__all__ = [
    'LOSS',
    'RELATIVE_L1',
    'Row',
    'SkipList',
    'Switch',
    'calibrate',
    'choose_by_metric',
    'choose_skips',
    'doubling',
    'float_outputs',
    'groups_of',
    'local_errors',
    'output_errors',
    'rows_of',
]

_BATCHES = Sequence[Any]
_FORWARD = Callable[[Any], Dict[str, Tensor]]


class Switch:
    """Says which units of a calibrated model quantize; the others compute in float.

    Layers that read one tensor share a quantizer, so a quantizer cannot be switched for one of them. A unit
    is made float by taking its quantizers from it, and gets the same ones back.

    Args:
        model: Calibrated.

    Attributes:
        names: Names of the units that have something to quantize.
    """

    def __init__(self, model: nn.Module) -> None:
        self._units: Dict[str, QuantUnit] = {}
        self._kept: Dict[str, Tuple] = {}
        for name, unit in lifecycle.units(model):
            if any(q.mode is not Mode.FLOAT and not q._disabled for q in unit.quantizers()):
                self._units[name] = unit
                self._kept[name] = (unit.input_quantizer, getattr(unit, 'weight_quantizer', None))
        self.names: List[str] = list(self._units)

    def unit(self, name: str) -> QuantUnit:
        """The unit of a name."""
        return self._units[name]

    def set(self, name: str, quantized: bool) -> None:
        """Makes one unit quantize or compute in float."""
        unit = self._units[name]
        unit.input_quantizer = self._kept[name][0] if quantized else None
        if isinstance(unit, QuantWeightLayer):
            unit.weight_quantizer = self._kept[name][1] if quantized else None

    def only(self, names: Collection[str]) -> None:
        """Makes the units of ``names`` quantize, and no others."""
        for name in self.names:
            self.set(name, name in names)

    @contextmanager
    def restored(self) -> Iterator['Switch']:
        """Within, units are switched; at the end all of them quantize again."""
        try:
            yield self
        finally:
            self.only(self.names)


def calibrate(model: nn.Module, batches: Iterable, forward: Callable, run: Callable) -> List[str]:
    """Calibrates, and goes on without the layers whose input holds NaN or Inf, which stay float.

    Args:
        model: Configured.
        batches: Re-iterable.
        forward: For this pass; boxes need not be decoded.
        run: The strict calibration, tried first.

    Returns:
        list: Names of the units that a NaN or Inf came to.
    """
    try:
        run()
        return []
    except Q3DError:
        activations = [q for q in lifecycle.quantizers(model) if not q.per_channel]
        if all(q.finite for q in activations):
            raise
    bad = []
    for quantizer in activations:
        quantizer.observe()
    quantizers = [q for q in lifecycle.quantizers(model) if q.per_channel]
    for quantizer in quantizers:
        quantizer.disable()
    with torch.no_grad():
        for batch in batches:
            forward(batch)
    for quantizer in quantizers:
        quantizer.enable()
    nonfinite = {id(q) for q in activations if not q.finite}
    compute_ranges(activations)
    for name, unit in lifecycle.units(model):
        if id(unit.input_quantizer) in nonfinite:
            bad.append(name)
        if isinstance(unit, QuantWeightLayer) and unit.weight_quantizer is not None:
            unit.calibrate_weight()
    return bad


def _read(unit: QuantUnit, output: Any) -> Tensor:
    """What is read of an output: of an addition before a ReLU, what that lets through.

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


RELATIVE_L1 = 'relative L1 of the outputs'
LOSS = 'points of mAP below float'


@dataclass
class SkipList:
    """Layers to leave float, and the error that remains.

    Attributes:
        measure: What the error is: relative L1 of the raw outputs, or points of mAP below float.
        names: The most harmful first.
        lengths: How many layers were float where the error was measured.
        errors: With so many of them float; None where no output is finite.
        budget: What the error had to come down to.
        kept: Whether it did.
    """

    measure: str = RELATIVE_L1
    names: List[str] = field(default_factory=list)
    lengths: List[int] = field(default_factory=list)
    errors: List[Optional[float]] = field(default_factory=list)
    budget: float = 0.0
    kept: bool = False

    def to_dict(self) -> Dict[str, Any]:
        """As plain data."""
        return asdict(self)


def _cost(error: OutputError) -> Tuple:
    relative = error.relative_l1
    return (error.nan + error.inf, float('inf') if relative is None else relative)


def choose_skips(
    switch: Switch,
    replay: Replay,
    batches: _BATCHES,
    ranking: Sequence[str],
    budget: float,
    most: int,
    candidates: int = 8,
    trial_frames: int = 1,
    progress: bool = True,
) -> SkipList:
    """Chooses layers to leave float until the error of the outputs is within a budget, as few as it can.

    Layers hide and mend each other's errors: while one of two layers in a row spoils everything, leaving the
    other one float changes nothing, so a list cannot be grown by what the next layer improves. It is made too
    long first (the shortest head of the ranking that keeps the budget, by bisection, and no more than twice
    ``most``); then the layers are given back that, quantized again, do least harm. The choice is made on the
    first frames; whether the budget is kept is measured on all of them.

    Args:
        switch: Of the model.
        replay: Of the same model and its forward pass.
        batches: Frames.
        ranking: Names, the most harmful first.
        budget: Relative L1 of the raw outputs.
        most: The longest list.
        candidates: How many layers are tried at a step, at least: of the last ones while the list is too
            long; when it keeps the budget, how many may break it, one after the other, before it is final.
        trial_frames: How many frames the choice among them is made on.
        progress: Whether to show a progress bar.
    """
    everything = set(switch.names)
    references = float_outputs(switch, replay.forward, batches)
    measured: Dict[Collection[str], OutputError] = {}

    def error_of(names: Sequence[str]) -> OutputError:
        key = frozenset(names)
        if key not in measured:
            quantized = everything.difference(key)
            measured[key] = _output_error(switch, replay.forward, batches, quantized, references)
        bar.set_postfix(float=len(key), error=measured[key].relative_l1)
        bar.update()
        return measured[key]

    def kept(names: Sequence[str]) -> bool:
        return _cost(error_of(names)) <= (0, budget)

    def least_harmful(names: Sequence[str], tried: Sequence[str]) -> List[str]:
        """``tried``, sorted by the error that is left when each is quantized again, the other names not."""
        base = everything.difference(names)
        variants = {n: base | {n} for n in tried}
        found, _ = output_errors(switch, replay, batches[:trial_frames], variants, base, references)
        bar.update(len(tried))
        return sorted(tried, key=lambda n: _cost(found[n]))

    with tqdm(desc='skip list', unit='pass', disable=not progress) as bar:
        high, _ = _shortest(min(len(ranking), 2 * most), lambda length: kept(ranking[:length]))
        names = list(ranking[:high])
        while len(names) > most:
            # Half of what is too much at once: as many steps as the excess has binary digits.
            many = (len(names) - most + 1) // 2
            back = least_harmful(names, names[-max(candidates, 2 * many) :])[:many]
            names = [n for n in names if n not in back]
        keeps, refused = kept(names), 0
        for name in least_harmful(names, names) if keeps and names else ():
            shorter = [n for n in names if n != name]
            if kept(shorter):
                names, refused = shorter, 0
            else:
                refused += 1
            if refused == candidates:
                break  # the rest does more harm
        lengths = doubling(len(names))
        errors = [error_of(names[:i]).relative_l1 for i in lengths]
    return SkipList(names=names, lengths=lengths, errors=errors, budget=budget, kept=keeps)


def choose_by_metric(
    switch: Switch,
    evaluate: Callable[[], float],
    reference: float,
    ranking: Sequence[str],
    budget: float,
    most: int,
    progress: bool = True,
) -> SkipList:
    """The shortest head of a ranking whose layers, left float, bring mAP near enough to that of float.

    Lengths double until one does, and bisection between it and the one before finds the shortest: at most two
    evaluations for each binary digit of ``most``. Where mAP is noisy, and does not rise with every layer, the
    list is one that was measured to do, and perhaps not the shortest.

    Args:
        switch: Of the model.
        evaluate: Gives mAP, from 0 to 1, of the model as it is.
        reference: mAP of the float model.
        ranking: Names, the most harmful first.
        budget: How many points (hundredths) of mAP may be lost.
        most: The longest list.
        progress: Whether to show a progress bar.
    """
    losses: Dict[int, float] = {}
    everything = set(switch.names)

    def kept(length: int) -> bool:
        with switch.restored():
            switch.only(everything.difference(ranking[:length]))
            losses[length] = 100 * (reference - evaluate())
        bar.set_postfix(float=length, loss=losses[length])
        bar.update()
        return losses[length] <= budget

    with tqdm(desc='skip list by mAP', unit='evaluation', disable=not progress) as bar:
        high, found = _shortest(min(len(ranking), most), kept)
    lengths = sorted(losses)
    errors = [losses[n] for n in lengths]
    return SkipList(LOSS, list(ranking[:high]), lengths, errors, budget, found)


def _shortest(most: int, kept: Callable[[int], bool]) -> Tuple[int, bool]:
    """The least length that is ``kept``, and True; ``most`` and False where it is not.

    Lengths double until one is kept, then bisection goes on between it and the one before.
    """
    low, high, found = 0, 0, False
    for length in doubling(most):
        low, high, found = high, length, kept(length)
        if found:
            break
    while found and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high, found


def doubling(most: int) -> List[int]:
    """Lengths to measure a list at: few, but all of the short ones.

    Examples:
        >>> doubling(20)
        [0, 1, 2, 4, 8, 16, 20]
    """
    powers = itertools.takewhile(lambda n: n < most, (2**i for i in itertools.count()))
    return sorted({0, *powers, most})


@torch.no_grad()
def _output_error(
    switch: Switch,
    forward: _FORWARD,
    batches: _BATCHES,
    quantized: Collection[str],
    references: Sequence[Mapping[str, Tensor]],
) -> OutputError:
    """Error of the raw outputs with these units quantized, by whole passes."""
    error = OutputError()
    with switch.restored():
        switch.only(quantized)
        for batch, reference in zip(batches, references):
            error.add(reference, forward(batch))
    return error
