"""Shared by all tests: random numbers, one thread, a small data set, and spconv on its own."""

import os
import random
import subprocess
import sys
from pathlib import Path

# The models are small. Beside other work, threads that wait for each other make them many times slower; the
# commands that tests start inherit it.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import hypothesis
import numpy as np
import pytest
import torch

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile('suite', deadline=None)
hypothesis.settings.load_profile('suite')


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def toy_nuscenes(tmp_path_factory):
    """Folder of a generated set: one training and one validation scene of three key frames, seed 0."""
    out = tmp_path_factory.mktemp('toy_nuscenes') / 'set'
    tool = Path(__file__).resolve().parents[1] / 'tools' / 'toy_nuscenes'
    small = ('--train-scenes', '1', '--val-scenes', '1', '--frames', '3')
    command = [sys.executable, str(tool), '--out', str(out), *small]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope='module')
def spconv_without_mmdet3d():
    """spconv with the loader of its own, for tests of OpenPCDet.

    Importing MMDetection3D gives all sparse layers of the process another loader, which permutes weights, and
    its tests may have run before. Nobody else has both frameworks in one process.
    """
    spconv = pytest.importorskip('spconv.pytorch')
    with pytest.MonkeyPatch.context() as patch:
        for name in ('_load_from_state_dict', '_version'):
            if name in vars(spconv.SparseModule):
                patch.delattr(spconv.SparseModule, name)
        yield
