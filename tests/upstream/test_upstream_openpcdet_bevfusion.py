"""OpenPCDet's bevfusion.yaml: full size on the real frame, and the double of its parts against it.

Set OPENPCDET_ROOT to a checkout of OpenPCDet to run this.
"""

import copy
import importlib
import inspect
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from full_size import choose_alike

ROOT = os.environ.get('OPENPCDET_ROOT')
REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get('Q3D_SHARED', REPOSITORY.parent / 'shared'))
FRAME = SHARED / 'data' / 'nuscenes_frame'
CONFIG = REPOSITORY / 'configs' / 'openpcdet' / 'bevfusion_w8a8.yaml'
RECIPE = {'weight': {'calibrator': 'max'}, 'activation': {'calibrator': 'max'}}
CONTRACT = {
    'models.detectors': ('BevFusion',),
    'models.backbones_image.img_neck': ('GeneralizedLSSFPN',),
    'models.view_transforms': ('DepthLSSTransform',),
    'models.backbones_2d.fuser': ('ConvFuser',),
    'models.dense_heads': ('TransFusionHead',),
    'models.dense_heads.transfusion_head': ('SeparateHead_Transfusion',),
    'models.model_utils.basic_block_2d': ('BasicBlock2D',),
    'models.model_utils.transfusion_utils': ('TransformerDecoderLayer', 'PositionEmbeddingLearned'),
}
PARTS = ('neck', 'vtransform', 'fuser', 'dense_head')

pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.usefixtures('spconv_without_mmdet3d'),
]


@pytest.fixture(scope='module')
def adapter():
    from q3d_plugin.frameworks import open_adapter

    return open_adapter('openpcdet', ROOT)


@pytest.fixture(scope='module')
def cfg(adapter):
    return adapter.read(CONFIG)


@pytest.fixture(scope='module')
def double():
    """The contract double under another name."""
    folder = str(REPOSITORY / 'tests' / 'openpcdet')
    sys.path.insert(0, folder)
    try:
        helpers = importlib.import_module('openpcdet_double')
    finally:
        sys.path.remove(folder)
    helpers.load_double('pcdet_double')
    yield
    for name in [n for n in sys.modules if n.split('.')[0] == 'pcdet_double']:
        del sys.modules[name]


def attribute(module, name):
    """A class of a module, or of the registry of a module."""
    loaded = importlib.import_module(module)
    registry = getattr(loaded, '__all__', None)
    return registry[name] if isinstance(registry, dict) else getattr(loaded, name)


def test_the_shipped_config_is_the_real_one_with_quant_types(adapter, cfg):
    expected = adapter.read(Path(ROOT) / 'tools' / 'cfgs' / 'nuscenes_models' / 'bevfusion.yaml')
    mine = adapter.float_config(cfg)
    for key in ('CLASS_NAMES', 'DATA_CONFIG', 'OPTIMIZATION'):
        assert mine[key] == expected[key]
    assert mine.MODEL.IMAGE_BACKBONE.pop('INIT_CFG') is None
    expected.MODEL.IMAGE_BACKBONE.pop('INIT_CFG')
    assert mine.MODEL == expected.MODEL
    named = [part.NAME for part in cfg.MODEL.values() if isinstance(part, dict) and 'NAME' in part]
    assert sum(name.startswith('Quant') for name in [cfg.MODEL.NAME, *named]) == 8


@pytest.mark.parametrize(('module', 'names'), CONTRACT.items())
def test_signatures_of_the_double_are_the_real_ones(adapter, double, module, names):
    for name in names:
        real, mine = (attribute(f'{package}.{module}', name) for package in ('pcdet', 'pcdet_double'))
        for method in ('forward', 'get_cam_feats', 'predict'):
            if hasattr(mine, method):
                theirs, ours = (list(inspect.signature(getattr(c, method)).parameters) for c in (real, mine))
                assert ours == theirs[: len(ours)]


def test_parts_of_the_double_have_the_real_weights_and_results(adapter, double, cfg):
    """Neck, fuser, head and the features of the view transform, full size, on small maps."""
    model_cfg = copy.deepcopy(adapter.float_config(cfg).MODEL)
    model_cfg.VTRANSFORM.update(DEPTHS=118, CELLS=4)
    classes = cfg.CLASS_NAMES
    head = dict(
        input_channels=512,
        num_class=len(classes),
        class_names=classes,
        grid_size=np.array([64, 64, 40]),
        point_cloud_range=np.array([-54.0, -54, -5, 54, 54, 3]),
        voxel_size=[0.075, 0.075, 0.2],
    )
    model_cfg.DENSE_HEAD.NUM_PROPOSALS = 6
    model_cfg.DENSE_HEAD.TARGET_ASSIGNER_CONFIG.DATASET = 'other'
    draw = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, c, 8 >> i, 12 >> i, generator=draw) for i, c in enumerate((192, 384, 768))]
    maps = [torch.randn(1, c, 8, 8, generator=draw) for c in (80, 256)]
    image, depth = torch.randn(1, 2, 256, 8, 12, generator=draw), torch.randn(1, 2, 1, 64, 96, generator=draw)
    feats = torch.randn(1, 512, 8, 8, generator=draw)
    run = {
        'neck': lambda part: part({'image_features': list(levels)})['image_fpn'],
        'vtransform': lambda part: [part.get_cam_feats(image, depth)],
        'fuser': lambda part: [
            part({'spatial_features_img': maps[0], 'spatial_features': maps[1]})['spatial_features']
        ],
        'dense_head': lambda part: [v for _, v in sorted(part.predict(feats).items())],
    }
    places = {
        'neck': ('models.backbones_image.img_neck', 'NECK'),
        'vtransform': ('models.view_transforms', 'VTRANSFORM'),
        'fuser': ('models.backbones_2d.fuser', 'FUSER'),
        'dense_head': ('models.dense_heads', 'DENSE_HEAD'),
    }
    for name, (module, section) in places.items():
        torch.manual_seed(0)
        more = head if name == 'dense_head' else {}
        types_ = [attribute(f'{p}.{module}', model_cfg[section].NAME) for p in ('pcdet', 'pcdet_double')]
        real, mine = (cls(model_cfg=model_cfg[section], **more).eval() for cls in types_)
        state = {k: v for k, v in real.state_dict().items() if k not in ('dx', 'bx', 'nx', 'frustum')}
        mine.load_state_dict(state, strict=True)
        with torch.no_grad():
            for got, expected in zip(run[name](mine), run[name](real)):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not FRAME.is_dir(), reason='the real nuScenes frame is not here')
def test_full_size_on_the_real_frame(adapter, cfg):
    """Off is float at every layer, W8A8 runs after a calibration on the frame, and coverage is complete."""
    from q3d_plugin import lifecycle
    from q3d_plugin.coverage import NORMALIZATION, counted, coverage
    from q3d_plugin.frame import read_frame
    from q3d_plugin.recipe import Recipe
    from q3d_plugin.zoo import compare, weights
    from q3d_plugin.zoo.layers import comparable

    torch.manual_seed(0)
    reference, model = adapter.build(adapter.float_config(cfg)), adapter.build(cfg)
    recipe = Recipe.from_dict(RECIPE)
    lifecycle.configure(model, recipe)
    weights.randomize(reference)
    frame, names = adapter.frame_batch(cfg, reference, read_frame(str(FRAME))), comparable(model)
    assert frame['camera_imgs'].shape == (1, 6, 3, 256, 704)
    handles = weights.settle(reference)
    choice = choose_alike(reference.dense_head.heatmap_head, model.dense_head.heatmap_head)
    expected, stopped = compare.record(adapter, reference, frame, names)
    for handle in handles:
        handle.remove()
    assert not stopped and set(expected) == set(names)
    adapter.load(model, copy.deepcopy(reference.state_dict()))
    lifecycle.configure(model, recipe)
    lifecycle.set_enabled(model, False)
    got, stopped = compare.record(adapter, model, frame, names)
    difference, where = compare.compare(expected, got)
    assert not stopped and difference < 1e-4, where
    for handle in choice:
        handle.remove()
    lifecycle.set_enabled(model, True)
    lifecycle.calibrate(model, [frame], lambda given: adapter.run(model, given))
    boxes = adapter.run(model, frame)[0][0]
    assert len(boxes['pred_scores']) and boxes['pred_scores'].isfinite().all()
    rows = coverage(model)
    left = [row for row in rows if not row.quantized and row.note != NORMALIZATION]
    assert all('float by default' in row.note for row in left)
    done = counted([(row.kind, row.note, row.quantized) for row in rows])
    assert (sum(done.layers), len(done.operations)) == (101, 13) and all(done.operations)
    assert len(done.layers) - sum(done.layers) == 30 == sum(row.name.startswith('dense_head') for row in left)
