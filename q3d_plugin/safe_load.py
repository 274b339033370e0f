"""Checkpoints read without running code that may be in them, also where torch alone cannot.

``torch.load(weights_only=True)`` knows tensors and plain data. The frameworks' training checkpoints hold
more, NumPy numbers for example, which torch 2.4 and newer can be told to trust. Older ones cannot: there, the
file is read by an unpickler that finds nothing but what is trusted.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import torch

__all__ = ['load', 'load_plain', 'trust']

_TENSORS = {
    '_codecs': ('encode',),
    'collections': ('OrderedDict',),
    'torch': ('Size', 'device', *(k for k, v in vars(torch).items() if isinstance(v, torch.dtype))),
    'torch._utils': ('_rebuild_parameter', '_rebuild_tensor', '_rebuild_tensor_v2'),
}
"""What the pickles of tensors and their containers name, by module."""

_NUMPY = {
    'numpy': ('dtype', 'ndarray'),
    'numpy.core.multiarray': ('_reconstruct', 'scalar'),
    'numpy._core.multiarray': ('_reconstruct', 'scalar'),
    '_codecs': ('encode',),
}
"""What the pickles of NumPy's numbers and arrays name, by module."""

_trusted: Dict[Tuple[str, str], Any] = {}


def trust(objects: Iterable[Any]) -> None:
    """Declares classes and functions safe to load, for the rest of the process.

    Args:
        objects: Such that calling them with any arguments does no harm.
    """
    objects = list(objects)
    _trusted.update({(o.__module__, o.__qualname__): o for o in objects})
    if _torch_can_trust():
        torch.serialization.add_safe_globals(objects)


def load(path: str) -> Any:
    """Reads a checkpoint onto the CPU.

    Args:
        path: The file, in either format of torch.

    Raises:
        pickle.UnpicklingError: It names something that is not trusted.
    """
    if _torch_can_trust():
        return torch.load(path, map_location='cpu', weights_only=True)
    return torch.load(path, map_location='cpu', weights_only=False, pickle_module=_TrustingPickle)


def load_plain(path: Path) -> Any:
    """Reads a pickle of plain data and of NumPy's numbers and arrays, such as an info file of a data set.

    Args:
        path: The file.

    Raises:
        pickle.UnpicklingError: It names anything else.
    """
    with open(path, 'rb') as file:
        return _PlainUnpickler(file).load()


def _torch_can_trust() -> bool:
    return hasattr(torch.serialization, 'add_safe_globals')


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _trusted:
            return _trusted[module, name]
        if name in _TENSORS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'Unsupported global: {module}.{name} is not trusted')


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _NUMPY.get(module, ()):
            raise pickle.UnpicklingError(f'Unsupported global: {module}.{name} is not plain data')
        # Both names of the module are the same; each version of NumPy knows one of them without a warning.
        known = 'numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray'
        return super().find_class(known if module.endswith('core.multiarray') else module, name)


class _TrustingPickle:
    """In the place of the module ``pickle``, for ``torch.load``."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _Unpickler(file, **kwargs).load()
