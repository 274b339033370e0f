"""Hands a command line over to the framework's own ``tools/test.py`` or ``tools/train.py``, unchanged.

The framework is told by the config: a ``.py`` file is MMDetection3D's, a ``.yaml`` file OpenPCDet's.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import List, Optional, Tuple

from q3d_plugin import extras
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import check_writable
from q3d_plugin.shipped import find_shipped

__all__ = ['absolute_paths', 'find_config', 'find_script', 'main']

_FILES = ('.py', '.yaml', '.yml', '.pth')
_PATH_OPTIONS = ('--cfg_file', '--ckpt', '--pretrained_model', '--ckpt_dir')


def find_config(argv: list) -> Path:
    """The config among the arguments: ``--cfg_file X``, ``--cfg_file=X`` or the first ``.py`` / ``.yaml``
    file.

    Args:
        argv: The arguments without the name of the script.

    Returns:
        Path: The config file, which exists.

    Raises:
        Q3DError: No argument looks like a config, or the file is not there.
    """
    given = None
    for i, arg in enumerate(argv):
        if arg == '--cfg_file' and i + 1 < len(argv):
            given = argv[i + 1]
        elif arg.startswith('--cfg_file='):
            given = arg.split('=', 1)[1]
    if given is None:
        given = next(
            (a for a in argv if a.endswith(('.py', '.yaml', '.yml')) and not a.startswith('-')), None
        )
    if given is None:
        raise Q3DError(
            'no config among the arguments: give a .py file (MMDetection3D) or --cfg_file with a .yaml file '
            '(OpenPCDet)'
        )
    path = Path(given)
    if not path.is_file():
        raise Q3DError(
            f'config {given!r} is not a file (looked in {Path.cwd()}) and none that comes with the plugin '
            '("q3d configs" lists those)'
        )
    return path


def find_script(name: str, root: str = None) -> Path:
    """MMDetection3D's own script: from ``root`` (a source checkout), else from the installed wheel.

    Args:
        name: ``'test.py'`` or ``'train.py'``, or another path under ``tools/``.
        root: A source checkout; the environment variable ``MMDET3D_ROOT`` where none is given.

    Raises:
        Q3DError: MMDetection3D is not installed, or has no such script.
    """
    root = root or os.environ.get('MMDET3D_ROOT')
    if root:
        script = Path(root) / 'tools' / name
        if not script.is_file():
            raise Q3DError(f'MMDET3D_ROOT={root!r} has no tools/{name}: name a checkout of MMDetection3D')
        return script
    found = importlib.util.find_spec('mmdet3d')
    if found is None or found.origin is None:
        missing = ImportError("No module named 'mmdet3d'", name='mmdet3d')
        raise Q3DError(f'this needs MMDetection3D, which is not installed here{extras.hint(missing)}')
    package = Path(found.origin).parent
    for script in (package / '.mim' / 'tools' / name, package.parent / 'tools' / name):
        if script.is_file():
            return script
    raise Q3DError(f'{package} has no tools/{name}: set MMDET3D_ROOT to a checkout of MMDetection3D')


def absolute_paths(argv: list, tools: Path) -> list:
    """The arguments of OpenPCDet's scripts, so that they mean the same files in another working directory.

    A config of OpenPCDet's own stays relative to its ``tools``, as in its documentation, because OpenPCDet
    names the folder of the output after that path.

    Args:
        argv: The arguments without the name of the script.
        tools: The folder ``tools`` of the checkout, where the script will run.
    """
    out, i = [], 0

    def resolved(option: str, value: str) -> str:
        path = Path(value).expanduser().absolute()
        if option == '--cfg_file' and path.resolve().is_relative_to(tools.resolve()):
            return str(path.resolve().relative_to(tools.resolve()))
        return os.path.normpath(path)

    while i < len(argv):
        option, equals, value = argv[i].partition('=')
        if option == '--set':  # takes everything that follows
            return out + argv[i:]
        out.append(argv[i])
        if option in _PATH_OPTIONS:
            if equals:
                out[-1] = f'{option}={resolved(option, value)}'
            elif i + 1 < len(argv):
                i += 1
                out.append(resolved(option, argv[i]))
        i += 1
    return out


def _named_files(argv: list) -> list:
    """The arguments with the names of shipped configs and checkpoints replaced by their paths."""

    def found(value: str) -> str:
        return find_shipped(value) if value.endswith(_FILES) else value

    out = []
    for arg in argv:
        option, equals, value = arg.partition('=') if arg.startswith('--') else ('', '', arg)
        out.append(f'{option}{equals}{found(value)}')
    return out


def _prepare_mmdet3d(name: str, argv: list, config: Path) -> Tuple[Path, list]:
    """Registers the MMDetection3D adapter; returns the script to run and its arguments."""
    script = find_script(name)
    try:
        # Registers the Quant types too.
        from q3d_plugin.mmdet3d.projects import import_for
        from q3d_plugin.mmdet3d.work_dir import work_dir_of
    except ImportError as error:
        raise Q3DError(
            f'this needs MMDetection3D, which does not import here: {error}{extras.hint(error)}'
        ) from error
    check_writable(work_dir_of(argv, config))
    import_for(config)
    return script, argv


def _prepare_openpcdet(name: str, argv: list, config: Path) -> Tuple[Path, list]:
    """Registers the OpenPCDet adapter and goes to where its scripts run; returns the script and arguments."""
    from q3d_plugin import openpcdet

    if not any(a == '--cfg_file' or a.startswith('--cfg_file=') for a in argv):
        raise Q3DError(f"OpenPCDet's tools/{name} takes its config as --cfg_file {config}")
    pcdet = openpcdet.register()
    tools = Path(pcdet.__file__).resolve().parents[1] / 'tools'
    if not (tools / name).is_file() and os.environ.get('OPENPCDET_ROOT'):
        tools = Path(os.environ['OPENPCDET_ROOT']).expanduser().resolve() / 'tools'
    if not (tools / name).is_file():
        raise Q3DError(f'{tools} has no {name}: set OPENPCDET_ROOT to a source checkout of OpenPCDet')
    argv = absolute_paths(argv, tools)
    # The paths in OpenPCDet's configs are relative to this folder, and its scripts import their neighbours.
    os.chdir(tools)
    sys.path.insert(0, str(tools))
    from q3d_plugin.openpcdet.recipe import check_config_file

    check_config_file(find_config(argv))
    return tools / name, argv


def main(name: str, argv: Optional[List[str]] = None, usage: str = '') -> int:
    """Registers the plugin, then runs the framework's script ``name``, in this process.

    Args:
        name: ``'test.py'`` or ``'train.py'``.
        argv: The arguments of the script; those of the process where None.
        usage: Printed where help is asked for without a config, which would tell whose script's help.

    Returns:
        int: 0 where the script came to its end; it may end the process with a status of its own.

    Raises:
        Q3DError: A mistake of the user; nothing is loaded before the config was found.
    """
    argv = _named_files(sys.argv[1:] if argv is None else argv)
    try:
        config = find_config(argv)
    except Q3DError:
        if '-h' not in argv and '--help' not in argv:
            raise
        sys.stdout.write(usage)
        return 0
    prepare = _prepare_mmdet3d if config.suffix == '.py' else _prepare_openpcdet
    script, argv = prepare(name, argv, config)
    sys.argv[:] = [str(script), *argv]
    runpy.run_path(str(script), run_name='__main__')
    return 0
