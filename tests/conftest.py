"""Shared by all tests: random numbers that are the same in every run, one thread, and a small data set."""

import os
import subprocess
import sys
from pathlib import Path

# The models are small. Beside other work, threads that wait for each other make them many times slower; the
# commands that tests start inherit it.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
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
