"""Learned ranges in an optimizer: a group of their own, with a learning rate that follows the weights'."""

from collections.abc import Sequence
from typing import Any, Dict, List, Optional

import torch
from torch import nn

__all__ = ['RangeGroup', 'add_ranges']

_MARK = 'q3d_ranges'
_FOLLOWED = ('betas', 'momentum')


class RangeGroup:
    """The learned ranges in one optimizer.

    In each step they form a parameter group without weight decay, whose learning rate is ``lr_factor`` times
    the highest one of the other groups at that time, and whose momentum is theirs, whatever schedule sets
    those.

    Args:
        optimizer: Of the weights.
        ranges: The parameters.
        lr_factor: Multiple of the weights' learning rate; 0: the ranges stay what they are. (They go on
            getting gradients, for which DistributedDataParallel waits.)
        lasting: Whether the group is there between steps too. Where it is not, the ranges are in the first
            group then: schedules that were built before count the groups.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        ranges: Sequence[nn.Parameter],
        lr_factor: float,
        lasting: bool,
    ) -> None:
        self.optimizer, self.ranges, self.lr_factor, self.lasting = (
            optimizer,
            list(ranges),
            lr_factor,
            lasting,
        )
        self._take_out()
        if lasting:
            optimizer.param_groups.append(self._made())
        else:
            self._put_back()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def drop(self) -> None:
        """Takes the ranges out of the optimizer, with what it remembers of them."""
        self.optimizer.param_groups[:] = self._others()
        self._take_out()
        for parameter in self.ranges:
            self.optimizer.state.pop(parameter, None)
        for hook in self._hooks:
            hook.remove()

    def _others(self) -> List[Dict[str, Any]]:
        return [group for group in self.optimizer.param_groups if _MARK not in group]

    def _leading(self) -> Dict[str, Any]:
        """The group of weights with the highest learning rate."""
        return max(self._others(), key=lambda group: float(group['lr']))

    def _take_out(self) -> None:
        mine = {id(p) for p in self.ranges}
        for group in self._others():
            group['params'] = [p for p in group['params'] if id(p) not in mine]

    def _put_back(self) -> None:
        self.optimizer.param_groups[0]['params'] += self.ranges

    def _made(self) -> Dict[str, Any]:
        # Schedules keep notes in the groups, which some of them look for in every group.
        return {**self._leading(), 'params': self.ranges, 'weight_decay': 0.0, _MARK: True}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.lasting:
            self._take_out()
            optimizer.param_groups.append(self._made())
        leading = self._leading()
        group = next(group for group in optimizer.param_groups if _MARK in group)
        group['lr'] = leading['lr'] * self.lr_factor
        group.update({key: leading[key] for key in _FOLLOWED if key in leading})

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.lasting:
            optimizer.param_groups[:] = self._others()
            self._put_back()


def add_ranges(
    optimizer: torch.optim.Optimizer,
    ranges: Sequence[nn.Parameter],
    lr_factor: float,
    lasting: Optional[bool] = None,
) -> RangeGroup:
    """Has an optimizer learn ranges; see :class:`RangeGroup`.

    Args:
        optimizer: Of the weights. Ranges that it has already are moved.
        ranges: The parameters; some.
        lr_factor: Multiple of the weights' learning rate.
        lasting: As there; None: unless a schedule has left notes in the groups.
    """
    if lasting is None:
        lasting = not any('initial_lr' in group for group in optimizer.param_groups)
    return RangeGroup(optimizer, ranges, lr_factor, lasting)
