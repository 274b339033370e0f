"""Info files of nuScenes, by MMDetection3D's own converter."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ['make_infos']


@contextlib.contextmanager
def _working_in(folder: Path, first: Path) -> Iterator[None]:
    """Within it ``folder`` is the working directory, and ``first`` comes first on the module path."""
    before = os.getcwd()
    os.chdir(folder)
    sys.path.insert(0, str(first))
    try:
        yield
    finally:
        sys.path.remove(str(first))
        os.chdir(before)


def make_infos(root: Path, version: str, sweeps: int, prefix: str, above: Path) -> None:
    """Writes ``{prefix}_infos_train.pkl`` and ``{prefix}_infos_val.pkl`` into ``root``.

    A file appears whole or not at all.

    Args:
        root: A data set in nuScenes format.
        version: Its version, such as ``v1.0-mini``; ``v1.0-test`` has one file, ``{prefix}_infos_test.pkl``.
        sweeps: How many sweeps before a key frame are listed.
        prefix: First part of the file names.
        above: The folder that holds MMDetection3D's ``tools/dataset_converters``.
    """
    root = root.resolve()
    with tempfile.TemporaryDirectory(prefix='.q3d-infos-', dir=root) as temporary:
        folder = Path(temporary)
        # The second step reads ./data/nuscenes, whatever the data set's folder is.
        (folder / 'data').mkdir()
        (folder / 'data' / 'nuscenes').symlink_to(root)
        part = f'{folder.name}/{prefix}'
        with _working_in(folder, above):
            from tools.dataset_converters import nuscenes_converter
            from tools.dataset_converters.update_infos_to_v2 import update_pkl_infos

            nuscenes_converter.create_nuscenes_infos(str(root), part, version=version, max_sweeps=sweeps)
            for made in sorted(folder.glob(f'{prefix}_infos_*.pkl')):
                update_pkl_infos('nuscenes', out_dir=str(folder), pkl_path=str(made))
        for made in sorted(folder.glob(f'{prefix}_infos_*.pkl')):
            os.replace(made, root / made.name)
