"""MMDetection3D's ``projects/BEVFusion``, which no wheel has: found, made to run without CUDA, and imported.

The package ``projects`` comes from a source checkout that the environment variable ``MMDET3D_ROOT`` names, or
is installed. Whoever imports ``projects.BEVFusion.bevfusion``, a config's ``custom_imports`` or
:func:`import_bevfusion`, gets it ready to run: on a machine without CUDA its compiled operators are those of
:mod:`q3d_plugin.bev_ops`, and its ``torch.autocast('cuda', ...)`` speaks of the CPU. It is imported on demand
only: other projects register types of the same names.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import List, Optional

import torch
from mmengine.config import Config

from q3d_plugin.bev_ops import BEV_POOL, VOXEL_LAYER
from q3d_plugin.errors import Q3DError, near_matches
from q3d_plugin.stand_in import StandIn

__all__ = [
    'BEVFUSION',
    'import_bevfusion',
    'import_for',
    'prepare_bevfusion',
    'upstream_config',
    'when_imported',
]

BEVFUSION = 'projects.BEVFusion.bevfusion'
"""The package whose import registers BEVFusion's types."""
EXTENSIONS = {
    f'{BEVFUSION}.ops.bev_pool.bev_pool_ext': BEV_POOL,
    f'{BEVFUSION}.ops.voxel.voxel_layer': VOXEL_LAYER,
}
"""Compiled module -> what stands in for it on a machine without CUDA."""
AUTOCAST = (f'{BEVFUSION}.bevfusion', f'{BEVFUSION}.transfusion_head')
"""The modules that name CUDA where they switch autocast off."""
BUILD = 'python projects/BEVFusion/setup.py develop'

_callbacks: List[Callable[[], None]] = []


def prepare_bevfusion() -> None:
    """Lets ``import projects.BEVFusion.bevfusion`` work from now on; imports nothing.

    Puts ``MMDET3D_ROOT`` at the end of the path of modules, and sees to the operators when the package is
    imported. Can be called any number of times.
    """
    root = os.environ.get('MMDET3D_ROOT')
    if root:
        folder = str(Path(root).expanduser().resolve())
        if folder not in sys.path:
            # At the end, so that an installed mmdet3d stays the one that is imported.
            sys.path.append(folder)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def import_bevfusion(quiet: bool = False) -> Optional[types.ModuleType]:
    """Imports BEVFusion, which registers its types in MMDetection3D's registries.

    Args:
        quiet: Whether to return None where it cannot be imported.

    Returns:
        ModuleType: The package ``projects.BEVFusion.bevfusion``.

    Raises:
        Q3DError: It is not found, its operators are not compiled although there is a CUDA device, or another
            project has registered types of the same names.
    """
    prepare_bevfusion()
    try:
        return _import()
    except (ImportError, Q3DError):
        if quiet:
            return None
        raise


def import_for(config: Path) -> None:
    """Imports BEVFusion where a config's ``custom_imports`` names it.

    MMEngine would do so a moment later, but with its own words where that fails.

    Args:
        config: The config file.

    Raises:
        Q3DError: As :func:`import_bevfusion`.
    """
    custom = Config.fromfile(str(config), import_custom_modules=False).get('custom_imports') or {}
    names = custom.get('imports') or []
    if BEVFUSION in ([names] if isinstance(names, str) else names):
        import_bevfusion()


def _import() -> types.ModuleType:
    try:
        return importlib.import_module(BEVFUSION)
    except ModuleNotFoundError as error:
        if not BEVFUSION.startswith(error.name or 'no name'):
            raise Q3DError(
                f'{BEVFUSION} needs the package {error.name!r}, which is not installed: pip install '
                f'{error.name}'
            ) from error
        raise Q3DError(_not_found()) from error
    except KeyError as error:  # of a registry
        raise Q3DError(f'{BEVFUSION} cannot be imported beside another project: {error.args[0]}') from error


def _not_found() -> str:
    """What to say where there is no BEVFusion: the variable, and the folder that was looked in."""
    root = os.environ.get('MMDET3D_ROOT')
    loaded = sys.modules.get('projects')
    places = [str(Path(p)) for p in getattr(loaded, '__path__', ())]
    if places:
        looked = f'the package projects in {", ".join(places)} has none'
    elif root:
        looked = f'MMDET3D_ROOT={root!r} has no projects/BEVFusion/bevfusion'
    else:
        looked = f'MMDET3D_ROOT is not set and no package projects is installed (looked in {Path.cwd()})'
    return (
        f'BEVFusion of MMDetection3D is not found: {looked}; set MMDET3D_ROOT to a source checkout of '
        'MMDetection3D, whose wheels come without projects/'
    )


def upstream_config(name: str) -> str:
    """Path of one of BEVFusion's own configs, for the ``_base_`` of another.

    Args:
        name: Of the file, with or without ``.py``.

    Raises:
        Q3DError: There is no BEVFusion, or it has no such config.

    Examples:
        In a config, whose ``_base_`` may be any expression without names::

            _base_ = __import__('q3d_plugin.mmdet3d.projects', fromlist=['_']).upstream_config(
                'bevfusion_lidar-cam_voxel0075_second_secfpn_8xb4-cyclic-20e_nus-3d'
            )
    """
    prepare_bevfusion()
    try:
        spec = importlib.util.find_spec(BEVFUSION.rpartition('.')[0])
    except ModuleNotFoundError:
        spec = None
    for place in getattr(spec, 'submodule_search_locations', None) or ():
        folder = Path(place) / 'configs'
        path = folder / f'{name[:-3] if name.endswith(".py") else name}.py'
        if path.is_file():
            return str(path)
        if folder.is_dir():
            known = sorted(p.stem for p in folder.glob('*.py'))
            raise Q3DError(f'{folder} has no config {name!r}{near_matches(name, known)}')
    raise Q3DError(_not_found())


def when_imported(callback: Callable[[], None]) -> None:
    """Calls ``callback`` once BEVFusion has been imported: now, or when that happens."""
    if getattr(sys.modules.get(BEVFUSION), '_q3d_ready', False):
        callback()
    else:
        _callbacks.append(callback)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loader of BEVFusion's package, so that it can be seen to before and after its import."""

    def find_spec(self, fullname, path=None, target=None):
        """The spec that the finders after this one find."""
        if fullname != BEVFUSION:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader) -> None:
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        if torch.cuda.is_available():
            _check_build(module)
        else:
            _put_operators()
        self.loader.exec_module(module)
        if not torch.cuda.is_available():
            for name in AUTOCAST:
                _patch_autocast(sys.modules[name])
        module._q3d_ready = True
        while _callbacks:
            _callbacks.pop(0)()


def _put_operators() -> None:
    for name, known in EXTENSIONS.items():
        # Also where a build exists: its operators want tensors on a CUDA device.
        if not isinstance(sys.modules.get(name), StandIn):
            sys.modules[name] = StandIn(name, 'this operator of BEVFusion has no CPU version', known)


def _check_build(module: types.ModuleType) -> None:
    """Raises unless the compiled operators are there."""
    folder = Path(module.__path__[0])
    for name in EXTENSIONS:
        relative = name[len(BEVFUSION) + 1 :].split('.')
        found = [
            p for s in ('.so', '.pyd') for p in folder.joinpath(*relative[:-1]).glob(f'{relative[-1]}*{s}')
        ]
        if not found:
            raise Q3DError(
                f'{name} is not compiled: run "{BUILD}" in {folder.parents[2]}, as upstream says, or set '
                'CUDA_VISIBLE_DEVICES to nothing to run on the CPU'
            )


class _Torch(types.ModuleType):
    """``torch`` for one module: the same, but for autocast."""

    def __getattr__(self, name):
        return getattr(torch, name)


def _autocast(device_type: str, dtype: Optional[torch.dtype] = None, enabled: bool = True, **kwargs):
    """``torch.autocast``; what is said of CUDA is said of the CPU, where float32 means that it is off."""
    if device_type == 'cuda':
        device_type, enabled = 'cpu', enabled and dtype not in (None, torch.float32)
    return torch.autocast(device_type, dtype=dtype if enabled else None, enabled=enabled, **kwargs)


def _patch_autocast(module: types.ModuleType) -> None:
    """Gives one module its own view of ``torch``, so that nobody else's autocast changes."""
    if isinstance(module.__dict__.get('torch'), _Torch):
        return
    view = _Torch('torch', doc='The view of q3d_plugin for BEVFusion on the CPU.')
    view.autocast = functools.wraps(torch.autocast, updated=())(_autocast)
    module.torch = view
