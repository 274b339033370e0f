"""Patterns of layer names, as skip lists and overrides have them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from q3d_plugin.errors import near_matches

__all__ = ['matches', 'matches_none']


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


def matches_none(place: object, pattern: str, names: Sequence[str], kind: str) -> str:
    """The message for a pattern that matches no layer, with the names that resemble it.

    Args:
        place: Where the pattern stands.
        pattern: The pattern.
        names: Names of the layers that could be meant.
        kind: Says what layers those are.
    """
    bare = pattern.strip('*')
    tails = {'.'.join(n.split('.')[i:]): n for n in names for i in range(n.count('.') + 1)}
    near = near_matches(bare, [*dict.fromkeys(names), *tails])
    return f'{place}: {pattern!r} matches none of the {len(names)} {kind}{near}'
