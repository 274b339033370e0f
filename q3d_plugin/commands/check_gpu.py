"""Checks and measures everything that only CUDA shows, on a machine with an NVIDIA GPU.

    q3d check-gpu [--wheels DIR] [--part NAME ...] [--out DIR] [--cpu-summary FILE]
    q3d check-gpu --collect DIR --python 3.12 --cuda 12.6

Works in a checkout of the repository. The first part, setup, makes an environment of its own beside the torch
that is there, from DIR where the machine has no network. Results of earlier runs stay in the folder of --out,
so that the parts can be run one at a time. With --collect it fills DIR instead, on a machine with a network.
"""

import argparse
import sys
from pathlib import Path
from typing import List, Optional

from q3d_plugin import files
from q3d_plugin.errors import Q3DError, near_matches

__all__ = ['main']

OUT = 'work_dirs/check_gpu'


def _root() -> Path:
    """The checkout, which has the tests.

    Raises:
        Q3DError: The plugin was installed from a wheel.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / 'tests' / 'gpu').is_dir():
        raise Q3DError(f'check-gpu needs a checkout of the repository, with its tests; {root} is none')
    return root


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--wheels', type=Path, help='folder that --collect filled; without it, pip downloads')
    parser.add_argument(
        '--part',
        nargs='+',
        default=[],
        metavar='NAME',
        help='of setup, tests, kernels, demo, openpcdet, benchmark, report',
    )
    parser.add_argument('--out', type=Path, default=Path(OUT), help='default: %(default)s')
    parser.add_argument(
        '--cpu-summary', type=Path, help='summary.json of "q3d demo" on a CPU, to compare with'
    )
    parser.add_argument('--collect', type=Path, metavar='DIR', help='folder to fill')
    parser.add_argument('--python', help='with --collect: version of Python on the other machine')
    parser.add_argument('--cuda', help='with --collect: version of CUDA that torch was built for there')
    return parser


def _collect(args: argparse.Namespace) -> int:
    from q3d_plugin.gpu_check.collect import collect, parts_table

    for name in ('python', 'cuda'):
        if getattr(args, name) is None:
            raise Q3DError(f'--collect: --{name} is missing; --python 3.12 --cuda 12.6 would work')
    files.check_writable(args.collect)
    parts, missing = collect(args.collect, args.python, args.cuda, _root())
    print(parts_table(parts))
    if missing:
        print(f'there is no wheel for Python {args.python} of: {", ".join(missing)}')
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command.

    Returns:
        int: 0, or 1 where a check failed or a target is missed.

    Raises:
        Q3DError: There is no GPU, or nothing can be checked on it.
    """
    args = _parser().parse_args(argv)
    if args.collect is not None:
        return _collect(args)
    for name in ('python', 'cuda'):
        if getattr(args, name) is not None:
            raise Q3DError(f'--{name} goes with --collect; PYTHON=... names the interpreter for the checks')
    from q3d_plugin.gpu_check import parts
    from q3d_plugin.gpu_check.machine import check_torch, gpus, torch_facts

    for name in args.part:
        if name not in parts.PARTS:
            raise Q3DError(f'--part: {name!r} is no part{near_matches(name, parts.PARTS)}')
    found = gpus()
    facts = torch_facts(sys.executable)
    check_torch(found, facts['torch'], facts['cuda'], facts['available'])
    files.check_writable(args.out)
    settings = parts.Settings(
        root=_root(),
        out=args.out.absolute(),
        wheels=args.wheels,
        cpu_summary=args.cpu_summary,
        gpu=found[0],
        facts=facts,
    )
    return parts.run_parts(args.part or list(parts.PARTS), settings)
