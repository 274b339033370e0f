"""Checkpoints of quantized models: checked before they are loaded, and written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from torch import nn

from q3d_plugin import __version__
from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.files import replacing
from q3d_plugin.recipe import Recipe, differences
from q3d_plugin.transforms.fold import fold_state_dict

__all__ = [
    'META_KEY',
    'check_recipe_of',
    'check_state_dict',
    'is_quantized_checkpoint',
    'save_checkpoint',
    'stamp',
]

META_KEY = 'q3d'
"""Where a checkpoint's ``meta`` holds the recipe."""


def is_quantized_checkpoint(state_dict: Mapping) -> bool:
    """Whether ``state_dict`` holds ranges."""
    return any(k.endswith('_quantizer._state') for k in state_dict)


_OWN_KEYS = ('_quantizer._amax', '_quantizer._state', '.smooth_alpha', '.smooth_scale', '.smooth_weight')


def _is_quantizer_key(key: str) -> bool:
    return f'.{key}'.endswith(_OWN_KEYS)


def check_state_dict(model: nn.Module, state_dict: Mapping, source: str = 'checkpoint') -> Dict[str, Any]:
    """Checks that a checkpoint belongs to ``model`` before it is loaded: every parameter is there, of its
    shape.

    Args:
        model: A configured model with Quant types.
        state_dict: Float or quantized; not changed.
        source: What to call it in messages.

    Returns:
        dict: The state dict with BatchNorm folded, as it will be loaded.

    Raises:
        Q3DError: Parameters are missing or have another shape, or (quantized) ranges are missing or left
            over.
    """
    folded = type(state_dict)(state_dict)
    for name, module in model.named_modules():
        if hasattr(module, '_q3d_folds'):
            fold_state_dict(module, folded, f'{name}.' if name else '', module._q3d_folds)
    mine = model.state_dict()
    weights = {k: v for k, v in mine.items() if not _is_quantizer_key(k) and 'num_batches_tracked' not in k}
    wrong = [
        k
        for k, v in weights.items()
        if k in folded
        and tuple(folded[k].shape) != tuple(v.shape)
        and not _permutes_to(folded[k].shape, v.shape)
    ]
    if wrong:
        raise Q3DError(
            f'{source}: of another model: {wrong[0]!r} has the shape {tuple(folded[wrong[0]].shape)}, the '
            f'model needs {tuple(weights[wrong[0]].shape)} (and {len(wrong) - 1} more differ)'
        )
    missing = [k for k in weights if k not in folded]
    if missing:
        has = f'it has {len(state_dict)} entries, {len(weights) - len(missing)} of the {len(weights)} needed'
        near = near_matches(missing[0], [k for k in state_dict if not _is_quantizer_key(k)][:2000], 1)
        raise Q3DError(
            f'{source}: of another model: {missing[0]!r} is missing (and {len(missing) - 1} more; {has})'
            + (near if near.startswith('; did') else '')
        )
    if is_quantized_checkpoint(state_dict):
        needed = {k for k in mine if _is_quantizer_key(k)}
        given = {k for k in state_dict if _is_quantizer_key(k)}
        if needed != given:
            lacking, extra = sorted(needed - given), sorted(given - needed)
            raise Q3DError(
                f'{source}: its quantizers are not those of the recipe: '
                + (f'{lacking[0]!r} and {len(lacking) - 1} more have no range in it' if lacking else '')
                + ('; ' if lacking and extra else '')
                + (f'{extra[0]!r} and {len(extra) - 1} more are not in the recipe' if extra else '')
                + '. Use the recipe it was made with, or calibrate the float checkpoint anew'
            )
    return folded


def _permutes_to(given, wanted) -> bool:
    """Whether a weight of spconv 1.x, (k, k, k, in, out), becomes the wanted one, (out, k, k, k, in)."""
    return len(given) > 3 and (given[-1], *given[:-1]) == tuple(wanted)


def check_recipe_of(
    meta: Optional[Mapping], recipe: Recipe, source: str = 'checkpoint', path: str = 'recipe'
) -> None:
    """Raises :class:`Q3DError` where a quantized checkpoint was made with another recipe.

    ``mode`` and ``calibration`` may differ: a PTQ checkpoint is a fine start for QAT, and the ranges are
    taken.

    Args:
        meta: The checkpoint's ``meta``.
        recipe: The config's recipe.
        source: What to call the checkpoint in messages.
        path: Where the recipe stands in the config.
    """
    given = ((meta or {}).get(META_KEY) or {}).get('recipe')
    if given is None:
        raise Q3DError(f'{source}: it has ranges but no recipe; it was not saved by this plugin')
    mine = recipe.to_dict()
    found = [
        d
        for key in [*mine, *(k for k in given if k not in mine)]
        if key not in ('mode', 'calibration')
        for d in differences(given.get(key), mine.get(key), f'{path}.{key}')
    ]
    if found:
        raise Q3DError(
            f'{source}: it was quantized with another recipe (checkpoint and config): {"; ".join(found)}. '
            'Use the recipe it was made with, or calibrate the float checkpoint anew'
        )


def stamp(recipe: Recipe) -> Dict[str, Any]:
    """What the ``meta`` of a quantized checkpoint holds under :data:`META_KEY`."""
    return {'recipe': recipe.to_dict(), 'version': __version__}


def save_checkpoint(
    model: nn.Module, recipe: Recipe, path: str, meta: Mapping = None, state_key: str = 'state_dict'
) -> None:
    """Writes weights, ranges and recipe; the file appears whole or not at all.

    Args:
        model: A calibrated model.
        recipe: The recipe it was calibrated with.
        path: Where to write; the folder exists.
        meta: What else the ``meta`` holds.
        state_key: Where the framework looks for the weights.
    """
    # state_dict() keeps the layout versions in _metadata, which spconv's loaders ask for.
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu()
    content = {'meta': {**(meta or {}), META_KEY: stamp(recipe)}, state_key: state}
    with replacing(Path(path)) as temporary:
        torch.save(content, str(temporary))
