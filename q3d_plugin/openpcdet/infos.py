"""Info files of nuScenes, by OpenPCDet's own converter."""

import os
import tempfile
from pathlib import Path

from q3d_plugin.errors import Q3DError

__all__ = ['arrange', 'make_infos']

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
        raise Q3DError(f'{str(root)!r} has no {version}/{TABLE}: not a nuScenes data set of that version')
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

    A file appears whole or not at all.

    Args:
        root: The folder that a config names as ``DATA_PATH``.
        version: Version of the data set, such as ``v1.0-mini``.
        sweeps: ``MAX_SWEEPS`` of the config: how many sweeps a frame has, the key frame itself included.

    Raises:
        Q3DError: There is no such data set, or no OpenPCDet.
    """
    root = root.resolve()
    folder = arrange(root, version)
    from q3d_plugin.openpcdet.cpu import import_pcdet

    import_pcdet()
    from pcdet.datasets.nuscenes.nuscenes_dataset import create_nuscenes_info

    with tempfile.TemporaryDirectory(prefix='.q3d-infos-', dir=root) as temporary:
        made = Path(temporary) / version
        made.mkdir()
        create_nuscenes_info(version, root, Path(temporary), max_sweeps=sweeps)
        for path in sorted(made.glob('*.pkl')):
            os.replace(path, folder / path.name)
