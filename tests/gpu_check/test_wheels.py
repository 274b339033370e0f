"""Which wheels fit a machine, and what is said of those that do not."""

import pytest

from q3d_plugin.errors import Q3DError
from q3d_plugin.gpu_check import wheels
from q3d_plugin.gpu_check.wheels import check_spconv, check_wheel, parse_wheel, spconv_candidates

SPCONV = 'spconv_cu126-2.3.8-cp312-cp312-manylinux_2_28_x86_64.whl'


@pytest.mark.parametrize(
    ('file', 'python', 'cuda'),
    [
        (SPCONV, (3, 12), (12, 6)),
        # A driver runs what was built for another minor version, and the runtime comes along.
        (SPCONV, (3, 12), (12, 1)),
        (SPCONV, (3, 12), (13, 0)),
        ('mmdet3d-1.4.0-py3-none-any.whl', (3, 9), (11, 8)),
        ('six-1.17.0-py2.py3-none-any.whl', (3, 12), (12, 6)),
        ('psutil-7.2.2-cp36-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl', (3, 12), (12, 6)),
    ],
)
def test_a_wheel_that_fits_is_taken(file, python, cuda):
    check_wheel(file, python, cuda)


@pytest.mark.parametrize(
    ('file', 'python', 'cuda', 'words'),
    [
        (SPCONV, (3, 11), (12, 6), r'for Python cp312, and this is Python 3\.11.*--python 3\.11'),
        (SPCONV, (3, 12), (11, 8), r'for CUDA 12\.6, and torch here is for CUDA 11\.8: spconv-cu118'),
        (SPCONV.replace('126', '118'), (3, 12), (12, 4), r'for CUDA 11\.8.*CUDA 12\.4: spconv-cu124'),
        (SPCONV.replace('spconv_cu126', 'cumm_cu118'), (3, 12), (12, 4), r'cumm-cu124 would work'),
        ('numpy-1.26.4-cp39-cp39-manylinux_2_17_x86_64.whl', (3, 12), (12, 6), r'for Python cp39'),
        ('a-1-cp313-abi3-linux_x86_64.whl', (3, 12), (12, 6), r'for Python cp313'),
        ('old-1-py2-none-any.whl', (3, 12), (12, 6), r'for Python py2'),
        ('mmcv-2.1.0.tar.gz', (3, 12), (12, 6), r'not the name of a wheel'),
        (SPCONV, (3, 12), (10, 2), r'CUDA 10\.2: there are builds of spconv for 11\.8'),
    ],
)
def test_a_wheel_for_another_python_or_cuda_is_refused_in_one_line(file, python, cuda, words):
    with pytest.raises(Q3DError, match=words) as error:
        check_wheel(file, python, cuda)
    assert '\n' not in str(error.value)


def test_the_nearest_older_build_of_spconv_comes_first():
    assert spconv_candidates((12, 6))[0] == 'spconv-cu126'
    assert spconv_candidates((13, 0))[0] == 'spconv-cu126'
    assert spconv_candidates((12, 3))[:2] == ['spconv-cu121', 'spconv-cu120']
    assert spconv_candidates((12, 0)) == ['spconv-cu120', 'spconv-cu121', 'spconv-cu124', 'spconv-cu126']
    assert spconv_candidates((11, 8)) == ['spconv-cu118']


@pytest.mark.parametrize(
    ('installed', 'words'),
    [
        (
            {'spconv': '2.3.8', 'cumm': '0.7.11'},
            r'has no CUDA, .*uninstall spconv cumm, then pip install spconv-cu126',
        ),
        ({'spconv': '2.3.8', 'spconv-cu126': '2.3.8'}, r'has no CUDA and spconv-cu126, which it overwrites'),
        ({'numpy': '1.26.4'}, r'spconv is not here: pip install spconv-cu126'),
        ({'spconv-cu118': '2.3.8'}, r'for another CUDA than torch here \(12\.6\): pip install spconv-cu126'),
    ],
)
def test_an_spconv_without_this_cuda_is_refused_in_one_line(installed, words):
    with pytest.raises(Q3DError, match=words) as error:
        check_spconv(installed, (12, 6))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['spconv-cu126', 'spconv_cu120'])
def test_an_spconv_of_this_cuda_is_taken(name):
    check_spconv({name: '2.3.8'}, (12, 6))


def test_torch_is_among_no_packages():
    names = {*wheels.OWN, *wheels.COMMON}
    assert not {n for n in names if n.startswith(('torch', 'nvidia', 'triton'))}
    assert not {*wheels.OWN} & {*wheels.COMMON}


def test_versions_that_are_none_are_refused():
    for text in ('12', 'twelve', ''):
        with pytest.raises(Q3DError, match='--cuda'):
            wheels.parse_version(text, '--cuda')


def test_pins_are_read_from_a_requirements_file():
    lines = ['# frozen', 'PyYAML==6.0.3', 'lyft_dataset_sdk==0.0.8', '', 'torch>=2']
    assert wheels.pinned(lines) == {'pyyaml': '6.0.3', 'lyft-dataset-sdk': '0.0.8'}


def test_the_version_of_cuda_is_in_the_name():
    assert parse_wheel(SPCONV).cuda == (12, 6)
    assert parse_wheel('curl_tool-1-py3-none-any.whl').cuda is None
