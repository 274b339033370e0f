"""A schema is a dataclass whose fields carry a check: it is declared once, and read from any config.

Each check takes a value and its :class:`Place`, and returns the value as the program holds it or raises an
error that names the place as the author of the config wrote it: in lower case in Python configs, in upper
case in OpenPCDet's YAML.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Type, TypeVar

from q3d_plugin.errors import Q3DError, near_matches

__all__ = [
    'Check',
    'Place',
    'choice',
    'entry',
    'fields_of',
    'integer',
    'keys_of',
    'listed',
    'number',
    'optional',
    'partial',
    'patterns',
    'read',
    'section',
    'text',
]


@dataclass(frozen=True)
class Place:
    """Where something stands in a config.

    Attributes:
        path: Dotted path.
        upper: Whether keys are written in upper case there.

    Examples:
        >>> str(Place('MODEL.QUANT', upper=True).key('overrides').item(0).key('weight'))
        'MODEL.QUANT.OVERRIDES[0].WEIGHT'
    """

    path: str = 'recipe'
    upper: bool = False

    def key(self, name: str) -> 'Place':
        """The place of an entry of this one."""
        return Place(f'{self.path}.{self.word(name)}', self.upper)

    def item(self, index: int) -> 'Place':
        """The place of an item of this list."""
        return Place(f'{self.path}[{index}]', self.upper)

    def word(self, name: str) -> str:
        """A key as it is written here."""
        return name.upper() if self.upper else name

    def __str__(self) -> str:
        return self.path


Check = Callable[[Any, Place], Any]
_T = TypeVar('_T')


def entry(check: Check, default: Any = dataclasses.MISSING, missing: str = '') -> Any:
    """A field of a schema.

    Args:
        check: Of its value.
        default: Its value where none is given; none: it has to be given.
        missing: What would work, where it has to be given.
    """
    return dataclasses.field(default=default, metadata={'check': check, 'missing': missing})


def fields_of(spec: Type) -> Dict[str, dataclasses.Field]:
    """The fields of a schema by name, without those that are not read from a config."""
    return {f.name: f for f in dataclasses.fields(spec) if 'check' in f.metadata}


def keys_of(spec: Type) -> List[str]:
    """The dotted keys of a schema, those of its sections before the section itself."""
    out: List[str] = []
    for name, field in fields_of(spec).items():
        inner = getattr(field.metadata['check'], 'spec', None)
        out += [f'{name}.{key}' for key in keys_of(inner)] if inner is not None else []
        out.append(name)
    return out


def _entries(spec: Type, given: Any, place: Place) -> Dict[str, Any]:
    """The entries that were given, checked."""
    fields = fields_of(spec)
    known = {place.word(name): name for name in fields}
    if not isinstance(given, Mapping):
        raise Q3DError.at(place, given, f'a dictionary with the keys {", ".join(known)} would work')
    out = {}
    for key, value in given.items():
        if key not in known:
            near = near_matches(str(key).upper() if place.upper else key, known)
            raise Q3DError(f'{place.path}.{key}: unknown key{near}', f'{place.path}.{key}', key, near)
        name = known[key]
        out[name] = fields[name].metadata['check'](value, place.key(name))
    return out


def read(spec: Type[_T], given: Any, place: Place) -> _T:
    """Reads a section of a config.

    Args:
        spec: A dataclass whose fields were made by :func:`entry`.
        given: The dictionary; missing keys take their defaults.
        place: Where it stands.

    Raises:
        Q3DError: Anything is unknown, missing, out of range or of the wrong type.
    """
    out = _entries(spec, given, place)
    for name, field in fields_of(spec).items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in out and required:
            hint = f'{field.metadata["missing"]} would work'
            raise Q3DError(f'{place.key(name)}: missing; {hint}', str(place.key(name)), None, hint)
    return spec(**out)


def section(spec: Type) -> Check:
    """A dictionary that :func:`read` turns into ``spec``."""

    def check(value: Any, place: Place) -> Any:
        return read(spec, value, place)

    check.spec = spec
    return check


def optional(inner: Check) -> Check:
    """None, or what ``inner`` takes."""

    def check(value: Any, place: Place) -> Any:
        return None if value is None else inner(value, place)

    check.spec = getattr(inner, 'spec', None)
    return check


def partial(spec: Type) -> Check:
    """Some of the entries of ``spec``, as a dictionary."""
    return lambda value, place: _entries(spec, value, place)


def listed(inner: Check) -> Check:
    """A list of dictionaries, as a tuple."""

    def check(value: Any, place: Place) -> Tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise Q3DError.at(place, value, 'a list of dictionaries would work')
        return tuple(inner(v, place.item(i)) for i, v in enumerate(value))

    return check


def choice(*known: Any) -> Check:
    """One of some values."""

    def check(value: Any, place: Place) -> Any:
        # True == 1 in Python, so membership alone would accept unsigned=1.
        if not any(value is k or (isinstance(k, str) and value == k) for k in known):
            near = near_matches(str(value), [k for k in known if isinstance(k, str)])
            hint = near if near.startswith('; did') else ''  # the choices are listed already
            raise Q3DError.at(place, value, f'one of {", ".join(map(repr, known))} would work{hint}')
        return value

    return check


def integer(low: int, high: Optional[int] = None) -> Check:
    """An integer within bounds, both included."""

    def check(value: Any, place: Place) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or value < low or (high is not None and value > high):
            bound = f'to {high} would work' if high is not None else 'up would work'
            raise Q3DError.at(place, value, f'an integer from {low} {bound}')
        return value

    return check


def number(fits: Callable[[float], bool], would_work: str, *words: Any) -> Check:
    """A number that ``fits``, or one of ``words``.

    Args:
        fits: Whether a number is within bounds.
        would_work: Says which numbers are, for messages.
        words: Other values, such as ``'search'`` and None.
    """

    def check(value: Any, place: Place) -> Any:
        if any(value is w or (isinstance(w, str) and value == w) for w in words):
            return value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not fits(value):
            raise Q3DError.at(place, value, f'{would_work} would work')
        return float(value)

    return check


def text(would_work: str) -> Check:
    """Text that is not empty.

    Args:
        would_work: Says what it means, for messages.
    """

    def check(value: Any, place: Place) -> str:
        if not isinstance(value, str) or not value:
            raise Q3DError.at(place, value, f'{would_work} would work')
        return value

    return check


def patterns(example: str, some: bool = False) -> Check:
    """A list of layer name patterns, or a single one; as a tuple.

    Args:
        example: For messages.
        some: Whether an empty list is refused.
    """

    def check(value: Any, place: Place) -> Tuple[str, ...]:
        given = [value] if isinstance(value, str) else value
        good = isinstance(given, Sequence) and all(isinstance(v, str) and v for v in given)
        if not good or (some and not given):
            raise Q3DError.at(
                place, value, f'a list of layer name patterns would work, such as [{example!r}]'
            )
        return tuple(given)

    return check
