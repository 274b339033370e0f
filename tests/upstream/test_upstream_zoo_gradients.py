"""Training steps of OpenPCDet's own detectors, quantized: set OPENPCDET_ROOT to a checkout."""

import os

import pytest
from zoo_gradients import check_config

from q3d_plugin.frameworks import open_adapter

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.usefixtures('spconv_without_mmdet3d'),
]
CONFIGS = (
    'kitti_models/pointpillar.yaml',
    'kitti_models/second.yaml',
    'kitti_models/second_multihead.yaml',
    'nuscenes_models/cbgs_pillar0075_res2d_centerpoint.yaml',
    'nuscenes_models/cbgs_voxel0075_res3d_centerpoint.yaml',
    'nuscenes_models/transfusion_lidar.yaml',
)


@pytest.mark.slow
@pytest.mark.parametrize('config', CONFIGS)
def test_every_parameter_gets_a_finite_gradient(config):
    check_config(open_adapter('openpcdet', ROOT), config, 'log2')


@pytest.mark.slow
def test_every_parameter_gets_a_finite_gradient_with_amp():
    check_config(open_adapter('openpcdet', ROOT), CONFIGS[0], 'linear', half=True)
