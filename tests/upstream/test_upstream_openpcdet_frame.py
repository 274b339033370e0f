"""A frame with cameras through OpenPCDet's own nuScenes data set: set OPENPCDET_ROOT to a checkout."""

import os

import numpy as np
import pytest
import torch
from frame_toys import by_matrices, cut_image, pixels_of, recorded

from q3d_plugin.errors import Q3DError
from q3d_plugin.frameworks import open_adapter

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.usefixtures('spconv_without_mmdet3d'),
]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope='module')
def built():
    """The adapter, the config of BEVFusion and its float model with random weights."""
    adapter = open_adapter('openpcdet', ROOT)
    cfg = adapter.read(adapter.folder / 'nuscenes_models' / 'bevfusion.yaml')
    return adapter, cfg, adapter.build(cfg)


@pytest.fixture(scope='module')
def frame(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp('frame'))


def test_the_frame_is_what_the_data_set_makes_of_it(built, frame):
    adapter, cfg, model = built
    before = dict(cfg.DATA_CONFIG)
    batch = adapter.frame_batch(cfg, model, frame)
    assert dict(cfg.DATA_CONFIG) == before
    inside = (np.abs(frame.points[:, :2]) <= 54).all(1)
    points = batch['points'][:, 1:].numpy()
    assert len(points) == inside.sum() and 0 < adapter.voxels(batch) < len(points)
    order, other = np.lexsort(points.T), np.lexsort(frame.points[inside].T)
    np.testing.assert_array_equal(points[order], frame.points[inside][other])
    near = frame.points[:, :3].astype(float)
    for i, camera in enumerate(frame.cameras):
        expected = (cut_image(camera) / 255 - MEAN) / STD
        image = batch['camera_imgs'][0, i].numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(image, expected, atol=1e-4)
        mine, depth = pixels_of(camera, near)
        theirs = by_matrices(near, batch['lidar2image'][0, i], batch['img_aug_matrix'][0, i])
        np.testing.assert_allclose(theirs[depth > 1], mine[depth > 1], rtol=1e-3, atol=0.1)
        np.testing.assert_allclose(
            batch['camera2lidar'][0, i].numpy() @ camera.from_lidar, np.eye(4), atol=1e-4
        )
    assert torch.equal(batch['lidar_aug_matrix'][0], torch.eye(4))


def test_a_config_of_another_data_set_is_refused(built, frame):
    adapter, cfg, model = built
    other = adapter.read(adapter.folder / 'kitti_models' / 'pointpillar.yaml')
    other.MODEL.IMAGE_BACKBONE = {}
    with pytest.raises(Q3DError, match="DATASET is 'KittiDataset'"):
        adapter.frame_batch(other, model, frame)
