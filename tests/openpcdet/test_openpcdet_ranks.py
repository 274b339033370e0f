"""Two ranks, as OpenPCDet's ``--launcher pytorch`` runs them: DistributedDataParallel around the detector."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SCRIPT = """
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from easydict import EasyDict
from openpcdet_double import CLASSES, DATA, MODEL, double_as_pcdet

from q3d_plugin import lifecycle
from q3d_plugin.cpu import enable_cpu_mode

enable_cpu_mode()
dist.init_process_group('gloo')
rank, (data, checkpoint, out, mode) = dist.get_rank(), sys.argv[1:]
with double_as_pcdet():
    from pcdet.datasets import build_dataloader
    from pcdet.models import build_network, load_data_to_gpu, model_fn_decorator

    from q3d_plugin.openpcdet.parts import register_parts

    register_parts()
    cfg = EasyDict(MODEL, NAME='QuantCenterPoint', QUANT={'MODE': mode, 'CALIBRATION': {'FRAMES': 3}})
    cfg.QUANT.TRAINING = EasyDict(RANGES={'WEIGHT': 'fixed', 'ACTIVATION': 'fixed'})
    for section in ('BACKBONE_3D', 'BACKBONE_2D', 'DENSE_HEAD'):
        cfg[section].NAME = f'Quant{cfg[section].NAME}'
    logger = logging.getLogger('ranks')
    logger.addHandler(logging.FileHandler(f'{out}/{rank}.log'))
    data_cfg = EasyDict(DATA, DATA_PATH=data)
    dataset, loader, _ = build_dataloader(data_cfg, CLASSES, 1, False, logger=logger, training=mode == 'qat')
    model = build_network(cfg, len(CLASSES), dataset)
    model.load_params_from_file(checkpoint, logger)
    model.train(mode == 'qat')
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for batch in loader:
        if mode == 'qat':
            model_fn_decorator()(wrapped, batch).loss.backward()
        else:
            load_data_to_gpu(batch)
            with torch.no_grad():
                wrapped(batch)
    torch.save([q._amax for q in lifecycle.quantizers(model)], f'{out}/{rank}.pt')
dist.barrier()
# Not destroy_process_group(): in torch 2.1 it can wait for a thread of its own forever, which wants the
# interpreter to give a tensor back.
os._exit(0)
"""


def run_ranks(world, folder, *argv):
    folder.mkdir()
    script = folder / 'script.py'
    script.write_text(SCRIPT)
    env = {**os.environ, 'PYTHONPATH': f'{HERE.parents[1]}:{HERE}', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}']
    arguments = [str(a) for a in (script, argv[0], argv[1], folder, argv[2])]
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f'{rank}.pt') for rank in range(world)]


def test_two_ranks_calibrate_as_one_does_and_train(toy_set, float_file, tmp_path):
    one, *_ = run_ranks(1, tmp_path / 'one', toy_set, float_file, 'ptq')
    for name, mode in (('two', 'ptq'), ('train', 'qat')):
        ranks = run_ranks(2, tmp_path / name, toy_set, float_file, mode)
        for ranges in ranks:
            assert all(torch.equal(a, b) for a, b in zip(one, ranges))
        assert (tmp_path / name / 'quantized.pth').is_file()
        assert len(list((tmp_path / name).glob('*.pth'))) == 1
