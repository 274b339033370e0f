"""Training steps of MMDetection3D's own detectors, quantized: what learns in float does so quantized."""

import os

import pytest
from zoo_gradients import check_config

from q3d_plugin.frameworks import open_adapter

# The configs come with the wheel; they take minutes, as all that is tested with a checkout.
pytestmark = pytest.mark.skipif(not os.environ.get('MMDET3D_ROOT'), reason='MMDET3D_ROOT is not set')

CONFIGS = (
    'pointpillars/pointpillars_hv_secfpn_8xb6-160e_kitti-3d-car.py',
    'second/second_hv_secfpn_8xb6-80e_kitti-3d-car.py',
    'centerpoint/centerpoint_voxel01_second_secfpn_8xb4-cyclic-20e_nus-3d.py',
    'centerpoint/centerpoint_pillar02_second_secfpn_8xb4-cyclic-20e_nus-3d.py',
)


@pytest.mark.slow
@pytest.mark.parametrize('config', CONFIGS)
def test_every_parameter_gets_a_finite_gradient(config):
    check_config(open_adapter('mmdet3d', None), config, 'log2')


@pytest.mark.slow
def test_every_parameter_gets_a_finite_gradient_with_amp():
    check_config(open_adapter('mmdet3d', None), CONFIGS[0], 'linear', half=True)
