"""Devices: a test with ``device`` runs on the CPU and on CUDA, one with ``cuda`` on CUDA alone."""

import os

# cuBLAS reads it when it is first used; without it, it refuses to be deterministic.
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest
import torch

ON_CUDA = pytest.param(
    'cuda',
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device'),
    ],
)


@pytest.fixture(autouse=True)
def _same_arithmetic():
    """Convolutions in full float32, so that CUDA comes as near to the CPU as it can."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture(params=['cpu', ON_CUDA])
def device(request):
    """Both devices in turn."""
    return torch.device(request.param)


@pytest.fixture(params=[ON_CUDA])
def cuda(request):
    """The CUDA device."""
    return torch.device(request.param)


@pytest.fixture
def deterministic():
    """Algorithms have to be deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
