"""Generates the toy nuScenes and writes the info files of the frameworks that are there.

    q3d toy-data
    q3d toy-data --out DIR --seed 1 --train-scenes 8 --val-scenes 2 --frames 32 --infos mmdet3d
    q3d toy-data --out DIR --profile look-alikes

A set in the format of nuScenes v1.0-mini: a ray-cast LiDAR of 32 beams, six cameras, all tables. The data
depends on seed and profile and not on --processes, and a scene does not change with the number of others. A
set that is there already is used again; another toy set in its place is replaced.
"""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import List, Optional

from q3d_plugin.commands import infos
from q3d_plugin.errors import Q3DError
from q3d_plugin.toy_nuscenes.profiles import PROFILES

__all__ = ['frameworks_at_hand', 'main']

SWEEPS = {'mmdet3d': 1, 'openpcdet': 2}
"""Sweeps in the info files, as the shipped toy configs read them."""


def frameworks_at_hand() -> List[str]:
    """The frameworks that are installed, or whose checkouts environment variables name."""
    places = {'mmdet3d': ('mmdet3d', 'MMDET3D_ROOT'), 'openpcdet': ('pcdet', 'OPENPCDET_ROOT')}
    return [
        framework
        for framework, (module, variable) in places.items()
        if os.environ.get(variable) or importlib.util.find_spec(module)
    ]


def generate(out: Path, arguments: dict, processes: int) -> str:
    """Generates the data set; returns what to say about it."""
    # The processes share the cores already; threads of the linear algebra would only wait for each other. To
    # be set before NumPy is imported.
    for name in ('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ.setdefault(name, '1')
    from q3d_plugin.toy_nuscenes.dataset import make_dataset

    if not make_dataset(out, arguments, processes):
        return f'{out} already holds this set, reusing it'
    size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())
    return f'wrote {out}: {size / 1e6:.0f} MB'


def write_infos(root: Path, frameworks: Sequence[str]) -> None:
    """Writes the info files that are missing."""
    for framework in frameworks:
        missing = [
            p for p in infos.info_files(framework, root, 'v1.0-mini', SWEEPS[framework]) if not p.is_file()
        ]
        if missing:
            infos.write_infos(framework, root, 'v1.0-mini', SWEEPS[framework])
        else:
            print(f'{root} already holds the info files of {framework}')


def main(argv: Optional[List[str]] = None) -> int:
    """Generates the set and writes the info files; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        '--out', type=Path, default=Path('data/toy_nuscenes'), help='the data root (default: %(default)s)'
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument('--train-scenes', type=int, default=8, help='1 to 8 (default: %(default)s)')
    parser.add_argument('--val-scenes', type=int, default=2, help='1 or 2 (default: %(default)s)')
    parser.add_argument(
        '--frames',
        type=int,
        default=32,
        help='keyframes a scene, 1 to 40, 0.5 s apart (default: %(default)s)',
    )
    abouts = '; '.join(f'{name}: {profile.about}' for name, profile in PROFILES.items())
    parser.add_argument('--profile', choices=tuple(PROFILES), default='default', help=abouts)
    parser.add_argument(
        '--processes', type=int, default=2, help='does not change the data (default: %(default)s)'
    )
    parser.add_argument(
        '--infos',
        nargs='+',
        choices=('auto', 'none', 'mmdet3d', 'openpcdet'),
        default=['auto'],
        help='whose info files; auto: of MMDetection3D where it is installed, and of OpenPCDet where it is '
        'installed or OPENPCDET_ROOT names a checkout (default: auto)',
    )
    args = parser.parse_args(argv)
    if len(args.infos) > 1 and {'auto', 'none'} & set(args.infos):
        raise Q3DError(f'--infos: {" ".join(args.infos)} was given; auto or none stands alone')
    if not 1 <= args.processes <= 64:
        raise Q3DError(f'--processes: {args.processes} was given; 1 to 64 would work')
    arguments = {k: getattr(args, k) for k in ('seed', 'train_scenes', 'val_scenes', 'frames')}
    if args.profile != 'default':
        arguments['profile'] = args.profile
    print(generate(args.out, arguments, args.processes), flush=True)
    if args.infos == ['auto']:
        frameworks = frameworks_at_hand()
        if not frameworks:
            print(
                'no info files: neither MMDetection3D nor OpenPCDet is installed, OPENPCDET_ROOT is not set'
            )
    else:
        frameworks = [] if args.infos == ['none'] else list(dict.fromkeys(args.infos))
    write_infos(args.out, frameworks)
    return 0
