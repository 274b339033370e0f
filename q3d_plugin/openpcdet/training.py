"""Quantization-aware training in OpenPCDet, whose script tells a detector neither optimizer nor epoch."""

import gc
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Dict, List, Optional

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset

from q3d_plugin.errors import Q3DError
from q3d_plugin.openpcdet.data import rank_and_world
from q3d_plugin.openpcdet.distillation import Distillation, make_teacher
from q3d_plugin.openpcdet.record import RunRecord
from q3d_plugin.recipe import Recipe
from q3d_plugin.training import QuantTraining

__all__ = ['STEPS_KEY', 'DetectorTraining', 'iterations_per_epoch', 'optimizers_of', 'torch_optimizer']

STEPS_KEY = 'q3d_steps'
"""The buffer of a quantized detector that counts its forward passes in training."""


class DetectorTraining:
    """A detector in training: its learned ranges are in the script's optimizer, its schedule knows the epoch.

    - The script makes the optimizer before there are ranges, and does not hand it over when it starts from a
      float checkpoint. It is found among the objects of the process; where there are several, or it is made
      later, it is recognised when it makes its first step. That alone would be too late with AMP: gradients
      are unscaled and checked, then clipped, for the parameters that are in the optimizer before its step.
    - The position in the training is the number of forward passes, which is in the buffer
      :data:`STEPS_KEY`, divided by the iterations of an epoch. OpenPCDet does not accumulate gradients.

    A copy of the model has none of this: it is not in training.

    Args:
        model: The calibrated detector, on its device and with the buffer; it holds its data set.
        recipe: With ``mode='qat'``.
        optimizer: The script's, or its wrapper, where it is known.
        teacher: The checkpoint that the teacher is made of; empty for the model as it is.

    Attributes:
        session: The training as it is in every framework.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, optimizer: Any = None, teacher: str = '') -> None:
        spec, self._distillation = recipe.training.distillation, None
        if spec is not None:
            self._distillation = Distillation(model, make_teacher(model, spec.teacher or teacher), spec)
        self.session = QuantTraining(model, recipe)
        self._model = weakref.ref(model)
        self._steps: Optional[int] = None
        self._record: Optional[RunRecord] = None
        self._batch_size = 0
        self._watch = None
        if self.session.parameters:
            known = optimizers_of(model) if optimizer is None else [torch_optimizer(optimizer)]
            if len(known) == 1:
                self.session.add_to(known[0])
            self._watch_steps()

    def __reduce__(self):
        return type(None), ()

    def _watch_steps(self) -> None:
        me = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            training = me()
            if training is not None and not training._met and _held(optimizer, training.session.model):
                training.session.add_to(optimizer)
                training._met = True

        self._met = False
        self._watch = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, self._watch.remove)

    def check_not_wrapped(self) -> None:
        """Raises :class:`Q3DError` where DistributedDataParallel may have been made before the ranges."""
        if self.session.parameters and rank_and_world()[1] > 1:
            raise Q3DError(
                'the learned ranges became parameters after the model may have been given to '
                'DistributedDataParallel, which would not average their gradients; call train() once the '
                "checkpoint is loaded and the model is on its device, before it is wrapped, as OpenPCDet's "
                'tools/train.py does'
            )

    def before_step(self, batch_size: int) -> None:
        """Brings ranges and quantizers to where they have to be, and counts the step.

        Args:
            batch_size: Of this process and batch. The last one of an epoch may be smaller than the others.
        """
        if self._watch is not None and self._met:
            # Not in the hook itself: torch is going through the hooks then.
            self._watch.remove()
            self._watch = None
        model = self._model()
        counter = getattr(model, STEPS_KEY)
        if self._steps is None:
            self._steps = int(counter)
        self._batch_size = max(self._batch_size, int(batch_size))
        self.session.before_step(self._steps / iterations_per_epoch(model.dataset, self._batch_size))
        self._steps += 1
        counter.fill_(self._steps)

    def forward(self, batch_dict: Dict[str, Any], forward: Callable[[Dict[str, Any]], Any]) -> Any:
        """A forward pass in training, with the losses of distillation where the recipe asks for them.

        Args:
            batch_dict: On the device of the model.
            forward: The detector's own forward pass.
        """
        if self._distillation is None:
            return forward(batch_dict)
        return self._distillation.run(batch_dict, forward)

    def scalars(
        self, shown: Mapping[str, Any], folder: Optional[str], logger: logging.Logger
    ) -> Dict[str, float]:
        """Scalars of a step for TensorBoard: see :meth:`~q3d_plugin.openpcdet.record.RunRecord.scalars`."""
        if self._record is None:
            self._record = RunRecord(self.session, folder, logger, self._steps - 1)
        epoch = iterations_per_epoch(self._model().dataset, self._batch_size)
        return self._record.scalars(self._steps, epoch, shown)

    def end(self) -> None:
        """Has the ranges stay what they are."""
        if self._watch is not None:
            self._watch.remove()
        self.session.end()


def torch_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of torch in what ``build_optimizer`` returns, which may be a wrapper of fastai's."""
    return optimizer if isinstance(optimizer, Optimizer) else optimizer.opt


def optimizers_of(model: nn.Module) -> List[Optimizer]:
    """The optimizers in this process that have the most of a model's parameters; none where none has any."""
    # Of the type, not of the object: some objects do something when they are asked for their class.
    everyone = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    held = [_held(o, model) for o in everyone]
    return [o for o, count in zip(everyone, held) if count and count == max(held)]


def _held(optimizer: Optimizer, model: nn.Module) -> int:
    mine = {id(p) for p in model.parameters()}
    # An optimizer that is just being made has no groups yet.
    groups = getattr(optimizer, 'param_groups', ())
    return sum(id(p) in mine for group in groups for p in group['params'])


def iterations_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Iterations of an epoch as OpenPCDet's script counts them.

    Args:
        dataset: Of the training.
        batch_size: Of one process.

    Returns:
        int: ``ceil(frames / (batch_size * processes))``, at least 1.
    """
    count = -(-len(dataset) // (batch_size * rank_and_world()[1]))
    if getattr(dataset, '_merge_all_iters_to_one_epoch', False):
        # --merge_all_iters_to_one_epoch: the data set has the frames of all epochs.
        count //= max(1, dataset.total_epochs)
    return max(1, count)
