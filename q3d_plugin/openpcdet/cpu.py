"""OpenPCDet as its repository is, on a machine without CUDA and without a build.

:func:`import_pcdet` is how the plugin imports OpenPCDet everywhere: it finds the package, gives it what its
set-up would have written, stands in for optional packages that are not there and, without CUDA, replaces the
compiled operators by those of :mod:`q3d_plugin.openpcdet.cpu_ops`. No file of OpenPCDet is touched.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from q3d_plugin import cpu
from q3d_plugin.errors import Q3DError
from q3d_plugin.openpcdet import cpu_ops
from q3d_plugin.openpcdet.image_transforms import TRANSFORMS
from q3d_plugin.stand_in import StandIn

__all__ = ['StandIn', 'enable_openpcdet_cpu_mode', 'find_pcdet', 'import_pcdet']

# Packages that OpenPCDet imports at start-up, but needs for some data sets and models only.
OPTIONAL = {
    'torchvision': ('torchvision.models', 'torchvision.transforms', 'torchvision.ops'),
    'kornia': ('kornia.geometry', 'kornia.geometry.conversions'),
    'av2': ('av2.utils', 'av2.utils.io'),
    'SharedArray': (),
    'torch_scatter': (),
}
KNOWN = {'torch_scatter': cpu_ops.SCATTER, 'torchvision.transforms': TRANSFORMS}
"""What of them works where they do not import."""
ARGO2 = 'pcdet.datasets.argo2.argo2_dataset'


def import_pcdet(root: Optional[str] = None) -> types.ModuleType:
    """Imports OpenPCDet with its data sets and models, in CPU mode where there is no CUDA device.

    Args:
        root: A checkout of OpenPCDet; where none is given the environment variable ``OPENPCDET_ROOT``, else
            the installed ``pcdet``.

    Returns:
        ModuleType: ``pcdet``.

    Raises:
        Q3DError: There is no OpenPCDet, a package that it needs is missing, or its operators were built for
            another torch.
    """
    package = find_pcdet(root)
    _patch_numpy()
    _provide_version(package)
    enable_openpcdet_cpu_mode()
    try:
        with _optional_packages():
            pcdet = importlib.import_module('pcdet')
            importlib.import_module('pcdet.datasets')
            importlib.import_module('pcdet.models')
            _patch_collate()
            if 'WORLD_SIZE' in os.environ and not torch.cuda.is_available():
                _patch_gather()
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] == 'pcdet':
            raise Q3DError(f'{package} is not a whole OpenPCDet: {error}') from error
        raise Q3DError(
            f'OpenPCDet needs the package {error.name!r}, which is not installed: pip install {error.name}'
        ) from error
    return pcdet


def find_pcdet(root: Optional[str] = None) -> Path:
    """The folder of the package ``pcdet``, which can be imported afterwards.

    Args:
        root: A checkout; where none is given the environment variable ``OPENPCDET_ROOT``, else what is
            installed.

    Raises:
        Q3DError: There is none, or another one was imported already.
    """
    source = 'root'
    if root is None:
        root, source = os.environ.get('OPENPCDET_ROOT') or None, 'OPENPCDET_ROOT'
    if root is not None:
        package = Path(root).expanduser().resolve() / 'pcdet'
        if not (package / '__init__.py').is_file():
            raise Q3DError(f'{source}={str(root)!r} has no pcdet/__init__.py: name a checkout of OpenPCDet')
        if str(package.parent) not in sys.path:
            sys.path.insert(0, str(package.parent))
    loaded = getattr(sys.modules.get('pcdet'), '__file__', None)
    if loaded is not None:
        if root is not None and Path(loaded).resolve().parent != package:
            raise Q3DError(
                f'{source}={str(root)!r}, but pcdet was already imported from {Path(loaded).parent}'
            )
        return Path(loaded).resolve().parent
    if root is not None:
        return package
    spec = importlib.util.find_spec('pcdet')
    if spec is None or spec.origin is None:
        raise Q3DError(
            'OpenPCDet is not found: no package pcdet is installed and OPENPCDET_ROOT is not set; set it to '
            'a checkout of OpenPCDet (without CUDA it needs no build)'
        )
    return Path(spec.origin).resolve().parent


def enable_openpcdet_cpu_mode() -> bool:
    """Lets OpenPCDet run without CUDA: its operators on the CPU, and ``.cuda()`` without effect.

    Can be called any number of times, before or after :func:`find_pcdet`.

    Returns:
        bool: True where CPU mode is on, False where CUDA is available and nothing was touched.

    Raises:
        Q3DError: CUDA is available, but OpenPCDet's operators are not built, or built for another torch.
    """
    if torch.cuda.is_available():
        _check_build()
        return False
    cpu.enable_cpu_mode()
    _patch_torch()
    if 'WORLD_SIZE' in os.environ:
        _patch_launcher()
    for name, known in cpu_ops.EXTENSIONS.items():
        # Also where a build exists: its operators want tensors on a CUDA device.
        if not isinstance(sys.modules.get(name), StandIn):
            module = StandIn(name, 'this operator of OpenPCDet has no CPU version', known)
            sys.modules[name] = module
            parent = sys.modules.get(name.rpartition('.')[0])
            if parent is not None:
                setattr(parent, name.rpartition('.')[2], module)
    return True


def _check_build() -> None:
    """Raises unless the operators that every detector uses import, or there is no OpenPCDet at all."""
    try:
        package = find_pcdet()
    except Q3DError:
        return
    _provide_version(package)
    for name in list(cpu_ops.EXTENSIONS)[:2]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            folder = package.parent.joinpath(*name.split('.')[:-1])
            stem = name.rpartition('.')[2]
            if any(folder.glob(f'{stem}*.so')) or any(folder.glob(f'{stem}*.pyd')):
                raise Q3DError(
                    f'{name} was built for another torch than {torch.__version__} ({error}): run "python '
                    f'setup.py develop" in {package.parent} again'
                ) from error
            raise Q3DError(
                f'{name} is not built: run "python setup.py develop" in {package.parent}, or set '
                'CUDA_VISIBLE_DEVICES to nothing to run on the CPU'
            ) from error


def _patch_torch() -> None:
    """``.cuda()`` returns what it is called on, and allocating on the device allocates on the CPU."""
    if getattr(torch.Tensor.cuda, '_q3d_patched', False):
        return

    def stays(original):
        @functools.wraps(original)
        def cuda(self, *args, **kwargs):
            return self

        cuda._q3d_patched = True
        return cuda

    torch.Tensor.cuda = stays(torch.Tensor.cuda)
    torch.nn.Module.cuda = stays(torch.nn.Module.cuda)
    for name in ('synchronize', 'empty_cache'):
        setattr(torch.cuda, name, functools.wraps(getattr(torch.cuda, name))(lambda *args, **kwargs: None))
    for name in ('FloatTensor', 'IntTensor', 'LongTensor'):
        setattr(torch.cuda, name, getattr(torch, name))


def _patch_launcher() -> None:
    """Lets ``--launcher pytorch`` run over gloo: OpenPCDet counts CUDA devices and asks for NCCL."""
    plain = torch.distributed.init_process_group
    if getattr(plain, '_q3d_patched', False):
        return

    @functools.wraps(plain)
    def init_process_group(backend=None, *args, **kwargs):
        return plain('gloo' if backend == 'nccl' else backend, *args, **kwargs)

    init_process_group._q3d_patched = True
    torch.distributed.init_process_group = init_process_group
    ranks = int(os.environ.get('LOCAL_WORLD_SIZE', os.environ['WORLD_SIZE']))
    torch.cuda.device_count = lambda: ranks
    # OpenPCDet would have its workers spawned, which would import it without the stand-ins.
    if torch.multiprocessing.get_start_method(allow_none=True) is None:
        torch.multiprocessing.set_start_method('fork')


def _patch_gather() -> None:
    """Lets ranks exchange objects over gloo: OpenPCDet moves them to a CUDA device for that."""
    try:
        commu_utils = importlib.import_module('pcdet.utils.commu_utils')
    except ModuleNotFoundError:
        return

    def all_gather(data):
        values = [data] * commu_utils.get_world_size()
        if len(values) > 1:
            torch.distributed.all_gather_object(values, data)
        return values

    commu_utils.all_gather = all_gather


def _patch_numpy() -> None:
    """OpenPCDet still writes ``np.int`` and the like, which NumPy 1.24 removed."""
    for name, plain in (('bool', bool), ('float', float), ('int', int), ('object', object)):
        if name not in np.__dict__:
            setattr(np, name, plain)


def _patch_collate() -> None:
    """Batches of camera images with NumPy 1.24 and newer, which make no array of lists of unlike lengths.

    Those are how each image was scaled; no model reads that, its matrices are in the batch as well.
    """
    template = getattr(sys.modules.get('pcdet.datasets.dataset'), 'DatasetTemplate', None)
    if template is None or hasattr(template.collate_batch, '_q3d_collate'):
        return
    collate = template.collate_batch

    @functools.wraps(collate)
    def without_ragged(batch_list, *args, **kwargs):
        kept = [{k: v for k, v in item.items() if k != 'img_process_infos'} for item in batch_list]
        return collate(kept, *args, **kwargs)

    without_ragged._q3d_collate = collate
    template.collate_batch = staticmethod(without_ragged)


def _provide_version(package: Path) -> None:
    """Stands in for ``pcdet/version.py``, which OpenPCDet's set-up writes."""
    if 'pcdet.version' in sys.modules or (package / 'version.py').is_file():
        return
    setup = package.parent / 'setup.py'
    found = re.search(r"version\s*=\s*'([\d.]+)", setup.read_text()) if setup.is_file() else None
    module = types.ModuleType('pcdet.version', doc='A stand-in of q3d_plugin.')
    module.__version__ = found.group(1) if found else '0.0.0'
    sys.modules['pcdet.version'] = module


@contextlib.contextmanager
def _optional_packages():
    """Stand-ins for optional packages that do not import here, for as long as OpenPCDet is being imported.

    They are gone afterwards, so that no other library takes them for the real ones; OpenPCDet's modules keep
    theirs.
    """
    added = []
    try:
        absent = [name for name in OPTIONAL if not _imports(name)]
        for name in absent:
            for full in (name, *OPTIONAL[name]):
                module = StandIn(full, f'the package {name} does not import here', KNOWN.get(full))
                sys.modules[full] = module
                added.append(full)
                parent, _, child = full.rpartition('.')
                if parent:
                    setattr(sys.modules[parent], child, module)
        if ARGO2 not in sys.modules and not _argoverse_imports(absent):
            # It compiles functions of kornia by torch.jit, which no stand-in for kornia gets through.
            sys.modules[ARGO2] = StandIn(ARGO2, 'the Argoverse 2 data set needs av2 0.2 and kornia 0.6')
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def _argoverse_imports(absent: list) -> bool:
    if 'kornia' in absent or 'av2' in absent:
        return False
    return hasattr(importlib.import_module('kornia.geometry.conversions'), 'QuaternionCoeffOrder')


def _imports(name: str) -> bool:
    """Whether a package and its submodules in :data:`OPTIONAL` import; a broken one leaves nothing behind."""
    before = set(sys.modules)
    try:
        for full in (name, *OPTIONAL[name]):
            importlib.import_module(full)
    except Exception:  # a torchvision built for another torch raises RuntimeError
        for left in set(sys.modules) - before:
            if left.split('.')[0] == name:
                del sys.modules[left]
        return False
    return True
