"""The recipe: what is quantized, how, and for which engine."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.files import plain
from q3d_plugin.recipe.patterns import matches, matches_none
from q3d_plugin.recipe.presets import PREFIX, described, expanded, missing, skips
from q3d_plugin.recipe.schema import (
    Place,
    choice,
    entry,
    fields_of,
    listed,
    optional,
    patterns,
    read,
    section,
)
from q3d_plugin.recipe.specs import (
    ActivationSpec,
    CalibrationSpec,
    LayerPlan,
    Override,
    SmoothQuantSpec,
    WeightSpec,
)
from q3d_plugin.recipe.targets import TARGETS, Problem, Target
from q3d_plugin.recipe.training import TrainingSpec

__all__ = ['LayerFacts', 'Recipe', 'differences']


class LayerFacts(NamedTuple):
    """The facts about a layer by which a recipe is checked.

    Attributes:
        name: Dotted name in the model.
        family: One of :data:`q3d_plugin.recipe.targets.FAMILIES`.
        weighted: Whether it has a weight.
        float_by_default: Why it stays float unless the recipe includes it; empty where it is quantized.
    """

    name: str
    family: str
    weighted: bool
    float_by_default: str = ''


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        mode: ``'float'`` (every quantizer off), ``'ptq'`` (calibrate, then test) or ``'qat'`` (calibrate,
            then train).
        target: The engine that the model is meant for; a key of :data:`q3d_plugin.recipe.targets.TARGETS`.
        weight: How weights are quantized; None leaves them float.
        activation: How inputs are quantized; None leaves them float.
        skip: Patterns of layers that stay float, and names of presets: they have no quantizer at all.
        include: Patterns of layers that stay float by default, such as the head of BEVFusion, and are to be
            quantized.
        overrides: Other specs for some layers.
        calibration: The frames that ranges are taken from.
        smoothquant: Which layers have scales moved from their inputs to their weights; None for no layer.
        training: What happens in quantization-aware training.
        place: Where it stands in its config, for messages. It is no part of the recipe itself.

    Examples:
        >>> overrides = [dict(layers='neck', weight=dict(calibrator='mse'))]
        >>> recipe = Recipe.from_dict(dict(skip=['head'], overrides=overrides))
        >>> recipe.plan('neck.0').weight.calibrator, recipe.plan('head.0').weight
        ('mse', None)
    """

    mode: str = entry(choice('float', 'ptq', 'qat'), 'ptq')
    target: str = entry(choice(*TARGETS), 'tensorrt')
    weight: Optional[WeightSpec] = entry(optional(section(WeightSpec)), WeightSpec())
    activation: Optional[ActivationSpec] = entry(optional(section(ActivationSpec)), ActivationSpec())
    skip: Tuple[str, ...] = entry(skips('*bbox_head*.heatmap.1'), ())
    include: Tuple[str, ...] = entry(patterns('*bbox_head.heatmap_head*'), ())
    overrides: Tuple[Override, ...] = entry(listed(section(Override)), ())
    calibration: CalibrationSpec = entry(section(CalibrationSpec), CalibrationSpec())
    smoothquant: Optional[SmoothQuantSpec] = entry(optional(section(SmoothQuantSpec)), None)
    training: TrainingSpec = entry(section(TrainingSpec), TrainingSpec())
    place: Place = field(default=Place(), compare=False, repr=False)

    @classmethod
    def from_dict(cls, given: Optional[Mapping], place: Place = Place()) -> 'Recipe':
        """Validates the dictionary of a config.

        Args:
            given: The dictionary; missing keys take their defaults.
            place: Where it stands in the config, for error messages.

        Raises:
            Q3DError: Anything is unknown, out of range, of the wrong type, or cannot run on the target.
        """
        recipe = dataclasses.replace(read(cls, {} if given is None else given, place), place=place)
        recipe._check_values()
        return recipe

    def to_dict(self) -> Dict[str, Any]:
        """The recipe with every default written out, in types that a checkpoint and JSON can hold."""
        return {name: plain(_as_dict(getattr(self, name))) for name in fields_of(type(self))}

    @property
    def engine(self) -> Target:
        """The target's line in the table of engines."""
        return TARGETS[self.target]

    def plan(self, name: str, float_by_default: str = '') -> LayerPlan:
        """The part of the recipe that concerns one layer.

        Args:
            name: Dotted name of the layer.
            float_by_default: Why it stays float unless the recipe includes it; empty where it is quantized.
        """
        for pattern, reason in expanded(self.skip):
            if matches(pattern, name):
                return LayerPlan(None, None, reason, target=self.target)
        if float_by_default and not any(matches(pattern, name) for pattern in self.include):
            return LayerPlan(None, None, f'float by default: {float_by_default}', target=self.target)
        weight, activation = self.weight, self.activation
        for _, override in self._overrides_of(name):
            weight = _changed(weight, override.weight, WeightSpec)
            activation = _changed(activation, override.activation, ActivationSpec)
        if not (weight or activation):
            return LayerPlan(None, None, 'left float by the recipe', target=self.target)
        smooth = None if self.smoothquant is None else self.smoothquant.plan(name)
        return LayerPlan(weight, self.engine.resolved(activation), '', smooth, self.target)

    def check(self, layers: Sequence[LayerFacts]) -> None:
        """Checks the recipe against the layers of a model.

        Args:
            layers: All layers, additions and concatenations that can be quantized.

        Raises:
            Q3DError: A pattern means none of the layers (one of ``smoothquant``: no layer with a weight that
                is quantized), or the target cannot run a layer as the recipe has it.
        """
        names = [layer.name for layer in layers]
        for place, pattern in self._patterns():
            if pattern.startswith(PREFIX):
                lacking = missing(pattern, names)
                if lacking:
                    raise Q3DError.at(
                        place,
                        pattern,
                        f'no layer here is {" or ".join(lacking)}; a list of patterns would work',
                    )
            elif not any(matches(pattern, name) for name in names):
                raise Q3DError(matches_none(place, pattern, names, 'quantized layers'), str(place), pattern)
        self._check_include([layer for layer in layers if layer.float_by_default])
        self._check_smoothing([layer for layer in layers if layer.weighted])
        for layer in layers:
            plan = self.plan(layer.name, layer.float_by_default)
            for problem in self.engine.problems(plan, layer.family):
                able = [n for n, t in TARGETS.items() if not any(t.problems(plan, layer.family))]
                raise self._refused(self._origin(layer.name, problem.key), problem, able, layer.name)

    def _overrides_of(self, name: str) -> Iterator[Tuple[int, Override]]:
        for i, override in enumerate(self.overrides):
            if any(matches(p, name) for p in override.layers):
                yield i, override

    def presets(self, names: Sequence[str]) -> List[str]:
        """The presets of ``skip``, written out for a log.

        Args:
            names: Names of the layers of the model.
        """
        return [described(entry, names) for entry in self.skip if entry.startswith(PREFIX)]

    def _patterns(self) -> Iterator[Tuple[Place, str]]:
        yield from _items(self.place.key('skip'), self.skip)
        yield from _items(self.place.key('include'), self.include)
        for i, override in enumerate(self.overrides):
            yield from _items(self.place.key('overrides').item(i).key('layers'), override.layers)

    def _check_include(self, layers: Sequence[LayerFacts]) -> None:
        for place, pattern in _items(self.place.key('include'), self.include):
            if pattern != '*' and not any(matches(pattern, layer.name) for layer in layers):
                raise Q3DError.at(
                    place,
                    pattern,
                    'the layers that it means are quantized without it'
                    + near_matches(pattern.strip('*'), [layer.name for layer in layers]),
                )

    def _check_smoothing(self, layers: Sequence[LayerFacts]) -> None:
        if self.smoothquant is None:
            return
        names, defaults = [layer.name for layer in layers], {x.name: x.float_by_default for x in layers}
        place = self.place.key('smoothquant')
        found = list(_items(place.key('layers'), self.smoothquant.layers))
        for i, override in enumerate(self.smoothquant.overrides):
            found += _items(place.key('overrides').item(i).key('layers'), override.layers)
        for place, pattern in found:
            meant = [name for name in names if matches(pattern, name)]
            if not meant:
                message = matches_none(place, pattern, names, 'layers with a weight')
                raise Q3DError(message, str(place), pattern)
            plans = [self.plan(name, defaults[name]) for name in meant]
            if not any(plan.weight or plan.activation for plan in plans):
                more = f' (and {len(meant) - 1} more)' if len(meant) > 1 else ''
                hint = 'a pattern of layers that have quantizers would work'
                raise Q3DError(
                    f'{place}: {pattern!r} means no layer that is quantized: {meant[0]!r} is '
                    f'{plans[0].reason}{more}; {hint}',
                    str(place),
                    pattern,
                    hint,
                )

    # The target.

    def _check_values(self) -> None:
        """Refuses values that no layer could run on the target, before there is a model."""
        places = [(self.place, self.weight, self.activation)]
        for i, override in enumerate(self.overrides):
            places.append((self.place.key('overrides').item(i), override.weight, override.activation))
        for place, *parts in places:
            for part, spec in zip(('weight', 'activation'), parts):
                for key, value in (_as_dict(spec) or {}).items():
                    problem = self.engine.anywhere(f'{part}.{key}', value)
                    if problem is not None:
                        raise self._refused(place.key(part).key(key), problem, _able(problem))
        if self.smoothquant is not None:
            problem = self.engine.anywhere('smooth.mode', self.smoothquant.mode)
            if problem is not None:
                place = self.place.key('smoothquant').key('mode')
                raise self._refused(place, problem, _able(problem))

    def _origin(self, name: str, key: str) -> Place:
        """The place of the entry that decides ``key`` for the layer ``name``."""
        part, _, entry_name = key.partition('.')
        if part == 'smooth':
            return self.place.key('smoothquant').key(entry_name)
        found = self.place
        for i, override in self._overrides_of(name):
            if entry_name in (getattr(override, part) or {}):
                found = self.place.key('overrides').item(i)
        return found.key(part).key(entry_name)

    def _refused(self, place: Place, problem: Problem, able: Sequence[str], layer: str = '') -> Q3DError:
        rule = problem.rule
        works = ' or '.join(repr(v) for v in rule.allowed)
        if rule.key.endswith('.bits'):
            part = place.word(rule.key.partition('.')[0])
            works += f', or None for {part} (those layers stay float)'
        hint = f'{works} would work, or another {place.word("target")} ({", ".join(map(repr, able))})'
        target = f'{place.word("target")} {self.target!r}'
        whose = f' for {layer!r}' if layer else ''
        return Q3DError(
            f'{place}: {problem.value!r} was given{whose}, which {target} cannot run: {rule.reason} '
            f'({rule.source}); {hint}',
            str(place),
            problem.value,
            hint,
        )


def _able(problem: Problem) -> List[str]:
    """The targets that can run a value which another one cannot."""
    return [name for name, t in TARGETS.items() if not t.anywhere(problem.key, problem.value)]


def _items(place: Place, values: Sequence[str]) -> Iterator[Tuple[Place, str]]:
    return ((place.item(i), value) for i, value in enumerate(values))


def _as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return [_as_dict(v) for v in value] if isinstance(value, tuple) else value


def _changed(spec, fields: Optional[Dict[str, Any]], kind):
    """``spec`` with ``fields`` replaced; None (left float) where ``fields`` is None."""
    if fields is None:
        return None
    if not fields:
        return spec
    return dataclasses.replace(spec or kind(), **fields)


def differences(a: Any, b: Any, place: Place = Place()) -> List[str]:
    """The dotted paths at which two recipes in plain form differ, with both values.

    Examples:
        >>> differences({'weight': {'bits': 8}}, {'weight': {'bits': 4}})
        ['recipe.weight.bits: 8 and 4']
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        out = []
        for key in [*a, *(k for k in b if k not in a)]:
            out += differences(a.get(key), b.get(key), place.key(key))
        return out
    return [] if a == b else [f'{place}: {a!r} and {b!r}']
