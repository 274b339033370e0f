"""Training checkpoints of MMEngine under torch's ``weights_only`` loading, which is the default from torch
2.6 on."""

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler import param_scheduler

__all__ = ['trust_mmengine_checkpoints']

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
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return
    arrays = [np.ndarray, np.dtype, np.core.multiarray._reconstruct, np.core.multiarray.scalar]
    dtypes = [type(np.dtype(kind)) for kind in _DTYPES]
    torch.serialization.add_safe_globals([HistoryBuffer, _pickled_method, *_SCHEDULERS, *arrays, *dtypes])
