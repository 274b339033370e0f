"""The states of a quantizer: for which kind of tensor it is, and the treatment that the next tensor gets."""

import enum

__all__ = ['STAGES', 'UNSIGNED_MODES', 'Mode', 'Role', 'Stage']


class Role(enum.Enum):
    """The kind of tensor that a quantizer is for."""

    WEIGHT = 'weight'
    """One range per output channel."""
    ACTIVATION = 'activation'
    """One range."""


class Stage(enum.Enum):
    """The treatment that the next tensor gets from a quantizer."""

    OFF = 'off'
    """It was switched off: the tensor passes unchanged."""
    OBSERVING = 'observing'
    """It takes statistics; the tensor passes unchanged."""
    UNCALIBRATED = 'uncalibrated'
    """It has no range yet: a forward pass is an error."""
    FLOAT = 'float'
    """It was left float, because calibration saw no data: the tensor passes unchanged."""
    STATIC = 'static'
    """It quantizes by its range."""
    DYNAMIC = 'dynamic'
    """It quantizes by the largest magnitude of the current tensor."""


class Mode(enum.IntEnum):
    """Stage and signedness as one number, as checkpoints hold them. Switching off is not saved."""

    UNCALIBRATED = 0
    SIGNED = 1
    UNSIGNED = 2
    FLOAT = 3
    DYNAMIC_SIGNED = 4
    DYNAMIC_UNSIGNED = 5


STAGES = {
    Mode.UNCALIBRATED: Stage.UNCALIBRATED,
    Mode.SIGNED: Stage.STATIC,
    Mode.UNSIGNED: Stage.STATIC,
    Mode.FLOAT: Stage.FLOAT,
    Mode.DYNAMIC_SIGNED: Stage.DYNAMIC,
    Mode.DYNAMIC_UNSIGNED: Stage.DYNAMIC,
}
"""The treatment that a mode stands for."""

UNSIGNED_MODES = (Mode.UNSIGNED, Mode.DYNAMIC_UNSIGNED)
