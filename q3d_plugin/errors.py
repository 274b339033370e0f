"""The one kind of error that a user's input causes, and how near matches are named in it."""

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ['Q3DError', 'near_matches']


class Q3DError(ValueError):
    """Input that cannot work. The message names the place, what was given and what would work.

    Args:
        message: The whole message.
        path: The place in the config, where there is one, as its author wrote it.
        given: The value that was given there.
        hint: What would work.

    Examples:
        >>> error = Q3DError.at('recipe.weight.bits', 99, 'an integer from 2 to 16 would work')
        >>> print(error)
        recipe.weight.bits: 99 was given; an integer from 2 to 16 would work
        >>> error.path, error.given
        ('recipe.weight.bits', 99)
    """

    def __init__(self, message: str, path: str = '', given: Any = None, hint: str = '') -> None:
        super().__init__(message)
        self.path, self.given, self.hint = path, given, hint

    @classmethod
    def at(cls, path: Any, given: Any, hint: str) -> 'Q3DError':
        """The error for a value of a config that cannot work."""
        return cls(f'{path}: {given!r} was given; {hint}', str(path), given, hint)


def near_matches(given: str, known: Iterable[str], count: int = 3) -> str:
    """Words of ``known`` that resemble ``given``, as the end of an error message.

    Args:
        given: What the user wrote.
        known: What would have been accepted.
        count: How many to name at most.

    Returns:
        str: ``'; did you mean a, b?'`` or, where nothing is near, ``'; known: a, b, c'`` (the first eight).

    Examples:
        >>> near_matches('wieght', ['weight', 'activation'])
        "; did you mean 'weight'?"
    """
    known = list(dict.fromkeys(str(k) for k in known))
    near = difflib.get_close_matches(str(given), known, n=count, cutoff=0.6)
    if near:
        return '; did you mean ' + ', '.join(repr(n) for n in near) + '?'
    if not known:
        return ''
    listed = ', '.join(repr(k) for k in known[:8])
    return f'; known: {listed}' + (f' and {len(known) - 8} more' if len(known) > 8 else '')
