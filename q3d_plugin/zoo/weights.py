"""Random weights and statistics that make a comparison of two models tell something."""

import math
from collections.abc import Mapping
from typing import List, Tuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from q3d_plugin.zoo.layers import compared_at, own_weights

__all__ = ['jitter', 'randomize', 'settle', 'spoil_idle']


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Gives every BatchNorm statistics and parameters of its own: the defaults fold to almost nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)


def settle(model: nn.Module) -> List:
    """Lets every BatchNorm take the statistics of the first tensor that it sees, but for a tenth, so that
    signals neither fade nor grow with depth.

    Returns:
        list: Handles, whose ``remove()`` ends it.
    """
    generator = torch.Generator().manual_seed(1)
    seen = set()

    def take(norm: _BatchNorm, args: Tuple) -> None:
        x = args[0]
        if norm in seen or not norm.track_running_stats or x.numel() < 2 * norm.num_features:
            return
        seen.add(norm)
        rows = x.detach().transpose(0, 1).reshape(x.shape[1], -1)
        var = rows.var(1).clamp(min=1e-4)
        near = torch.empty(2, len(var)).uniform_(-0.1, 0.1, generator=generator)
        norm.running_mean.copy_(rows.mean(1) + near[0] * var.sqrt())
        norm.running_var.copy_(var * (1 + near[1]))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [m.register_forward_pre_hook(take) for m in norms]


@torch.no_grad()
def spoil_idle(model: nn.Module, ran: Mapping) -> None:
    """Makes the weights NaN of quantized layers whose forward was not called.

    Where code reads such a weight past the layer's forward, which no quantizer would see, the outputs show
    it.

    Args:
        model: A quantized model with the weights loaded.
        ran: Names, as of :func:`~q3d_plugin.zoo.layers.comparable`, of what was called in the float model.
    """
    for name, place in compared_at(model).items():
        if place not in ran:
            for weight in own_weights(model.get_submodule(name)):
                weight.fill_(math.nan)


@torch.no_grad()
def jitter(model: nn.Module) -> None:
    """Changes the weights of ``model`` in their last bit, at random."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1 + 2**-23 * (2 * torch.rand(parameter.shape, generator=generator) - 1))
