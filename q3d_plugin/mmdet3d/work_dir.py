"""Where MMDetection3D's scripts write."""

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

__all__ = ['work_dir_of']


def work_dir_of(argv: Sequence[str], config: Path) -> Path:
    """The folder that MMDetection3D's scripts will write to, by their own rule.

    The argument ``--work-dir`` comes first, then the config's ``work_dir``, then the name of the config.

    Args:
        argv: The arguments without the name of the script.
        config: The config file.
    """
    for i, arg in enumerate(argv):
        if arg == '--work-dir' and i + 1 < len(argv):
            return Path(argv[i + 1])
        if arg.startswith('--work-dir='):
            return Path(arg.split('=', 1)[1])
    given = Config.fromfile(str(config), import_custom_modules=False).get('work_dir')
    return Path(given) if given else Path('work_dirs') / config.stem
