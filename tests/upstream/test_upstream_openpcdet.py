"""The adapter on the real OpenPCDet, of which nothing is changed: set OPENPCDET_ROOT to a checkout."""

import contextlib
import copy
import importlib
import inspect
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.usefixtures('spconv_without_mmdet3d'),
]

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / 'configs' / 'openpcdet'
SHARED = Path(os.environ.get('Q3D_SHARED', REPOSITORY.parent / 'shared'))
FULL_SIZE = 'cbgs_voxel0075_res3d_centerpoint'
BASES = {
    f'{FULL_SIZE}_w8a8.yaml': f'cfgs/nuscenes_models/{FULL_SIZE}.yaml',
    'waymo_centerpoint_w8a8.yaml': 'cfgs/waymo_models/centerpoint.yaml',
    'toy_centerpoint_voxel_w8a8.yaml': CONFIGS / 'toy_centerpoint_voxel.yaml',
    'toy_centerpoint_pillar_w8a8.yaml': CONFIGS / 'toy_centerpoint_pillar.yaml',
}
# Where the double and the real package must agree: module -> names.
CONTRACT = {
    'config': ('cfg_from_yaml_file', 'cfg_from_list', 'merge_new_config'),
    'utils.common_utils': ('create_logger',),
    'utils.spconv_utils': ('find_all_spconv_keys', 'replace_feature'),
    'datasets': ('build_dataloader', 'DatasetTemplate', 'NuScenesDataset'),
    'models': ('build_network', 'load_data_to_gpu', 'model_fn_decorator'),
    'models.detectors': ('build_detector', 'Detector3DTemplate', 'CenterPoint', 'SECONDNet'),
    'models.backbones_3d': ('VoxelResBackBone8x',),
    'models.backbones_3d.spconv_backbone': ('SparseBasicBlock',),
    'models.backbones_3d.vfe': ('MeanVFE',),
    'models.backbones_2d': ('BaseBEVBackbone',),
    'models.backbones_2d.map_to_bev': ('HeightCompression',),
    'models.dense_heads': ('CenterHead', 'AnchorHeadSingle'),
    'models.dense_heads.center_head': ('SeparateHead',),
}
METHODS = ('__init__', 'forward', 'load_params_from_file', 'load_params_with_optimizer', '_load_state_dict')


@pytest.fixture(scope='module')
def upstream():
    """The real package with the adapter registered, its configs' folder as the current one."""
    from q3d_plugin import openpcdet

    before = Path.cwd()
    pcdet = openpcdet.register(ROOT)
    os.chdir(Path(ROOT) / 'tools')
    yield pcdet
    os.chdir(before)


@pytest.fixture(scope='module')
def double():
    """The contract double, under another name beside the real package; and its helpers."""
    folder = str(REPOSITORY / 'tests' / 'openpcdet')
    sys.path.insert(0, folder)
    try:
        helpers = importlib.import_module('openpcdet_double')
    finally:
        sys.path.remove(folder)
    helpers.load_double('pcdet_double')
    yield helpers
    for name in [n for n in sys.modules if n.split('.')[0] == 'pcdet_double']:
        del sys.modules[name]


def load_config(path):
    from easydict import EasyDict
    from pcdet.config import cfg_from_yaml_file

    return cfg_from_yaml_file(str(path), EasyDict())


def build(cfg, folder):
    """The detector of a config on a data set without frames."""
    from pcdet.datasets import build_dataloader
    from pcdet.models import build_network

    cfg = copy.deepcopy(cfg)
    cfg.DATA_CONFIG.DATA_PATH = str(folder)
    logger = logging.getLogger('upstream')
    dataset, _, _ = build_dataloader(
        cfg.DATA_CONFIG, cfg.CLASS_NAMES, 1, False, workers=0, logger=logger, training=False
    )
    return build_network(model_cfg=cfg.MODEL, num_class=len(cfg.CLASS_NAMES), dataset=dataset).eval()


def frame(detector):
    """The real nuScenes frame where it is there, else a made-up one, as a batch."""
    from pcdet.models import load_data_to_gpu

    files = sorted((SHARED / 'data' / 'nuscenes_frame').glob('*LIDAR_TOP*.pcd.bin'))
    if files:
        points = np.fromfile(files[0], np.float32).reshape(-1, 5).copy()
        points[:, 4] = 0
    else:
        draw = np.random.default_rng(0)
        spread = draw.normal(size=(20000, 3)) * [20, 20, 0.6]
        points = np.concatenate([spread, draw.uniform(0, 255, (20000, 1)), np.zeros((20000, 1))], 1)
    np.random.seed(0)
    item = detector.dataset.prepare_data({'points': points.astype(np.float32), 'frame_id': 'frame'})
    batch = detector.dataset.collate_batch([item])
    load_data_to_gpu(batch)
    return batch


def raw_outputs(detector):
    """What the head predicts for :func:`frame` before boxes are decoded."""
    with torch.no_grad():
        batch = frame(detector)
        for module in detector.module_list[:-1]:
            batch = module(batch)
        head = detector.dense_head
        shared = head.shared_conv(batch['spatial_features_2d'])
        return {f'{i}.{k}': v for i, h in enumerate(head.heads_list) for k, v in h(shared).items()}


def parameters(function):
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values() if p.name != '_unused']


def test_the_double_has_the_names_and_signatures_of_the_real_package(upstream, double):
    for module, names in CONTRACT.items():
        real, mine = (importlib.import_module(f'{p}.{module}') for p in ('pcdet', 'pcdet_double'))
        for name in names:
            a, b = getattr(real, name), getattr(mine, name)
            if inspect.isfunction(a):
                assert parameters(a) == parameters(b), f'{module}.{name}'
                continue
            for method in METHODS:
                if method in vars(b) and name not in ('NuScenesDataset', 'AnchorHeadSingle'):
                    ours, theirs = parameters(getattr(b, method)), parameters(getattr(a, method))
                    # A module that takes **kwargs takes what the real one names.
                    if ours[-1][1] is inspect.Parameter.VAR_KEYWORD:
                        ours, theirs = ours[:-1], theirs[: len(ours) - 1]
                    assert [n for n, _ in ours] == [n for n, _ in theirs], f'{module}.{name}.{method}'
        if '__all__' in vars(mine):
            assert {k for k in mine.__all__} <= set(real.__all__)
    for name in ('DatasetTemplate', 'NuScenesDataset'):
        real, mine = (importlib.import_module(f'{p}.datasets') for p in ('pcdet', 'pcdet_double'))
        a, b = (inspect.signature(getattr(m, name).__init__).parameters for m in (real, mine))
        assert list(a) == list(b)


def test_the_double_has_the_layers_of_the_real_package(upstream, double):
    from easydict import EasyDict

    cfg = load_config(CONFIGS / 'toy_centerpoint_voxel.yaml')
    grid, keys = np.array([512, 512, 40]), {}
    for package in ('pcdet', 'pcdet_double'):
        models = f'{package}.models'
        parts = [
            importlib.import_module(f'{models}.backbones_3d')
            .__all__['VoxelResBackBone8x'](EasyDict(cfg.MODEL.BACKBONE_3D), 5, grid)
            .state_dict(),
            importlib.import_module(f'{models}.backbones_2d')
            .__all__['BaseBEVBackbone'](cfg.MODEL.BACKBONE_2D, 256)
            .state_dict(),
            importlib.import_module(f'{models}.dense_heads')
            .__all__['CenterHead'](
                cfg.MODEL.DENSE_HEAD, 80, 10, cfg.CLASS_NAMES, grid, [0] * 6, [1] * 3, False
            )
            .state_dict(),
        ]
        keys[package] = [{k: tuple(v.shape) for k, v in part.items()} for part in parts]
    assert keys['pcdet'] == keys['pcdet_double']


def test_the_double_loads_as_the_real_package_does(upstream, double):
    """Unknown keys are dropped, spconv 1.x is permuted, a missing key is an error where it is strict."""
    import spconv.pytorch as spconv

    for package in ('pcdet', 'pcdet_double'):
        template = importlib.import_module(f'{package}.models.detectors').__all__['Detector3DTemplate']

        class Detector(torch.nn.Module):
            _load_state_dict = template._load_state_dict

            def __init__(self):
                super().__init__()
                self.sparse = spconv.SparseSequential(spconv.SubMConv3d(2, 5, 3, bias=False))
                self.dense = torch.nn.Linear(2, 2)

        model = Detector()
        utils = importlib.import_module(f'{package}.utils.spconv_utils')
        assert utils.find_all_spconv_keys(model) == {'sparse.0.weight'}
        old = torch.randn(3, 3, 3, 2, 5)
        state = {'sparse.0.weight': old, 'dense.bias': torch.ones(2), 'unknown': torch.zeros(1)}
        _, update = model._load_state_dict({**state, 'dense.weight': torch.zeros(9)}, strict=False)
        assert set(update) == {'sparse.0.weight', 'dense.bias'}
        assert torch.equal(model.sparse[0].weight, old.permute(4, 0, 1, 2, 3))
        with pytest.raises(RuntimeError, match=r'dense\.weight'):
            model._load_state_dict(state, strict=True)


def test_the_double_merges_configs_as_the_real_package_does(upstream, double, tmp_path):
    from easydict import EasyDict

    (tmp_path / 'base.yaml').write_text('A: {_BASE_CONFIG_: nothing.yaml, B: 1, L: [1, 2]}\nC: 3\n')
    text = f'_BASE_CONFIG_: {tmp_path / "base.yaml"}\nA: {{B: 2, D: {{E: 5}}}}\n'
    (tmp_path / 'x.yaml').write_text(text)
    made = []
    for package in ('pcdet', 'pcdet_double'):
        config = importlib.import_module(f'{package}.config')
        cfg = config.cfg_from_yaml_file(str(tmp_path / 'x.yaml'), EasyDict())
        config.cfg_from_list(['A.D.E', '7', 'C', '4'], cfg)
        with pytest.raises(AssertionError):
            config.cfg_from_list(['A.X', '7'], cfg)
        made.append(cfg)
    assert made[0] == made[1] and made[0].A.B == 2 and made[0].A.D.E == 7


def test_every_type_of_the_table_is_registered(upstream):
    from q3d_plugin.openpcdet.parts import BLOCKS, PARTS
    from q3d_plugin.openpcdet.registries import registry_of

    for part in PARTS:
        registry = registry_of(part.section)
        assert issubclass(registry[f'Quant{part.base}'], registry[part.base]), part
        if part.mixin is not None and 'forward' in vars(part.mixin):
            a, b = (inspect.signature(c.forward).parameters for c in (part.mixin, registry[part.base]))
            assert list(a) == list(b)
    assert len(BLOCKS) == 9


@pytest.mark.parametrize('name', BASES)
def test_our_configs_are_their_bases_with_quant_names(upstream, name):
    from q3d_plugin.openpcdet.recipe import check_config_file

    check_config_file(CONFIGS / name)
    base, mine = load_config(BASES[name]), load_config(CONFIGS / name)
    assert mine.MODEL.pop('QUANT').MODE == 'ptq'
    mine.pop('_BASE_CONFIG_', None)
    changed = 0
    for section in (mine.MODEL, *mine.MODEL.values()):
        if isinstance(section, dict) and str(section.get('NAME')).startswith('Quant'):
            section.NAME, changed = section.NAME[len('Quant') :], changed + 1
    assert changed == 4 and mine == base


@contextlib.contextmanager
def quick_checkpoint(detector, folder):
    """A float checkpoint file of a detector with random BatchNorms."""
    path = folder / 'float.pth'
    torch.save({'model_state': detector.state_dict(), 'epoch': 20, 'version': 'pcdet+0.6.0'}, path)
    yield str(path)
    path.unlink()


def test_full_size_off_is_float_and_w8a8_runs(upstream, double, tmp_path, monkeypatch):
    from q3d_plugin.coverage import coverage
    from q3d_plugin.openpcdet import detector as adapter

    cfg = load_config(CONFIGS / f'{FULL_SIZE}_w8a8.yaml')
    plain = load_config(f'cfgs/nuscenes_models/{FULL_SIZE}.yaml')
    torch.manual_seed(0)
    reference = double.randomize(build(plain, tmp_path))
    expected = raw_outputs(reference)
    logger = logging.getLogger('upstream')
    with quick_checkpoint(reference, tmp_path) as path:
        off = copy.deepcopy(cfg)
        off.MODEL.QUANT.MODE = 'float'
        model = build(off, tmp_path)
        model.load_params_from_file(path, logger)
        for name, value in raw_outputs(model).items():
            error = (value - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-4, name
        model = build(cfg, tmp_path)
        model.load_params_from_file(path, logger)
    # There is no data set here: the one frame is the calibration set.
    monkeypatch.setattr(adapter, 'calibration_loader', lambda *args: ([frame(model)], 1))
    with torch.no_grad():
        boxes, _ = model(frame(model))
    assert boxes[0]['pred_boxes'].shape[1] == 9
    rows = coverage(model)
    # The config leaves the first layer float, and says so.
    floats = {r.name: r.note for r in rows if not r.quantized}
    assert floats == {'backbone_3d.conv_input.0': "skipped by 'backbone_3d.conv_input'"}
    kinds = {kind: sum(r.kind == kind for r in rows) for kind in {r.kind for r in rows}}
    # The study's detector: 8 residual blocks, 12 and 2 convolutions in 2D, 6 heads of 6 branches of two.
    assert kinds == {
        'SubMConv3d': 17,
        'SparseConv3d': 4,
        'Conv2d': 12 + 1 + 72,
        'ConvTranspose2d': 2,
        'Add': 8,
        'Concat': 1,
    }
    got = raw_outputs(model)
    errors = [((got[k] - v).norm() / v.norm()).item() for k, v in expected.items()]
    assert 1e-3 < max(errors) < 0.5


def test_full_size_off_is_float_after_smoothing(upstream, double, tmp_path, monkeypatch):
    from easydict import EasyDict

    from q3d_plugin import lifecycle
    from q3d_plugin.coverage import coverage
    from q3d_plugin.openpcdet import detector as adapter

    plain = load_config(f'cfgs/nuscenes_models/{FULL_SIZE}.yaml')
    torch.manual_seed(0)
    reference = double.randomize(build(plain, tmp_path))
    expected = raw_outputs(reference)
    with quick_checkpoint(reference, tmp_path) as path:
        for alpha, mode in ((0.0, 'static'), (0.5, 'static'), (1.0, 'static'), (0.5, 'dynamic')):
            cfg = load_config(CONFIGS / f'{FULL_SIZE}_w8a8.yaml')
            # No engine has scales from the running input.
            cfg.MODEL.QUANT.TARGET = 'simulation'
            cfg.MODEL.QUANT.SMOOTHQUANT = EasyDict(ALPHA=alpha, MODE=mode)
            model = build(cfg, tmp_path)
            model.load_params_from_file(path, logging.getLogger('upstream'))
            monkeypatch.setattr(adapter, 'calibration_loader', lambda *args, m=model: ([frame(m)], 1))
            with torch.no_grad():
                model(frame(model))
            smoothed = [r.smoothquant for r in coverage(model) if r.smoothquant]
            # All but the first layer, which the config leaves float.
            assert len(smoothed) == 107 and all(r['alpha'] == alpha for r in smoothed)
            lifecycle.set_enabled(model, False)
            for name, value in raw_outputs(model).items():
                error = (value - expected[name]).abs().max() / expected[name].abs().max()
                assert error < 1e-4, (alpha, mode, name)


@pytest.mark.parametrize(
    'config',
    [
        'kitti_models/second.yaml',
        'kitti_models/pointpillar.yaml',
        'nuscenes_models/cbgs_second_multihead.yaml',
        'nuscenes_models/cbgs_voxel0075_voxelnext.yaml',
    ],
)
def test_other_detectors_build_and_take_a_float_checkpoint(upstream, double, tmp_path, config):
    from easydict import EasyDict

    from q3d_plugin.coverage import coverage
    from q3d_plugin.openpcdet.registries import REGISTRIES, registry_of

    cfg = load_config(f'cfgs/{config}')
    cfg.DATA_CONFIG.DATA_PATH = str(tmp_path)
    reference = build(cfg, tmp_path)
    for section in REGISTRIES:
        part = cfg.MODEL if section == 'NAME' else cfg.MODEL.get(section)
        if part is not None and f'Quant{part.NAME}' in registry_of(section):
            part.NAME = f'Quant{part.NAME}'
    cfg.MODEL.QUANT = EasyDict(MODE='float')
    model = build(cfg, tmp_path)
    model._load_state_dict(reference.state_dict(), strict=False)
    assert all(r.note == 'switched off' for r in coverage(model))
