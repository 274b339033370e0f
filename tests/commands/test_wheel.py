"""The built wheel: everything that the commands need is in it, and it runs without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY_DATA = ('toy-data', '--out', 'd', '--train-scenes', '1', '--val-scenes', '1', '--frames', '1')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel, built from a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    source.mkdir()
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    for name in ('q3d_plugin', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    done = subprocess.run(
        [*command, '--wheel-dir', str(folder), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob('q3d_plugin-*.whl')
    return made


def files_below(folder):
    files = (p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())
    return {f for f in files if '__pycache__' not in f}


def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in n}
    expected = {f'q3d_plugin/{f}' for f in files_below(ROOT / 'q3d_plugin')}
    expected |= {f'q3d_plugin/configs/{f}' for f in files_below(ROOT / 'configs')}
    assert names == expected
    for name in ('mmdet3d/toy_centerpoint_voxel.pth', 'openpcdet/toy_centerpoint_pillar_w8a8.yaml'):
        assert f'q3d_plugin/configs/{name}' in names


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
    """A folder of packages with the content of the wheel."""
    folder = tmp_path_factory.mktemp('site')
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def run(site, tmp_path):
    """Runs the installed ``q3d`` in an empty folder, ``tmp_path / 'here'``."""
    here = tmp_path / 'here'
    here.mkdir()

    def call(*argv):
        env = {**os.environ, 'PYTHONPATH': str(site)}
        command = [sys.executable, '-m', 'q3d_plugin', *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_installed_commands_run_in_an_empty_folder_without_the_checkout(run, site, tmp_path):
    entry = next(site.glob('*.dist-info')) / 'entry_points.txt'
    assert 'q3d = q3d_plugin.commands:main' in entry.read_text()
    assert f'in {site / "q3d_plugin" / "configs"}' in run('configs')
    assert 'toy-data' in run('--help')
    run(*TOY_DATA, '--infos', 'none')
    assert (tmp_path / 'here' / 'd' / 'v1.0-mini' / 'sample.json').is_file()


@pytest.mark.slow
def test_the_installed_detector_is_calibrated_and_tested_in_an_empty_folder(run, site, tmp_path):
    pytest.importorskip('mmdet3d')
    run(*TOY_DATA, '--infos', 'mmdet3d')
    name, options = 'mmdet3d/toy_centerpoint_voxel', ['custom_hooks.0.recipe.calibration.frames=1']
    options += [f'{part}_dataloader.dataset.data_root=d/' for part in ('train', 'test')]
    options += ['test_evaluator.data_root=d/', 'test_evaluator.ann_file=d/nuscenes_infos_val.pkl']
    out = run('test', f'{name}_w8a8.py', f'{name}.pth', '--work-dir', 'w', '--cfg-options', *options)
    assert 'NuScenes/mAP' in out
    saved = Path((tmp_path / 'here' / 'w' / 'last_quantized').read_text().strip())
    record = json.loads((tmp_path / 'here' / saved.parent / 'run.json').read_text())
    assert record['checkpoint'] == str(site / 'q3d_plugin' / 'configs' / f'{name}.pth')
    rows = json.loads((tmp_path / 'here' / saved.parent / 'coverage.json').read_text())
    assert all(row['quantized'] for row in rows) and len(rows) > 100
