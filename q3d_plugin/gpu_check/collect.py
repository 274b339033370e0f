"""Fills a folder with the packages that a machine without a network needs."""

import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Dict, List, Tuple

from q3d_plugin.errors import Q3DError
from q3d_plugin.gpu_check import packing, wheels
from q3d_plugin.text import text_table

__all__ = ['PART_LIMIT', 'collect', 'parts_table']

PART_LIMIT = 60 * packing.MIB
MMCV = 'mmcv==2.1.0'

# pip matches the minor version of glibc exactly.
_GLIBC = ('2_34', '2_31', '2_28', '2_27', '2_24', '2_17', '2_12', '2_5')
_PLATFORMS = (*(f'manylinux_{v}_x86_64' for v in _GLIBC), 'manylinux2014_x86_64', 'manylinux1_x86_64')


def _download(pip: Sequence[str], requirements: Sequence[str], python: str, folder: Path) -> str:
    """Downloads wheels for another Python; returns the last line of an error, empty where there was none."""
    platforms = [word for p in _PLATFORMS for word in ('--platform', p)]
    target = ['--python-version', python, '--implementation', 'cp', *platforms]
    command = [*pip, 'download', '--quiet', '--no-deps', '--only-binary=:all:', *target]
    done = subprocess.run(
        [*command, '--dest', str(folder), *requirements], capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith('ERROR')]
    return '' if done.returncode == 0 else (errors or done.stderr.strip().splitlines() or ['no message'])[-1]


def _download_each(
    pip: Sequence[str], names: Sequence[str], pins: Dict, python: str, folder: Path
) -> List[str]:
    """Downloads packages in the pinned versions, or in others where those do not run on that Python.

    Returns:
        list: Names of the packages that there is no wheel of.
    """
    exact = [f'{n}=={pins[n]}' if n in pins else n for n in names]
    if not _download(pip, exact, python, folder):
        return []
    # One after the other, since pip stops at the first that it does not find.
    missing = []
    for name, requirement in zip(names, exact):
        if _download(pip, [requirement], python, folder) and _download(pip, [name], python, folder):
            missing.append(name)
    return missing


def _download_spconv(pip: Sequence[str], cuda: Tuple[int, int], python: str, folder: Path) -> None:
    """The best spconv that there is for this CUDA and Python, with its cumm.

    Raises:
        Q3DError: There is none.
    """
    candidates = wheels.spconv_candidates(cuda)
    for name in candidates:
        if not _download(pip, [name], python, folder):
            cumm = name.replace('spconv', 'cumm')
            of = wheels.CUMM_OF if not list(folder.glob('spconv_*-2.3.6-*')) else '>=0.4.5,<0.5'
            error = _download(pip, [cumm + of], python, folder)
            if error:
                raise Q3DError(f'{cumm}: {error}')
            return
    raise Q3DError(f'there is no wheel of {", ".join(candidates)} for Python {python}')


def _download_source(requirement: str, pins: Dict, folder: Path) -> None:
    """The source distribution of mmcv. Its setup imports pkg_resources, which newer setuptools no longer has.

    Raises:
        Q3DError: It cannot be had.
    """
    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        pip = [f'{place}/bin/python', '-m', 'pip', '--disable-pip-version-check']
        setuptools = f'setuptools=={pins.get("setuptools", "79.0.1")}'
        for words in (
            ['install', '--quiet', setuptools, 'wheel'],
            [*('download', '--quiet', '--no-deps', '--no-build-isolation', '--no-binary', ':all:')]
            + ['--dest', str(folder), requirement],
        ):
            done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ['no message'])[-1]
                raise Q3DError(f'{requirement}: pip {words[0]} failed: {last}')


def collect(
    out: Path, python: str, cuda: str, root: Path, limit: int = PART_LIMIT
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """Downloads everything beside torch, and lays it out in parts.

    Args:
        out: The folder to fill.
        python: Version of Python on the other machine.
        cuda: Version of CUDA that torch was built for there.
        root: The repository, whose requirements/dev.txt has the versions that go together.
        limit: Bytes of a part.

    Returns:
        tuple: Name, bytes and pieces of each part, and the packages that there is no wheel of.

    Raises:
        Q3DError: A package that nothing works without cannot be had.
    """
    version = wheels.parse_version(cuda, '--cuda')
    wheels.parse_version(python, '--python')
    pins = dict(wheels.pinned((root / 'requirements' / 'dev.txt').read_text().splitlines()))
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    with tempfile.TemporaryDirectory(dir=_made(out)) as temporary:
        ordered: List[Path] = []
        missing: List[str] = []
        for name in ('cuda', 'own', 'common'):
            folder = Path(temporary) / name
            folder.mkdir()
            if name == 'cuda':
                _download_spconv(pip, version, python, folder)
                _download_source(MMCV, pins, folder)
            else:
                names = wheels.OWN if name == 'own' else wheels.COMMON
                missing += _download_each(pip, names, pins, python, folder)
            ordered += sorted(folder.iterdir())
        space = Path(temporary) / 'packed'
        space.mkdir()
        packed = [packing.pack(path, space) for path in ordered]
        entries = [packing.entry_of(path, tight) for path, tight in zip(ordered, packed)]
        head = {'python': python, 'cuda': cuda, 'missing': missing}
        return packing.write_parts(packed, entries, head, out, limit), missing


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parts_table(parts: Sequence[Dict[str, Any]]) -> str:
    """The parts as text."""
    rows = []
    for part in parts:
        most = [piece.split('-')[0] for piece in part['pieces']]
        words = ', '.join(most[:4]) + (f' and {len(most) - 4} more' if len(most) > 4 else '')
        rows.append([part['part'], f'{part["bytes"] / packing.MIB:.1f}', len(most), words])
    return text_table(['part', 'MiB', 'files', ''], rows, right=[1, 2])
