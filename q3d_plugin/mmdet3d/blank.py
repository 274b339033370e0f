"""A step of a test pipeline that takes one sensor away, to see how much a detector needs it."""

from typing import Any, Dict

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet3d.registry import TRANSFORMS

from q3d_plugin.errors import Q3DError

__all__ = ['BlankSensor']


@TRANSFORMS.register_module()
class BlankSensor(BaseTransform):
    """Blanks the cameras or the LiDAR of every frame.

    To stand before ``Pack3DDetInputs``. Images keep their number and size and become black; of the points the
    first one stays, because sparse encoders need one.

    Args:
        sensor (str): ``'cameras'``, ``'lidar'``, or ``'none'``, which changes nothing.

    Examples:
        In a config that inherits any other one::

            _base_ = './toy_bevfusion.py'
            _base_.test_dataloader.dataset.pipeline.insert(-1, dict(type='BlankSensor', sensor='cameras'))
    """

    def __init__(self, sensor: str = 'none') -> None:
        if sensor not in ('cameras', 'lidar', 'none'):
            raise Q3DError.at('BlankSensor.sensor', sensor, "'cameras', 'lidar' or 'none' would work")
        self.sensor = sensor

    def transform(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Blanks the sensor of one frame.

        Args:
            results: ``img``, an image or a list of images (H, W, 3); ``points`` (N, F).

        Raises:
            Q3DError: The frame has no such data.
        """
        key = {'cameras': 'img', 'lidar': 'points'}.get(self.sensor)
        if key is None:
            return results
        if results.get(key) is None:
            raise Q3DError(f'BlankSensor.sensor: {self.sensor!r} was given, but no {key!r} was loaded before')
        if key == 'points':
            results['points'] = results['points'][:1]
        elif isinstance(results['img'], list):
            results['img'] = [np.zeros_like(image) for image in results['img']]
        else:
            results['img'] = np.zeros_like(results['img'])
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(sensor={self.sensor!r})'
