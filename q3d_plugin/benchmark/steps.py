"""A training step of a model as a function, float or with quantization."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin.benchmark.subject import Subject
from q3d_plugin.recipe import RangesSpec
from q3d_plugin.training import QuantTraining

__all__ = ['qat_step_of', 'step_of']


@contextlib.contextmanager
def _training(model: nn.Module, decoding: Sequence[str]) -> Iterator[None]:
    """Training mode inside, with statistics of BatchNorm that stay as they are; afterwards as before.

    The flags of the detector and of its heads themselves stay down: in OpenPCDet they decide whether a loss
    is computed, which needs annotations.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
    model.train()
    for module in (model, *(m for m in model.modules() if any(hasattr(m, name) for name in decoding))):
        module.training = False
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
        model.zero_grad(set_to_none=True)


def step_of(
    model: nn.Module,
    forward: Callable[[Any], Dict[str, Tensor]],
    batch: Any,
    decoding: Sequence[str] = (),
    before: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """A training step as a function.

    Args:
        model: To train.
        forward: From a batch to the outputs of the head.
        batch: What is trained on.
        decoding: Names of the methods by which heads decode their outputs.
        before: Belongs to the step, and comes first.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        with _training(model, decoding):
            before()
            outputs = [o for o in forward(batch).values() if o.requires_grad]
            sum(o.float().square().mean() for o in outputs).backward()
            optimizer.step()

    return step


def qat_step_of(subject: Subject, ranges: RangesSpec) -> Tuple[nn.Module, Callable[[], None]]:
    """A copy of the quantized model, and a step of its training.

    Args:
        subject: Its model stays as it is.
        ranges: What happens to the ranges.
    """
    model = copy.deepcopy(subject.model)
    spec = dataclasses.replace(subject.recipe.training, ranges=ranges)
    training = QuantTraining(model, dataclasses.replace(subject.recipe, mode='qat', training=spec))
    forward, decoding = subject.adapter.forward_of(model), subject.adapter.decoding
    # Learned ranges are among the parameters by now.
    return model, step_of(model, forward, subject.inputs, decoding, lambda: training.before_step(0.0))
