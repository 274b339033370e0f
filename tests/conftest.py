"""What all tests share: random numbers that are the same in every run, one thread, and spconv on its own."""

import os
import random

# The models are small. Beside other work, threads that wait for each other make them many times slower; the
# commands that tests start inherit it.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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
