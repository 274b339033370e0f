"""Losses of a quantized detector towards the float one, from which its training started."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, List

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from q3d_plugin.errors import Q3DError
from q3d_plugin.layers.model import set_enabled
from q3d_plugin.recipe import DistillationSpec, Recipe

__all__ = [
    'HeadMaps',
    'HeadOutputs',
    'box_loss',
    'check_distillation',
    'distillation_losses',
    'feature_loss',
    'frozen_copy',
    'heatmap_loss',
]

SEEN = 0.1
"""The score from which on the teacher sees an object: CenterPoint's threshold for boxes."""


@dataclass
class HeadMaps:
    """Outputs of a head for the same places: those of a map, or proposals.

    Attributes:
        heatmap: (B, K, ...) logits of K classes.
        boxes: Name -> (B, C, ...) what is said about the box at each place.
    """

    heatmap: Tensor
    boxes: Dict[str, Tensor] = field(default_factory=dict)


@dataclass
class HeadOutputs:
    """The raw outputs of a head and what it read.

    Attributes:
        features: (B, C, H, W) BEV features that the head reads, one tensor for each level.
        maps: Of each task or stage of the head.
    """

    features: List[Tensor] = field(default_factory=list)
    maps: List[HeadMaps] = field(default_factory=list)


def heatmap_loss(student: Tensor, teacher: Tensor, exponent: float = 2.0) -> Tensor:
    """Quality focal loss (Li et al. 2020, "Generalized Focal Loss", equation 3) towards a heat map.

    It is the focal loss for targets between 0 and 1: cross entropy times ``|p - q|^exponent``, so that the
    many places that are empty in both maps have no weight. The sum is divided by the number of objects that
    the teacher sees: peaks of its map.

    Args:
        student: (B, K, ...) logits.
        teacher: (B, K, ...) logits, without gradients.
        exponent: That of the detector's own focal loss.

    Returns:
        Tensor: Scalar, float32.
    """
    target, logits = teacher.float().sigmoid(), student.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    weight = (logits.sigmoid() - target).abs().pow(exponent)
    return (entropy * weight).sum() / _objects(target).clamp_min(1)


def _objects(scores: Tensor) -> Tensor:
    """The number of peaks in (B, K, H, W) maps, or of (B, K, P) proposals, with a score of at least SEEN."""
    peaks = scores >= SEEN
    if scores.dim() == 4:
        peaks = peaks & (scores == F.max_pool2d(scores, 3, stride=1, padding=1))
    return peaks.sum()


def box_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], heatmap: Tensor) -> Tensor:
    """L1 between what two heads say about boxes, at the places where the teacher sees an object.

    Each place counts by the teacher's highest score there. Outputs are summed over their channels.

    Args:
        student: Name -> (B, C, ...).
        teacher: The same outputs, without gradients.
        heatmap: (B, K, ...) logits of the teacher.

    Returns:
        Tensor: Scalar, float32.
    """
    scores = heatmap.float().sigmoid().amax(1, keepdim=True)
    weight = torch.where(scores >= SEEN, scores, 0.0)
    difference = sum((student[k].float() - teacher[k].float()).abs().sum(1, keepdim=True) for k in teacher)
    return (difference * weight).sum() / weight.sum().clamp_min(1)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of features as a share of the teacher's power, the mean over levels.

    Args:
        student: (B, C, H, W) of each level.
        teacher: The same, without gradients.

    Returns:
        Tensor: Scalar, float32.
    """
    shares = []
    for mine, other in zip(student, teacher):
        power = other.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        shares.append((mine.float() - other.float()).square().mean() / power)
    return torch.stack(shares).mean()


def distillation_losses(
    student: HeadOutputs, teacher: HeadOutputs, spec: DistillationSpec, exponent: float = 2.0
) -> Dict[str, Tensor]:
    """The weighted losses that a recipe asks for, by name: ``heatmap``, ``boxes``, ``features``.

    Args:
        student: With gradients.
        teacher: Without.
        spec: Of the recipe.
        exponent: That of the detector's own focal loss.
    """
    out: Dict[str, Tensor] = {}
    pairs = list(zip(student.maps, teacher.maps))
    if spec.heatmap:
        out['heatmap'] = spec.heatmap * sum(heatmap_loss(s.heatmap, t.heatmap, exponent) for s, t in pairs)
    if spec.boxes:
        out['boxes'] = spec.boxes * sum(box_loss(s.boxes, t.boxes, t.heatmap) for s, t in pairs if t.boxes)
    if spec.features:
        out['features'] = spec.features * feature_loss(student.features, teacher.features)
    return out


def check_distillation(recipe: Recipe, known: Sequence[str], head: str) -> None:
    """Checks, before anything long begins, that a detector can be distilled as its recipe says.

    Args:
        recipe: With ``mode='qat'``.
        known: Those of ``heatmap``, ``boxes`` and ``features`` that the detector has.
        head: The type of the head, for messages.

    Raises:
        Q3DError: It lacks outputs that are asked for (the names that it has are listed); or features are to
            be compared with those of a teacher that has another scale in each channel.
    """
    spec, place = recipe.training.distillation, recipe.place.key('training').key('distillation')
    if spec is None:
        return
    for name in ('heatmap', 'boxes', 'features'):
        if getattr(spec, name) and name not in known:
            raise Q3DError.at(
                place.key(name),
                getattr(spec, name),
                f'0 would work: the head {head} has no such outputs; those that can be distilled here are '
                f'{", ".join(known) or "none"}',
            )
    if spec.teacher and spec.features and recipe.smoothquant is not None:
        raise Q3DError.at(
            place.key('features'),
            spec.features,
            '0 would work, or no teacher of your own: SmoothQuant moves scales between layers, so the BEV '
            'features of the smoothed model have other scales than those of the teacher',
        )


def frozen_copy(model: nn.Module, shared: Sequence[Any] = ()) -> nn.Module:
    """The float model of a calibrated one: its quantizers are off, and nothing in it learns.

    Args:
        model: Calibrated, not yet in training.
        shared: Large objects that the model holds and that are not copied, such as a data set.
    """
    teacher = copy.deepcopy(model, {id(thing): thing for thing in shared}).requires_grad_(False)
    set_enabled(teacher, False)
    # Not in one line: some models' eval() returns nothing.
    teacher.eval()
    return teacher


class Captured(BaseException):
    """Ends a teacher's forward pass once its outputs are known. Not an Exception: nothing keeps it."""


def run_until_captured(run: Callable[[], Any]) -> None:
    """Runs a forward pass without gradients, which may end with :class:`Captured`."""
    try:
        with torch.no_grad():
            run()
    except Captured:
        pass
