"""Learned ranges in an optimizer: a group of their own, with a learning rate that follows the weights'."""

from collections.abc import Sequence
from typing import Any, Dict, List, Optional

import torch
from torch import nn

__all__ = ['add_ranges', 'drop_ranges', 'range_group', 'set_lr_factor']

_FACTOR = 'q3d_lr_factor'
_FOLLOWED = ('betas', 'momentum')


def range_group(optimizer: torch.optim.Optimizer) -> Optional[Dict[str, Any]]:
    """The parameter group that :func:`add_ranges` added; None where there is none."""
    return next((group for group in optimizer.param_groups if _FACTOR in group), None)


def add_ranges(optimizer: torch.optim.Optimizer, ranges: Sequence[nn.Parameter], lr_factor: float) -> None:
    """Puts learned ranges into a group of their own, without weight decay.

    In each step the group's learning rate is ``lr_factor`` times the highest one of the other groups at that
    time, and its momentum is theirs, whatever schedule sets those: schedules that were built before know
    nothing of the group. Harmless when called again.

    Args:
        optimizer: Of the weights. Ranges that it has already are moved.
        ranges: The parameters.
        lr_factor: Multiple of the weights' learning rate.
    """
    if not ranges or range_group(optimizer) is not None:
        return
    mine = {id(p) for p in ranges}
    for group in optimizer.param_groups:
        group['params'] = [p for p in group['params'] if id(p) not in mine]
    # Schedules keep notes in the groups, which they look for in every group.
    notes = {k: v for k, v in _leading(optimizer).items() if k != 'params'}
    optimizer.add_param_group({**notes, 'params': list(ranges), 'weight_decay': 0.0, _FACTOR: lr_factor})
    optimizer.register_step_pre_hook(_follow)


def drop_ranges(optimizer: torch.optim.Optimizer) -> None:
    """Takes the group of learned ranges out of an optimizer, with what it remembers of them."""
    group = range_group(optimizer)
    if group is not None:
        optimizer.param_groups[:] = _others(optimizer)
        for parameter in group['params']:
            optimizer.state.pop(parameter, None)


def set_lr_factor(optimizer: torch.optim.Optimizer, lr_factor: float) -> None:
    """Changes the multiple of the weights' learning rate; with 0 learned ranges stay what they are.

    They go on getting gradients then, for which DistributedDataParallel waits.
    """
    group = range_group(optimizer)
    if group is not None:
        group[_FACTOR] = lr_factor


def _others(optimizer: torch.optim.Optimizer) -> List[Dict[str, Any]]:
    return [group for group in optimizer.param_groups if _FACTOR not in group]


def _leading(optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """The group of weights with the highest learning rate."""
    return max(_others(optimizer), key=lambda group: float(group['lr']))


def _follow(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    group, leading = range_group(optimizer), _leading(optimizer)
    if group is None:
        return
    group['lr'] = leading['lr'] * group[_FACTOR]
    for key in _FOLLOWED:
        if key in leading:
            group[key] = leading[key]
