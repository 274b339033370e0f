"""The unmodified BEVFusion of MMDetection3D in CPU mode: set MMDET3D_ROOT to a checkout to run these."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not os.environ.get('MMDET3D_ROOT'), reason='MMDET3D_ROOT is not set'),
    pytest.mark.skipif(torch.cuda.is_available(), reason='CPU mode is off where CUDA is'),
]

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / 'configs' / 'mmdet3d' / 'toy_bevfusion.py'


@pytest.fixture(scope='module')
def bevfusion():
    pytest.importorskip('mmdet3d')
    from q3d_plugin.mmdet3d.projects import import_bevfusion

    return import_bevfusion()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """The smallest set of the profile: two frames of training and two of validation."""
    out = tmp_path_factory.mktemp('look_alikes') / 'set'
    command = [sys.executable, '-m', 'q3d_plugin', 'toy-data', '--out', str(out), '--infos', 'mmdet3d']
    command += ['--profile', 'look-alikes', '--train-scenes', '1', '--val-scenes', '1', '--frames', '2']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope='module')
def toy(bevfusion, root):
    """The toy config on that set, and its model with random weights."""
    from mmdet3d.registry import MODELS
    from mmdet3d.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    torch.manual_seed(0)
    cfg = Config.fromfile(str(CONFIG))
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = f'{root}/'
        loader.update(num_workers=0, persistent_workers=False)
    return cfg, MODELS.build(cfg.model)


def batch_of(loader):
    from mmengine.runner import Runner

    return next(iter(Runner.build_dataloader(loader, seed=0)))


def test_types_are_registered(bevfusion):
    from mmdet3d.registry import MODELS, TRANSFORMS

    assert all(MODELS.get(name) for name in ('BEVFusion', 'DepthLSSTransform', 'TransFusionHead'))
    assert TRANSFORMS.get('ImageAug3D')


def test_pooling_by_its_own_function(bevfusion):
    sizes = 2, 3, 4, 5
    batch, depth, height, width = sizes
    cells = torch.stack([torch.randint(n, (300,)) for n in (height, width, depth, batch)], 1)
    x = torch.randn(300, 6, requires_grad=True)
    out = bevfusion.depth_lss.bev_pool(x, cells, *(torch.tensor(n) for n in sizes))
    expected = torch.zeros(batch, 6, depth, height, width)
    for row, (i, j, k, b) in zip(x.detach(), cells.tolist()):
        expected[b, :, k, i, j] += row
    torch.testing.assert_close(out.detach(), expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    i, j, k, b = cells.T
    torch.testing.assert_close(x.grad, weight[b, :, k, i, j])


@pytest.mark.parametrize('deterministic', [True, False])
def test_voxelization_by_its_own_module(bevfusion, deterministic):
    from mmcv.ops import Voxelization as Peer

    size, area = [0.5, 0.5, 1.0], [-4.0, -3.0, -1.0, 4.0, 3.0, 3.0]
    points = torch.rand(2000, 5) * 10 - 5
    module = bevfusion.ops.Voxelization(size, area, 3, (100, 600), deterministic)
    for training in (True, False):
        found = module.train(training)(points)
        expected = Peer(size, area, 3, (100, 600)).train(training)(points)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
        assert torch.equal(found[1], expected[1].flip(1))  # x, y, z here; z, y, x in mmcv
    dynamic = bevfusion.ops.Voxelization(size, area, -1, -1)(points)
    assert torch.equal(dynamic, Peer(size, area, -1, -1)(points).flip(1))


def test_the_toy_trains(toy):
    cfg, model = toy
    model.train()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*device_type of .cuda.*')
        data = model.data_preprocessor(batch_of(cfg.train_dataloader), True)
        loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not still
    moving = {n.split('.')[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {'img_backbone', 'img_neck', 'view_transform', 'pts_middle_encoder', 'fusion_layer'} <= moving


def test_the_toy_predicts_with_each_sensor_and_without(toy):
    cfg, model = toy
    model.eval()
    outputs, inputs = {}, {}
    place = [step['type'] for step in cfg.test_dataloader.dataset.pipeline].index('BlankSensor')
    for name in ('none', 'again', 'cameras', 'lidar'):
        sensor = 'none' if name == 'again' else name
        cfg.merge_from_dict({f'test_dataloader.dataset.pipeline.{place}.sensor': sensor})
        batch = batch_of(cfg.test_dataloader)
        with torch.no_grad():
            data = model.data_preprocessor(batch, False)
            images = data['inputs']['imgs'][0]
            # How many of the six show anything, and the points.
            shown = int((images.amax((2, 3)) > images.amin((2, 3))).any(1).sum())
            inputs[name] = shown, data['inputs']['points'][0]
            metas = [sample.metainfo for sample in data['data_samples']]
            outputs[name] = model.extract_feat(data['inputs'], metas)[0]
            assert len(model(**data, mode='predict')[0].pred_instances_3d.scores_3d) > 0
    assert torch.equal(outputs['none'], outputs['again'])
    assert not torch.equal(outputs['none'], outputs['cameras'])
    assert not torch.equal(outputs['none'], outputs['lidar'])
    assert {name: inputs[name][0] for name in outputs} == {'none': 6, 'again': 6, 'cameras': 0, 'lidar': 6}
    assert [len(inputs[name][1]) == 1 for name in outputs] == [False, False, False, True]


def test_the_demo_knows_where_a_sensor_is_blanked(bevfusion):
    from mmengine.config import Config

    from q3d_plugin.commands.demo import DETECTORS

    pipeline = Config.fromfile(str(CONFIG)).test_dataloader.dataset.pipeline
    assert pipeline[DETECTORS['bevfusion'].blank].type == 'BlankSensor'
