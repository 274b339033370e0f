"""Shared by the commands: arguments that name a detector, folders of results, how a command ends."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Dict, List, Optional

import torch

from q3d_plugin.errors import Q3DError
from q3d_plugin.files import check_writable

__all__ = [
    'add_common',
    'add_frame',
    'as_command',
    'at_least',
    'options_of',
    'out_folder',
    'parser_of',
    'set_threads',
]


def parser_of(name: str, words: str) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        name: What follows ``q3d``.
        words: Docstring of its module.
    """
    return argparse.ArgumentParser(
        prog=f'q3d {name}',
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


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


def add_frame(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that names a frame in the place of a data set."""
    parser.add_argument(
        '--frame',
        metavar='FILE|FOLDER',
        help='the frame for calibration and measurement, in place of the data set of the config: a LiDAR '
        'file, or a folder with that, the camera images and an info file',
    )


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


def as_command(run: Callable[[Optional[List[str]]], int]) -> Callable[..., int]:
    """The ``main`` of a command: ``run``, where a mistake of the user ends in one line and status 2.

    Args:
        run: Takes the arguments, those of the process where None, and returns the exit status.
    """

    def main(argv: Optional[List[str]] = None) -> int:
        """Runs the command; returns the exit status."""
        try:
            return run(argv)
        except Q3DError as error:
            sys.stderr.write(f'q3d_plugin: {error}\n')
            return 2

    return main


def set_threads(args: argparse.Namespace) -> None:
    """As many threads as were asked for."""
    at_least(args, 1, 'threads')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
