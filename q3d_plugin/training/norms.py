"""BatchNorm in place during training: brought back behind the layers that it was folded into."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Dict, List

import torch
from torch import Tensor, nn

from q3d_plugin.calibration import feed, from_all_ranks
from q3d_plugin.transforms.folded_norm import FoldedNorm

__all__ = ['fold_norms', 'norm_parameters', 'revive_norms', 'revive_norms_of']


def _folded(model: nn.Module) -> Dict[str, FoldedNorm]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, FoldedNorm)}
    return {name: norm for name, norm in found.items() if not (norm.frozen or norm.live)}


def norm_parameters(model: nn.Module) -> List[nn.Parameter]:
    """The parameters of the BatchNorms that are back, in the order of the model."""
    return [p for m in model.modules() if isinstance(m, FoldedNorm) for p in m.parameters()]


class _Moments:
    """Count, sums and sums of squares of the channels of tensors."""

    def __init__(self) -> None:
        self.count, self.sums = 0, None

    def add(self, x: Tensor) -> None:
        rows = x.detach().transpose(0, 1).flatten(1).double()
        sums = torch.stack([rows.sum(1), rows.square().sum(1)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += rows.shape[1]


@contextlib.contextmanager
def _watched(norms: Mapping[str, FoldedNorm]) -> Iterator[Dict[str, _Moments]]:
    moments: Dict[str, _Moments] = {name: _Moments() for name in norms}
    handles = [
        norm.register_forward_pre_hook(lambda _, args, name=name: moments[name].add(args[0]))
        for name, norm in norms.items()
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def revive_norms(model: nn.Module, batches: Iterable, forward: Callable[[Any], Any]) -> int:
    """Brings back the BatchNorms that were folded, with the statistics of a pass; the model does what it did.

    The weights stay folded. A BatchNorm behind a layer multiplies each of its output channels, and a weight
    has a range for each of them: so whoever folds it later multiplies ranges, and the integers stay the same.
    Those that did not learn (frozen ones) stay folded, and so do those that no batch reached.

    Args:
        model: Calibrated.
        batches: Those of calibration.
        forward: Called with each batch.

    Returns:
        int: How many are back.
    """
    norms = _folded(model)
    with _watched(norms) as moments:
        feed(model, batches, forward, lambda: [])
    mine = [(m.count, None if m.sums is None else m.sums.cpu()) for m in moments.values()]
    revived = 0
    for norm, seen in zip(norms.values(), zip(*from_all_ranks(mine))):
        count = sum(number for number, _ in seen)
        if count < 2:
            continue
        mean, square = sum(sums for number, sums in seen if number) / count
        device = _device_of(model)
        norm.revive(mean.float().to(device), (square - mean**2).clamp_min(0).float().to(device))
        revived += 1
    return revived


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def revive_norms_of(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Brings back the BatchNorms that a checkpoint of such a training has, before it is loaded.

    Args:
        model: Configured.
        state: The entries of the checkpoint.

    Returns:
        int: How many are back.
    """
    found = {n: norm for n, norm in _folded(model).items() if f'{n}.running_var' in state}
    for name, norm in found.items():
        device = _device_of(model)
        norm.revive(*(state[f'{name}.{key}'].to(device) for key in ('running_mean', 'running_var')))
    return len(found)


def fold_norms(model: nn.Module) -> None:
    """Folds the BatchNorms that are back, as whoever loads a checkpoint of the training does.

    Args:
        model: Calibrated.
    """
    live = [m for m in model.modules() if isinstance(m, FoldedNorm) and m.live]
    if not live:
        return
    state = copy.deepcopy(model.state_dict())
    for norm in live:
        norm.bury()
    model.load_state_dict(state, strict=False)
