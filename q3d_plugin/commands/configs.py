"""Lists the configs and checkpoints that come with the plugin, or copies them to change them.

The other commands take these names as they are listed here, from any folder:

    q3d test mmdet3d/toy_centerpoint_voxel_w8a8.py mmdet3d/toy_centerpoint_voxel.pth

A file of that name in the working directory comes first.
"""

import argparse
import shutil
from pathlib import Path
from typing import List, Optional

from q3d_plugin import files
from q3d_plugin.errors import Q3DError
from q3d_plugin.shipped import config_names, configs_folder

__all__ = ['copy_configs', 'main']


def copy_configs(target: Path) -> List[Path]:
    """Copies all shipped files into a folder, in the same arrangement.

    Args:
        target: The folder, which need not exist.

    Returns:
        list: The copies.

    Raises:
        Q3DError: One is there already with other content; nothing is copied then.
    """
    pairs = [(configs_folder() / name, target / name) for name in config_names()]
    for source, copy in pairs:
        if copy.exists() and (copy.is_dir() or copy.read_bytes() != source.read_bytes()):
            raise Q3DError(f'--copy: {str(copy)!r} is there and differs; an empty or new folder would work')
    files.check_writable(target)
    for source, copy in pairs:
        with files.replacing(copy) as temporary:
            shutil.copyfile(source, temporary)
    return [copy for _, copy in pairs]


def main(argv: Optional[List[str]] = None) -> int:
    """Lists or copies; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument('--copy', type=Path, metavar='DIR', help='copy all of them into this folder')
    args = parser.parse_args(argv)
    if args.copy is None:
        print('\n'.join([*config_names(), f'in {configs_folder()}']))
    else:
        print(f'copied {len(copy_configs(args.copy))} files to {args.copy}')
    return 0
