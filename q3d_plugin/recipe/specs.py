"""The sections of a recipe, each field declared once with its check and its default."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple, Union

from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe.patterns import matches
from q3d_plugin.recipe.schema import (
    Place,
    choice,
    entry,
    integer,
    listed,
    number,
    optional,
    partial,
    patterns,
    section,
)

__all__ = [
    'CALIBRATORS',
    'WEIGHT_CALIBRATORS',
    'ActivationSpec',
    'CalibrationSpec',
    'LayerPlan',
    'Override',
    'SmoothOverride',
    'SmoothQuantSpec',
    'SmoothSpec',
    'WeightSpec',
]

CALIBRATORS = ('max', 'percentile', 'mse', 'entropy', 'grid')
WEIGHT_CALIBRATORS = ('max', 'percentile', 'mse', 'grid')

_PERCENTILE = number(lambda v: 0 < v <= 100, 'a number above 0 and up to 100, such as 99.99,')
_EXAMPLE = '*bbox_head*.heatmap.1'


@dataclass(frozen=True)
class WeightSpec:
    """How a weight is quantized: signed, symmetric, one range per output channel.

    Attributes:
        bits: Width of the integers, 2 to 16.
        calibrator: ``'max'``, ``'percentile'``, ``'mse'`` or ``'grid'``.
        percentile: Share of the magnitudes inside the range, for ``'percentile'``, in ``(0, 100]``.
    """

    bits: int = entry(integer(2, 16), 8)
    calibrator: str = entry(choice(*WEIGHT_CALIBRATORS), 'max')
    percentile: float = entry(_PERCENTILE, 99.99)


@dataclass(frozen=True)
class ActivationSpec:
    """How the inputs of a layer are quantized: symmetric, one range per tensor.

    Attributes:
        bits: Width of the integers, 2 to 16.
        unsigned: True, False, or ``'auto'``: unsigned where the target has unsigned integers and the producer
            is a ReLU, that is, where not one value of all calibration frames is negative.
        calibrator: ``'max'``, ``'percentile'``, ``'mse'``, ``'entropy'`` or ``'grid'``.
        percentile: Share of the magnitudes inside the range, for ``'percentile'``, in ``(0, 100]``.
        range: ``'static'``: from calibration. ``'dynamic'``: the largest magnitude of the current tensor;
            calibration then only decides whether it is unsigned.
    """

    bits: int = entry(integer(2, 16), 8)
    unsigned: Any = entry(choice('auto', True, False), 'auto')
    calibrator: str = entry(choice(*CALIBRATORS), 'mse')
    percentile: float = entry(_PERCENTILE, 99.99)
    range: str = entry(choice('static', 'dynamic'), 'static')


@dataclass(frozen=True)
class CalibrationSpec:
    """The frames that activation ranges are taken from.

    Attributes:
        split: ``'train'``, ``'val'`` or ``'test'``: whose annotation file the frames come from.
        frames: How many frames, at least 1. Where the split has fewer, all of them are used, with a warning.
        seed: Chooses the frames.
    """

    split: str = entry(choice('train', 'val', 'test'), 'train')
    frames: int = entry(integer(1), 300)
    seed: int = entry(integer(0), 0)


@dataclass(frozen=True)
class Override:
    """A change of the specs for the layers that match one of ``layers``; later overrides win.

    Attributes:
        layers: Patterns.
        weight: Fields of :class:`WeightSpec` to change; None to leave the weight float.
        activation: Fields of :class:`ActivationSpec` to change; None to leave the inputs float.
    """

    layers: Tuple[str, ...] = entry(patterns(_EXAMPLE), missing='a pattern or a list of patterns')
    weight: Optional[Dict[str, Any]] = field(
        default_factory=dict, metadata={'check': optional(partial(WeightSpec))}
    )
    activation: Optional[Dict[str, Any]] = field(
        default_factory=dict, metadata={'check': optional(partial(ActivationSpec))}
    )


_GRID = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class SmoothSpec:
    """How the inputs of one layer are smoothed (SmoothQuant, Xiao et al. 2023).

    Attributes:
        alpha: How much of the difficulty goes from the inputs to the weight, 0 to 1, or ``'search'``.
        mode: ``'static'``: by scales from calibration, in the layers before where that is possible.
            ``'dynamic'``: by scales from the running input.
        grid: The values that ``'search'`` chooses from.
    """

    alpha: Union[float, str] = 0.5
    mode: str = 'static'
    grid: Tuple[float, ...] = _GRID


def _alpha(*words: Any):
    more = ', or None' if None in words else ''
    return number(lambda v: 0 <= v <= 1, f"a number from 0 to 1 or 'search'{more}", 'search', *words)


def _grid(value: Any, place: Place) -> Tuple[float, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise Q3DError.at(place, value, 'a list of numbers from 0 to 1 would work')
    check = number(lambda v: 0 <= v <= 1, 'a number from 0 to 1')
    return tuple(sorted({check(v, place.item(i)) for i, v in enumerate(value)}))


@dataclass(frozen=True)
class SmoothOverride:
    """Another alpha for the layers that match one of ``layers``; later overrides win.

    Attributes:
        layers: Patterns.
        alpha: 0 to 1, ``'search'``, or None: these layers are not smoothed.
    """

    layers: Tuple[str, ...] = entry(patterns(_EXAMPLE), missing='a pattern or a list of patterns')
    alpha: Optional[Union[float, str]] = entry(_alpha(None), missing="a number, 'search' or None")


@dataclass(frozen=True)
class SmoothQuantSpec:
    """Which layers are smoothed, and how; the recipe's ``smoothquant``.

    Attributes:
        alpha: 0 to 1, or ``'search'``.
        layers: Patterns of the layers that are smoothed.
        mode: ``'static'`` or ``'dynamic'``.
        grid: The values that ``'search'`` chooses from; 0.25, 0.5, 0.75 and no smoothing at all are always
            tried too.
        overrides: Other values of alpha for some of the layers.
    """

    alpha: Union[float, str] = entry(_alpha(), 0.5)
    layers: Tuple[str, ...] = entry(patterns('*backbone*', some=True), ('*',))
    mode: str = entry(choice('static', 'dynamic'), 'static')
    grid: Tuple[float, ...] = entry(_grid, _GRID)
    overrides: Tuple[SmoothOverride, ...] = entry(listed(section(SmoothOverride)), ())

    def plan(self, name: str) -> Optional[SmoothSpec]:
        """How the layer ``name`` is smoothed; None for a layer that is not."""
        if not any(matches(p, name) for p in self.layers):
            return None
        alpha: Optional[Union[float, str]] = self.alpha
        for override in self.overrides:
            if any(matches(p, name) for p in override.layers):
                alpha = override.alpha
        # The grid of a layer whose alpha is given has no meaning, and must not tell two such layers apart.
        grid = self.grid if alpha == 'search' else ()
        return None if alpha is None else SmoothSpec(alpha, self.mode, grid)


@dataclass(frozen=True)
class LayerPlan:
    """The part of the recipe that concerns one layer: None for a part that stays float.

    Attributes:
        weight: How the weight is quantized.
        activation: How the inputs are quantized; ``unsigned`` is False where the target has no unsigned
            integers.
        reason: Why the layer has no quantizer, for the coverage table; empty where it has one.
        smooth: How the inputs are smoothed; None where they are not.
        target: The engine that the layer is meant for.
    """

    weight: Optional[WeightSpec]
    activation: Optional[ActivationSpec]
    reason: str = ''
    smooth: Optional[SmoothSpec] = None
    target: str = ''
