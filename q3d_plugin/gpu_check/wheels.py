"""The packages that have to come along to a machine without a network, and what wheels fit it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

from q3d_plugin.errors import Q3DError

__all__ = [
    'COMMON',
    'CUDA_BUILDS',
    'CUMM_OF',
    'OWN',
    'Wheel',
    'check_spconv',
    'check_wheel',
    'parse_version',
    'parse_wheel',
    'pinned',
    'spconv_candidates',
]

CUDA_BUILDS = ('11.8', '12.0', '12.1', '12.4', '12.6')
"""Versions of CUDA that there are builds of spconv for: ``spconv-cu118`` and so on."""

CUMM_OF = '>=0.7.11,<0.8'
"""The versions of cumm that spconv 2.3.8 runs with; spconv 2.3.6 says its own."""

OWN = (
    *('pccm', 'ccimport', 'pybind11', 'fire', 'termcolor', 'lark', 'portalocker'),
    *('pytorch-quantization', 'absl-py', 'prettytable', 'wcwidth', 'numpy', 'setuptools', 'wheel', 'tqdm'),
    *('mmengine', 'addict', 'yapf', 'platformdirs', 'rich', 'markdown-it-py', 'mdurl', 'pygments', 'pyyaml'),
    *('mmdet', 'pycocotools', 'shapely', 'terminaltables', 'mmdet3d', 'lyft-dataset-sdk', 'nuscenes-devkit'),
    *('pyquaternion', 'cachetools', 'trimesh', 'ninja', 'psutil', 'packaging', 'parameterized', 'plyfile'),
    *('pytest', 'pytest-timeout', 'pluggy', 'iniconfig', 'hypothesis', 'sortedcontainers', 'six'),
    *('easydict', 'tensorboardx', 'protobuf'),
)
"""Packages beside spconv, cumm and mmcv that a machine with torch may well lack, most needed first."""

COMMON = (
    *('opencv-python-headless', 'numba', 'llvmlite', 'matplotlib', 'contourpy', 'cycler', 'fonttools'),
    *('kiwisolver', 'pyparsing', 'python-dateutil', 'pillow', 'scipy', 'scikit-learn', 'joblib'),
    *('threadpoolctl', 'scikit-image', 'lazy-loader', 'imageio', 'tifffile', 'networkx', 'pandas'),
)
"""Packages that most machines with torch have; they fill the last parts, which may then be left out."""

_WHEEL = re.compile(
    r'(?P<name>[^-]+)-(?P<version>[^-]+)(-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl'
)


class Wheel(NamedTuple):
    """What the name of a wheel says (PEP 427).

    Attributes:
        name: Of the package, as in the file's name.
        version: Of the package.
        python: Tags such as ``cp312`` or ``py3``, joined by dots.
        abi: Such as ``cp312``, ``abi3`` or ``none``.
        platform: Tags such as ``manylinux_2_28_x86_64`` or ``any``.
    """

    name: str
    version: str
    python: str
    abi: str
    platform: str

    @property
    def cuda(self) -> Optional[Tuple[int, int]]:
        """The version of CUDA that the package's name tells; None where it tells none.

        Examples:
            >>> parse_wheel('spconv_cu126-2.3.8-cp312-cp312-manylinux_2_28_x86_64.whl').cuda
            (12, 6)
        """
        found = re.search(r'[-_]cu(\d\d)(\d)$', self.name)
        return None if found is None else (int(found[1]), int(found[2]))


def parse_version(text: str, what: str) -> Tuple[int, int]:
    """The first two numbers of a version.

    Args:
        text: Such as ``'12.6'`` or ``'3.12.3'``.
        what: What it is the version of, for the message.

    Raises:
        Q3DError: It does not begin with two numbers.

    Examples:
        >>> parse_version('3.12.3', 'Python')
        (3, 12)
    """
    found = re.match(r'(\d+)\.(\d+)', text)
    if found is None:
        raise Q3DError(f'{what}: {text!r} was given; two numbers, such as 12.6 or 3.12, would work')
    return int(found[1]), int(found[2])


def parse_wheel(file: str) -> Wheel:
    """The parts of a wheel's name.

    Args:
        file: Name of the file, or its path.

    Raises:
        Q3DError: It is not the name of a wheel.
    """
    found = _WHEEL.fullmatch(Path(file).name)
    if found is None:
        raise Q3DError(
            f'{Path(file).name!r} is not the name of a wheel (NAME-VERSION-PYTHON-ABI-PLATFORM.whl)'
        )
    return Wheel(**found.groupdict())


def _runs(tag: str, abi: str, python: Tuple[int, int]) -> bool:
    """Whether a wheel of this tag runs on this version of CPython."""
    found = re.fullmatch(r'(cp|py)(\d)(\d*)', tag)
    if found is None or int(found[2]) != python[0]:
        return False
    minor = int(found[3]) if found[3] else 0
    if found[1] == 'py' or abi == 'abi3':
        return minor <= python[1]
    return minor == python[1]


def check_wheel(file: str, python: Tuple[int, int], cuda: Tuple[int, int]) -> None:
    """Refuses a wheel that this machine cannot use, and names the package that it can.

    Args:
        file: Name of the file.
        python: Version of the interpreter.
        cuda: Version of CUDA that torch was built for.

    Raises:
        Q3DError: The wheel is for another Python or another CUDA.
    """
    wheel = parse_wheel(file)
    if not any(_runs(tag, wheel.abi, python) for tag in wheel.python.split('.')):
        raise Q3DError(
            f'{Path(file).name} is for Python {wheel.python}, and this is Python {python[0]}.{python[1]}: '
            f'collect the wheels again with --python {python[0]}.{python[1]}'
        )
    if wheel.cuda is not None and not _same_cuda(wheel.cuda, cuda):
        base = re.sub(r'[-_]cu\d+$', '', wheel.name)
        raise Q3DError(
            f'{Path(file).name} is for CUDA {wheel.cuda[0]}.{wheel.cuda[1]}, and torch here is for CUDA '
            f'{cuda[0]}.{cuda[1]}: {spconv_candidates(cuda)[0].replace("spconv", base, 1)} would work '
            f'(collect the wheels again with --cuda {cuda[0]}.{cuda[1]})'
        )


def _same_cuda(wheel: Tuple[int, int], cuda: Tuple[int, int]) -> bool:
    """Whether a build for ``wheel`` runs beside a torch for ``cuda``: it brings its own runtime library.

    A driver runs what was built for any minor version of its own major version, and for older ones. There are
    no builds of spconv for 13 yet; those for 12 run under its driver.
    """
    return wheel[0] == min(cuda[0], 12)


def spconv_candidates(cuda: Tuple[int, int]) -> List[str]:
    """Packages of spconv for a version of CUDA, best first.

    Args:
        cuda: Of torch.

    Raises:
        Q3DError: There is none.

    Examples:
        >>> spconv_candidates((12, 4))
        ['spconv-cu124', 'spconv-cu121', 'spconv-cu120', 'spconv-cu126']
    """
    builds = [b for b in (parse_version(text, 'CUDA') for text in CUDA_BUILDS) if _same_cuda(b, cuda)]
    if not builds:
        raise Q3DError(f'CUDA {cuda[0]}.{cuda[1]}: there are builds of spconv for {", ".join(CUDA_BUILDS)}')
    older = sorted((b for b in builds if b <= cuda), reverse=True)
    newer = sorted(b for b in builds if b > cuda)
    return [f'spconv-cu{major}{minor}' for major, minor in (*older, *newer)]


def check_spconv(installed: Mapping[str, str], cuda: Tuple[int, int]) -> None:
    """Refuses an spconv without CUDA on a machine with it.

    Args:
        installed: Version of every installed package by its name.
        cuda: Version of CUDA that torch was built for.

    Raises:
        Q3DError: spconv is missing, or is the build for CPUs, or one for another CUDA.
    """
    names = [name.lower().replace('_', '-') for name in installed]
    wanted = spconv_candidates(cuda)
    builds = [name for name in names if name.startswith('spconv-cu')]
    if 'spconv' in names:
        both = f' and {builds[0]}, which it overwrites' if builds else ''
        remove = ' '.join(n for n in ('spconv', 'cumm', *builds) if n in names)
        raise Q3DError(
            f'spconv {installed["spconv"]} has no CUDA{both}, and this machine has: '
            f'pip uninstall {remove}, then pip install {wanted[0]}'
        )
    if not builds:
        raise Q3DError(f'spconv is not here: pip install {wanted[0]}')
    for name in builds:
        if name not in wanted:
            raise Q3DError(
                f'{name} is for another CUDA than torch here ({cuda[0]}.{cuda[1]}): pip install {wanted[0]}'
            )


def pinned(lines: Iterable[str]) -> Mapping[str, str]:
    """The versions of a requirements file, by the name of the package.

    Args:
        lines: Of the file.

    Examples:
        >>> pinned(['# frozen', 'PyYAML==6.0.3'])
        {'pyyaml': '6.0.3'}
    """
    pairs = (line.strip().partition('==') for line in lines)
    return {
        name.lower().replace('_', '-'): version
        for name, equals, version in pairs
        if equals and name[0] != '#'
    }
