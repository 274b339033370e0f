"""Quant types in a config: put in the place of every type that has one, and taken out again."""

from typing import Any

from mmdet3d.registry import MODELS

from q3d_plugin.mmdet3d.parts import PARTS, quant_name

__all__ = ['put_quant_types', 'take_quant_types']

_QUANT_NAMES = {part.base: quant_name(part.base) for part in PARTS}
_BASES = {name: base for base, name in _QUANT_NAMES.items()}


def put_quant_types(node: Any, scope: str = '') -> int:
    """Replaces every type of a config that has a Quant type by that one, in place.

    Args:
        node: A model's config, or a part of one.
        scope: The ``_scope_`` of the dictionaries around it.

    Returns:
        int: How many types were changed.

    Examples:
        >>> config = {'type': 'VoxelNet', 'backbone': {'type': 'SECOND'}}
        >>> put_quant_types(config), config['backbone']
        (1, {'type': 'QuantSECOND'})
    """
    changed = 0
    if isinstance(node, dict):
        scope = node.get('_scope_', scope)
        kind = node.get('type')
        name = _QUANT_NAMES.get(kind) or (_QUANT_NAMES.get(f'{scope}.{kind}') if scope else None)
        if isinstance(kind, str) and name:
            # Inside of another scope names are looked up in that framework's registry.
            node['type'] = f'mmdet3d.{name}' if scope else name
            changed += 1
    if isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            changed += put_quant_types(child, scope)
    return changed


def take_quant_types(node: Any) -> int:
    """Replaces every Quant type of a config by its float type, in place.

    Args:
        node: A model's config, or a part of one.

    Returns:
        int: How many types were changed.

    Examples:
        >>> config = {'img_backbone': {'type': 'QuantResNet'}, 'head': {'type': 'CenterHead'}}
        >>> take_quant_types(config), config['img_backbone']
        (1, {'type': 'mmdet.ResNet'})
    """
    changed = 0
    if isinstance(node, dict) and isinstance(node.get('type'), str):
        base = _float_type(node['type'])
        if base:
            node['type'] = base
            changed += 1
    if isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            changed += take_quant_types(child)
    return changed


def _float_type(kind: str) -> str:
    """The float type of a Quant type; empty for any other type."""
    scope, _, name = kind.rpartition('.')
    if not name.startswith('Quant') or scope not in ('', 'mmdet3d'):
        return ''
    base = _BASES.get(name)
    if base is None and MODELS.get(name[5:]) is not None:
        base = name[5:]  # a Quant type that the user registered, by the same rule
    if base is None:
        return ''
    # Inside of another scope, where its full name stands, so has that of the float type.
    return f'mmdet3d.{base}' if scope and '.' not in base else base
