"""The recipe's ``training``: what happens to ranges in quantization-aware training, when, and what is learned
from the float model."""

from dataclasses import dataclass
from typing import Optional

from q3d_plugin.recipe.schema import choice, entry, number, optional, section, text

__all__ = ['DistillationSpec', 'RANGE_KINDS', 'RangesSpec', 'ScheduleSpec', 'TrainingSpec']

RANGE_KINDS = ('fixed', 'moving', 'learned')

_EPOCHS = number(lambda v: v >= 0, 'a number of epochs from 0 up, such as 1.5,')
_WEIGHT = number(lambda v: v >= 0, 'a number from 0 up')
_POSITIVE = number(lambda v: v > 0, 'a number above 0')


@dataclass(frozen=True)
class RangesSpec:
    """What happens to the ranges in training.

    Attributes:
        weight: ``'fixed'``: a channel's range keeps its ratio to the largest weight of the channel, and so
            follows the weights. ``'moving'``: it follows them as a moving average. ``'learned'``: it is a
            parameter.
        activation: ``'fixed'``: as calibrated. ``'moving'``: moving average of the largest magnitudes of the
            batches. ``'learned'``: a parameter.
        scale: ``'linear'``: the parameter is the range (LSQ, Esser et al. 2020). ``'log2'``: its logarithm
            (TQT, Jain et al. 2020), so that a step changes large and small ranges by the same ratio.
        lr_factor: The learning rate of learned ranges as a multiple of that of the weights.
        momentum: Of the moving averages: what stays of the old value at each step, from 0 up to 1.
    """

    weight: str = entry(choice(*RANGE_KINDS), 'learned')
    activation: str = entry(choice(*RANGE_KINDS), 'learned')
    scale: str = entry(choice('linear', 'log2'), 'log2')
    lr_factor: float = entry(_POSITIVE, 10.0)
    momentum: float = entry(number(lambda v: 0 <= v < 1, 'a number from 0 up to, but not including, 1'), 0.99)


@dataclass(frozen=True)
class ScheduleSpec:
    """When something begins or ends, in epochs from the start of training; fractions too.

    Attributes:
        activations_from: Before it weights alone are quantized.
        observe_until: Moving averages stay what they are from then on; None: they move until the end.
        learn_until: Learned ranges stay what they are from then on; None: they are learned until the end.
    """

    activations_from: float = entry(_EPOCHS, 0.0)
    observe_until: Optional[float] = entry(optional(_EPOCHS), None)
    learn_until: Optional[float] = entry(optional(_EPOCHS), None)


@dataclass(frozen=True)
class DistillationSpec:
    """Losses towards the outputs of the float model, each with its weight; 0 leaves one out.

    Attributes:
        heatmap: Heat maps: quality focal loss (Li et al. 2020, equation 3) with the teacher's heat map as the
            target and the exponent of the detector's own focal loss.
        boxes: The other outputs of the head: L1, at the places where the teacher sees an object.
        features: The BEV features that the head reads: squared error as a share of the teacher's power.
        teacher: A checkpoint of the same architecture; None for the model that training starts from.
    """

    heatmap: float = entry(_WEIGHT, 4.0)
    boxes: float = entry(_WEIGHT, 0.25)
    features: float = entry(_WEIGHT, 1.0)
    teacher: Optional[str] = entry(optional(text('a checkpoint file')), None)


@dataclass(frozen=True)
class TrainingSpec:
    """Quantization-aware training; the recipe's ``training``, without a meaning in the other modes.

    Attributes:
        ranges: What happens to the ranges.
        schedule: When.
        batch_norm: ``'folded'``: into the weights before training, as in the engine. ``'kept'``: behind its
            layer during training, with the statistics of the batches, and folded by whoever loads the
            checkpoint.
        distillation: Losses towards the float model; None for none.
    """

    ranges: RangesSpec = entry(section(RangesSpec), RangesSpec())
    schedule: ScheduleSpec = entry(section(ScheduleSpec), ScheduleSpec())
    batch_norm: str = entry(choice('folded', 'kept'), 'folded')
    distillation: Optional[DistillationSpec] = entry(optional(section(DistillationSpec)), None)
