"""Where OpenPCDet keeps its types: the ``__all__`` dictionaries of ``pcdet.models``."""

import importlib
from typing import Dict, Type

from torch import nn

__all__ = ['REGISTRIES', 'registry_of']

REGISTRIES = {
    'NAME': 'pcdet.models.detectors',
    'VFE': 'pcdet.models.backbones_3d.vfe',
    'BACKBONE_3D': 'pcdet.models.backbones_3d',
    'MAP_TO_BEV': 'pcdet.models.backbones_2d.map_to_bev',
    'PFE': 'pcdet.models.backbones_3d.pfe',
    'BACKBONE_2D': 'pcdet.models.backbones_2d',
    'DENSE_HEAD': 'pcdet.models.dense_heads',
    'POINT_HEAD': 'pcdet.models.dense_heads',
    'ROI_HEAD': 'pcdet.models.roi_heads',
    'IMAGE_BACKBONE': 'pcdet.models.backbones_image',
    'NECK': 'pcdet.models.backbones_image.img_neck',
    'VTRANSFORM': 'pcdet.models.view_transforms',
    'FUSER': 'pcdet.models.backbones_2d.fuser',
}
"""Section of a model's config (NAME: the detector) -> the module whose ``__all__`` has its types by name."""


def registry_of(section: str) -> Dict[str, Type[nn.Module]]:
    """The registry that the NAME of a section of a model's config is looked up in.

    Args:
        section: A key of :data:`REGISTRIES`.

    Returns:
        dict: Types by name; empty where the OpenPCDet at hand has no such section.
    """
    try:
        return importlib.import_module(REGISTRIES[section]).__all__
    except ModuleNotFoundError as error:
        if error.name is None or not REGISTRIES[section].startswith(error.name):
            raise
        return {}
