"""Quantization-aware training by OpenPCDet's own script and optimizers: set OPENPCDET_ROOT to a checkout."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from q3d_plugin import lifecycle
from q3d_plugin.openpcdet.checkpoints import read_checkpoint
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_

ROOT = os.environ.get('OPENPCDET_ROOT')
pytestmark = [
    pytest.mark.skipif(not ROOT, reason='OPENPCDET_ROOT is not set'),
    pytest.mark.skipif(torch.cuda.is_available(), reason='results on CUDA differ from run to run'),
]

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / 'configs' / 'openpcdet'
EPOCHS, FRAMES = 2, 4
# Iterations until it is killed come from outside. Nobody waits for further checkpoints at the end.
DRIVER = """
import os, signal, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
from q3d_plugin.commands import main

time.sleep = lambda seconds: None
left = [int(os.environ.get('KILL_AFTER', 10**9))]


def count(*_):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


register_optimizer_step_post_hook(count)
sys.exit(main(['train', *sys.argv[1:]]))
"""


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of OpenPCDet's code, since its script writes into the checkout."""
    copy = tmp_path_factory.mktemp('checkout')
    for name in ('pcdet', 'tools'):
        shutil.copytree(Path(ROOT) / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(Path(ROOT) / 'setup.py', copy)
    return copy


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data set of four training and four validation frames."""
    out = tmp_path_factory.mktemp('data') / 'set'
    command = [sys.executable, '-m', 'q3d_plugin', 'toy-data', '--out', str(out), '--infos', 'openpcdet']
    command += ['--train-scenes', '1', '--val-scenes', '1', '--frames', str(FRAMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def train(checkout, data, tmp_path):
    """Runs the script: ``train(tag)`` gives its process after its end; ``train.folder(tag)`` its output."""
    driver = tmp_path / 'driver.py'
    driver.write_text(DRIVER)
    config = tmp_path / 'toy_qat.yaml'
    content = yaml.safe_load((CONFIGS / 'toy_centerpoint_voxel_w8a8.yaml').read_text())
    # A part of each frame, which saves time.
    content['DATA_CONFIG']['POINT_CLOUD_RANGE'] = [-25.6, -25.6, -5.0, 25.6, 25.6, 3.0]
    config.write_text(yaml.safe_dump(content))

    def run(tag, world=1, **environment):
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}']
        command = [sys.executable, *(launcher if world > 1 else []), str(driver)]
        command += ['--cfg_file', str(config), '--extra_tag', tag, '--batch_size', '2', '--workers', '0']
        command += ['--pretrained_model', str(CONFIGS / 'toy_centerpoint_voxel.pth')]
        command += ['--epochs', str(EPOCHS), '--fix_random_seed']
        command += ['--launcher', 'pytorch'] if world > 1 else []
        settings = {
            'DATA_CONFIG.DATA_PATH': data,
            'MODEL.QUANT.MODE': 'qat',
            'MODEL.QUANT.CALIBRATION.FRAMES': 3,
            'OPTIMIZATION.LR': 0.0003,
        }
        command += ['--set', *(str(part) for pair in settings.items() for part in pair)]
        env = {**os.environ, 'OPENPCDET_ROOT': str(checkout), 'OMP_NUM_THREADS': '1', **environment}
        env['PYTHONPATH'] = f'{REPOSITORY}'
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def folder(tag):
        (found,) = [p for p in (checkout / 'output').rglob(tag) if p.is_dir()]
        return found

    run.folder = folder
    return run


def state_of(path):
    return read_checkpoint(str(path), path.name)['model_state']


def test_a_killed_training_is_resumed_and_its_checkpoints_are_evaluated(train):
    """Two iterations an epoch; killed in the second epoch."""
    killed = train('killed', KILL_AFTER='3')
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    folder = train.folder('killed')
    assert [p.name for p in (folder / 'ckpt').iterdir()] == ['checkpoint_epoch_1.pth']
    other = folder.with_name('other')
    shutil.copytree(folder / 'ckpt', other / 'ckpt')
    ends = []
    for tag in ('killed', 'other'):
        done = train(tag)
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'mAP' in done.stdout + done.stderr
        ends.append(state_of(train.folder(tag) / 'ckpt' / 'checkpoint_epoch_2.pth'))
    start, first, second = state_of(folder / 'ckpt' / 'checkpoint_epoch_1.pth'), *ends
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=0, atol=1e-6)
    learned = [k for k in first if k.endswith('_log2_amax')]
    assert len(learned) > 100 and int(first['q3d_steps']) == 2 * EPOCHS
    assert sum(not torch.equal(first[k], start[k]) for k in learned) > 0.9 * len(learned)

    # Two processes take the ranges of one, and train. They do not come to the evaluation: without pauses of
    # the script they may not agree on which checkpoints there are.
    done = train('two', world=2, KILL_AFTER='3')
    assert 'Signal 9 (SIGKILL)' in done.stderr, done.stderr[-3000:]
    one, two = (torch.load(train.folder(t) / 'quantized.pth', weights_only=True) for t in ('killed', 'two'))
    assert all(torch.equal(v, two['model_state'][k]) for k, v in one['model_state'].items())
    end = state_of(train.folder('two') / 'ckpt' / 'checkpoint_epoch_1.pth')
    assert int(end['q3d_steps']) == 2 and end.keys() == first.keys()


@pytest.fixture(scope='module')
def optimization():
    """``train_utils.optimization`` of the checkout."""
    folder = str(Path(ROOT) / 'tools')
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module('train_utils.optimization')
    finally:
        sys.path.remove(folder)
        for name in [n for n in sys.modules if n.split('.')[0] == 'train_utils']:
            del sys.modules[name]


class Model(nn.Sequential):
    """Two layers, with what a detector has beside them."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        quantize_(self)
        self.register_buffer('q3d_steps', torch.zeros((), dtype=torch.int64))
        self.dataset = range(5)


@pytest.mark.parametrize('name', ['adam_onecycle', 'adam_cosineanneal', 'adam', 'sgd'])
def test_every_optimizer_of_openpcdet_learns_the_ranges(optimization, name):
    """Its learning rates and its weight decay, with a schedule that is made after the ranges; and resumed."""
    from easydict import EasyDict

    from q3d_plugin import openpcdet

    openpcdet.register(ROOT)
    from q3d_plugin.openpcdet.training import DetectorTraining, torch_optimizer

    recipe = Recipe.from_dict({'mode': 'qat', 'training': {'ranges': {'lr_factor': 4.0}}})
    settings = EasyDict(
        OPTIMIZER=name, LR=0.01, WEIGHT_DECAY=0.5, MOMENTUM=0.9, MOMS=[0.95, 0.85], PCT_START=0.4,
        DIV_FACTOR=10, DECAY_STEP_LIST=[1], LR_DECAY=0.1, LR_CLIP=1e-7, LR_WARMUP=False, WARMUP_ITER=2,
    )  # fmt: skip
    inputs = torch.randn(2, 3, 8, 8)
    states = None
    for epoch in (0, 1):
        torch.manual_seed(0)
        model = Model()
        lifecycle.configure(model, recipe)
        optimizer = optimization.build_optimizer(model, settings)
        lifecycle.calibrate(model, [inputs], model)
        training = DetectorTraining(model.train(), recipe, optimizer if epoch else None)
        if epoch:
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        last = epoch + 1 if epoch else -1
        schedule, _ = optimization.build_scheduler(optimizer, 3, 2, last, settings)
        groups = torch_optimizer(optimizer).param_groups
        for i in range(3 * epoch, 3 * epoch + 3):
            schedule.step(i, epoch) if 'adam_' in name else schedule.step(epoch)
            training.before_step(2)
            optimizer.zero_grad()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            if i == 1:
                # Weight decay alone.
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                held = [p.detach().clone() for p in groups[-1]['params']]
                momenta = torch_optimizer(optimizer).state
                momenta.clear()
                optimizer.step()
                assert all(torch.equal(a, b) for a, b in zip(held, groups[-1]['params']))
                assert not torch.equal(before['0.weight'], model[0].weight)
                continue
            (model(inputs) - 1).square().mean().backward()
            optimizer.step()
            assert groups[-1]['lr'] == pytest.approx(4 * groups[0]['lr']) and groups[-1]['weight_decay'] == 0
            names = {id(p): n for n, p in model.named_parameters()}
            assert {names[id(p)].rpartition('.')[2] for p in groups[-1]['params']} == {'_log2_amax'}
            assert all('_quantizer' not in names[id(p)] for g in groups[:-1] for p in g['params'])
        states = model.state_dict(), optimizer.state_dict()
        assert int(model.q3d_steps) == 3 * (epoch + 1)
