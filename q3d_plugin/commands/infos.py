"""Writes a framework's info files for a data set in nuScenes format, by its own converter.

    q3d infos mmdet3d data/nuscenes --version v1.0-trainval --sweeps 10
    q3d infos openpcdet data/nuscenes --version v1.0-trainval --sweeps 10

Without the database of ground-truth objects, which testing and calibration do not need. OpenPCDet looks for a
data set in DATA_PATH/VERSION: where ROOT holds the samples itself, as MMDetection3D wants it, ROOT/VERSION
becomes that folder by links to what is in ROOT, and both frameworks can use the same copy.
"""

import argparse
from pathlib import Path
from typing import List, Optional

from q3d_plugin import launch
from q3d_plugin.errors import Q3DError

__all__ = ['info_files', 'main', 'write_infos']

VERSIONS = ('v1.0-mini', 'v1.0-trainval', 'v1.0-test')


def info_files(framework: str, root: Path, version: str, sweeps: int, prefix: str = 'nuscenes') -> List[Path]:
    """The files that :func:`write_infos` writes.

    Args:
        framework: ``'mmdet3d'`` or ``'openpcdet'``.
        root: Folder of the data set.
        version: Its version, such as ``v1.0-mini``.
        sweeps: See :func:`write_infos`.
        prefix: See :func:`write_infos`.
    """
    splits = ('test',) if version.endswith('test') else ('train', 'val')
    if framework == 'mmdet3d':
        return [root / f'{prefix}_infos_{split}.pkl' for split in splits]
    return [root / version / f'nuscenes_infos_{sweeps}sweeps_{split}.pkl' for split in splits]


def write_infos(framework: str, root: Path, version: str, sweeps: int, prefix: str = 'nuscenes') -> None:
    """Writes the info files of one framework, and prints their names.

    Args:
        framework: ``'mmdet3d'`` or ``'openpcdet'``.
        root: Folder of the data set.
        version: Its version, such as ``v1.0-mini``.
        sweeps: For MMDetection3D the sweeps before a key frame, for OpenPCDet all sweeps of a frame, the key
            frame included.
        prefix: First part of MMDetection3D's file names.

    Raises:
        Q3DError: There is no such data set, or the framework is missing.
    """
    least = 0 if framework == 'mmdet3d' else 1
    if sweeps < least:
        raise Q3DError(f'--sweeps: {sweeps} was given; {least} or more would work')
    if framework == 'mmdet3d':
        if not (root / version).is_dir():
            raise Q3DError(f'{str(root)!r} has no folder {version}: not a nuScenes data set of that version')
        # The converters import each other as tools.dataset_converters, from the folder above tools/.
        above = launch.find_script('create_data.py').parents[1]
        from q3d_plugin.mmdet3d.infos import make_infos

        make_infos(root, version, sweeps, prefix, above)
    else:
        from q3d_plugin.openpcdet.infos import make_infos

        make_infos(root, version, sweeps)
    for path in info_files(framework, root, version, sweeps, prefix):
        print(f'wrote {path}')


def main(argv: Optional[List[str]] = None) -> int:
    """Writes them; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('framework', choices=('mmdet3d', 'openpcdet'))
    parser.add_argument('root', type=Path, help='folder of the data set')
    parser.add_argument('--version', default='v1.0-mini', choices=VERSIONS, help='default: %(default)s')
    parser.add_argument(
        '--sweeps',
        type=int,
        help='mmdet3d: sweeps before a key frame (default: 1); openpcdet: MAX_SWEEPS (default: 2)',
    )
    parser.add_argument(
        '--prefix', default='nuscenes', help="first part of MMDetection3D's file names (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    sweeps = args.sweeps if args.sweeps is not None else {'mmdet3d': 1, 'openpcdet': 2}[args.framework]
    write_infos(args.framework, args.root, args.version, sweeps, args.prefix)
    return 0
