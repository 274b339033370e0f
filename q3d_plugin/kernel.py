"""torch's own kernel of fake quantization: one pass over memory on CUDA, and gradients."""

from typing import Optional

import torch
from torch import Tensor

__all__ = ['fake_quantize', 'is_fast']


def is_fast(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's own kernel is the fast way on this kind of device.

    Args:
        device_type: Such as ``'cuda'``.
        dtype: Of the tensor. Older versions of torch do not take bfloat16 on CUDA.
    """
    return device_type == 'cuda' and dtype is not torch.bfloat16


def fake_quantize(x: Tensor, scale: Tensor, axis: Optional[int], low: int, high: int) -> Tensor:
    """Fake quantization by torch's own kernel, which has gradients.

    Args:
        x: Any shape, floating point.
        scale: The step, float32; a scalar tensor, or one number per index of ``axis``.
        axis: The axis that has steps of its own; None for one step for all.
        low: The smallest integer.
        high: The largest integer.
    """
    if axis is None:
        zero = torch.zeros((), dtype=torch.int32, device=x.device)
        return torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zero, low, high)
    # Zero points in floating point give the same numbers. Integers have torch look whether all of them are in
    # range, and the host waits for a CUDA device twice for that.
    scale = scale.reshape(-1)
    return torch.fake_quantize_per_channel_affine(x, scale, torch.zeros_like(scale), axis, low, high)
