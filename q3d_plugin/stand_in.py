"""A module in the place of one that is not there."""

import types
from typing import Optional

__all__ = ['StandIn']


class StandIn(types.ModuleType):
    """Stands where a module should be, and names what was called.

    Args:
        name: The module's full name.
        reason: Why it is not there, as the end of a sentence.
        known: What does work.
    """

    __path__: list = []

    def __init__(self, name: str, reason: str, known: Optional[dict] = None) -> None:
        super().__init__(name, doc='A stand-in of q3d_plugin.')
        self.__dict__['_q3d_reason'] = reason
        self.__dict__.update(known or {})

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)
        message = f'{self.__name__}.{name} cannot be used here: {self._q3d_reason}'

        def missing(*args, **kwargs):
            raise NotImplementedError(message)

        missing.__name__ = name
        return missing
