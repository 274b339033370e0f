"""A model in quantization-aware training, as both adapters drive it."""

from typing import Any, Dict, List, Optional

import torch
from torch import nn

from q3d_plugin.layers.model import quantizers
from q3d_plugin.quantizer import Role
from q3d_plugin.recipe import Recipe
from q3d_plugin.training.norms import fold_norms, norm_parameters
from q3d_plugin.training.optimizer import RangeGroup, add_ranges
from q3d_plugin.training.ranges import (
    check_ranges,
    follow_weights,
    keep_ranges,
    move_ranges,
    note_shares,
    range_parameters,
    train_ranges,
)
from q3d_plugin.training.record import TrainingRecord

__all__ = ['QuantTraining']


def _before_state(model: nn.Module, *_) -> None:
    """Whoever takes the state of a model, to save it, gets ranges that go with the weights."""
    check_ranges(model)
    follow_weights(model)


class QuantTraining:
    """The ranges of a model in training, and their schedule.

    It is made once the model is calibrated and before it goes into DistributedDataParallel, so that learned
    ranges are parameters from then on. Nothing here has to be saved: what the schedule asks for follows from
    the position in the training, and the rest is in the model and in the optimizer.

    Args:
        model: Calibrated, on its device.
        recipe: With ``mode='qat'``.

    Attributes:
        group: The learned ranges in their optimizer; None before they are in one, or where there are none.
        record: What the training makes of ranges and weights.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.spec = model, recipe.training
        self.group: Optional[RangeGroup] = None
        self.record = TrainingRecord(model)
        train_ranges(model, self.spec.ranges)
        if _before_state not in model._state_dict_pre_hooks.values():
            model.register_state_dict_pre_hook(_before_state)

    @property
    def parameters(self) -> List[nn.Parameter]:
        """The learned ranges."""
        return range_parameters(self.model)

    @property
    def added(self) -> List[nn.Parameter]:
        """All parameters that the model did not have when it was built."""
        return [*norm_parameters(self.model), *self.parameters]

    def add_to(self, optimizer: torch.optim.Optimizer, lasting: Optional[bool] = None) -> None:
        """Has an optimizer learn the ranges; harmless when called again.

        Args:
            optimizer: Of the weights.
            lasting: See :class:`~q3d_plugin.training.optimizer.RangeGroup`.
        """
        ranges = self.parameters
        known = {id(p) for group in optimizer.param_groups for p in group['params']}
        # After a resume too, the state of the optimizer counts them in this order.
        optimizer.param_groups[0]['params'] += [p for p in norm_parameters(self.model) if id(p) not in known]
        if ranges and self.group is None:
            self.group = add_ranges(optimizer, ranges, self.spec.ranges.lr_factor, lasting)

    def before_step(self, epoch: float) -> None:
        """Brings ranges and quantizers to where they have to be at a point of the training.

        Args:
            epoch: Epochs since the start of training, with fractions.
        """
        schedule, ranges = self.spec.schedule, self.spec.ranges
        waiting = epoch < schedule.activations_from
        for quantizer in quantizers(self.model):
            quantizer.waiting = waiting and quantizer.role is Role.ACTIVATION
        note_shares(self.model)
        follow_weights(self.model)
        if schedule.observe_until is None or epoch < schedule.observe_until:
            move_ranges(self.model, ranges.momentum)
        learning = schedule.learn_until is None or epoch < schedule.learn_until
        if self.group is not None:
            self.group.lr_factor = ranges.lr_factor if learning else 0.0
        self.record.start(epoch)
        self.record.sample_now(epoch)

    def follow_weights(self) -> None:
        """Sets fixed ranges of weights by the weights that the model has now."""
        follow_weights(self.model)

    def finish_epoch(self, epoch: float) -> Dict[str, Any]:
        """A record of ranges, clipped values and changed weights; every process has to ask for it.

        Args:
            epoch: Epochs since the start of training, with fractions.

        Returns:
            dict: See :meth:`q3d_plugin.training.record.TrainingRecord.finish_epoch`.
        """
        follow_weights(self.model)
        return self.record.finish_epoch(epoch)

    def end(self) -> None:
        """Has the ranges stay what they are, as buffers, and folds the BatchNorms that were back."""
        if self.group is not None:
            self.group.drop()
            self.group = None
        keep_ranges(self.model)
        fold_norms(self.model)
