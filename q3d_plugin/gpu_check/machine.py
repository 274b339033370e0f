"""The GPU, its driver and its torch, and whether they go together."""

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Dict, List, NamedTuple, Optional

from q3d_plugin.errors import Q3DError
from q3d_plugin.gpu_check.wheels import parse_version

__all__ = ['GPU', 'NO_GPU', 'check_torch', 'gpus', 'parse_gpus', 'torch_facts']

NO_GPU = 'there is no NVIDIA GPU here'

DRIVERS = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA -> the oldest driver that runs it on Linux (NVIDIA's release notes of CUDA)."""

QUERY = ('name', 'driver_version', 'compute_cap', 'memory.total')

_FACTS = (
    'import json, sys, torch; '
    'print(json.dumps(dict(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda, '
    'available=torch.cuda.is_available())))'
)


class GPU(NamedTuple):
    """What nvidia-smi says of a GPU.

    Attributes:
        name: Such as ``'NVIDIA H200'``.
        driver: Version of the driver.
        capability: Compute capability, such as ``'9.0'``.
        memory: Such as ``'143771 MiB'``.
    """

    name: str
    driver: str
    capability: str
    memory: str


def parse_gpus(output: str) -> List[GPU]:
    """The GPUs in the output of ``nvidia-smi --query-gpu=... --format=csv,noheader``.

    Args:
        output: A line for each GPU with the fields of :data:`QUERY`.

    Raises:
        Q3DError: There is none, or a line is something else: what a driver says that does not work.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines or lines[0].startswith('No devices'):
        raise Q3DError(f'{NO_GPU}: nvidia-smi lists none')
    found = []
    for line in lines:
        fields = [field.strip() for field in line.split(',')]
        if len(fields) != len(QUERY) or not re.fullmatch(r'\d+\.\d+', fields[2]):
            raise Q3DError(f'nvidia-smi does not tell the GPU, it says: {line}')
        found.append(GPU(*fields))
    return found


def gpus(run: Callable[..., Any] = subprocess.run) -> List[GPU]:
    """The GPUs of this machine.

    Args:
        run: In place of :func:`subprocess.run`, for tests.

    Raises:
        Q3DError: There is none, or its driver does not work.
    """
    command = ['nvidia-smi', f'--query-gpu={",".join(QUERY)}', '--format=csv,noheader']
    try:
        done = run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise Q3DError(f'{NO_GPU}: nvidia-smi is not to be found') from None
    if done.returncode:
        first = ((done.stdout + done.stderr).strip().splitlines() or ['no message'])[0]
        raise Q3DError(f'{NO_GPU} that works: nvidia-smi says: {first}')
    return parse_gpus(done.stdout)


def torch_facts(python: str, run: Callable[..., Any] = subprocess.run) -> Dict[str, Any]:
    """Versions of Python, torch and its CUDA, as an interpreter has them.

    Args:
        python: The interpreter.
        run: In place of :func:`subprocess.run`, for tests.

    Returns:
        dict: ``python``, ``torch``, ``cuda`` (None for a build without) and ``available``.

    Raises:
        Q3DError: It has no torch.
    """
    done = run([python, '-c', _FACTS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Q3DError(
            f'{python} has no torch that can be imported, and it is never installed here: PYTHON=... names '
            'an interpreter that has'
        )
    return json.loads(done.stdout.splitlines()[-1])


def check_torch(found: Sequence[GPU], torch: str, cuda: Optional[str], available: bool) -> None:
    """Refuses a torch without CUDA, and a driver that is too old for it.

    Args:
        found: The GPUs.
        torch: Version of torch.
        cuda: Version of CUDA that it was built for; None for a build without.
        available: Whether torch can use the GPU.

    Raises:
        Q3DError: One of these, in one line with what to install.
    """
    gpu = found[0]
    if cuda is None:
        raise Q3DError(
            f'torch {torch} was built without CUDA, and this machine has {gpu.name}: install a build of '
            'torch with CUDA, from https://download.pytorch.org/whl/cu126 for example'
        )
    major = parse_version(cuda, 'CUDA of torch')[0]
    least = DRIVERS.get(major, max(DRIVERS.values()))
    if int(gpu.driver.split('.')[0]) < least:
        older = [m for m, d in DRIVERS.items() if d <= int(gpu.driver.split('.')[0])]
        other = f', or a torch for CUDA {max(older)}' if older else ''
        raise Q3DError(
            f'driver {gpu.driver} is too old for torch {torch}, which is for CUDA {cuda}: '
            f'driver {least} or newer would work{other}'
        )
    if not available:
        raise Q3DError(
            f'torch {torch} (CUDA {cuda}) cannot use {gpu.name} with driver {gpu.driver}: '
            'python -c "import torch; torch.cuda.init()" tells why'
        )
