"""A tiny generated data set with MMDetection3D's own info files, and the toy detector on it."""

import copy
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmdet3d')

from mmdet3d.registry import MODELS
from mmdet3d.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

import q3d_plugin.mmdet3d  # noqa: F401  (registers the plugin)

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / 'configs' / 'mmdet3d'


def run_tool(*command):
    """Runs one of the tools as a user does."""
    command = [sys.executable, str(REPOSITORY / 'tools' / command[0]), *map(str, command[1:])]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


@pytest.fixture(scope='session')
def toy_root(toy_nuscenes):
    """The small generated set, with info files."""
    done = run_tool('make_infos.py', toy_nuscenes)
    assert done.returncode == 0, done.stderr
    return toy_nuscenes


def randomize(model, seed=0):
    """Gives every BatchNorm statistics and parameters of its own: the defaults fold to almost nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


def build(config, **changes):
    """The model of a config file."""
    register_all_modules()
    cfg = Config.fromfile(str(CONFIGS / config))
    cfg.merge_from_dict({f'model.{k}': v for k, v in changes.items()})
    return MODELS.build(cfg.model)


@pytest.fixture(scope='session')
def build_model():
    """Builds the model of a config: `build_model(file, **changes of the model)`; BatchNorms are random."""
    return lambda config, **changes: randomize(build(config, **changes))


@pytest.fixture(scope='session')
def randomized():
    """Gives a model random BatchNorms: `randomized(model)`."""
    return randomize


@pytest.fixture(scope='session')
def wheel_config():
    """The model of one of MMDetection3D's own configs."""

    def load(name):
        import mmdet3d

        register_all_modules()
        return Config.fromfile(str(Path(mmdet3d.__file__).parent / '.mim' / 'configs' / name)).model

    return load


@pytest.fixture
def points():
    """One synthetic LiDAR frame: a ground, some walls of returns and clutter, (N, 5)."""
    generator = torch.Generator().manual_seed(0)
    ground = torch.rand(9000, 2, generator=generator) * 90 - 45
    height = torch.randn(9000, 1, generator=generator) * 0.05 - 1.8
    boxes = torch.randn(6000, 3, generator=generator) * torch.tensor([1.5, 1.5, 0.8])
    centres = torch.rand(30, 3, generator=generator) * torch.tensor([80.0, 80.0, 1.0]) - torch.tensor(
        [40.0, 40.0, 1.5]
    )
    xyz = torch.cat([torch.cat([ground, height], 1), boxes + centres.repeat(200, 1)])
    rest = torch.rand(len(xyz), 2, generator=generator) * torch.tensor([255.0, 0.5])
    return torch.cat([xyz, rest], 1)


@pytest.fixture
def raw_outputs():
    """The detector's raw outputs for one frame: `raw_outputs(model, points)` -> name -> tensor."""

    def forward(model, points):
        model.eval()
        with torch.no_grad():
            batch = {'inputs': {'points': [points]}, 'data_samples': []}
            features = model.extract_feat(model.data_preprocessor(batch, False)['inputs'], [{}])[1]
            tasks = model.pts_bbox_head(features)
        return {f'{i}.{k}': v for i, task in enumerate(tasks) for k, v in task[0].items()}

    return forward


@pytest.fixture(scope='session')
def float_checkpoint(tmp_path_factory):
    """A float checkpoint of the toy detector with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('checkpoints') / 'float.pth'
    torch.save({'meta': {}, 'state_dict': randomize(build('toy_centerpoint_voxel.py')).state_dict()}, path)
    return path


@pytest.fixture
def runner(toy_root, tmp_path):
    """Makes a runner of a toy config on the tiny set: `runner(checkpoint, recipe=..., **changes)`."""

    def make(checkpoint=None, recipe=None, config='toy_centerpoint_voxel_w8a8.py', work_dir=None, **changes):
        register_all_modules()
        cfg = Config.fromfile(str(CONFIGS / config))
        root = f'{toy_root}/'
        merged = {}
        for loader in ('train', 'val', 'test'):
            merged[f'{loader}_dataloader.dataset.data_root'] = root
            merged[f'{loader}_dataloader.num_workers'] = 0
            merged[f'{loader}_dataloader.persistent_workers'] = False
        for evaluator in ('val', 'test'):
            merged[f'{evaluator}_evaluator.data_root'] = root
            merged[f'{evaluator}_evaluator.ann_file'] = f'{root}nuscenes_infos_val.pkl'
        cfg.merge_from_dict(merged)
        if recipe is not None:
            cfg.custom_hooks = [dict(type='QuantHook', recipe=copy.deepcopy(recipe))]
        cfg.merge_from_dict(changes)
        cfg.work_dir = str(work_dir or tmp_path / 'work')
        cfg.load_from = None if checkpoint is None else str(checkpoint)
        # MMEngine keeps loggers by this name, and its default is the time in seconds.
        cfg.experiment_name = uuid.uuid4().hex
        return Runner.from_cfg(cfg)

    return make
