"""Distillation in OpenPCDet: the losses are added to the one that a detector returns."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn

from q3d_plugin.adapter import copy_containers
from q3d_plugin.layers.model import set_enabled
from q3d_plugin.openpcdet.checkpoints import read_checkpoint
from q3d_plugin.recipe import DistillationSpec
from q3d_plugin.training.distillation import (
    Captured,
    HeadMaps,
    HeadOutputs,
    distillation_losses,
    frozen_copy,
    run_until_captured,
)

__all__ = ['Distillation', 'known_outputs', 'make_teacher']

# CenterHead keeps its outputs and decodes them in its forward pass; TransFusionHead hands them on.
_DECODING, _PREDICTING = 'generate_predicted_boxes', 'predict'


def known_outputs(model: nn.Module) -> List[str]:
    """Those of ``heatmap``, ``boxes`` and ``features`` that a detector has."""
    head = getattr(model, 'dense_head', None)
    if head is None:
        return []
    # CenterHead has heads_list, TransFusionHead heatmap_head.
    maps = hasattr(head, 'heads_list') or hasattr(head, 'heatmap_head')
    return ['heatmap', 'boxes', 'features'] if maps else ['features']


def make_teacher(model: nn.Module, path: Optional[str] = None) -> nn.Module:
    """A frozen copy of a detector in float, which shares its data set.

    Args:
        model: Calibrated, not yet in training.
        path: A checkpoint of the same architecture, whose weights the copy gets; None for those of ``model``.

    Raises:
        Q3DError: The checkpoint is of another architecture.
    """
    teacher = frozen_copy(model, shared=[model.dataset])
    if path:
        state = read_checkpoint(path, f'teacher {path!r}')['model_state']
        teacher._q3d_source = path
        teacher._load_state_dict(state, strict=False)
        set_enabled(teacher, False)
    teacher._q3d_ready = True
    return teacher


class Distillation:
    """The teacher of a detector, outside of its modules and so of its checkpoints; copies of it have none.

    Args:
        model: The detector in training.
        teacher: From :func:`make_teacher`.
        spec: Of the recipe.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, spec: DistillationSpec) -> None:
        self.head, self.teacher, self.spec = model.dense_head, teacher, spec
        loss = getattr(self.head, 'loss_heatmap', None)
        self.exponent = float(getattr(loss, 'alpha', 2.0))

    def __reduce__(self):
        return type(None), ()

    def run(self, batch_dict: Dict[str, Any], forward: Callable[[Dict[str, Any]], Any]) -> Any:
        """A forward pass in training, with the losses of distillation in what it returns.

        Args:
            batch_dict: On the device of the model.
            forward: The detector's own forward pass.
        """
        # Modules add entries to the batch.
        batch, found = copy_containers(batch_dict), []
        with _watched(self.head, found.append):
            returned, shown, displayed = forward(batch_dict)
        with torch.no_grad():
            expected = self._expected(batch, found[0])
        losses = distillation_losses(found[0], expected, self.spec, self.exponent)
        returned['loss'] = returned['loss'] + sum(losses.values())
        shown.update({f'loss_distill_{name}': value.item() for name, value in losses.items()})
        return returned, shown, displayed

    def _expected(self, batch: Dict[str, Any], student: HeadOutputs) -> HeadOutputs:
        found: List[HeadOutputs] = []
        head = self.teacher.dense_head

        def capture(outputs: HeadOutputs) -> None:
            found.append(outputs)
            raise Captured

        # A head that takes the best places of its heat map as proposals has to take those of the student, or
        # the two would say something about different places.
        chosen = hasattr(head, 'heatmap_head')
        dense: List[Tensor] = []

        def choose(module, args, output):
            dense.append(output)
            return student.maps[0].heatmap.detach().to(output.dtype)

        handle = head.heatmap_head.register_forward_hook(choose) if chosen else None
        try:
            with _watched(head, capture):
                run_until_captured(lambda: self.teacher(batch))
        finally:
            if handle is not None:
                handle.remove()
        if dense:
            found[0].maps[0].heatmap = dense[0]
        return found[0]


@contextlib.contextmanager
def _watched(head: nn.Module, seen: Callable[[HeadOutputs], None]) -> Iterator[None]:
    """Inside, ``seen`` gets what the head read and its raw outputs, as soon as they are there."""
    features: List[Tensor] = []

    def before(module, args):
        features[:] = [args[0]['spatial_features_2d']]

    def outputs_of(tasks: List[Mapping[str, Tensor]]) -> HeadOutputs:
        return HeadOutputs(list(features), [maps for task in tasks for maps in _maps(task)])

    handles = [head.register_forward_pre_hook(before)]
    if hasattr(head, 'heads_list'):

        def kept(*_):
            seen(outputs_of(head.forward_ret_dict['pred_dicts']))

        handles.append(head.register_forward_hook(kept))
        if not head.training:
            # Whoever is interested in the outputs alone can end the pass before they are decoded.
            head.__dict__[_DECODING] = kept
    elif hasattr(head, 'heatmap_head'):
        predict = head.predict

        def predicting(inputs):
            result = predict(inputs)
            seen(outputs_of([result]))
            return result

        head.__dict__[_PREDICTING] = predicting
    else:
        handles.append(head.register_forward_hook(lambda *_: seen(outputs_of([]))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in (_DECODING, _PREDICTING):
            head.__dict__.pop(name, None)


def _maps(task: Mapping[str, Tensor]) -> Iterator[HeadMaps]:
    # Losses apply the sigmoid to heat maps in place.
    boxes = {k: v for k, v in task.items() if k != 'hm' and 'heatmap' not in k}
    if 'dense_heatmap' in task:
        yield HeadMaps(task['dense_heatmap'].clone())
    yield HeadMaps((task['hm'] if 'hm' in task else task['heatmap']).clone(), boxes)
