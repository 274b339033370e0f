"""Smoothing of a layer's input at run time (SmoothQuant), where no layer before it has taken the scales."""

import math
from collections.abc import Callable
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from q3d_plugin import numerics
from q3d_plugin.recipe import SmoothSpec

__all__ = ['SmoothedInput']


class SmoothedInput(nn.Module):
    """The part of a layer with a weight that multiplies its input before it is quantized.

    Three buffers are kept, only where the recipe asks for smoothing: ``smooth_alpha`` (NaN: not smoothed);
    ``smooth_scale`` (static), the factors of the input; ``smooth_weight`` (dynamic), the largest magnitude of
    the weight per input channel.
    """

    smooth_spec: Optional[SmoothSpec] = None
    """How the recipe has the input smoothed; None where it has not."""
    smooth_note: str = ''
    """Where the scales went, for the coverage table."""
    smooth_producers: Tuple[str, ...] = ()
    """The layers that have the inverse scales in their weights."""
    _smoothing = False

    def _once(self, what: str, x: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        group = self.input_group
        return compute(x) if group is None else group.once((what, self.smooth_spec), x, compute)

    def _scaled(self, x: Tensor) -> Tensor:
        if self.smooth_spec.mode == 'dynamic':
            return self._once('dynamic', x, self._smoothed_dynamically)[0]
        return self._once('static', x, lambda x: self._times(x, self.smooth_scale))

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.channel_axis(x)] = -1
        return x * factor.to(x.dtype).reshape(shape)

    def _smoothed_dynamically(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The input divided by scales of its own, and the scales."""
        largest = numerics.channel_amax(x.detach(), self.channel_axis(x)).float()
        scale = numerics.smoothing_scale(largest, self.smooth_weight, self.smooth_alpha)
        return self._times(x, 1 / scale), scale

    def _plan_smoothing(self, spec: Optional[SmoothSpec]) -> None:
        """Gives the layer the buffers that ``spec`` needs; at first they change nothing."""
        for name in ('smooth_alpha', 'smooth_scale', 'smooth_weight'):
            self._buffers.pop(name, None)
        self.smooth_spec, self.smooth_note, self.smooth_producers, self._smoothing = spec, '', (), False
        if spec is not None:
            device = self.weight.device
            self.register_buffer('smooth_alpha', torch.full((), math.nan, device=device))
            name = 'smooth_scale' if spec.mode == 'static' else 'smooth_weight'
            self.register_buffer(name, torch.ones(self.input_channels, device=device))

    @property
    def smoothing(self) -> bool:
        """Whether the input is multiplied before it is quantized, because no layer before does it."""
        return self._smoothing

    def refresh_smoothing(self) -> None:
        """Looks whether the buffers ask for anything: scales of one cost nothing."""
        spec = self.smooth_spec
        if spec is None:
            self._smoothing = False
        elif spec.mode == 'static':
            self._smoothing = bool((self.smooth_scale != 1).any())
        else:
            self._smoothing = not bool(self.smooth_alpha.isnan())

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)
        if self.smooth_spec is not None:
            # A float checkpoint has no scales, and that is no mistake.
            for name in ('smooth_alpha', 'smooth_scale', 'smooth_weight'):
                if prefix + name in missing_keys:
                    missing_keys.remove(prefix + name)
            self.refresh_smoothing()
