"""Distillation in MMDetection3D: the losses are added to those that a detector returns."""

import math
from collections.abc import Mapping
from typing import Any, Dict, Iterator, List, Optional

import torch
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import Tensor, nn

from q3d_plugin import checkpoints, safe_load
from q3d_plugin.adapter import copy_containers
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.mmdet3d.checkpoints import weights_of
from q3d_plugin.recipe import DistillationSpec
from q3d_plugin.training.distillation import (
    Captured,
    HeadMaps,
    HeadOutputs,
    distillation_losses,
    run_until_captured,
)

__all__ = ['attach_teacher', 'head_of', 'known_outputs', 'load_teacher']


def head_of(model: nn.Module) -> Optional[nn.Module]:
    """The head of a detector, which reads the BEV features; None where there is none."""
    return next(
        (h for n in ('pts_bbox_head', 'bbox_head') if (h := getattr(model, n, None)) is not None), None
    )


def known_outputs(model: nn.Module) -> List[str]:
    """Those of ``heatmap``, ``boxes`` and ``features`` that a detector has."""
    head = head_of(model)
    if head is None:
        return []
    # CenterHead has task_heads, TransFusionHead heatmap_head.
    maps = hasattr(head, 'task_heads') or hasattr(head, 'heatmap_head')
    return ['heatmap', 'boxes', 'features'] if maps else ['features']


def load_teacher(teacher: nn.Module, path: str) -> None:
    """Loads the weights of another checkpoint into a teacher.

    Args:
        teacher: A frozen copy of the model.
        path: The checkpoint.

    Raises:
        Q3DError: It is of another architecture.
    """
    check_checkpoint_file(path)
    checkpoint = safe_load.load(path)
    checkpoints.check_state_dict(teacher, weights_of(checkpoint, f'teacher {path!r}'), f'teacher {path!r}')
    # With the layout of sparse weights that the state notes beside its entries.
    _load_checkpoint_to_model(teacher, checkpoint, strict=False, revise_keys=[(r'^module\.', '')])


def attach_teacher(model: nn.Module, teacher: nn.Module, spec: DistillationSpec) -> None:
    """From now on the losses of ``model`` in training have those of distillation beside them.

    The teacher runs on the same batch, once the head of the model has run.

    Args:
        model: The detector in training.
        teacher: A frozen copy of it. It does not become a part of the model.
        spec: Of the recipe.
    """
    batch: Dict[str, Any] = {}
    losses: Dict[str, Tensor] = {}
    head, other = head_of(model), head_of(teacher)
    exponent = _focal_exponent(head)

    def before(module, args, kwargs):
        batch.clear(), losses.clear()
        if module.training and kwargs.get('mode') == 'loss':
            # Detectors add entries to their inputs.
            batch.update(copy_containers(kwargs), mode='predict')

    def after_head(module, args, output):
        if not batch or losses:
            return
        student = _outputs(args, output)
        with torch.no_grad():
            expected = _teacher_outputs(teacher, other, batch, output)
        losses.update(distillation_losses(student, expected, spec, exponent))

    def after(module, args, kwargs, output):
        if losses:
            output = {**output, **{f'loss_distill_{name}': value for name, value in losses.items()}}
            batch.clear(), losses.clear()
        return output

    # Functions, not methods: a copy of the model, as of a moving average, must not copy the teacher.
    model.register_forward_pre_hook(before, with_kwargs=True)
    head.register_forward_hook(after_head)
    model.register_forward_hook(after, with_kwargs=True)


def _focal_exponent(head: nn.Module) -> float:
    """The exponent of the focal loss that a head has for its heat maps; 2 where it says none."""
    found = (getattr(getattr(head, name, None), 'alpha', None) for name in ('loss_heatmap', 'loss_cls'))
    return next((float(v) for v in found if v is not None and not math.isnan(float(v))), 2.0)


def _teacher_outputs(teacher: nn.Module, head: nn.Module, batch: Mapping, student: Any) -> HeadOutputs:
    found: List[HeadOutputs] = []
    dense: List[Tensor] = []
    # A head that takes the best places of its heat map as proposals has to take those of the student, or the
    # two would say something about different places.
    chosen = [d['dense_heatmap'].detach() for d in _dictionaries(student) if 'dense_heatmap' in d]

    def choose(module, args, output):
        dense.append(output)
        return chosen[0].to(output.dtype)

    def capture(module, args, output):
        outputs = _outputs(args, output)
        if dense:
            outputs.maps[0].heatmap = dense[0]
        found.append(outputs)
        raise Captured

    handles = [head.register_forward_hook(capture)]
    if chosen:
        handles.append(head.heatmap_head.register_forward_hook(choose))
    try:
        run_until_captured(lambda: teacher(**copy_containers(dict(batch))))
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


def _outputs(args: Any, output: Any) -> HeadOutputs:
    """What a head read and returned, in the form that distillation compares."""
    features = [args[0]] if isinstance(args[0], Tensor) else list(args[0])
    maps = []
    for found in _dictionaries(output):
        boxes = {
            k: v for k, v in found.items() if 'heatmap' not in k and v.shape[0] == found['heatmap'].shape[0]
        }
        # Losses apply the sigmoid to heat maps in place.
        if 'dense_heatmap' in found:
            maps.append(HeadMaps(found['dense_heatmap'].clone()))
        maps.append(HeadMaps(found['heatmap'].clone(), boxes))
    return HeadOutputs(features, maps)


def _dictionaries(value: Any) -> Iterator[Dict[str, Tensor]]:
    """The dictionaries with a heat map in nested lists and tuples."""
    if isinstance(value, Mapping):
        if 'heatmap' in value:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _dictionaries(item)
