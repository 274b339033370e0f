"""The three transforms of torchvision that OpenPCDet's data sets prepare camera images with.

They stand in for it where torchvision does not import; the names and the arithmetic are torchvision's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ['TRANSFORMS', 'Compose', 'Normalize', 'ToTensor']


class Compose:
    """Several transforms, one after the other.

    Args:
        transforms: Each takes what the one before it returns.
    """

    def __init__(self, transforms: Sequence[Callable]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    """An image of bytes as a tensor: (H, W, C), or a PIL image, from 0 to 255, to (C, H, W) from 0 to 1."""

    def __call__(self, image: Any) -> Tensor:
        pixels = np.array(image, dtype=np.uint8, copy=True)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


class Normalize:
    """Subtracts a mean and divides by a deviation, channel by channel.

    Args:
        mean: One number a channel.
        std: One number a channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (torch.tensor(list(v), dtype=image.dtype)[:, None, None] for v in (self.mean, self.std))
        return (image - mean) / std


TRANSFORMS = {'Compose': Compose, 'Normalize': Normalize, 'ToTensor': ToTensor}
"""What of ``torchvision.transforms`` there is, by name."""
