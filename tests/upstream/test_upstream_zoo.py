"""A handful of OpenPCDet's own configs through the survey: set OPENPCDET_ROOT to a checkout."""

import os

import pytest

from q3d_plugin.frameworks import open_adapter
from q3d_plugin.zoo.process import in_process

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set')

WHOLE = (
    'kitti_models/pointpillar.yaml',
    'kitti_models/second_multihead.yaml',
    'nuscenes_models/cbgs_pillar0075_res2d_centerpoint.yaml',
    'nuscenes_models/transfusion_lidar.yaml',
)
# What runs on the CPU of these is less; attention, point and second-stage parts are in them.
BUILT = (
    'kitti_models/PartA2.yaml',
    'kitti_models/pointrcnn.yaml',
    'kitti_models/pv_rcnn.yaml',
    'waymo_models/dsvt_voxel.yaml',
    'waymo_models/mppnet_4frames.yaml',
)


@pytest.fixture(scope='module')
def adapter():
    return open_adapter('openpcdet', ROOT)


def test_all_configs_are_found(adapter):
    configs = adapter.configs()
    assert len(configs) >= 50 and not any('dataset_configs' in c for c in configs)


@pytest.mark.parametrize('config', WHOLE)
def test_off_is_float_in_every_layer(adapter, config):
    row = in_process(adapter, config, True, False, 300, 8)
    assert row.ours == '' and row.quant_build == ''
    assert row.layers == row.quantized and row.left == {}
    assert row.same and row.compared == row.comparable


@pytest.mark.parametrize('config', BUILT)
def test_what_builds_in_float_builds_quantized_and_loads(adapter, config):
    row = in_process(adapter, config, False, False, 300, 8)
    assert row.ours == '' and row.float_build == row.quant_build == ''
    assert row.layers == row.quantized and row.elements == row.quantized_elements


def test_the_reason_of_a_config_without_its_base_names_no_folder_of_the_machine(adapter):
    row = in_process(adapter, 'custom_models/pv_rcnn.yaml', False, False, 300, 8)
    assert 'custom_dataset.yaml' in row.float_build and str(adapter.folder.parent) not in row.float_build
