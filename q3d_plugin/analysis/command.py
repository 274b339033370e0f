"""What the command lines of the analysis have in common."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Dict, List, Optional

import torch

from q3d_plugin.bench import Bench
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.errors import Q3DError
from q3d_plugin.files import check_writable
from q3d_plugin.recipe import Recipe

__all__ = [
    'add_common',
    'at_least',
    'guarded',
    'open_bench',
    'options_of',
    'out_folder',
    'paste_list',
    'set_threads',
]


def add_common(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the arguments that name a detector.

    Args:
        parser: Of the command.
        what: The folder under ``work_dirs`` where its results go.
    """
    parser.add_argument('config', help='.py: MMDetection3D; .yaml: OpenPCDet; with Quant types and a recipe')
    parser.add_argument('checkpoint', help='of the float model')
    parser.add_argument(
        '--out', help=f'folder for the results (default: work_dirs/{what}/NAME OF THE CONFIG)'
    )
    parser.add_argument(
        '--set',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='changes of the config, such as DATA_CONFIG.DATA_PATH=/data/nuscenes',
    )
    parser.add_argument('--threads', type=int, help="threads of the CPU (default: torch's own choice)")


def options_of(args: argparse.Namespace) -> Dict[str, str]:
    """The changes of the config.

    Raises:
        Q3DError: One has no ``=``.
    """
    out = {}
    for item in args.set:
        key, equals, value = item.partition('=')
        if not equals or not key:
            raise Q3DError(f'--set: {item!r} was given; KEY=VALUE would work')
        out[key] = value
    return out


def out_folder(args: argparse.Namespace, what: str) -> Path:
    """The folder of the results, which can be written to.

    Raises:
        Q3DError: It cannot.
    """
    out = Path(args.out) if args.out else Path('work_dirs') / what / Path(args.config).stem
    check_writable(out)
    return out


def at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Raises :class:`Q3DError` where one of these arguments is given and too small."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace('_', '-')
            raise Q3DError(f'--{option}: {value} was given; a number from {least:g} up would work')


def paste_list(key: str, values: Sequence[str], framework: str) -> str:
    """A list as a config holds it.

    Examples:
        >>> print(paste_list('skip', ['a', 'b'], 'openpcdet'))
        SKIP:
            - a
            - b
    """
    if framework == 'openpcdet':
        # A star begins an alias in YAML.
        lines = [f'    - {repr(v) if "*" in v else v}' for v in values]
        return '\n'.join([f'{key.upper()}:' + ('' if lines else ' []'), *lines])
    if not values:
        return f'{key}=[],'
    return '\n'.join([f'{key}=[', *(f'    {v!r},' for v in values), '],'])


def guarded(run: Callable[[Optional[List[str]]], int], argv: Optional[List[str]] = None) -> int:
    """Runs a command; a mistake of the user ends it with one line and status 2."""
    try:
        return run(argv)
    except Q3DError as error:
        sys.stderr.write(f'q3d_plugin: {error}\n')
        return 2


def set_threads(args: argparse.Namespace) -> None:
    """As many threads as were asked for."""
    at_least(args, 1, 'threads')
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def open_bench(
    config: str, checkpoint: str, options: Optional[Mapping[str, str]] = None, recipe: Optional[Recipe] = None
) -> Bench:
    """Builds the model of a config and loads a checkpoint, with the checks of the adapter.

    Args:
        config: A ``.py`` file (MMDetection3D) or a ``.yaml`` file (OpenPCDet), with Quant types.
        checkpoint: Float or quantized.
        options: Dotted keys of the config to change, and their values as text.
        recipe: In place of the config's recipe.

    Raises:
        Q3DError: Anything is missing or does not fit.
    """
    path = Path(config)
    if path.suffix not in ('.py', '.yaml', '.yml'):
        raise Q3DError(
            f'config {config!r}: a .py file (MMDetection3D) or a .yaml file (OpenPCDet) would work'
        )
    if not path.is_file():
        raise Q3DError(f'config {config!r} is not a file (looked in {Path.cwd()})')
    check_checkpoint_file(checkpoint)
    if path.suffix == '.py':
        try:
            from q3d_plugin.mmdet3d.bench import MMDet3DBench
        except ImportError as error:
            raise Q3DError(
                f'a .py config needs MMDetection3D, which does not import here: {error}'
            ) from error
        return MMDet3DBench(path, checkpoint, options, recipe)
    from q3d_plugin import openpcdet

    openpcdet.register()
    from q3d_plugin.openpcdet.bench import OpenPCDetBench

    return OpenPCDetBench(path, checkpoint, options, recipe)
