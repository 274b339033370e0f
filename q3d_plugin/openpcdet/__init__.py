"""OpenPCDet adapter. ``q3d_plugin.openpcdet.register()`` finds OpenPCDet and registers everything.

Importing the package alone imports no ``pcdet``. The launchers (``tools/test.py`` and ``tools/train.py`` with
a ``.yaml`` config) call :func:`register` before OpenPCDet's own script runs; a script of one's own does the
same before ``build_network``.
"""

from types import ModuleType
from typing import Optional

__all__ = ['register']

_ADVICE = 'Give the detector a Quant name too, and the recipe under MODEL.QUANT (OpenPCDet)'


def register(root: Optional[str] = None) -> ModuleType:
    """Finds OpenPCDet, switches CPU mode on where there is no CUDA, and fills OpenPCDet's registries.

    Args:
        root: A source checkout; where None, the installed package or the environment variable
            ``OPENPCDET_ROOT``.

    Returns:
        ModuleType: The package ``pcdet``.

    Raises:
        Q3DError: There is no OpenPCDet, or it does not import.
    """
    from q3d_plugin.openpcdet.cpu import import_pcdet

    pcdet = import_pcdet(root)
    from q3d_plugin.openpcdet.checkpoints import trust_openpcdet_checkpoints
    from q3d_plugin.openpcdet.parts import register_parts
    from q3d_plugin.quantizer import ADVICE

    register_parts()
    if _ADVICE not in ADVICE:
        ADVICE.append(_ADVICE)
    trust_openpcdet_checkpoints()
    return pcdet
