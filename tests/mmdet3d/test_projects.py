"""BEVFusion of ``projects/``: found, made to run without CUDA, refused in one line; on a double of it."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from q3d_plugin.errors import Q3DError
from q3d_plugin.mmdet3d import projects

DOUBLE = {
    'bevfusion/__init__.py': 'from . import ops\nfrom .bevfusion import features\n',
    'bevfusion/ops/__init__.py': '',
    'bevfusion/ops/bev_pool/__init__.py': 'from . import bev_pool_ext\n',
    'bevfusion/ops/voxel/__init__.py': 'from .voxel_layer import dynamic_voxelize, hard_voxelize\n',
    'bevfusion/bevfusion.py': """
import torch
from .ops import bev_pool, voxel
from . import transfusion_head

def features(layer, x):
    with torch.autocast('cuda', enabled=False):
        plain = layer(x)
    with torch.autocast(device_type='cuda', dtype=torch.float32):
        return plain, layer(x)
""",
    'bevfusion/transfusion_head.py': """
import torch

def heatmap(layer, x):
    with torch.autocast('cuda', enabled=False):
        return layer(x)
""",
    'configs/some_config.py': "model = dict(type='BEVFusion', size=3)\n",
}
COMPILED = """bev_pool_forward = bev_pool_backward = hard_voxelize = dynamic_voxelize = len
"""


def write(folder, files):
    for name, text in files.items():
        path = folder / 'projects' / 'BEVFusion' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def clean(monkeypatch):
    """No package ``projects`` has been imported or can be found, and no variable is set."""
    monkeypatch.delenv('MMDET3D_ROOT', raising=False)
    gone = {n: m for n, m in sys.modules.items() if n.split('.')[0] == 'projects'}
    for name in gone:
        del sys.modules[name]
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p and not _has_projects(p)])
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    monkeypatch.setattr(projects, '_callbacks', [])
    yield
    for name in [n for n in sys.modules if n.split('.')[0] == 'projects']:
        del sys.modules[name]
    sys.modules.update(gone)


def _has_projects(folder):
    return (Path(folder) / 'projects').is_dir()


@pytest.fixture
def checkout(clean, tmp_path, monkeypatch):
    """``MMDET3D_ROOT`` names a checkout with the double in it."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setenv('MMDET3D_ROOT', str(write(tmp_path, DOUBLE)))
    return tmp_path


def test_it_is_imported_with_its_operators_and_tells_those_who_wait(checkout):
    called = []
    projects.when_imported(lambda: called.append('before'))
    assert not called and projects.BEVFUSION not in sys.modules
    package = projects.import_bevfusion()
    assert called == ['before']
    projects.when_imported(lambda: called.append('after'))
    assert called == ['before', 'after'] and projects.import_bevfusion() is package
    points, coordinates = torch.tensor([[0.5, 1.5, 0.5]]), torch.zeros(1, 3, dtype=torch.int)
    package.ops.voxel.dynamic_voxelize(points, coordinates, [1.0] * 3, [0.0, 0, 0, 4, 4, 4], 3)
    assert coordinates.tolist() == [[0, 1, 0]]
    extension = package.ops.bev_pool.bev_pool_ext
    with pytest.raises(NotImplementedError, match=r'bev_pool_ext\.other cannot be used here'):
        extension.other()


def test_a_config_that_imports_it_itself_gets_the_same(checkout, tmp_path):
    projects.prepare_bevfusion()
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports=['projects.BEVFusion.bevfusion'])\n")
    called = []
    projects.when_imported(lambda: called.append(1))
    Config.fromfile(str(config))
    assert called == [1]
    assert hasattr(sys.modules[projects.BEVFUSION].ops.bev_pool.bev_pool_ext, 'bev_pool_forward')


def test_autocast_for_cuda_is_off_on_the_cpu_without_a_warning(checkout):
    package = projects.import_bevfusion()
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert all(torch.equal(out, layer(x)) for out in package.features(layer, x))
        # What is switched off there is off on the CPU as well, and goes on behind it.
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert layer(x).dtype is torch.bfloat16
            assert [out.dtype for out in package.features(layer, x)] == [torch.float32] * 2
            assert package.bevfusion.transfusion_head.heatmap(layer, x).dtype is torch.float32
            assert layer(x).dtype is torch.bfloat16


def test_nobody_elses_torch_is_another(checkout):
    autocast = torch.autocast
    package = projects.import_bevfusion()
    assert torch.autocast is autocast and package.bevfusion.torch.autocast is not autocast
    assert package.bevfusion.torch.float32 is torch.float32 and package.bevfusion.torch.nn is torch.nn


def test_without_a_checkout_one_line_names_the_variable_and_the_folder(clean, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert projects.import_bevfusion(quiet=True) is None
    for call in (projects.import_bevfusion, lambda: projects.upstream_config('some_config')):
        with pytest.raises(Q3DError) as error:
            call()
        words = str(error.value)
        assert 'set MMDET3D_ROOT to a source checkout' in words and str(tmp_path) in words
        assert '\n' not in words
    monkeypatch.setenv('MMDET3D_ROOT', str(tmp_path / 'empty'))
    with pytest.raises(Q3DError, match=r"MMDET3D_ROOT='.*empty' has no projects/BEVFusion/bevfusion"):
        projects.import_bevfusion()
    assert projects.import_bevfusion(quiet=True) is None


def test_a_package_of_that_name_without_bevfusion(clean, tmp_path, monkeypatch):
    (tmp_path / 'projects').mkdir()
    (tmp_path / 'projects' / '__init__.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Q3DError, match=rf'the package projects in {tmp_path}/projects has none'):
        projects.import_bevfusion()


def test_with_cuda_operators_that_are_not_compiled_are_refused(checkout, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(Q3DError) as error:
        projects.import_bevfusion()
    words = str(error.value)
    assert 'bev_pool_ext is not compiled' in words
    assert f'run "python projects/BEVFusion/setup.py develop" in {checkout}' in words
    assert projects.import_bevfusion(quiet=True) is None
    # A compiled file takes their place.
    for name in ('bev_pool/bev_pool_ext', 'voxel/voxel_layer'):
        (checkout / f'projects/BEVFusion/bevfusion/ops/{name}.py').write_text(COMPILED)
        (checkout / f'projects/BEVFusion/bevfusion/ops/{name}.cpython.so').write_text('')
    package = projects.import_bevfusion()
    assert package.ops.bev_pool.bev_pool_ext.bev_pool_forward is len
    assert package.bevfusion.torch is torch


@pytest.mark.parametrize(
    'line, words',
    [
        ("raise KeyError('HungarianAssigner3D is already registered')", 'beside another project: Hungarian'),
        ('import a_package_that_is_not_there', "needs the package 'a_package_that_is_not_there'"),
    ],
)
def test_a_package_that_does_not_import_says_why(checkout, line, words):
    write(checkout, {'bevfusion/transfusion_head.py': line})
    with pytest.raises(Q3DError, match=words):
        projects.import_bevfusion()
    assert projects.import_bevfusion(quiet=True) is None


def test_configs_inherit_from_a_folder_that_no_wheel_has(checkout, tmp_path):
    child = tmp_path / 'child.py'
    child.write_text(
        "_base_ = __import__('q3d_plugin.mmdet3d.projects', fromlist=['_']).upstream_config('some_config')\n"
        'model = dict(size=5)\n'
    )
    assert Config.fromfile(str(child)).model == {'type': 'BEVFusion', 'size': 5}
    with pytest.raises(Q3DError, match="has no config 'some_confg'.*some_config"):
        projects.upstream_config('some_confg')


def test_a_config_that_needs_it_is_refused_in_one_line(clean, tmp_path):
    config = tmp_path / 'config.py'
    for names in (['q3d_plugin.mmdet3d', projects.BEVFUSION], projects.BEVFUSION):
        config.write_text(f'custom_imports = dict(imports={names!r})\n')
        with pytest.raises(Q3DError, match='set MMDET3D_ROOT'):
            projects.import_for(config)
    for text in ('', "custom_imports = dict(imports=['q3d_plugin.mmdet3d'])\n"):
        config.write_text(text)
        projects.import_for(config)


def test_it_is_looked_for_once_however_often_it_is_prepared(checkout):
    for _ in range(3):
        projects.prepare_bevfusion()
    assert sum(isinstance(f, projects._Finder) for f in sys.meta_path) == 1
    assert sys.path.count(str(checkout)) == 1
