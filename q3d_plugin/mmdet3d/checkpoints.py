"""Training checkpoints of MMEngine under torch's ``weights_only`` loading, which is the default from torch
2.6 on."""

from collections.abc import Mapping
from typing import Any, Dict

import numpy as np
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import param_scheduler
from torch import nn

from q3d_plugin import checkpoints, safe_load
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe

__all__ = ['check_checkpoint', 'trust_mmengine_checkpoints', 'weights_of']

_DTYPES = ('float32', 'float64', 'int32', 'int64', 'bool')


_SCHEDULERS = tuple(
    c for c in vars(param_scheduler).values() if isinstance(c, type) and 'Scheduler' in c.__name__
)


def _pickled_method(owner, name):
    """Stands for ``getattr`` in a checkpoint, for the two uses that MMEngine makes of it.

    A HistoryBuffer is pickled with its methods, that is, with ``getattr(HistoryBuffer, 'mean')``, and a
    one-cycle schedule with its annealing function. The real ``getattr`` among the safe globals would open
    every attribute of every safe class to a forged checkpoint.
    """
    if isinstance(name, str):
        if owner is HistoryBuffer and not name.startswith('_'):
            return getattr(owner, name)
        if owner in _SCHEDULERS and name.startswith('_annealing_'):
            return getattr(owner, name)
    raise TypeError(f'a checkpoint asks for {name!r} of {owner!r}, which no checkpoint of MMEngine does')


# torch looks safe globals up by these two names.
_pickled_method.__module__, _pickled_method.__qualname__ = 'builtins', 'getattr'


def trust_mmengine_checkpoints() -> None:
    """Declares safe what MMEngine writes into a training checkpoint beside tensors: histories, schedules."""
    arrays = [np.ndarray, np.dtype, np.core.multiarray._reconstruct, np.core.multiarray.scalar]
    dtypes = [type(np.dtype(kind)) for kind in _DTYPES]
    safe_load.trust([HistoryBuffer, _pickled_method, *_SCHEDULERS, *arrays, *dtypes])


def weights_of(checkpoint: Mapping, source: str = 'checkpoint') -> Dict[str, Any]:
    """The weights in a checkpoint, by the names of the model.

    Args:
        checkpoint: As read from the file.
        source: What to call it in messages.

    Raises:
        Q3DError: It is of another framework.
    """
    if 'model_state' in checkpoint and 'state_dict' not in checkpoint:
        raise Q3DError(
            f'{source}: it is a checkpoint of OpenPCDet (it has model_state, not state_dict); use '
            'it with an OpenPCDet config (--cfg_file X.yaml)'
        )
    state = checkpoint.get('state_dict', checkpoint)
    return {k[7:] if k.startswith('module.') else k: v for k, v in state.items()}


def check_checkpoint(
    checkpoint: Mapping, model: nn.Module, recipe: Recipe, source: str = 'checkpoint'
) -> Dict[str, Any]:
    """Checks that a checkpoint belongs to a configured model and, if it is quantized, to its recipe.

    Units that shared a quantizer in a quantized checkpoint share one afterwards.

    Args:
        checkpoint: As read from the file.
        model: The model that it will go into.
        recipe: The recipe of the config.
        source: What to call it in messages.

    Returns:
        dict: Its weights, by the names of ``model``.

    Raises:
        Q3DError: It is of another framework, another model or another recipe.
    """
    state = weights_of(checkpoint, source)
    if checkpoints.is_quantized_checkpoint(state):
        checkpoints.check_recipe_of(checkpoint.get('meta'), state, model, recipe, source)
        checkpoints.restore_sharing(checkpoint.get('meta'), model)
    checkpoints.check_state_dict(model, state, source)
    return state
