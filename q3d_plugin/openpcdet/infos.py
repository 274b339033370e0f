"""Info files for OpenPCDet, by its own converter, without the ground-truth database.

OPENPCDET_ROOT=../OpenPCDet python tools/make_openpcdet_infos.py data/toy_nuscenes --version v1.0-mini

OpenPCDet looks for a data set in DATA_PATH/VERSION. Where ROOT holds the samples itself, as MMDetection3D
wants it, ROOT/VERSION becomes that folder by links to what is in ROOT, and both can use the same copy.
"""

import argparse
import os
import sys
from pathlib import Path

from q3d_plugin.errors import Q3DError

TABLE = 'sample_data.json'


def arrange(root: Path, version: str) -> Path:
    """Makes sure that ``root/version`` is a data set in OpenPCDet's arrangement.

    Args:
        root: A data set in nuScenes format, in either arrangement.
        version: Its version, such as ``v1.0-mini``.

    Returns:
        Path: ``root/version``, with ``samples`` and ``sweeps`` in it.

    Raises:
        Q3DError: There is no such data set.
    """
    folder = root / version
    if (folder / version / TABLE).is_file():
        return folder
    if not (folder / TABLE).is_file():
        raise Q3DError(f'{root} has no {version}/{TABLE}: not a nuScenes data set of that version')
    for name in ('samples', 'sweeps', 'maps'):
        if (root / name).is_dir() and not (folder / name).exists():
            (folder / name).symlink_to(Path('..') / name)
    tables = folder / version
    tables.mkdir(exist_ok=True)
    for table in folder.glob('*.json'):
        if not (tables / table.name).exists():
            (tables / table.name).symlink_to(Path('..') / table.name)
    return folder


def make_infos(root: Path, version: str, sweeps: int) -> None:
    """Writes ``nuscenes_infos_{sweeps}sweeps_train.pkl`` and ``..._val.pkl`` into ``root/version``.

    Args:
        root: The folder that a config names as ``DATA_PATH``.
        version: Version of the data set, such as ``v1.0-mini``.
        sweeps: ``MAX_SWEEPS`` of the config: how many sweeps a frame has, the key frame itself included.
    """
    folder = arrange(root, version)
    from q3d_plugin.openpcdet.cpu import import_pcdet

    import_pcdet()
    from pcdet.datasets.nuscenes.nuscenes_dataset import create_nuscenes_info

    create_nuscenes_info(version, root, root, max_sweeps=sweeps)
    for split in ('test',) if 'test' in version else ('train', 'val'):
        print(f'wrote {folder / f"nuscenes_infos_{sweeps}sweeps_{split}.pkl"}')


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('root', type=Path, help='folder of the data set, the DATA_PATH of a config')
    parser.add_argument(
        '--version',
        default='v1.0-mini',
        choices=['v1.0-mini', 'v1.0-trainval', 'v1.0-test'],
        help='default: %(default)s',
    )
    parser.add_argument(
        '--sweeps', type=int, default=2, help='sweeps a frame, MAX_SWEEPS of a config (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    try:
        if args.sweeps < 1:
            raise Q3DError(f'--sweeps {args.sweeps}: a frame has at least 1 sweep, the key frame itself')
        make_infos(args.root.resolve(), args.version, args.sweeps)
    except Q3DError as error:
        print(f'make_openpcdet_infos: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != here]
    sys.exit(main())
