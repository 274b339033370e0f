"""The adapter of a framework, imported when it is asked for: most environments have only one of them."""

from pathlib import Path
from typing import Optional

from q3d_plugin import extras
from q3d_plugin.adapter import Adapter
from q3d_plugin.errors import Q3DError

__all__ = ['adapter_of', 'framework_of', 'open_adapter']


def open_adapter(framework: str, place: Optional[str] = None) -> Adapter:
    """The adapter of a framework.

    Args:
        framework: ``'mmdet3d'`` or ``'openpcdet'``.
        place: Of MMDetection3D the folder of its configs; where None, that of the wheel. Of OpenPCDet its
            checkout; where None, as :func:`q3d_plugin.openpcdet.register` finds it.

    Raises:
        Q3DError: The framework does not import.
    """
    if framework == 'mmdet3d':
        try:
            from q3d_plugin.mmdet3d.build import MMDet3D
        except ImportError as error:
            hint = extras.hint(error)
            raise Q3DError(
                f'a .py config needs MMDetection3D, which does not import here: {error}{hint}'
            ) from error
        return MMDet3D(place)
    from q3d_plugin import openpcdet

    openpcdet.register(place)
    from q3d_plugin.openpcdet.build import OpenPCDet

    return OpenPCDet()


def framework_of(config: str) -> str:
    """The framework that a config is of: ``'mmdet3d'`` or ``'openpcdet'``.

    Args:
        config: A ``.py`` file (MMDetection3D) or a ``.yaml`` file (OpenPCDet).

    Raises:
        Q3DError: It is no file, or of neither.
    """
    path = Path(config)
    if path.suffix not in ('.py', '.yaml', '.yml'):
        raise Q3DError(
            f'config {config!r}: a .py file (MMDetection3D) or a .yaml file (OpenPCDet) would work'
        )
    if not path.is_file():
        raise Q3DError(f'config {config!r} is not a file (looked in {Path.cwd()})')
    return 'mmdet3d' if path.suffix == '.py' else 'openpcdet'


def adapter_of(config: str) -> Adapter:
    """The adapter of the framework that a config is of.

    Args:
        config: As :func:`framework_of` takes it.

    Raises:
        Q3DError: It is no file, or of neither, or its framework does not import.
    """
    return open_adapter(framework_of(config))
