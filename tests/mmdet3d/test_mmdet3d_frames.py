"""Frames with cameras for detectors of MMDetection3D: by the config's own pipeline, and generated ones."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip('mmdet3d')
pytest.importorskip('cv2')

import cv2
from mmdet3d.utils import register_all_modules
from mmengine.config import Config

from q3d_plugin.errors import Q3DError
from q3d_plugin.frame import Camera, Frame
from q3d_plugin.mmdet3d.build import MMDet3D
from q3d_plugin.mmdet3d.frames import frame_inputs, packed_keys
from q3d_plugin.mmdet3d.synthetic import synthetic_frame

CAMERAS = [
    dict(type='LoadMultiViewImageFromFiles', to_float32=True, num_views=2),
    dict(type='LoadPointsFromFile', coord_type='LIDAR', load_dim=5, use_dim=5),
    dict(type='LoadPointsFromMultiSweeps', sweeps_num=9, load_dim=5, use_dim=5, pad_empty_sweeps=True),
]
PACK = dict(type='Pack3DDetInputs', keys=['points', 'img'], meta_keys=['lidar2cam', 'cam2img', 'box_type_3d'])


@pytest.fixture(autouse=True)
def _scope():
    register_all_modules()


def config(pipeline):
    return Config(dict(model=dict(), test_dataloader=dict(dataset=dict(pipeline=pipeline))))


@pytest.fixture
def frame(tmp_path):
    """Twenty points and two images of 32 x 48 pixels."""
    rng = np.random.default_rng(0)
    points = rng.uniform(2, 20, (20, 5)).astype(np.float32)
    (tmp_path / 'f.bin').write_bytes(points.tobytes())
    cameras = []
    for i in range(2):
        image, from_lidar = tmp_path / f'{i}.png', np.eye(4)
        cv2.imwrite(str(image), rng.integers(0, 256, (32, 48, 3)).astype(np.uint8))
        from_lidar[:3, 3] = i
        cameras.append(Camera(f'CAM_{i}', image, np.diag([30.0 + i, 30.0, 1.0]), from_lidar))
    return Frame(points, tmp_path / 'f.bin', tuple(cameras))


def test_the_pipeline_gets_points_images_and_matrices_of_the_frame(frame):
    made = frame_inputs(config([*CAMERAS, PACK]), frame)
    (points,), (images,) = made['inputs']['points'], made['inputs']['img']
    # Once each, although the config asks for sweeps and pads those that are not there.
    assert torch.equal(points[:, :4], torch.from_numpy(frame.points[:, :4])) and not points[:, 4].any()
    info = made['data_samples'][0].metainfo
    assert images.shape == (2, 3, 32, 48)
    for i, camera in enumerate(frame.cameras):
        assert np.array_equal(images[i].numpy().transpose(1, 2, 0), cv2.imread(str(camera.image)))
        np.testing.assert_allclose(info['cam2img'][i], camera.intrinsic)
        np.testing.assert_allclose(info['lidar2cam'][i], camera.from_lidar)


def test_images_are_read_where_a_step_loads_them():
    assert packed_keys(config([*CAMERAS, PACK])) == {'points', 'img'}
    assert packed_keys(config([*CAMERAS[1:], PACK])) == {'points'}


def test_what_a_frame_cannot_give_is_named(frame):
    points_alone, mine = Frame(frame.points, frame.lidar), MMDet3D()
    with pytest.raises(Q3DError, match='points alone, and the model of the config reads images'):
        mine.frame_batch(config([*CAMERAS, PACK]), nn.Identity(), points_alone)
    with pytest.raises(Q3DError, match='image of one camera'):
        frame_inputs(config([dict(type='LoadImageFromFile'), *CAMERAS[1:], PACK]), frame)


class Fusion(nn.Module):
    """What the generated frame asks a model for."""

    def __init__(self, view_transform):
        super().__init__()
        self.data_preprocessor, self.view_transform = nn.Identity(), view_transform


def test_a_generated_frame_has_a_ring_of_cameras_for_a_view_transform():
    steps = [*CAMERAS, dict(type='ImageAug3D', final_dim=[64, 176]), PACK]
    made = synthetic_frame(config(steps), Fusion(nn.Identity()))
    info = made['data_samples'][0].metainfo
    assert made['inputs']['img'][0].shape == (6, 3, 64, 176) and info['img_shape'] == (64, 176)
    for key in ('lidar2img', 'cam2img', 'cam2lidar', 'img_aug_matrix'):
        assert np.shape(info[key]) == (6, 4, 4), key
    assert np.shape(info['lidar_aug_matrix']) == (4, 4)
    np.testing.assert_allclose(
        info['lidar2img'], info['cam2img'] @ np.linalg.inv(info['cam2lidar']), rtol=1e-4, atol=1e-3
    )
    assert synthetic_frame(config(steps), Fusion(None))['inputs']['img'][0].shape[0] == 5
