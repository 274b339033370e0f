"""The shortest list of layers to leave float, so that what the detector computes stays near to float."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor
from tqdm import tqdm

from q3d_plugin import lifecycle
from q3d_plugin.analysis.calibrate import calibrate
from q3d_plugin.analysis.measures import OutputError
from q3d_plugin.analysis.replay import Replay
from q3d_plugin.analysis.sensitivity import float_outputs, output_errors
from q3d_plugin.analysis.switch import Switch
from q3d_plugin.bench import Bench
from q3d_plugin.layers import QuantWeightLayer
from q3d_plugin.recipe import Recipe

__all__ = [
    'LOSS',
    'RELATIVE_L1',
    'SkipList',
    'choose_by_metric',
    'choose_skips',
    'choose_unsmoothed',
    'doubling',
    'paste',
    'treated',
    'verdict',
]

_BATCHES = Sequence[Any]
_FORWARD = Callable[[Any], Dict[str, Tensor]]

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


def choose_unsmoothed(
    bench: Bench,
    recipe: Recipe,
    ranking: Sequence[str],
    batches: _BATCHES,
    budget: float,
    most: int,
    frames: Optional[Iterable] = None,
) -> SkipList:
    """The shortest head of a ranking that is better off without SmoothQuant, as far as the budget asks.

    Taking SmoothQuant from a layer changes the weights before it, so each list is measured by calibrating
    anew, and lists double in length.

    Args:
        bench: Calibrated by ``recipe``.
        recipe: With SmoothQuant.
        ranking: Names, the most harmful first; those that are not smoothed are passed over.
        batches: Frames to measure on.
        budget: Relative L1 of the raw outputs.
        most: The longest list.
        frames: Calibration frames; those that the recipe names where None.
    """
    references = float_outputs(Switch(bench.model), bench.forward, batches)
    layers = dict(lifecycle.units(bench.model))
    smoothed = [n for n in ranking if isinstance(layers[n], QuantWeightLayer)]
    smoothed = [n for n in smoothed if layers[n].smooth_spec is not None]
    out, best = SkipList(budget=budget), (float('inf'), float('inf'))
    for length in doubling(min(most, len(smoothed))):
        names = smoothed[:length]
        if length:
            calibrate(bench, treated(recipe, names, 'standard'), frames, f'{length} layers standard')
        switch = Switch(bench.model)
        error = _output_error(switch, bench.forward, batches, switch.names, references)
        out.lengths.append(length)
        out.errors.append(error.relative_l1)
        if _cost(error) < best:
            best, out.names = _cost(error), names
        if best <= (0, budget):
            out.kept = True
            break
    return out


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


def treated(recipe: Recipe, names: Sequence[str], treat: str) -> Recipe:
    """The recipe with some layers treated otherwise.

    Args:
        recipe: Of all layers.
        names: Of the layers.
        treat: ``'float'``: they stay float. ``'standard'``: they are quantized without SmoothQuant.
    """
    plain = recipe.to_dict()
    if treat == 'float':
        plain['skip'] = [*plain['skip'], *names]
    elif names:
        smooth = plain['smoothquant']
        smooth['overrides'] = [*(smooth.get('overrides') or []), {'layers': list(names), 'alpha': None}]
    return Recipe.from_dict(plain)


def paste(recipe: Recipe, names: Sequence[str], treat: str, framework: str) -> str:
    """A list as a config takes it, with what was in the recipe before.

    Args:
        recipe: Of the config.
        names: Of the layers.
        treat: As :func:`treated` takes it.
        framework: ``'openpcdet'`` for YAML, else Python.

    Examples:
        >>> print(paste(Recipe(), ['a', 'b*'], 'float', 'openpcdet'))
        SKIP:
            - a
            - 'b*'
        >>> print(paste(Recipe(), ['a'], 'standard', 'mmdet3d'))
        smoothquant=dict(overrides=[dict(layers=['a'], alpha=None)]),
    """
    if treat == 'float':
        return _paste_skip([*recipe.skip, *names], framework)
    if not names:
        return '# no layer is better off without SmoothQuant'
    listed = ', '.join(repr(n) for n in names)
    if framework == 'openpcdet':
        return f'SMOOTHQUANT: {{OVERRIDES: [{{LAYERS: [{listed}], ALPHA: null}}]}}'
    return f'smoothquant=dict(overrides=[dict(layers=[{listed}], alpha=None)]),'


def _paste_skip(names: Sequence[str], framework: str) -> str:
    if framework == 'openpcdet':
        # A star begins an alias in YAML.
        lines = [f'    - {repr(n) if "*" in n else n}' for n in names]
        return '\n'.join(['SKIP:' + ('' if lines else ' []'), *lines])
    return '\n'.join(['skip=[', *(f'    {n!r},' for n in names), '],']) if names else 'skip=[],'


def verdict(found: SkipList, treat: str, most: int) -> str:
    """Whether a list keeps its budget, in words.

    Args:
        found: The list.
        treat: As :func:`treated` takes it.
        most: The longest list that was allowed.
    """
    word = {'float': 'left float', 'standard': 'without SmoothQuant'}[treat]
    errors = ['none, all NaN or Inf' if e is None else f'{e:.5f}' for e in found.errors]
    after = errors[found.lengths.index(len(found.names))]
    kept = 'kept' if found.kept else f'NOT kept (--max-skipped {most})'
    return (
        f'{found.measure} with everything quantized: {errors[0]}\n'
        f'with {len(found.names)} layers {word}: {after}; budget {found.budget:g}: {kept}'
    )
