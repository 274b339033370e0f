"""An environment of its own beside the torch that is there: spconv for CUDA, mmcv, MMDetection3D."""

import json
import os
import site
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from q3d_plugin.errors import Q3DError
from q3d_plugin.gpu_check import packing, wheels

__all__ = ['compile_environment', 'install', 'installed_versions', 'interpreter_of', 'make_environment']

MMCV = '2.1.0'

_VERSIONS = (
    'import importlib.metadata as m, json; '
    'print(json.dumps({d.metadata["Name"]: d.version for d in reversed(list(m.distributions())) '
    'if d.metadata["Name"]}))'
)


def interpreter_of(out: Path) -> Path:
    """The interpreter of the environment; the present one where none was made."""
    made = out / 'venv' / 'bin' / 'python'
    return made if made.exists() else Path(sys.executable)


def make_environment(out: Path) -> Path:
    """Makes the environment where it is missing; what the present interpreter has stays visible in it.

    Args:
        out: Folder of the results.

    Returns:
        Path: Its interpreter.
    """
    folder = out / 'venv'
    python = folder / 'bin' / 'python'
    if not python.exists():
        # pip is that of the present interpreter, so no ensurepip is needed, which some systems lack.
        venv.EnvBuilder(system_site_packages=True, with_pip=False, symlinks=True).create(folder)
        # Made from within an environment, the new one sees the packages of the base interpreter alone.
        version = f'python{sys.version_info[0]}.{sys.version_info[1]}'
        path = folder / 'lib' / version / 'site-packages' / 'q3d_outer.pth'
        path.write_text('\n'.join(site.getsitepackages()) + '\n')
    return python


def installed_versions(python: Path) -> Dict[str, str]:
    """The version of every package that an interpreter sees, by its name in lower case with hyphens."""
    done = subprocess.run([str(python), '-c', _VERSIONS], capture_output=True, text=True, check=True)
    return {name.lower().replace('_', '-'): version for name, version in json.loads(done.stdout).items()}


def _pip(python: Path, words: Sequence[str], log: Path, environment: Optional[Dict[str, str]] = None) -> None:
    """Runs pip; raises :class:`Q3DError` with the last line of its output where it fails."""
    command = [str(python), '-m', 'pip', '--disable-pip-version-check', *words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as f:
        code = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        last = (log.read_text(errors='replace').strip().splitlines() or ['no message'])[-1]
        raise Q3DError(f'pip {words[0]} failed: {last} (log: {log})')


def _from_folder(
    python: Path, folder: Path, out: Path, facts: Dict[str, Any], log: Path
) -> Tuple[List[str], Optional[Path]]:
    """Installs what is collected in a folder.

    Returns:
        tuple: What is missing, a line each, and the source of mmcv.
    """
    version, cuda = (
        wheels.parse_version(facts['python'], 'Python'),
        wheels.parse_version(facts['cuda'], 'CUDA'),
    )
    here, notes, chosen, source = installed_versions(python), [], [], None
    for entry in packing.read_list(folder)['packages']:
        try:
            if not entry['file'].endswith('.whl'):
                source = packing.unpack(entry, folder, out / 'wheels')
                continue
            wheels.check_wheel(entry['file'], version, cuda)
            wheel = wheels.parse_wheel(entry['file'])
            if here.get(wheel.name.lower().replace('_', '-')) != wheel.version:
                chosen.append(packing.unpack(entry, folder, out / 'wheels'))
        except Q3DError as error:
            notes.append(str(error))
    if chosen:
        _pip(python, ['install', '--no-index', '--no-deps', *map(str, chosen)], log)
    return notes, source


def _from_network(python: Path, facts: Dict[str, Any], root: Path, log: Path) -> List[str]:
    """Installs everything but mmcv by pip; returns what could not be had, a line each."""
    pins = wheels.pinned((root / 'requirements' / 'dev.txt').read_text().splitlines())
    here, notes = installed_versions(python), []
    names = [n for n in (*wheels.OWN, *wheels.COMMON) if n not in here or here[n] != pins.get(n, here[n])]
    for name in names:
        wanted = [f'{name}=={pins[name]}', name] if name in pins else [name]
        notes += _first_of(python, wanted, ['--no-deps'], log)
    candidates = wheels.spconv_candidates(wheels.parse_version(facts['cuda'], 'CUDA'))
    if not any(name in here for name in candidates):
        # With what they need: their cumm has to fit.
        notes += _first_of(python, candidates, [], log)
    return notes


def _first_of(python: Path, requirements: Sequence[str], options: Sequence[str], log: Path) -> List[str]:
    """Installs the first of these that there is; a line where there is none."""
    error = ''
    for requirement in requirements:
        try:
            _pip(python, ['install', '--only-binary=:all:', *options, requirement], log)
            return []
        except Q3DError as failed:
            error = str(failed)
    return [f'{requirements[0]}: {error}']


def compile_environment(capability: str, path: str, processors: int) -> Dict[str, str]:
    """The variables under which mmcv is compiled, for one GPU alone.

    Args:
        capability: Compute capability of the GPU.
        path: Folders of programs; ninja has to be in one.
        processors: How many compilers run at once.
    """
    return {
        'MMCV_WITH_OPS': '1',
        'FORCE_CUDA': '1',
        'TORCH_CUDA_ARCH_LIST': capability,
        'MAX_JOBS': str(processors),
        'PATH': path,
    }


def _compile_mmcv(python: Path, source: Optional[Path], out: Path, capability: str, log: Path) -> None:
    """Compiles mmcv and installs it. Cut off, it goes on from where it was: object files are kept.

    Raises:
        Q3DError: It does not compile.
    """
    folder = out / 'mmcv'
    built = sorted((out / 'wheels').glob(f'mmcv-{MMCV}-*.whl'))
    if not built:
        folder.mkdir(parents=True, exist_ok=True)
        if source is None:
            words = [
                'download',
                '--no-deps',
                '--no-build-isolation',
                '--no-binary',
                ':all:',
                '--dest',
                str(folder),
            ]
            _pip(python, [*words, f'mmcv=={MMCV}'], log)
            source = next(folder.glob('mmcv-*.tar.gz'))
        tree = folder / source.name[: -len('.tar.gz')]
        if not tree.is_dir():
            with tarfile.open(source) as archive:
                archive.extractall(folder)
        path = f'{python.parent}{os.pathsep}{os.environ.get("PATH", "")}'
        extra = compile_environment(capability, path, os.cpu_count() or 1)
        words = [
            'wheel',
            '--verbose',
            '--no-build-isolation',
            '--no-deps',
            '--wheel-dir',
            str(out / 'wheels'),
        ]
        _pip(python, [*words, str(tree)], log, {**os.environ, **extra})
        built = sorted((out / 'wheels').glob(f'mmcv-{MMCV}-*.whl'))
    _pip(python, ['install', '--no-index', '--no-deps', '--force-reinstall', str(built[0])], log)


def _has_mmcv(python: Path) -> bool:
    """Whether mmcv's compiled operators can be imported."""
    return subprocess.run([str(python), '-c', 'import mmcv._ext'], capture_output=True).returncode == 0


def install(
    root: Path, out: Path, folder: Optional[Path], facts: Dict[str, Any], capability: str
) -> Tuple[List[str], Dict[str, str]]:
    """Makes the environment and installs into it what is missing; torch is never touched.

    Args:
        root: The repository.
        out: Folder of the results.
        folder: What ``--collect`` filled; None to download.
        facts: Versions of Python, torch and CUDA; see :func:`q3d_plugin.gpu_check.machine.torch_facts`.
        capability: Compute capability of the GPU.

    Returns:
        tuple: What could not be installed, a line each, and the versions of what is there.
    """
    python, log = make_environment(out), out / 'logs' / 'setup.log'
    source = None
    if folder is None:
        notes = _from_network(python, facts, root, log)
    else:
        notes, source = _from_folder(python, folder, out, facts, log)
    if not _has_mmcv(python):
        try:
            _compile_mmcv(python, source, out, capability, out / 'logs' / 'mmcv.log')
        except Q3DError as error:
            notes.append(f'mmcv: {error}')
    here = installed_versions(python)
    # Wheels of torch leave +cu121 out of their metadata, or do not.
    if here.get('torch', '').partition('+')[0] != facts['torch'].partition('+')[0]:
        notes.append(f'torch {facts["torch"]} became {here.get("torch")}; it must stay')
    try:
        wheels.check_spconv(here, wheels.parse_version(facts['cuda'], 'CUDA'))
    except Q3DError as error:
        notes.append(str(error))
    return notes, here
