"""Reading checkpoints of OpenPCDet, and the recipe that travels inside of them."""

import json
import pickle
from collections.abc import Mapping
from typing import Any, Dict, Optional

import numpy as np
import torch
from torch import Tensor, nn

from q3d_plugin import checkpoints, safe_load
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe

__all__ = ['pack_recipe', 'read_checkpoint', 'trust_openpcdet_checkpoints', 'unpack_recipe']

_DTYPES = ('float32', 'float64', 'int32', 'int64', 'bool')


def trust_openpcdet_checkpoints() -> None:
    """Declares safe what OpenPCDet writes into a training checkpoint beside tensors: NumPy numbers.

    Its one-cycle schedule computes learning rates and momenta with NumPy, and they are in the state of the
    optimizer. Such a checkpoint would not load otherwise.
    """
    arrays = [np.ndarray, np.dtype, np.core.multiarray._reconstruct, np.core.multiarray.scalar]
    safe_load.trust([*arrays, *(type(np.dtype(kind)) for kind in _DTYPES)])


def read_checkpoint(filename: str, source: str) -> Dict[str, Any]:
    """Reads a checkpoint of OpenPCDet onto the CPU, without running code that may be in it.

    Args:
        filename: The file.
        source: What to call it in messages.

    Returns:
        dict: ``model_state`` and, from training, ``optimizer_state``, ``epoch``, ``it``, ``version``.

    Raises:
        Q3DError: The file is missing, cut off, holds objects that are no plain data, or is of MMDetection3D.
    """
    check_checkpoint_file(filename)
    trust_openpcdet_checkpoints()
    try:
        checkpoint = safe_load.load(filename)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if 'GLOBAL' in line or 'global' in line), '')
        raise Q3DError(
            f'{source}: it holds objects that are no plain data, and loading those could run any code '
            f'({reason.strip() or str(error).splitlines()[0]}). Save its model_state alone in a file'
        ) from error
    if not isinstance(checkpoint, Mapping) or 'model_state' not in checkpoint:
        if isinstance(checkpoint, Mapping) and 'state_dict' in checkpoint:
            raise Q3DError(
                f'{source}: it is a checkpoint of MMDetection3D (it has state_dict, not model_state); use it '
                'with an MMDetection3D config (a .py file)'
            )
        has = (
            ', '.join(map(str, list(checkpoint)[:5])) if isinstance(checkpoint, Mapping) else 'no dictionary'
        )
        raise Q3DError(f'{source}: it is no checkpoint of OpenPCDet: it has no model_state (it has {has})')
    return checkpoint


def pack_recipe(recipe: Recipe, model: Optional[nn.Module] = None, teacher: str = '') -> Tensor:
    """The recipe as a tensor: OpenPCDet's training checkpoints have no place but the ``state_dict``.

    Args:
        recipe: Any recipe.
        model: As in :func:`q3d_plugin.checkpoints.stamp`.
        teacher: As there.

    Returns:
        Tensor: (N,) uint8, the JSON text.
    """
    text = json.dumps(checkpoints.stamp(recipe, model, teacher), sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpack_recipe(packed: Optional[Tensor]) -> Optional[Dict[str, Any]]:
    """What :func:`pack_recipe` was given, as the ``meta`` of a checkpoint; None where it cannot be read."""
    if packed is None:
        return None
    try:
        return {checkpoints.META_KEY: json.loads(bytes(packed.cpu().to(torch.uint8).tolist()).decode())}
    except ValueError:
        return None
