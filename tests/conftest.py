"""What all tests share: random numbers that are the same in every run, and one thread."""

import os

# The models are small. Beside other work, threads that wait for each other make them many times slower; the
# commands that tests start inherit it.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
