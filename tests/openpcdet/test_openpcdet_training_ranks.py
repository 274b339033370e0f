"""Quantization-aware training in several processes, and one process where a training was interrupted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_double import result_of, train

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, 'PYTHONPATH': f'{HERE.parents[1]}:{HERE}', 'OMP_NUM_THREADS': '1'}
QAT = {'MODE': 'qat', 'TARGET': 'simulation', 'ACTIVATION': {'CALIBRATOR': 'max'}}


def recipe(kind, frames=3, **ranges):
    kinds = {'WEIGHT': kind, 'ACTIVATION': kind, 'MOMENTUM': 0.5, **ranges}
    return {**QAT, 'CALIBRATION': {'FRAMES': frames}, 'TRAINING': {'RANGES': kinds}}


RECIPES = {
    'log2': recipe('learned', SCALE='log2'),
    'linear': recipe('learned', SCALE='linear'),
    'fixed': recipe('fixed'),
    'moving': recipe('moving'),
    # Two ranks share one frame: one of them has none.
    'one_frame': recipe('learned', frames=1),
}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def four_frames(toy_set):
    infos = [{'token': f'train{s}', 'seed': s} for s in range(4)]
    (toy_set / 'v1.0-mini' / 'train.json').write_text(json.dumps(infos))
    return str(toy_set)


def command(runs, *launcher):
    return [sys.executable, *launcher, str(HERE / 'train_double.py'), json.dumps(runs)]


def torchrun(world):
    return '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}'


def started(runs, *launcher, **changes):
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen(command(runs, *launcher), env={**ENVIRONMENT, **changes}, **pipes)


def test_two_processes_train_as_one_does(four_frames, float_file, tmp_path):
    """The ranges after calibration, and weights and ranges after one step with the same global batch."""
    processes = {}
    for world in (1, 2):
        runs = [
            {
                'folder': str(tmp_path / f'{world}_{name}'),
                'data': four_frames,
                # Plain gradient descent on logarithms needs large steps.
                'quant': {**quant, 'TRAINING': {'RANGES': {**quant['TRAINING']['RANGES'], **steep}}},
                'start': str(float_file),
                'batch_size': 2 // world,
                'optimizer': 'sgd',
                'steps': 1,
                'lr': 3e-2,
            }
            for name, quant in RECIPES.items()
            for steep in [{'LR_FACTOR': 1e6 if name == 'log2' else 1.0}]
        ]
        processes[world] = started(runs, *torchrun(world))
    for process in processes.values():
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]

    def result(world, name, file):
        return torch.load(tmp_path / f'{world}_{name}' / f'{file}.pt')

    for name in RECIPES:
        start, end = result(1, name, '0_start'), result(1, name, '0')
        assert start.keys() == end.keys()
        step = {k: (end[k] - start[k]).abs().max().item() for k in start if start[k].is_floating_point()}
        for kind in ('.weight', '.bias', '_quantizer._amax') if name != 'one_frame' else ('.weight',):
            # Far more than the two may differ by.
            assert max(v for k, v in step.items() if k.endswith(kind)) > 1e-4, (name, kind)
        for rank in (0, 1):
            assert same(result(2, name, f'{rank}_start'), start), name
            for key, value in result(2, name, rank).items():
                torch.testing.assert_close(value, end[key], rtol=0, atol=1e-5)
        assert same(result(2, name, 0), result(2, name, 1)), name
    assert len(list(tmp_path.glob('2_log2/quantized*.pth'))) == 1


@pytest.fixture
def dying_frame(four_frames):
    """The last of the frames ends the process that reads it."""
    infos = [{'token': f'train{s}', 'seed': s, **({'die': True} if s == 3 else {})} for s in range(4)]
    (Path(four_frames) / 'v1.0-mini' / 'train.json').write_text(json.dumps(infos))
    return four_frames


def run_of(folder, data, float_file):
    files = {'folder': str(folder), 'data': data, 'start': str(float_file)}
    # It does not come to a step.
    return {**files, 'quant': recipe('learned', frames=4), 'optimizer': None}


def test_a_process_that_dies_during_calibration_ends_the_others(dying_frame, float_file, tmp_path):
    begin = time.time()
    process = started([run_of(tmp_path / 'torchrun', dying_frame, float_file)], *torchrun(2))
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.time() - begin < 120
    assert 'Signal 9 (SIGKILL)' in out

    # Without torchrun, which kills those that are left, they end by themselves and say why.
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    ranks = [
        started(
            [run_of(tmp_path / 'alone', dying_frame, float_file)],
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
            RANK=str(rank),
            WORLD_SIZE='2',
        )
        for rank in (0, 1)
    ]
    out = [process.communicate(timeout=120)[0] for process in ranks]
    codes = [process.returncode for process in ranks]
    assert sorted(codes) == [-signal.SIGKILL, 1]
    assert 'calibration: another process has ended' in out[codes.index(1)]
    assert not list(tmp_path.rglob('*.pth*')) or list(tmp_path.rglob('*.pth*')) == [float_file]


def test_killed_in_an_epoch_and_resumed(adapter, four_frames, float_file, tmp_path):
    """Two epochs of two steps; killed after the third, resumed from the checkpoint of the first epoch."""
    names, processes = ('log2', 'fixed'), {}
    runs = {
        name: {
            'data': four_frames,
            'quant': RECIPES[name],
            'start': str(float_file),
            'epochs': 2,
            'batch_size': 2,
        }
        for name in names
    }
    for name, run in runs.items():
        processes[name] = started([{'folder': str(tmp_path / name), 'kill': 3, **run}])
    for name, process in processes.items():
        out, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, out[-3000:]
        (checkpoint,) = (tmp_path / name).glob('checkpoint_*')
        other = tmp_path / f'{name}_other'
        other.mkdir()
        shutil.copy(checkpoint, other)
        resumed, optimizer = train(tmp_path / name, **runs[name])
        assert 'calibrating on' not in (tmp_path / name / '0.log').read_text().partition('==> Done\n')[2]
        for end in (other, tmp_path / f'{name}_whole'):
            expected = result_of(train(end, **runs[name])[0])
            for key, value in result_of(resumed).items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6, msg=f'{name} {key}')
        assert int(resumed.q3d_steps) == 4
