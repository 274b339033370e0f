"""Packages that q3d_plugin does not bring by itself, and the extras of its own that do."""

from types import MappingProxyType

__all__ = ['EXTRAS', 'hint']

EXTRAS = MappingProxyType(
    {
        'cv2': 'toy',
        'easydict': 'openpcdet',
        'matplotlib': 'report',
        'mmcv': 'mmdet3d',
        'mmdet': 'mmdet3d',
        'mmdet3d': 'mmdet3d',
        'mmengine': 'mmdet3d',
        'nuscenes': 'toy',
        'numba': 'openpcdet',
        'onnx': 'export',
        'onnxruntime': 'export',
        'openvino': 'export',
        'pkg_resources': 'mmdet3d',
        'pyquaternion': 'toy',
        'skimage': 'openpcdet',
        'spconv': 'cpu',
        'tensorboardX': 'openpcdet',
        'yaml': 'openpcdet',
    }
)
"""Module -> the extra in pyproject.toml that installs it."""


def hint(error: ImportError) -> str:
    """How to install what an import did not find, as the end of an error message; empty where unknown.

    Args:
        error: The error; its ``name`` tells the module.

    Examples:
        >>> hint(ImportError('No module named matplotlib', name='matplotlib.figure'))
        "; pip install 'q3d-plugin[report]' installs it"
    """
    extra = EXTRAS.get((error.name or '').partition('.')[0])
    if not extra:
        return ''
    other = ' (with CUDA: [cu120])' if extra == 'cpu' else ''
    return f"; pip install 'q3d-plugin[{extra}]' installs it{other}"
