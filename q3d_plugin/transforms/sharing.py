"""Groups of tensors that have one scale across modules: named as data by a model, and found by running it.

Layers of one part that read the same tensor are declared where the part is set up
(:func:`~q3d_plugin.transforms.insert.share_input`). Groups that span modules are declared by a model or part
that holds them, as its attribute ``shared_scales``: a neck's concatenation and the next stage's convolution,
for example, between which an engine would have to convert one scale to the other.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple

from torch import Tensor, nn

from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.layers import InputGroup, QuantConcat, QuantUnit, QuantWeightLayer
from q3d_plugin.layers.model import units
from q3d_plugin.recipe import ActivationSpec, Recipe, matches
from q3d_plugin.transforms.graph import tensors_in

__all__ = [
    'SharedScale',
    'Sharing',
    'check_sharing',
    'check_specs',
    'declare_sharing',
    'found_groups',
    'share_scales',
    'undeclared_groups',
]


class SharedScale(NamedTuple):
    """Units whose inputs have one scale, and so one quantizer.

    A module declares some as its attribute ``shared_scales``, a tuple.

    Attributes:
        name: For messages.
        units: Patterns of names of units (layers, additions, concatenations), relative to the module that
            declares them. Those of the recipe: a name also stands for everything below it.
        optional: Whether a pattern may match nothing, as where a variant of a model lacks a layer.
    """

    name: str
    units: Tuple[str, ...]
    optional: bool = False


class Sharing(NamedTuple):
    """How the groups that were declared differ from those that a forward pass showed.

    Attributes:
        scales: Names of units whose inputs have to have one scale: see :func:`found_groups`.
        together: Names of units that were declared to read one tensor, and read several.
    """

    scales: List[List[str]]
    together: List[List[str]]


def declare_sharing(model: nn.Module, groups: Sequence[SharedScale] = ()) -> None:
    """Gives the units of each group one :class:`~q3d_plugin.layers.InputGroup`, and so one quantizer.

    Groups that have a unit in common are joined, those of :func:`~q3d_plugin.transforms.insert.share_input`
    too. Quantizers that are there already stay what they are until a recipe is applied; harmless when called
    again.

    Args:
        model: With quantized units. The ``shared_scales`` of all modules below it are declared, too.
        groups: More of them, with names relative to ``model``.

    Raises:
        Q3DError: A pattern matches no unit, or a group has only one.

    Examples:
        >>> from q3d_plugin.transforms.insert import quantize_
        >>> model = quantize_(nn.ModuleDict(dict(neck=nn.Conv2d(3, 3, 1), head=nn.Conv2d(3, 3, 1))))
        >>> declare_sharing(model, [SharedScale('out', ('neck', 'head'))])
        >>> model['neck'].input_group is model['head'].input_group
        True
    """
    named = dict(units(model))
    joined: List[Set[str]] = [set(names) for _, names in _declared(model, groups, list(named))]
    if not joined:
        return
    by_group: Dict[int, Set[str]] = {}
    for name, unit in named.items():
        if unit.input_group is not None:
            by_group.setdefault(id(unit.input_group), set()).add(name)
    declared = set().union(*joined)
    for names in _joined([*joined, *by_group.values()]):
        if not names & declared:
            continue
        members = [unit for name, unit in named.items() if name in names]
        present = [unit.input_group for unit in members if unit.input_group is not None]
        group = present[0] if present else InputGroup()
        for unit in members:
            unit.input_group = group


def _declared(
    model: nn.Module, groups: Sequence[SharedScale], names: Sequence[str]
) -> Iterator[Tuple[SharedScale, List[str]]]:
    """Every declared group of ``model`` and of the modules below it, with the names of its units."""
    places = [('', type(model).__name__, group) for group in groups]
    for prefix, module in model.named_modules():
        for group in getattr(module, 'shared_scales', ()):
            places.append((prefix + '.' if prefix else '', type(module).__name__, group))
    for prefix, owner, group in places:
        below = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        found: Dict[str, None] = {}
        for pattern in group.units:
            meant = [name for name in below if matches(pattern, name)]
            if not meant and not group.optional:
                raise Q3DError(
                    f'{owner}.shared_scales: {group.name!r}: {pattern!r} matches no layer, addition or '
                    f'concatenation{near_matches(pattern, below)}'
                )
            found.update(dict.fromkeys(prefix + name for name in meant))
        if len(found) > 1:
            yield group, list(found)
        elif not group.optional:
            raise Q3DError(
                f'{owner}.shared_scales: {group.name!r}: {next(iter(found), "nothing")} alone was given; two '
                'or more units, whose inputs have one scale, would work'
            )


def _joined(sets: Sequence[Set[str]]) -> List[Set[str]]:
    """The sets, those that have a name in common made one."""
    out: List[Set[str]] = []
    for names in sets:
        touching = [other for other in out if other & names]
        out = [other for other in out if not other & names] + [names.union(*touching)]
    return out


def check_specs(model: nn.Module, recipe: Recipe, prefix: str = '') -> None:
    """Raises where the recipe treats units of one declared group differently, which cannot have one scale.

    Units that stay float take no part.

    Args:
        model: With quantized units.
        recipe: Validated recipe.
        prefix: What the names of units begin with in the recipe.

    Raises:
        Q3DError: Group, both units and what is different are named.
    """
    named = dict(units(model))
    for group, names in _declared(model, (), list(named)):
        plans = {name: recipe.plan(prefix + name, named[name].float_by_default) for name in names}
        members = [name for name in names if plans[name].activation is not None]
        # Operations are never smoothed: beside a smoothed layer they have a scale of their own.
        layers = [name for name in members if isinstance(named[name], QuantWeightLayer)]
        for part, alike in (('activation', members), ('smooth', layers)):
            for name in alike[1:]:
                different = _difference(getattr(plans[alike[0]], part), getattr(plans[name], part))
                if different:
                    key, one, other = different
                    word = {'smooth': 'smoothquant'}.get(part, part)
                    raise Q3DError(
                        f'{recipe.place}: the inputs of {prefix + alike[0]!r} and {prefix + name!r} have one '
                        f'scale ({group.name!r}), but {word}{key} {one!r} and {other!r} were given; the same '
                        'for both would work, by one override that names both'
                    )


def _difference(a: Any, b: Any) -> Optional[Tuple[str, Any, Any]]:
    """The first entry in which two specs differ: its key, and both values; the specs may be None."""
    if a is None or b is None:
        return None if a is b else ('', a and 'on', b and 'on')
    for field in dataclasses.fields(a):
        values = getattr(a, field.name), getattr(b, field.name)
        if values[0] != values[1]:
            return (f'.{field.name}', *values)
    return None


def found_groups(model: nn.Module, forward: Callable[[], Any]) -> List[List[str]]:
    """Names of the units whose inputs have one scale, as one forward pass shows them.

    Units that read the same tensor do, all inputs of an addition or concatenation do, and what reads the
    result of a concatenation has the scale of what went in (STUDY part B, the neck of BEVFusion).

    Args:
        model: With quantized units.
        forward: Runs the pass.
    """
    return _scale_groups(dict(units(model)), _readers(model, forward))


def check_sharing(model: nn.Module, forward: Callable[[], Any]) -> Sharing:
    """Compares the groups that are declared with those that one forward pass shows.

    Args:
        model: Configured.
        forward: Runs the pass.
    """
    named, readers = dict(units(model)), _readers(model, forward)
    groups = _scale_groups(named, readers)
    scales = {name for _, names in _declared(model, (), list(named)) for name in names}
    called = {name for names in readers for name in names}
    by_group: Dict[int, List[str]] = {}
    for name, unit in named.items():
        if unit.input_group is not None and unit.input_group.one_tensor and name in called:
            by_group.setdefault(id(unit.input_group), []).append(name)
    together = [
        names
        for names in by_group.values()
        if not scales.intersection(names) and not any(set(names) <= set(group) for group in groups)
    ]
    return Sharing(groups, together)


def share_scales(model: nn.Module, groups: Sequence[Sequence[str]]) -> List[List[str]]:
    """Gives units that have to have one scale one quantizer, which has seen what all of theirs saw.

    To be called between a pass that takes statistics and the choice of ranges, or before a checkpoint is
    loaded, and undone by the next recipe that is applied. Units of a group that are to be quantized
    differently, or whose range is that of the current tensor, keep quantizers of their own.

    Args:
        model: Configured.
        groups: Names of units.

    Returns:
        list: Names of the units that share a quantizer now and did not before.
    """
    named = dict(units(model))
    holders: Dict[int, List[QuantUnit]] = {}
    for unit in named.values():
        holders.setdefault(id(unit.input_quantizer), []).append(unit)
    out = []
    for names in _joined([set(names) for names in groups]):
        by_spec: Dict[ActivationSpec, List[str]] = {}
        for name in (name for name in named if name in names):
            quantizer = named[name].input_quantizer
            if quantizer is None or quantizer.spec.range != 'static':
                continue
            # A layer that multiplies its input before it is quantized reads another tensor. And one that was
            # given nothing but NaN stays float, whatever the others have seen.
            if not _smooths(named[name]) and not (quantizer.observing and quantizer.observer.frames == 0):
                by_spec.setdefault(quantizer.spec, []).append(name)
        for members in by_spec.values():
            first = named[members[0]].input_quantizer
            apart = {id(named[name].input_quantizer): named[name].input_quantizer for name in members}
            apart.pop(id(first))
            if apart:
                out.append(members)
            for other in apart.values():
                first.join(other)
                for unit in holders[id(other)]:
                    unit.input_quantizer = first
                holders[id(first)] += holders[id(other)]
    return out


def undeclared_groups(model: nn.Module) -> List[List[str]]:
    """Names of the units that have one quantizer because calibration found that they need one."""
    names: Dict[int, List[str]] = {}
    declared: Dict[int, Set[Any]] = {}
    for name, unit in units(model):
        names.setdefault(id(unit.input_quantizer), []).append(name)
        # Within a declared group, layers that a recipe smooths are apart from the rest at first.
        key = id(unit.input_group or unit), getattr(unit, 'smooth_spec', None)
        declared.setdefault(id(unit.input_quantizer), set()).add(key)
    return [names[key] for key in names if key != id(None) and len(declared[key]) > 1]


def _smooths(unit: QuantUnit) -> bool:
    spec = getattr(unit, 'smooth_spec', None)
    return spec is not None and (unit.smoothing or spec.mode == 'dynamic')


def _scale_groups(named: Dict[str, QuantUnit], readers: Sequence[Sequence[str]]) -> List[List[str]]:
    """The readers of each tensor, those joined that an addition or concatenation joins."""
    tensors: Dict[str, List[int]] = {}
    for number, names in enumerate(readers):
        for name in names:
            tensors.setdefault(name, []).append(number)
    sets = []
    for names in readers:
        operations = [name for name in names if not isinstance(named[name], QuantWeightLayer)]
        # A layer that also reads other tensors, such as one that is called for each level of a pyramid,
        # shares with those that read all of them. An operation has one scale whatever else it reads.
        same = [name for name in names if operations or tensors[name] == tensors[names[0]]]
        sets += [set(same)] if len(same) > 1 else []
    order = {name: i for i, name in enumerate(named)}
    return [sorted(names, key=order.get) for names in _joined(sets)]


def _readers(model: nn.Module, forward: Callable[[], Any]) -> List[List[str]]:
    """For every tensor that a unit reads in one pass, the names of its readers in the order of the pass.

    The first of those of a concatenation's result is the concatenation itself.
    """
    readers: List[List[str]] = []
    latest: Dict[int, Tuple[weakref.ref, Optional[int], List[str]]] = {}

    def note(x: Tensor, name: str) -> None:
        version = None if x.is_inference() else x._version
        known = latest.get(id(x))
        if known is None or known[0]() is not x or known[1] != version:
            known = latest[id(x)] = (weakref.ref(x), version, [])
            readers.append(known[2])
        if name not in known[2]:
            known[2].append(name)

    def reading(name: str):
        def hook(unit, args, kwargs):
            for x in _inputs(unit, args, kwargs):
                note(x, name)

        return hook

    handles = []
    for name, unit in units(model):
        handles.append(unit.register_forward_pre_hook(reading(name), with_kwargs=True))
        if isinstance(unit, QuantConcat):
            handles.append(unit.register_forward_hook(lambda _, args, out, name=name: note(out, name)))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return readers


def _inputs(unit: QuantUnit, args: Tuple, kwargs: Dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that go through the input quantizer of a unit."""
    if isinstance(unit, QuantWeightLayer):
        yield unit.features(args[0] if args else next(iter(kwargs.values())))
    else:
        yield from tensors_in([args, kwargs])
