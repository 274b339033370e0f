"""The configs and checkpoints that come with the plugin, in a checkout and in the wheel alike.

In a checkout they are the folder ``configs`` beside the package, in the wheel ``q3d_plugin/configs``.
"""

import os
from pathlib import Path
from typing import List

from q3d_plugin.errors import Q3DError

__all__ = ['config_names', 'configs_folder', 'find_shipped']


def configs_folder() -> Path:
    """The folder that holds ``mmdet3d/`` and ``openpcdet/``.

    Raises:
        Q3DError: The installation is broken.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / 'configs', package.parent / 'configs'):
        if (folder / 'mmdet3d').is_dir():
            return folder
    raise Q3DError(f'{package} has no configs: the installation is not complete, install q3d-plugin again')


def config_names() -> List[str]:
    """Names of all shipped files, such as ``mmdet3d/toy_centerpoint_voxel.py``, sorted."""
    folder = configs_folder()
    files = (p for s in ('.py', '.yaml', '.pth') for p in folder.rglob(f'*{s}'))
    return sorted(p.relative_to(folder).as_posix() for p in files)


def find_shipped(given: str) -> str:
    """The file that the user named: as it is where it exists, else the shipped one of that name.

    Args:
        given: A path, or the name of a shipped file with or without ``configs/`` before it.

    Returns:
        str: A path that exists, or ``given`` unchanged where there is no such file either.

    Examples:
        >>> find_shipped('nowhere/x.py')
        'nowhere/x.py'
    """
    if os.path.exists(given) or os.path.isabs(given):
        return given
    name = os.path.normpath(given)
    names = config_names()
    for candidate in (name, os.path.relpath(name, 'configs')):
        if Path(candidate).as_posix() in names:
            return str(configs_folder() / candidate)
    return given
