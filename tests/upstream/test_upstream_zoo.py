"""A handful of OpenPCDet's own configs through the survey: set OPENPCDET_ROOT to a checkout."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set')

REPOSITORY = Path(__file__).resolve().parents[2]
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
def zoo():
    spec = importlib.util.spec_from_file_location('zoo_tool', REPOSITORY / 'tools' / 'zoo.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope='module')
def framework(zoo):
    return zoo.OpenPCDet(ROOT)


def test_all_configs_are_found(framework):
    configs = framework.configs()
    assert len(configs) >= 50 and not any('dataset_configs' in c for c in configs)


@pytest.mark.parametrize('config', WHOLE)
def test_off_is_float_in_every_layer(zoo, framework, config):
    row = zoo.in_process(framework, config, True, False, 300, 8)
    assert row.ours == '' and row.quant_build == ''
    assert row.layers == row.quantized and row.left == {}
    assert row.same and row.compared == row.comparable


@pytest.mark.parametrize('config', BUILT)
def test_what_builds_in_float_builds_quantized_and_loads(zoo, framework, config):
    row = zoo.in_process(framework, config, False, False, 300, 8)
    assert row.ours == '' and row.float_build == row.quant_build == ''
    assert row.layers == row.quantized and row.elements == row.quantized_elements
