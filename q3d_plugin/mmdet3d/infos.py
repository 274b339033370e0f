"""Info files for MMDetection3D, by its own converter, without the ground-truth database.

python tools/make_infos.py data/toy_nuscenes --version v1.0-mini
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from q3d_plugin.errors import Q3DError
from q3d_plugin.launch import find_script


def make_infos(root: Path, version: str, sweeps: int, prefix: str) -> None:
    """Writes ``{prefix}_infos_train.pkl`` and ``{prefix}_infos_val.pkl`` into ``root``.

    Args:
        root: A data set in nuScenes format.
        version: Its version, such as ``v1.0-mini``.
        sweeps: How many sweeps before a key frame are listed.
        prefix: First part of the file names.
    """
    # The converters import each other as tools.dataset_converters, from the folder above tools/.
    above = find_script('create_data.py').parents[1]
    sys.path.insert(0, str(above))
    from tools.dataset_converters import nuscenes_converter
    from tools.dataset_converters.update_infos_to_v2 import update_pkl_infos

    root, start = root.resolve(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        # The second step reads ./data/nuscenes, whatever the data set's folder is.
        (Path(folder) / 'data').mkdir()
        (Path(folder) / 'data' / 'nuscenes').symlink_to(root)
        os.chdir(folder)
        try:
            nuscenes_converter.create_nuscenes_infos(str(root), prefix, version=version, max_sweeps=sweeps)
            for split in ('train', 'val'):
                path = root / f'{prefix}_infos_{split}.pkl'
                update_pkl_infos('nuscenes', out_dir=str(root), pkl_path=str(path))
        finally:
            os.chdir(start)
    for split in ('train', 'val'):
        print(f'wrote {root / f"{prefix}_infos_{split}.pkl"}')


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('root', type=Path, help='folder of the data set')
    parser.add_argument('--version', default='v1.0-mini', help='default: %(default)s')
    parser.add_argument(
        '--sweeps', type=int, default=1, help='sweeps before a key frame (default: %(default)s)'
    )
    parser.add_argument('--prefix', default='nuscenes', help='default: %(default)s')
    args = parser.parse_args(argv)
    if not (args.root / args.version).is_dir():
        print(
            f'make_infos: {args.root} has no folder {args.version}: not a nuScenes data set', file=sys.stderr
        )
        return 2
    try:
        make_infos(args.root, args.version, args.sweeps, args.prefix)
    except Q3DError as error:
        print(f'make_infos: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or '.') != here]
    sys.exit(main())
