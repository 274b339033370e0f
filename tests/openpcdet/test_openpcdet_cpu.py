"""How OpenPCDet is found and imported, with made-up packages, each in a process of its own."""

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from q3d_plugin.openpcdet import cpu

REPOSITORY = Path(__file__).resolve().parents[2]
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason='CPU mode is off where CUDA is')


def run(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ('OPENPCDET_ROOT', 'PYTHONPATH')}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        env={**kept, 'PYTHONPATH': str(REPOSITORY), **environment},
    )
    return done.stdout + done.stderr


IMPORT = """
import sys
from q3d_plugin.errors import Q3DError
from q3d_plugin.openpcdet.cpu import import_pcdet
try:
    pcdet = import_pcdet()
    print('imported', pcdet.__version__)
except Q3DError as error:
    print('refused:', error)
"""


@pytest.fixture
def checkout(tmp_path):
    """The layout of an unbuilt checkout: what is imported at start-up, and nothing else."""
    operators = 'from . import iou3d_nms_cuda\n'
    files = {
        'setup.py': "version = '0.6.0+%s' % commit\n",
        'pcdet/__init__.py': 'from .version import __version__\n',
        'pcdet/ops/__init__.py': '',
        'pcdet/ops/iou3d_nms/__init__.py': '',
        'pcdet/ops/iou3d_nms/iou3d_nms_utils.py': operators,
        'pcdet/datasets/__init__.py': 'import torchvision, SharedArray, numpy\n'
        'from av2.utils.io import read_feather\nkind = numpy.int\n',
        'pcdet/models/__init__.py': 'import torch_scatter\nfrom ..ops.iou3d_nms import iou3d_nms_utils\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@needs_cpu
def test_an_unbuilt_checkout_imports(checkout):
    code = """
import torch
from pcdet.ops.iou3d_nms.iou3d_nms_utils import iou3d_nms_cuda
from q3d_plugin.openpcdet import cpu, cpu_ops
assert iou3d_nms_cuda.nms_gpu is cpu_ops.nms_gpu
assert pcdet.datasets.kind is int
assert not [n for n in cpu.OPTIONAL if isinstance(sys.modules.get(n), cpu.StandIn)]
assert torch.ones(1).cuda().device.type == 'cpu' and torch.nn.Linear(1, 1).cuda(0).weight.device.type == 'cpu'
assert torch.cuda.FloatTensor(2, 3).zero_().shape == (2, 3) and torch.cuda.synchronize() is None
before = torch.Tensor.cuda
assert cpu.enable_openpcdet_cpu_mode() and import_pcdet() is pcdet and torch.Tensor.cuda is before
try:
    iou3d_nms_cuda.something(1)
except NotImplementedError as error:
    print('stand-in:', error)
"""
    out = run(IMPORT + code, OPENPCDET_ROOT=str(checkout))
    assert 'imported 0.6.0' in out and 'Error' not in out
    assert 'stand-in: pcdet.ops.iou3d_nms.iou3d_nms_cuda.something cannot be used here: ' in out
    assert not (checkout / 'pcdet' / 'version.py').exists()


@needs_cpu
def test_operators_imported_before_are_replaced(checkout):
    """As where a build exists, but no device."""
    (checkout / 'pcdet/version.py').write_text("__version__ = '9.9'")
    (checkout / 'pcdet/ops/iou3d_nms/iou3d_nms_cuda.py').write_text('nms_gpu = None\n')
    first = f'import sys\nsys.path.insert(0, {str(checkout)!r})\nimport pcdet.ops.iou3d_nms.iou3d_nms_cuda\n'
    code = "print(sys.modules['pcdet.ops.iou3d_nms'].iou3d_nms_cuda.nms_gpu)"
    out = run(first + IMPORT + code)
    assert 'imported 9.9' in out and 'function nms_gpu' in out


@needs_cpu
def test_a_package_that_openpcdet_needs_is_named(checkout):
    (checkout / 'pcdet/datasets/__init__.py').write_text('import surely_not_installed\n')
    out = run(IMPORT, OPENPCDET_ROOT=str(checkout))
    assert "refused: OpenPCDet needs the package 'surely_not_installed'" in out


def test_a_folder_without_openpcdet_is_refused(tmp_path):
    out = run(IMPORT, OPENPCDET_ROOT=str(tmp_path))
    assert 'refused: OPENPCDET_ROOT=' in out and 'has no pcdet/__init__.py' in out
    assert len(out.splitlines()) == 1


def test_no_openpcdet_at_all_is_refused():
    out = run(IMPORT)
    if 'imported' in out:
        pytest.skip('pcdet is installed')
    assert 'refused: OpenPCDet is not found' in out and 'OPENPCDET_ROOT' in out


def test_a_second_checkout_is_refused(checkout, tmp_path):
    other = tmp_path / 'other' / 'pcdet'
    other.mkdir(parents=True)
    (other / '__init__.py').touch()
    code = f"""
from q3d_plugin.openpcdet.cpu import find_pcdet
try:
    find_pcdet({str(other.parent)!r})
except Q3DError as error:
    print(error)
"""
    out = run(IMPORT + code, OPENPCDET_ROOT=str(checkout))
    if not torch.cuda.is_available():
        assert 'but pcdet was already imported from' in out


@pytest.mark.parametrize(
    ('made', 'expected'), [(True, 'was built for another torch'), (False, 'is not built: run')]
)
def test_with_cuda_a_build_is_wanted(made, expected, checkout):
    if made:
        suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
        (checkout / f'pcdet/ops/iou3d_nms/iou3d_nms_cuda{suffix}').write_bytes(b'not a library')
    code = 'import torch\ntorch.cuda.is_available = lambda: True\n' + IMPORT
    out = run(code, OPENPCDET_ROOT=str(checkout))
    assert 'refused:' in out and expected in out
    assert len(out.splitlines()) == 1


def test_with_cuda_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(cpu, '_check_build', lambda: None)
    monkeypatch.setattr(cpu, '_patch_torch', lambda: pytest.fail('called'))
    before = set(sys.modules)
    assert cpu.enable_openpcdet_cpu_mode() is False
    assert not [n for n in set(sys.modules) - before if n.startswith('pcdet')]


def test_a_stand_in_is_no_package_for_introspection():
    stand_in = cpu.StandIn('some.module', 'it is not there', {'there': 1})
    assert stand_in.there == 1
    with pytest.raises(AttributeError):
        _ = stand_in.__file__
    with pytest.raises(
        NotImplementedError, match=r'^some\.module\.absent cannot be used here: it is not there$'
    ):
        stand_in.absent()
