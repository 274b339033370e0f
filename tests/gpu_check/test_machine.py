"""What nvidia-smi and torch say of a machine, and what is said of one on which nothing can be checked."""

import subprocess

import pytest

from q3d_plugin.errors import Q3DError
from q3d_plugin.gpu_check.machine import GPU, check_torch, gpus, parse_gpus, torch_facts

H200 = 'NVIDIA H200, 580.159.03, 9.0, 143771 MiB\n'


def answering(stdout='', stderr='', code=0):
    """A stand-in for subprocess.run."""
    return lambda command, **_: subprocess.CompletedProcess(command, code, stdout, stderr)


def test_gpus_are_read():
    found = gpus(answering(H200 + 'NVIDIA GeForce RTX 3090, 535.54.03, 8.6, 24576 MiB\n'))
    assert found[0] == GPU('NVIDIA H200', '580.159.03', '9.0', '143771 MiB')
    assert found[1].capability == '8.6'


def test_a_machine_without_a_gpu_is_refused_in_one_line():
    def missing(*_, **__):
        raise FileNotFoundError

    failed = answering(stdout="NVIDIA-SMI has failed because it couldn't communicate\nmore\n", code=9)
    for run, words in (
        (missing, 'nvidia-smi is not to be found'),
        (failed, "NVIDIA-SMI has failed because it couldn't communicate$"),
        (answering('No devices were found\n'), 'nvidia-smi lists none'),
        (answering(''), 'nvidia-smi lists none'),
    ):
        with pytest.raises(Q3DError, match=f'there is no NVIDIA GPU here.*{words}') as error:
            gpus(run)
        assert '\n' not in str(error.value)


def test_an_answer_that_is_no_gpu_is_shown():
    with pytest.raises(Q3DError, match=r'it says: NVIDIA H200, 580, \[N/A\], 1'):
        parse_gpus('NVIDIA H200, 580, [N/A], 1\n')


@pytest.mark.parametrize(
    ('driver', 'cuda', 'words'),
    [
        (
            '470.57.02',
            '12.6',
            r'470\.57\.02 is too old.*CUDA 12\.6: driver 525 or newer.*torch for CUDA 11',
        ),
        ('550.54', '13.0', r'CUDA 13\.0: driver 580 or newer would work, or a torch for CUDA 12$'),
        ('440.33', '11.8', r'driver 450 or newer would work$'),
    ],
)
def test_a_driver_that_is_too_old_is_refused_in_one_line(driver, cuda, words):
    with pytest.raises(Q3DError, match=words) as error:
        check_torch([GPU('NVIDIA A100', driver, '8.0', '')], '2.5.0', cuda, available=False)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('driver', 'cuda'), [('535.54', '12.6'), ('580.1', '13.0'), ('580.1', '11.8')])
def test_a_driver_that_is_new_enough_is_taken(driver, cuda):
    check_torch([GPU('NVIDIA A100', driver, '8.0', '')], '2.5.0', cuda, available=True)


def test_a_torch_without_cuda_is_refused_with_what_to_install():
    with pytest.raises(
        Q3DError, match=r'2\.13\.0\+cpu was built without CUDA.*NVIDIA H200.*download\.pytorch'
    ):
        check_torch(parse_gpus(H200), '2.13.0+cpu', None, available=False)


def test_a_torch_that_does_not_find_the_gpu_is_refused():
    with pytest.raises(Q3DError, match='cannot use NVIDIA H200 with driver 580'):
        check_torch(parse_gpus(H200), '2.13.0', '13.0', available=False)


def test_an_interpreter_without_torch_is_refused():
    with pytest.raises(Q3DError, match='no torch that can be imported.*PYTHON='):
        torch_facts('python3', answering(code=1))


def test_versions_of_torch_are_read():
    import sys

    import torch

    assert torch_facts(sys.executable)['torch'] == torch.__version__
