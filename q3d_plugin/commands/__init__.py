"""The commands of ``q3d``: one module of this package each.

The module ``toy_data`` is the command ``q3d toy-data``. It has a docstring, whose first line ``q3d --help``
shows, and a function ``main(argv: Optional[List[str]] = None) -> int``, which takes the arguments that follow
the name of the command and returns the exit status. A mistake of the user it raises as :class:`Q3DError`.

Nothing heavy is imported before a command is chosen: the list of commands is read from their source.
"""

import ast
import contextlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from typing import List, Optional

from q3d_plugin import __version__, extras
from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.text import text_table

__all__ = ['command_names', 'main', 'summary']


def command_names() -> List[str]:
    """Names of all commands, as they are typed."""
    return sorted(m.name.replace('_', '-') for m in pkgutil.iter_modules(__path__) if m.name[0] != '_')


def summary(name: str) -> str:
    """The first line of a command's docstring, read without importing the module."""
    spec = importlib.util.find_spec(f'{__name__}.{name.replace("-", "_")}')
    return (ast.get_docstring(ast.parse(spec.loader.get_source(spec.name))) or '').partition('\n')[0]


def _help() -> str:
    commands = text_table(['command', ''], [[name, summary(name)] for name in command_names()])
    return (
        'usage: q3d COMMAND [arguments]\n'
        '       q3d COMMAND --help\n'
        '       q3d --version\n\n'
        'INT8 quantization of 3D detectors in MMDetection3D and OpenPCDet, by config alone.\n\n'
        f'{commands}\n\n'
        'A config or checkpoint that is not in the working directory is looked for among those that come\n'
        'with the plugin; "q3d configs" lists them.'
    )


def _forget_script_folder() -> None:
    """Takes the folder of the script that was started off the module path.

    Python puts it there first. Scripts beside it, such as test.py or report.py, would shadow modules of that
    name in the frameworks and in the standard library.
    """
    if os.path.isfile(sys.argv[0]):
        here = os.path.dirname(os.path.realpath(sys.argv[0]))
        sys.path[:] = [p for p in sys.path if os.path.realpath(p) != here]


@contextlib.contextmanager
def _called(name: str) -> Iterator[None]:
    """Within it the program is called ``name`` in usage lines, which argparse takes from ``sys.argv``."""
    before = sys.argv[0]
    sys.argv[0] = name
    try:
        yield
    finally:
        sys.argv[0] = before


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command that the first argument names.

    Args:
        argv: The arguments; those of the process where None.

    Returns:
        int: Exit status: that of the command, or 2 after a mistake, which one line on standard error tells.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    _forget_script_folder()
    if not argv or argv[0] in ('-h', '--help'):
        print(_help())
        return 0
    if argv[0] == '--version':
        print(f'q3d_plugin {__version__}')
        return 0
    name = argv[0]
    try:
        if name not in command_names():
            raise Q3DError(f'{name!r} is no command{near_matches(name, command_names())}')
        module = importlib.import_module(f'{__name__}.{name.replace("-", "_")}')
        with _called(f'q3d {name}'):
            return module.main(argv[1:])
    except Q3DError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if not extras.hint(error):
            raise
        message = f'q3d {name} needs the package {error.name}, which is not here{extras.hint(error)}'
    print(f'q3d_plugin: {message}', file=sys.stderr)
    return 2
