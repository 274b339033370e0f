"""What the user asked for: one validated schema, the same words in every framework.

A recipe is a plain dictionary in a config and a :class:`Recipe` in the program. Unknown keys, patterns that
match no layer, bit widths out of range and calibrators that do not exist fail before any data is read, with
the full dotted path, what was given, and the nearest thing that would have worked.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Dict, List, Optional, Tuple, Union

from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.files import plain

__all__ = [
    'ActivationSpec',
    'CALIBRATORS',
    'CalibrationSpec',
    'LayerPlan',
    'Recipe',
    'SmoothOverride',
    'SmoothQuantSpec',
    'SmoothSpec',
    'WeightSpec',
    'differences',
    'matches',
]

CALIBRATORS = ('max', 'percentile', 'mse', 'entropy', 'grid')
WEIGHT_CALIBRATORS = ('max', 'percentile', 'mse', 'grid')
MODES = ('float', 'ptq', 'qat')
SPLITS = ('train', 'val', 'test')
SMOOTH_MODES = ('static', 'dynamic')
RANGES = ('static', 'dynamic')


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is quantized: signed, symmetric, one range per output channel.

    Attributes:
        bits: Width of the integers, 2 to 16.
        calibrator: ``'max'``, ``'percentile'``, ``'mse'`` or ``'grid'``.
        percentile: Share of the magnitudes inside the range, for ``'percentile'``, in ``(0, 100]``.
    """

    bits: int = 8
    calibrator: str = 'max'
    percentile: float = 99.99


@dataclass(frozen=True)
class ActivationSpec:
    """How the inputs of a layer are quantized: symmetric, one range per tensor.

    Attributes:
        bits: Width of the integers, 2 to 16.
        unsigned: True, False, or ``'auto'``: unsigned where the producer is a ReLU, that is, where not one
            value of all calibration frames is negative.
        calibrator: ``'max'``, ``'percentile'``, ``'mse'``, ``'entropy'`` or ``'grid'``.
        percentile: Share of the magnitudes inside the range, for ``'percentile'``, in ``(0, 100]``.
        range: ``'static'``: from calibration. ``'dynamic'``: the largest magnitude of the current tensor;
            calibration then only decides whether it is unsigned.
    """

    bits: int = 8
    unsigned: Any = 'auto'
    calibrator: str = 'mse'
    percentile: float = 99.99
    range: str = 'static'


@dataclass(frozen=True)
class CalibrationSpec:
    """What the activation ranges are taken from.

    Attributes:
        split: ``'train'``, ``'val'`` or ``'test'``: whose annotation file the frames come from.
        frames: How many frames, at least 1. Where the split has fewer, all of them are used, with a warning.
        seed: Chooses the frames.
    """

    split: str = 'train'
    frames: int = 300
    seed: int = 0


_GRID = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class SmoothSpec:
    """How the inputs of one layer are smoothed (SmoothQuant, Xiao et al. 2023).

    Attributes:
        alpha: How much of the difficulty goes from the inputs to the weight, 0 to 1, or ``'search'``.
        mode: ``'static'``: by scales from calibration, in the layers before where that is possible.
            ``'dynamic'``: by scales from the running input.
        grid: What ``'search'`` chooses from.
    """

    alpha: Union[float, str] = 0.5
    mode: str = 'static'
    grid: Tuple[float, ...] = _GRID


@dataclass(frozen=True)
class SmoothOverride:
    """Another alpha for the layers that match one of ``layers``; later overrides win.

    Attributes:
        layers: Patterns.
        alpha: 0 to 1, ``'search'``, or None: these layers are not smoothed.
    """

    layers: Tuple[str, ...]
    alpha: Optional[Union[float, str]] = None


@dataclass(frozen=True)
class SmoothQuantSpec:
    """Which layers are smoothed, and how; the recipe's ``smoothquant``.

    Attributes:
        alpha: 0 to 1, or ``'search'``.
        layers: Patterns of the layers that are smoothed.
        mode: ``'static'`` or ``'dynamic'``.
        grid: What ``'search'`` chooses from; 0.25, 0.5, 0.75 and no smoothing at all are always tried too.
        overrides: Other values of alpha for some of the layers.
    """

    alpha: Union[float, str] = 0.5
    layers: Tuple[str, ...] = ('*',)
    mode: str = 'static'
    grid: Tuple[float, ...] = _GRID
    overrides: Tuple[SmoothOverride, ...] = ()

    def plan(self, name: str) -> Optional[SmoothSpec]:
        """What it says of the layer ``name``; None for a layer that is not smoothed."""
        if not any(matches(p, name) for p in self.layers):
            return None
        alpha: Optional[Union[float, str]] = self.alpha
        for override in self.overrides:
            if any(matches(p, name) for p in override.layers):
                alpha = override.alpha
        # The grid of a layer whose alpha is given has no meaning, and must not tell two such layers apart.
        grid = self.grid if alpha == 'search' else ()
        return None if alpha is None else SmoothSpec(alpha, self.mode, grid)


@dataclass(frozen=True)
class LayerPlan:
    """What the recipe says of one layer: None for a part that stays float.

    Attributes:
        weight: How the weight is quantized.
        activation: How the inputs are quantized.
        reason: Why the layer has no quantizer, for the coverage table; empty where it has one.
        smooth: How the inputs are smoothed; None where they are not.
    """

    weight: Optional[WeightSpec]
    activation: Optional[ActivationSpec]
    reason: str = ''
    smooth: Optional[SmoothSpec] = None


@dataclass(frozen=True)
class Override:
    """A change of the specs for the layers that match one of ``layers``; later overrides win.

    Attributes:
        layers: Patterns.
        weight: Fields of :class:`WeightSpec` to change; None to leave the weight float.
        activation: Fields of :class:`ActivationSpec` to change; None to leave the inputs float.
    """

    layers: Tuple[str, ...]
    weight: Optional[Dict[str, Any]] = field(default_factory=dict)
    activation: Optional[Dict[str, Any]] = field(default_factory=dict)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of the recipe means the layer ``name`` or a module that holds it.

    Patterns are those of :mod:`fnmatch`; ``*`` also matches dots.

    Examples:
        >>> matches('*head*.heatmap.1', 'pts_bbox_head.task_heads.0.heatmap.1')
        True
        >>> matches('pts_backbone', 'pts_backbone.blocks.0.3')
        True
        >>> matches('pts_backbone', 'pts_backbone_extra.0')
        False
    """
    if fnmatchcase(name, pattern):
        return True
    parts = name.split('.')
    return any(fnmatchcase('.'.join(parts[:i]), pattern) for i in range(1, len(parts)))


def _fail(path: str, given: Any, would_work: str) -> None:
    raise Q3DError(f'{path}: {given!r} was given; {would_work}')


def _mapping(value: Any, path: str, known: Sequence[str]) -> Dict[str, Any]:
    if not isinstance(value, Mapping):
        _fail(path, value, f'a dictionary with the keys {", ".join(known)} would work')
    for key in value:
        if key not in known:
            raise Q3DError(f'{path}.{key}: unknown key{near_matches(key, known)}')
    return dict(value)


def _choice(value: Any, path: str, known: Sequence[Any]) -> Any:
    # True == 1 in Python, so membership alone would accept unsigned=1.
    if not any(value is k or (isinstance(k, str) and value == k) for k in known):
        hint = near_matches(value, [k for k in known if isinstance(k, str)]) if isinstance(value, str) else ''
        _fail(path, value, f'one of {", ".join(repr(k) for k in known)} would work{hint}')
    return value


def _integer(value: Any, path: str, low: int, high: Optional[int] = None) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        _fail(path, value, f'an integer from {low} ' + (f'to {high} would work' if high else 'up would work'))
    return value


def _percentile(value: Any, path: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 100:
        _fail(path, value, 'a number above 0 and up to 100 would work, such as 99.99')
    return float(value)


def _patterns(value: Any, path: str) -> Tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(v, str) and v for v in value):
        _fail(path, value, "a list of layer name patterns would work, such as ['*bbox_head*.heatmap.1']")
    return tuple(value)


def _weight_fields(value: Any, path: str) -> Dict[str, Any]:
    value = _mapping(value, path, [f.name for f in dataclasses.fields(WeightSpec)])
    if 'bits' in value:
        _integer(value['bits'], f'{path}.bits', 2, 16)
    if 'calibrator' in value:
        _choice(value['calibrator'], f'{path}.calibrator', WEIGHT_CALIBRATORS)
    if 'percentile' in value:
        value['percentile'] = _percentile(value['percentile'], f'{path}.percentile')
    return value


def _activation_fields(value: Any, path: str) -> Dict[str, Any]:
    value = _mapping(value, path, [f.name for f in dataclasses.fields(ActivationSpec)])
    if 'bits' in value:
        _integer(value['bits'], f'{path}.bits', 2, 16)
    if 'unsigned' in value:
        _choice(value['unsigned'], f'{path}.unsigned', ('auto', True, False))
    if 'calibrator' in value:
        _choice(value['calibrator'], f'{path}.calibrator', CALIBRATORS)
    if 'percentile' in value:
        value['percentile'] = _percentile(value['percentile'], f'{path}.percentile')
    if 'range' in value:
        _choice(value['range'], f'{path}.range', RANGES)
    return value


def _override(value: Any, path: str) -> Override:
    value = _mapping(value, path, ('layers', 'weight', 'activation'))
    if 'layers' not in value:
        raise Q3DError(f'{path}.layers: missing; a pattern or a list of patterns would work')
    fields = {'layers': _patterns(value['layers'], f'{path}.layers')}
    for key, check in (('weight', _weight_fields), ('activation', _activation_fields)):
        if key in value:
            fields[key] = None if value[key] is None else check(value[key], f'{path}.{key}')
    return Override(**fields)


def _alpha(value: Any, path: str, none: bool = False) -> Optional[Union[float, str]]:
    if value == 'search' or (none and value is None):
        return value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        _fail(path, value, "a number from 0 to 1 or 'search' would work" + (', or None' if none else ''))
    return float(value)


def _smooth_override(value: Any, path: str) -> SmoothOverride:
    value = _mapping(value, path, ('layers', 'alpha'))
    for key, hint in (('layers', 'a pattern or a list of patterns'), ('alpha', "a number, 'search' or None")):
        if key not in value:
            raise Q3DError(f'{path}.{key}: missing; {hint} would work')
    layers = _patterns(value['layers'], f'{path}.layers')
    return SmoothOverride(layers, _alpha(value['alpha'], f'{path}.alpha', none=True))


def _smoothquant(value: Any, path: str) -> SmoothQuantSpec:
    value = _mapping(value, path, [f.name for f in dataclasses.fields(SmoothQuantSpec)])
    if 'alpha' in value:
        value['alpha'] = _alpha(value['alpha'], f'{path}.alpha')
    if 'layers' in value:
        value['layers'] = _patterns(value['layers'], f'{path}.layers')
        if not value['layers']:
            _fail(f'{path}.layers', [], "a list of patterns such as ['*backbone*'] would work")
    if 'mode' in value:
        _choice(value['mode'], f'{path}.mode', SMOOTH_MODES)
    if 'grid' in value:
        grid = value['grid']
        if not isinstance(grid, Sequence) or isinstance(grid, str) or not grid:
            _fail(f'{path}.grid', grid, 'a list of numbers from 0 to 1 would work')
        for i, a in enumerate(grid):
            if a == 'search':
                _fail(f'{path}.grid[{i}]', a, 'a number from 0 to 1 would work')
        value['grid'] = tuple(sorted({_alpha(a, f'{path}.grid[{i}]') for i, a in enumerate(grid)}))
    if 'overrides' in value:
        if not isinstance(value['overrides'], Sequence) or isinstance(value['overrides'], str):
            _fail(f'{path}.overrides', value['overrides'], 'a list of dictionaries would work')
        value['overrides'] = tuple(
            _smooth_override(v, f'{path}.overrides[{i}]') for i, v in enumerate(value['overrides'])
        )
    return SmoothQuantSpec(**value)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        mode: ``'float'`` (every quantizer off), ``'ptq'`` (calibrate, then test) or ``'qat'`` (calibrate,
            then train).
        weight: How weights are quantized; None leaves them float.
        activation: How inputs are quantized; None leaves them float.
        smoothquant: Which layers have scales moved from their inputs to their weights; None for no layer.
        skip: Patterns of layers that stay float: they have no quantizer at all.
        overrides: Other specs for some layers.
        calibration: What the ranges are taken from.

    Examples:
        >>> neck = dict(layers='neck', weight=dict(bits=4))
        >>> recipe = Recipe.from_dict(dict(skip=['head'], overrides=[neck]))
        >>> recipe.plan('neck.0').weight.bits, recipe.plan('head.0').weight
        (4, None)
    """

    mode: str = 'ptq'
    weight: Optional[WeightSpec] = WeightSpec()
    activation: Optional[ActivationSpec] = ActivationSpec()
    skip: Tuple[str, ...] = ()
    overrides: Tuple[Override, ...] = ()
    calibration: CalibrationSpec = CalibrationSpec()
    smoothquant: Optional[SmoothQuantSpec] = None

    @classmethod
    def from_dict(cls, given: Optional[Mapping], path: str = 'recipe') -> 'Recipe':
        """Validates what a config holds.

        Args:
            given: The dictionary; missing keys take their defaults.
            path: Where it stands in the config, for error messages.

        Raises:
            Q3DError: Anything is unknown, out of range or of the wrong type.
        """
        value = _mapping({} if given is None else given, path, [f.name for f in dataclasses.fields(cls)])
        out: Dict[str, Any] = {}
        if 'mode' in value:
            out['mode'] = _choice(value['mode'], f'{path}.mode', MODES)
        if 'weight' in value:
            spec = value['weight']
            out['weight'] = None if spec is None else WeightSpec(**_weight_fields(spec, f'{path}.weight'))
        if 'activation' in value:
            spec = value['activation']
            out['activation'] = (
                None if spec is None else ActivationSpec(**_activation_fields(spec, f'{path}.activation'))
            )
        if value.get('smoothquant') is not None:
            out['smoothquant'] = _smoothquant(value['smoothquant'], f'{path}.smoothquant')
        if 'skip' in value:
            out['skip'] = _patterns(value['skip'], f'{path}.skip')
        if 'overrides' in value:
            if not isinstance(value['overrides'], Sequence) or isinstance(value['overrides'], str):
                _fail(f'{path}.overrides', value['overrides'], 'a list of dictionaries would work')
            out['overrides'] = tuple(
                _override(v, f'{path}.overrides[{i}]') for i, v in enumerate(value['overrides'])
            )
        if 'calibration' in value:
            known = [f.name for f in dataclasses.fields(CalibrationSpec)]
            spec = _mapping(value['calibration'], f'{path}.calibration', known)
            if 'split' in spec:
                _choice(spec['split'], f'{path}.calibration.split', SPLITS)
            if 'frames' in spec:
                _integer(spec['frames'], f'{path}.calibration.frames', 1)
            if 'seed' in spec:
                _integer(spec['seed'], f'{path}.calibration.seed', 0)
            out['calibration'] = CalibrationSpec(**spec)
        return cls(**out)

    def to_dict(self) -> Dict[str, Any]:
        """The recipe with every default written out, in types that a checkpoint and JSON can hold."""
        return plain(dataclasses.asdict(self))

    def plan(self, name: str) -> LayerPlan:
        """What the recipe says of the layer ``name``."""
        for pattern in self.skip:
            if matches(pattern, name):
                return LayerPlan(None, None, f'skipped by {pattern!r}')
        weight, activation = self.weight, self.activation
        for override in self.overrides:
            if any(matches(p, name) for p in override.layers):
                weight = _changed(weight, override.weight, WeightSpec)
                activation = _changed(activation, override.activation, ActivationSpec)
        if not (weight or activation):
            return LayerPlan(None, None, 'left float by the recipe')
        smooth = None if self.smoothquant is None else self.smoothquant.plan(name)
        return LayerPlan(weight, activation, '', smooth)

    def check_patterns(
        self, names: Sequence[str], path: str = 'recipe', weighted: Optional[Sequence[str]] = None
    ) -> None:
        """Raises :class:`Q3DError` for the first pattern that means none of the layers ``names``.

        A pattern of ``smoothquant`` has to mean a layer with a weight that is quantized.

        Args:
            names: Names of all layers that can be quantized, additions and concatenations too.
            path: Where the recipe stands in the config, for error messages.
            weighted: Those of them that have a weight; all where None.
        """
        places = [(f'{path}.skip[{i}]', p) for i, p in enumerate(self.skip)]
        for i, override in enumerate(self.overrides):
            places += [(f'{path}.overrides[{i}].layers[{j}]', p) for j, p in enumerate(override.layers)]
        for place, pattern in places:
            if not any(matches(pattern, name) for name in names):
                raise Q3DError(_matches_none(place, pattern, names, 'quantized layers'))
        if self.smoothquant is None:
            return
        weighted = names if weighted is None else weighted
        places = [(f'{path}.smoothquant.layers[{i}]', p) for i, p in enumerate(self.smoothquant.layers)]
        for i, change in enumerate(self.smoothquant.overrides):
            places += [
                (f'{path}.smoothquant.overrides[{i}].layers[{j}]', p) for j, p in enumerate(change.layers)
            ]
        for place, pattern in places:
            meant = [name for name in weighted if matches(pattern, name)]
            if not meant:
                raise Q3DError(_matches_none(place, pattern, weighted, 'layers with a weight'))
            plans = [self.plan(name) for name in meant]
            if not any(plan.weight or plan.activation for plan in plans):
                more = f' (and {len(meant) - 1} more)' if len(meant) > 1 else ''
                raise Q3DError(
                    f'{place}: {pattern!r} means no layer that is quantized: {meant[0]!r} is '
                    f'{plans[0].reason}{more}; a pattern of layers that have quantizers would work'
                )


def _matches_none(place: str, pattern: str, names: Sequence[str], what: str) -> str:
    bare = pattern.strip('*')
    tails = {'.'.join(n.split('.')[i:]): n for n in names for i in range(n.count('.') + 1)}
    near = near_matches(bare, [*dict.fromkeys(names), *tails])
    return f'{place}: {pattern!r} matches none of the {len(names)} {what}{near}'


def _changed(spec, fields: Optional[Dict[str, Any]], kind):
    """``spec`` with ``fields`` replaced; None (left float) where ``fields`` is None."""
    if fields is None:
        return None
    if not fields:
        return spec
    return dataclasses.replace(spec or kind(), **fields)


def differences(a: Any, b: Any, path: str = 'recipe') -> List[str]:
    """The dotted paths at which two recipes in plain form differ, with both values.

    Examples:
        >>> differences({'weight': {'bits': 8}}, {'weight': {'bits': 4}})
        ['recipe.weight.bits: 8 and 4']
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        out = []
        for key in [*a, *(k for k in b if k not in a)]:
            out += differences(a.get(key), b.get(key), f'{path}.{key}')
        return out
    return [] if a == b else [f'{path}: {a!r} and {b!r}']
