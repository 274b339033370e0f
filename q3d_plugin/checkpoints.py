"""Checkpoints of quantized models: checked before they are loaded, and written whole or not at all."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from torch import nn

from q3d_plugin import __version__
from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.files import replacing
from q3d_plugin.layers import QuantUnit
from q3d_plugin.layers.model import units
from q3d_plugin.quantizer import UNSIGNED_MODES, Mode, Quantizer
from q3d_plugin.recipe import TARGETS, LayerPlan, Recipe, differences
from q3d_plugin.trained_range import LOG2_KEY
from q3d_plugin.transforms.fold import fold_state_dict
from q3d_plugin.transforms.sharing import share_scales, undeclared_groups

__all__ = [
    'META_KEY',
    'check_recipe_of',
    'check_state_dict',
    'check_training_of',
    'is_quantized_checkpoint',
    'load_quantizers',
    'restore_sharing',
    'save_checkpoint',
    'stamp',
    'teacher_of',
]

FORMAT = 4
"""Of the checkpoints that are written. In format 1 recipes had no target; before 3 they had no ``include``,
and no layer was float by default; before 4 they had no ``training``, and ranges stayed as calibrated."""

META_KEY = 'q3d'
"""Where a checkpoint's ``meta`` holds the recipe."""


def is_quantized_checkpoint(state_dict: Mapping) -> bool:
    """Whether ``state_dict`` holds ranges."""
    return any(k.endswith('_quantizer._state') for k in state_dict)


_OWN_KEYS = ('_quantizer._amax', '_quantizer._state', '.smooth_alpha', '.smooth_scale', '.smooth_weight')
_OWN_KEYS += ('camera_input._calibrated', f'_quantizer.{LOG2_KEY}')


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
    absent = _absent_parts(weights, folded)
    if absent:
        raise Q3DError(
            f'{source}: of another model: it has no weights at all of {", ".join(absent)}, which this model '
            f'has ({len(missing)} of {len(weights)} entries are missing)'
        )
    if missing:
        has = f'it has {len(state_dict)} entries, {len(weights) - len(missing)} of the {len(weights)} needed'
        near = near_matches(missing[0], [k for k in state_dict if not _is_quantizer_key(k)][:2000], 1)
        raise Q3DError(
            f'{source}: of another model: {missing[0]!r} is missing (and {len(missing) - 1} more; {has})'
            + (near if near.startswith('; did') else '')
        )
    if is_quantized_checkpoint(state_dict):
        needed = {k for k in mine if _is_quantizer_key(k) and not k.endswith(LOG2_KEY)}
        given = {k for k in state_dict if _is_quantizer_key(k) and not k.endswith(LOG2_KEY)}
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


def _absent_parts(needed: Iterable[str], given: Iterable[str]) -> List[str]:
    """Parts of a model of which a checkpoint that has others holds nothing, such as those of the cameras.

    None where it has parts of names like theirs.

    Args:
        needed: Entries of the model.
        given: Entries of the checkpoint.

    Examples:
        >>> _absent_parts(['head.w', 'img_neck.w'], ['head.w']), _absent_parts(['head.w'], ['x.w'])
        (['img_neck'], [])
    """
    parts, known = (dict.fromkeys(k.partition('.')[0] for k in keys) for keys in (needed, given))
    absent, extra = ([part for part in a if part not in b] for a, b in ((parts, known), (known, parts)))
    renamed = any(near_matches(part, extra).startswith('; did') for part in absent)
    return [] if renamed or len(absent) == len(parts) else absent


def _permutes_to(given, wanted) -> bool:
    """Whether a weight of spconv 1.x, (k, k, k, in, out), becomes the wanted one, (out, k, k, k, in)."""
    return len(given) > 3 and (given[-1], *given[:-1]) == tuple(wanted)


def check_recipe_of(
    meta: Optional[Mapping],
    state_dict: Mapping,
    model: nn.Module,
    recipe: Recipe,
    source: str = 'checkpoint',
) -> None:
    """Checks that a quantized checkpoint was made with a recipe that means the same for every layer.

    ``mode``, ``calibration`` and ``training`` may differ: a PTQ checkpoint is a fine start for QAT, one of a
    training can be tested, and the ranges are taken. So may words that change nothing for any layer of
    ``model``.

    Args:
        meta: The checkpoint's ``meta``.
        state_dict: Its weights and ranges.
        model: The model that it will go into.
        recipe: The config's recipe.
        source: What to call the checkpoint in messages.

    Raises:
        Q3DError: It was made for another target or with another recipe, or has none that can be read.
    """
    stamped = (meta or {}).get(META_KEY) or {}
    if not stamped.get('recipe'):
        raise Q3DError(f'{source}: it has ranges but no recipe; it was not saved by this plugin')
    made, place = _recipe_of(stamped, source), recipe.place.key('target')
    advice = 'or calibrate the float checkpoint anew'
    if stamped.get('format', 1) == 1:
        # Recipes had no target then, and 'auto' could become unsigned. The ranges tell what it became.
        unsigned = _unsigned_quantizer(state_dict)
        if unsigned and not recipe.engine.unsigned:
            able = ', '.join(repr(name) for name, target in TARGETS.items() if target.unsigned)
            raise Q3DError(
                f'{source}: it was saved before recipes had a target, and {unsigned} is unsigned, which '
                f'{place} = {recipe.target!r} cannot run; one of {able} would work, {advice}'
            )
        made = dataclasses.replace(made, target=recipe.target)
    if made.target != recipe.target:
        raise Q3DError(
            f'{source}: it was made for another target: {made.target!r}, and {place} is {recipe.target!r}; '
            f'{made.target!r} would work, {advice}'
        )
    layer = next((n for n, u in units(model) if _plan(made, n, u) != _plan(recipe, n, u)), None)
    if layer is None:
        return
    found = _differences(made, recipe, ('mode', 'calibration', 'training'))
    raise Q3DError(
        f'{source}: it was quantized with another recipe (checkpoint and config): {"; ".join(found)}. They '
        f'differ for {layer!r}. Use the recipe it was made with, {advice}'
    )


def check_training_of(meta: Optional[Mapping], recipe: Recipe, source: str = 'checkpoint') -> None:
    """Checks that a training can go on from a checkpoint: that it is one of a training by the same recipe.

    :func:`check_recipe_of` has to be asked as well, which compares what the recipes mean for the layers.

    Args:
        meta: The checkpoint's ``meta``.
        recipe: The config's recipe, with ``mode='qat'``.
        source: What to call the checkpoint in messages.

    Raises:
        Q3DError: It is of another mode, or its ``training`` differs. The differences are listed.
    """
    stamped = (meta or {}).get(META_KEY) or {}
    advice = 'start a new training from it in place of resuming'
    if not stamped.get('recipe'):
        raise Q3DError(f'{source}: a quantized training cannot resume from it: it has no recipe; {advice}')
    made = _recipe_of(stamped, source)
    if (made.mode, made.training) == (recipe.mode, recipe.training):
        return
    found = _differences(made, recipe, ('calibration',))
    raise Q3DError(
        f'{source}: a training cannot resume with another recipe (checkpoint and config): '
        f'{"; ".join(found)}. Use the recipe it was started with, or {advice}'
    )


def _differences(made: Recipe, recipe: Recipe, besides: Iterable[str]) -> List[str]:
    """The paths at which two recipes differ, with the values of the checkpoint and of the config."""
    theirs, mine = made.to_dict(), recipe.to_dict()
    return [
        d
        for key in mine
        if key not in besides
        for d in differences(theirs[key], mine[key], recipe.place.key(key))
    ]


def _plan(recipe: Recipe, name: str, unit: QuantUnit) -> LayerPlan:
    """The plan of a layer without the words for it."""
    return dataclasses.replace(recipe.plan(name, unit.float_by_default), reason='')


def _recipe_of(stamped: Mapping, source: str) -> Recipe:
    """The recipe in a checkpoint, as it is understood today.

    A recipe in a checkpoint has all its defaults written out, so an entry that it lacks is younger than the
    checkpoint; the version that brings an entry sets here what was done before.
    """
    given, version = dict(stamped['recipe']), stamped.get('format', 1)
    if version > FORMAT:
        raise Q3DError(
            f'{source}: it was saved by a newer version of this plugin ({stamped.get("version")}; this is '
            f'{__version__}), in a format that this one does not know; install that version'
        )
    if version == 1:
        given['target'] = 'simulation'
    if version < 3:
        given['include'] = ['*']
    if version < 4:
        given.setdefault('training', {'ranges': {'weight': 'fixed', 'activation': 'fixed'}})
    try:
        return Recipe.from_dict(given)
    except Q3DError as error:
        raise Q3DError(f'{source}: its recipe cannot be read: {error}') from error


def _unsigned_quantizer(state_dict: Mapping) -> str:
    """The name of the first unsigned quantizer in a checkpoint; empty where all are signed."""
    for key, value in state_dict.items():
        if key.endswith('_quantizer._state') and Mode(int(value[0])) in UNSIGNED_MODES:
            return key[: -len('._state')]
    return ''


def stamp(recipe: Recipe, model: Optional[nn.Module] = None, teacher: str = '') -> Dict[str, Any]:
    """The entry of a quantized checkpoint's ``meta`` under :data:`META_KEY`.

    Args:
        recipe: Of the checkpoint.
        model: Calibrated: which of its units have one scale is noted as far as calibration found it.
        teacher: The checkpoint that the teacher of a training is made of again, where it has one.
    """
    shared = [] if model is None else undeclared_groups(model)
    return {
        'recipe': recipe.to_dict(),
        'version': __version__,
        'format': FORMAT,
        **({'shared_scales': shared} if shared else {}),
        **({'teacher': teacher} if teacher else {}),
    }


def teacher_of(meta: Optional[Mapping], recipe: Recipe, source: str = 'checkpoint') -> str:
    """The checkpoint that the teacher of a training that is resumed is made of.

    Args:
        meta: The checkpoint's ``meta``.
        recipe: The config's recipe, with distillation.
        source: What to call the checkpoint in messages.

    Raises:
        Q3DError: The checkpoint does not say which.
    """
    found = ((meta or {}).get(META_KEY) or {}).get('teacher')
    if not found:
        place = recipe.place.key('training').key('distillation').key('teacher')
        raise Q3DError(
            f'{source}: it does not say which teacher its training had; the float checkpoint that training '
            f'started from, as {place}, would work'
        )
    return found


def restore_sharing(meta: Optional[Mapping], model: nn.Module) -> None:
    """Gives units one quantizer that had one when a checkpoint was saved; to be called before it is loaded.

    Args:
        meta: The checkpoint's ``meta``.
        model: Configured by the recipe of the checkpoint.
    """
    share_scales(model, ((meta or {}).get(META_KEY) or {}).get('shared_scales', ()))


def load_quantizers(model: nn.Module, state_dict: Mapping) -> None:
    """Loads ranges and modes alone, before the weights come.

    Args:
        model: With the quantizers of the checkpoint.
        state_dict: Quantized.
    """
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            own = {k: v for k, v in state_dict.items() if k.startswith(f'{name}.')}
            module._load_from_state_dict(own, f'{name}.', {}, False, [], [], [])


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
    content = {'meta': {**(meta or {}), META_KEY: stamp(recipe, model)}, state_key: state}
    with replacing(Path(path)) as temporary:
        torch.save(content, str(temporary))
