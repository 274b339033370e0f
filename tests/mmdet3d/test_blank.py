"""A sensor that is blanked: black images of the same sizes, one point, and nothing else."""

import numpy as np
import pytest
import torch
from mmdet3d.registry import TRANSFORMS
from mmdet3d.structures import LiDARPoints

from q3d_plugin.errors import Q3DError


def frame():
    images = [np.full((4, 6, 3), 7.0, np.float32), np.full((4, 6, 3), 9.0, np.float32)]
    return {'img': images, 'points': LiDARPoints(torch.arange(20.0).view(4, 5), points_dim=5), 'other': 3}


def blank(sensor, results):
    return TRANSFORMS.build(dict(type='BlankSensor', sensor=sensor))(results)


def test_cameras():
    out = blank('cameras', frame())
    assert [i.shape for i in out['img']] == [(4, 6, 3)] * 2
    assert all(i.dtype == np.float32 and not i.any() for i in out['img'])
    assert torch.equal(out['points'].tensor, frame()['points'].tensor) and out['other'] == 3


def test_one_camera():
    out = blank('cameras', {'img': np.ones((2, 2, 3), np.uint8)})
    assert out['img'].dtype == np.uint8 and out['img'].shape == (2, 2, 3) and not out['img'].any()


def test_lidar():
    out = blank('lidar', frame())
    assert isinstance(out['points'], LiDARPoints)
    assert torch.equal(out['points'].tensor, torch.arange(5.0)[None])
    assert all(np.array_equal(a, b) for a, b in zip(out['img'], frame()['img']))


def test_none():
    results = frame()
    before = dict(results)
    out = TRANSFORMS.build(dict(type='BlankSensor'))(results)
    assert out is results and all(out[key] is value for key, value in before.items())


def test_a_sensor_that_is_not_there():
    with pytest.raises(Q3DError, match="'camera' was given; 'cameras', 'lidar' or 'none' would work"):
        blank('camera', frame())
    with pytest.raises(Q3DError, match="'cameras' was given, but no 'img' was loaded before"):
        blank('cameras', {'points': frame()['points']})
