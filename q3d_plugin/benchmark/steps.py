"""A training step of a model as a function, float or with quantization."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import List, Tuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin.benchmark.subject import Subject
from q3d_plugin.recipe import RangesSpec
from q3d_plugin.training import QuantTraining

__all__ = ['qat_step_of', 'step_of']


@contextlib.contextmanager
def _training(model: nn.Module, still: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Training mode inside, with statistics of BatchNorm that stay as they are; afterwards as before.

    Args:
        model: To train.
        still: Modules whose own flag stays down.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    modes, momenta = {m: m.training for m in model.modules()}, [m.momentum for m in norms]
    model.train()
    for module in still:
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
    subject: Subject, model: nn.Module, before: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """A training step as a function.

    Its loss is the detector's own where the subject has an annotated frame, and else the mean square of all
    outputs of the head. Then the flags of the detector and of its heads themselves stay down: in OpenPCDet
    they decide whether a loss is computed, which needs annotations.

    Args:
        subject: Has the frame.
        model: To train.
        before: Belongs to the step, and comes first.
    """
    adapter, annotated = subject.adapter, subject.annotated
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if annotated is not None:
        still: List[nn.Module] = []

        def loss() -> Tensor:
            return adapter.loss(model, annotated)
    else:
        forward = adapter.forward_of(model)
        still = [model, *adapter.heads_of(model)]

        def loss() -> Tensor:
            outputs = [o for o in forward(subject.inputs).values() if o.requires_grad]
            return sum(o.float().square().mean() for o in outputs)

    def step() -> None:
        with _training(model, still):
            before()
            loss().backward()
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
    # Learned ranges are among the parameters by now.
    return model, step_of(subject, model, lambda: training.before_step(0.0))
