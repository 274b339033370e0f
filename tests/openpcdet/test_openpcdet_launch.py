"""From the command line to OpenPCDet's script, with the contract double as the checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from openpcdet_double import CLASSES, DATA, MODEL

from q3d_plugin.errors import Q3DError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
QUANT = {
    'MODE': 'ptq',
    'TARGET': 'tensorrt',
    'WEIGHT': {'BITS': 8},
    'CALIBRATION': {'SPLIT': 'train', 'FRAMES': 2},
}
SCRIPT = """
import _init_path
import argparse
import numpy as np
import torch
from pathlib import Path
from eval_utils import eval_one_epoch
from pcdet.config import cfg, cfg_from_list, cfg_from_yaml_file
from pcdet.datasets import build_dataloader
from pcdet.models import build_network
from pcdet.utils import common_utils

parser = argparse.ArgumentParser()
for name in ('--cfg_file', '--ckpt', '--extra_tag'):
    parser.add_argument(name, default='default')
parser.add_argument('--set', dest='set_cfgs', nargs=argparse.REMAINDER)
args = parser.parse_args()
cfg_from_yaml_file(args.cfg_file, cfg)
np.random.seed(1024)
if args.set_cfgs:
    cfg_from_list(args.set_cfgs, cfg)
folder = cfg.ROOT_DIR / 'output' / args.extra_tag
folder.mkdir(parents=True)
logger = common_utils.create_logger(folder / 'log_eval.txt')
made = build_dataloader(cfg.DATA_CONFIG, cfg.CLASS_NAMES, 1, False, workers=0, logger=logger, training=False)
model = build_network(model_cfg=cfg.MODEL, num_class=len(cfg.CLASS_NAMES), dataset=made[0])
with torch.no_grad():
    model.load_params_from_file(filename=args.ckpt, logger=logger)
    model.cuda()
    eval_one_epoch(model, made[1])
"""
EVALUATION = """
from pcdet.models import load_data_to_gpu


def eval_one_epoch(model, loader):
    model.eval()
    for batch in loader:
        load_data_to_gpu(batch)
        print('RESULT', sum(v.double().sum().item() for head in model(batch)[0] for v in head.values()))
"""


def model_cfg(quant=True):
    out = json.loads(json.dumps(MODEL))
    if quant:
        for section in ('BACKBONE_3D', 'BACKBONE_2D', 'DENSE_HEAD'):
            out[section]['NAME'] = f'Quant{out[section]["NAME"]}'
        out = {**out, 'NAME': 'QuantCenterPoint', 'QUANT': json.loads(json.dumps(QUANT))}
    return out


@pytest.fixture
def checkout(tmp_path):
    """A checkout of OpenPCDet with the double in it."""
    root = tmp_path / 'OpenPCDet'
    shutil.copytree(HERE / 'pcdet_double', root / 'pcdet')
    (root / 'tools' / 'cfgs').mkdir(parents=True)
    (root / 'tools' / 'test.py').write_text(SCRIPT)
    (root / 'tools' / '_init_path.py').write_text("import sys\n\nsys.path.insert(0, '../')\n")
    (root / 'tools' / 'eval_utils.py').write_text(EVALUATION)
    return root


@pytest.fixture
def run(checkout, tmp_path):
    """Runs ``tools/test.py`` as a user does, from another folder."""

    def call(*argv, root=checkout):
        env = {**os.environ, 'OPENPCDET_ROOT': str(root), 'PYTHONPATH': str(REPOSITORY)}
        command = [sys.executable, str(REPOSITORY / 'tools' / 'test.py'), *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)

    return call


@pytest.fixture
def config(tmp_path, toy_set):
    """Writes a config: ``config(model, name)``."""

    def write(model, name='x.yaml'):
        data = {**DATA, 'DATA_PATH': str(toy_set)}
        (tmp_path / name).write_text(
            yaml.safe_dump({'CLASS_NAMES': CLASSES, 'DATA_CONFIG': data, 'MODEL': model})
        )
        return name

    return write


def results(done):
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith('RESULT')]


def test_float_quantized_and_again(run, config, checkout, float_file, tmp_path):
    plain = results(run('--cfg_file', config(model_cfg(False)), '--ckpt', 'float.pth', '--extra_tag', 'a'))
    assert len(plain) == 2 and not list(checkout.glob('output/a/*.pth'))
    name = config(model_cfg())
    first = results(run('--cfg_file', name, '--ckpt', float_file, '--extra_tag', 'b'))
    saved = checkout / 'output' / 'b' / 'quantized.pth'
    assert 'model_state' in torch.load(saved, weights_only=True)
    assert len(first) == 2 and first != plain
    again = run('--cfg_file', name, f'--ckpt={saved}', '--extra_tag', 'c')
    assert results(again) == first and not list(checkout.glob('output/c/*.pth'))
    few = run(
        *('--cfg_file', name, '--ckpt', 'float.pth', '--extra_tag', 'd'),
        *(
            '--set',
            'MODEL.QUANT.TARGET',
            'simulation',
            'MODEL.QUANT.WEIGHT.BITS',
            '3',
            'MODEL.QUANT.CALIBRATION.FRAMES',
            '1',
        ),
    )
    assert results(few) != first
    assert 'calibrating on 1 frames' in (checkout / 'output' / 'd' / 'log_eval.txt').read_text()


@pytest.mark.parametrize(
    ('argv', 'quant', 'words'),
    [
        (['--ckpt', 'mmdet3d.pth'], QUANT, 'it is a checkpoint of MMDetection3D'),
        (['--ckpt', 'x', '--set', 'MODEL.QUANT.WEIGHT.BITS', '0'], QUANT, 'MODEL.QUANT.WEIGHT.BITS: 0 was'),
        (['--ckpt', 'x'], {'MODEL': 1}, "MODEL.QUANT.MODEL: unknown key; did you mean 'MODE'?"),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2(run, config, tmp_path, argv, quant, words):
    torch.save({'state_dict': {}}, tmp_path / 'mmdet3d.pth')
    done = run('--cfg_file', config({**model_cfg(), 'QUANT': quant}), *argv)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('q3d_plugin: ') and words in last and 'Traceback' not in done.stderr


def test_no_openpcdet(run, config, tmp_path):
    done = run('--cfg_file', config(model_cfg()), '--ckpt', 'float.pth', root=tmp_path / 'nowhere')
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('q3d_plugin: ') and 'OPENPCDET_ROOT' in last and 'Traceback' not in done.stderr


def without(model, key):
    return {k: v for k, v in model.items() if k != key}


@pytest.mark.parametrize(
    ('model', 'words'),
    [
        ({**without(model_cfg(), 'QUANT'), 'QUNT': {}}, ["MODEL.QUNT: unknown key; did you mean 'QUANT'?"]),
        (without(model_cfg(), 'QUANT'), ['MODEL.QUANT: missing']),
        ({**model_cfg(False), 'QUANT': {}}, ['MODEL.QUANT: there is a recipe', 'QuantBaseBEVBackbone']),
        (
            {**model_cfg(), 'QUANT': {'WIEGHT': {}}},
            ["MODEL.QUANT.WIEGHT: unknown key; did you mean 'WEIGHT'?"],
        ),
        (
            {**model_cfg(), 'BACKBONE_2D': {'NAME': 'QuantBaseBEVBackbon'}},
            ["MODEL.BACKBONE_2D.NAME: 'QuantBaseBEVBackbon'", "did you mean 'QuantBaseBEVBackbone'?"],
        ),
        ({**model_cfg(), 'NAME': 'QuantCentrePoint'}, ['MODEL.NAME', "did you mean 'QuantCenterPoint'?"]),
        ({**model_cfg(), 'PFE': {'NAME': 'QuantSet'}}, ['MODEL.PFE.NAME', 'no part under PFE']),
    ],
)
def test_a_config_is_checked_before_anything_is_read(adapter, config, tmp_path, model, words):
    path = tmp_path / config(model)
    with pytest.raises(Q3DError) as caught:
        adapter.recipe.check_config_file(path)
    for word in words:
        assert word in str(caught.value)


def test_a_config_without_its_base_or_that_is_no_yaml(adapter, tmp_path):
    path = tmp_path / 'x.yaml'
    for text, words in (
        ('_BASE_CONFIG_: cfgs/gone.yaml', r"x\.yaml': _BASE_CONFIG_: 'cfgs/gone\.yaml' is not a file.*tools"),
        ('DATA_CONFIG: {_BASE_CONFIG_: gone.yaml}', r'DATA_CONFIG\._BASE_CONFIG_.*is not a file'),
        ('MODEL: [', r"x\.yaml' is no YAML"),
        ('CLASS_NAMES: [car]', r"x\.yaml' has no MODEL"),
        ('just words', r"x\.yaml' is no config"),
    ):
        path.write_text(text)
        with pytest.raises(Q3DError, match=words):
            adapter.recipe.check_config_file(path)


def test_good_configs_pass(adapter, config, tmp_path):
    adapter.recipe.check_config_file(tmp_path / config(model_cfg()))
    adapter.recipe.check_config_file(tmp_path / config(model_cfg(False)))


@pytest.mark.parametrize('kind', ['voxel', 'pillar'])
def test_toy_configs_differ_in_the_quantization_only(kind):
    folder = REPOSITORY / 'configs' / 'openpcdet'
    plain, quant = (
        yaml.safe_load((folder / f'toy_centerpoint_{kind}{end}.yaml').read_text()) for end in ('', '_w8a8')
    )
    quant['MODEL'].pop('QUANT')
    text = yaml.safe_dump(quant).replace('NAME: Quant', 'NAME: ')
    assert yaml.safe_load(text) == plain
