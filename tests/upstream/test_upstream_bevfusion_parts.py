"""MMDetection3D's projects/BEVFusion: the double against it, and both full-size models on the real frame.

Set MMDET3D_ROOT to a checkout of MMDetection3D to run this.
"""

import copy
import importlib
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from full_size import choose_alike

ROOT = os.environ.get('MMDET3D_ROOT')
REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get('Q3D_SHARED', REPOSITORY.parent / 'shared'))
FRAME = SHARED / 'data' / 'nuscenes_frame'
CONFIGS = REPOSITORY / 'configs' / 'mmdet3d'
TYPES = ('BEVFusion', 'BEVFusionSparseEncoder', 'ConvFuser', 'DepthLSSTransform', 'GeneralizedLSSFPN')
METHODS = ('forward', 'get_cam_feats', 'extract_feat', 'predict', 'loss')
RECIPE = {'weight': {'calibrator': 'max'}, 'activation': {'calibrator': 'max'}}

pytest.importorskip('mmdet3d')
pytestmark = pytest.mark.skipif(
    not ROOT or not (Path(ROOT) / 'projects' / 'BEVFusion').is_dir(),
    reason='MMDET3D_ROOT is not set, or has no projects/BEVFusion',
)


@pytest.fixture(scope='module')
def toy():
    """The double, and small configs."""
    folder = str(REPOSITORY / 'tests' / 'mmdet3d')
    sys.path.insert(0, folder)
    try:
        return importlib.import_module('bevfusion_double')
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope='module')
def real(toy):
    """The real project, imported."""
    from q3d_plugin.mmdet3d.projects import import_bevfusion

    with toy.checkout(ROOT):
        yield import_bevfusion()


def built(toy, root, cfg, prepare=lambda model: None):
    """The model of a config with the types of a checkout, its signatures, and its raw outputs."""
    from mmdet3d.registry import MODELS

    from q3d_plugin.mmdet3d.projects import import_bevfusion

    with toy.checkout(root):
        import_bevfusion()
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(cfg)).eval()
        prepare(model)
        found = {
            f'{name}.{method}': list(inspect.signature(getattr(MODELS.get(name), method)).parameters)
            for name in TYPES
            for method in METHODS
            if hasattr(MODELS.get(name), method)
        }
        return model, found, toy.raw_outputs(model, toy.frame())


@pytest.mark.parametrize('name', ['resnet', 'swin', 'without_points', 'lidar'])
def test_the_double_is_what_the_real_types_are(toy, name):
    from q3d_plugin.zoo.weights import randomize

    cfg = {
        'lidar': toy.lidar_config,
        'without_points': lambda: toy.fusion_config('resnet', 'LSSTransform'),
    }.get(name, lambda: toy.fusion_config(name))()
    real, signatures, expected = built(toy, ROOT, cfg, randomize)
    state = real.state_dict()
    double, mine, got = built(toy, toy.DOUBLE, cfg, lambda m: m.load_state_dict(copy.deepcopy(state)))
    assert {k: v.shape for k, v in double.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert mine == signatures
    names = [name for name, _ in real.named_modules() if 'loss' not in name]
    assert set(names) <= {name for name, _ in double.named_modules()}
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['lidar', 'lidar-cam_swint', 'lidar-cam_r50'])
def test_shipped_configs_are_the_real_ones_with_quant_types(real, name):
    from mmengine.config import Config

    from q3d_plugin.mmdet3d.quant_types import take_quant_types

    (upstream,) = (Path(ROOT) / 'projects/BEVFusion/configs').glob(f'bevfusion_{name.split("_")[0]}_*.py')
    cfg, expected = (Config.fromfile(str(p)) for p in (CONFIGS / f'bevfusion_{name}_w8a8.py', upstream))
    changed = {'model', 'custom_hooks', 'custom_imports', 'recipe'}
    assert {k: v for k, v in cfg.items() if k not in changed} == {
        k: v for k, v in expected.items() if k not in changed
    }
    assert take_quant_types(cfg.model) == (9 if 'cam' in name else 5)
    parts = {k for k, v in cfg.model.items() if v != expected.model.get(k)}
    expected = {'lidar': set(), 'lidar-cam_swint': {'img_backbone'}}
    assert parts == expected.get(name, {'img_backbone', 'img_neck'})


@pytest.mark.slow
@pytest.mark.skipif(not FRAME.is_dir(), reason='the real nuScenes frame is not here')
@pytest.mark.parametrize(
    ('config', 'layers', 'operations'),
    [
        ('bevfusion_lidar-cam_r50_w8a8.py', 102, 29),
        ('bevfusion_lidar-cam_swint_w8a8.py', 101, 13),
        ('bevfusion_lidar_w8a8.py', 35, 9),
    ],
)
def test_full_size_on_the_real_frame(real, config, layers, operations):
    """Off is float at every layer, W8A8 runs after a calibration on the frame, and coverage is complete."""

    from q3d_plugin import lifecycle
    from q3d_plugin.coverage import NORMALIZATION, counted, coverage
    from q3d_plugin.frame import read_frame
    from q3d_plugin.mmdet3d.build import MMDet3D
    from q3d_plugin.recipe import Recipe
    from q3d_plugin.zoo import compare, weights
    from q3d_plugin.zoo.layers import comparable

    adapter = MMDet3D()
    cfg = adapter.read(CONFIGS / config)
    torch.manual_seed(0)
    reference, model = adapter.build(adapter.float_config(cfg)), adapter.build(cfg)
    lifecycle.configure(model, Recipe.from_dict(RECIPE))
    weights.randomize(reference)
    frame, names = adapter.frame_batch(cfg, reference, read_frame(str(FRAME))), comparable(model)
    if 'cam' in config:
        assert frame['inputs']['imgs'].shape == (1, 6, 3, 256, 704)
    handles = weights.settle(reference)
    choice = choose_alike(reference.bbox_head.heatmap_head, model.bbox_head.heatmap_head)
    expected, stopped = compare.record(adapter, reference, frame, names)
    for handle in handles:
        handle.remove()
    assert not stopped and set(expected) == set(names)
    state = copy.deepcopy(reference.state_dict())
    adapter.load(model, state)
    lifecycle.set_enabled(model, False)
    got, stopped = compare.record(adapter, model, frame, names)
    difference, where = compare.compare(expected, got)
    assert not stopped and difference < 1e-4, where
    for handle in choice:
        handle.remove()
    lifecycle.set_enabled(model, True)
    lifecycle.calibrate(model, [frame], lambda given: adapter.run(model, given))
    boxes = adapter.run(model, frame)[0].pred_instances_3d
    assert len(boxes.scores_3d) and boxes.scores_3d.isfinite().all()
    rows = coverage(model)
    left = [row for row in rows if not row.quantized and row.note != NORMALIZATION]
    assert all('float by default' in row.note for row in left)
    done = counted([(row.kind, row.note, row.quantized) for row in rows])
    assert (sum(done.layers), len(done.operations)) == (layers, operations) and all(done.operations)
    assert len(done.layers) - sum(done.layers) == 30 == sum(row.name.startswith('bbox_head') for row in left)
