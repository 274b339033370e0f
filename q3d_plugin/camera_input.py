"""The number and size of the camera images that a detector was calibrated with, which later ones must have.

Ranges of activations hold for the views and the size that calibration saw. Both are checked at every frame,
and travel with the quantized checkpoint.
"""

from collections.abc import Iterable
from typing import Optional

import torch
from torch import Tensor, nn

from q3d_plugin.errors import Q3DError
from q3d_plugin.quantizer import Quantizer

__all__ = ['CameraInput']


class CameraInput(nn.Module):
    """Holds the number and the size of the images of calibration, as a buffer of a detector.

    Args:
        advice: What to do where there are no images, as the end of a sentence.

    Examples:
        >>> camera = CameraInput('load')
        >>> camera.check(torch.zeros(1, 6, 3, 32, 88), [])
        >>> camera.check(None, [])
        Traceback (most recent call last):
        ...
        q3d_plugin.errors.Q3DError: camera images: the detector has an image backbone, the frame none: load
    """

    def __init__(self, advice: str) -> None:
        super().__init__()
        self._advice = advice
        # Views, height and width; zeros where no calibration saw images.
        self.register_buffer('_calibrated', torch.zeros(3, dtype=torch.int64))

    def check(self, images: Optional[Tensor], quantizers: Iterable[Quantizer]) -> None:
        """Takes note of the images while ranges are calibrated, and compares them with those afterwards.

        Args:
            images: (B, views, 3, height, width), or None.
            quantizers: Of the parts that images go through.

        Raises:
            Q3DError: There are no images, or others than in calibration.
        """
        if images is None:
            raise Q3DError(
                f'camera images: the detector has an image backbone, the frame none: {self._advice}'
            )
        given = [images.shape[1], *images.shape[-2:]]
        activations = [q for q in quantizers if not q.per_channel]
        observers = [q.observer for q in activations if q.observing]
        if observers and not any(observer.frames for observer in observers):
            self._calibrated.copy_(torch.tensor(given))
        elif not observers and not any(q.has_range and q.enabled for q in activations):
            return
        known = self._calibrated.tolist()
        if any(known) and known != given:
            words = ['{} of {} x {} pixels (height x width)'.format(*shape) for shape in (given, known)]
            raise Q3DError(
                f'camera images: {words[0]} were given, but the ranges were calibrated with {words[1]}; give '
                'such images, or calibrate the float checkpoint anew with these'
            )

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A float checkpoint has none, and that is no mistake.
        if prefix + '_calibrated' in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
