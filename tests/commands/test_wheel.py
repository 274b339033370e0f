"""The built wheel: everything that the commands need is in it, and it runs without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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


def test_installed_commands_run_in_an_empty_folder_without_the_checkout(wheel, tmp_path):
    site, here = tmp_path / 'site', tmp_path / 'here'
    here.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    entry = next(site.glob('*.dist-info')) / 'entry_points.txt'
    assert 'q3d = q3d_plugin.commands:main' in entry.read_text()

    def run(*argv):
        env = {**os.environ, 'PYTHONPATH': str(site)}
        command = [sys.executable, '-m', 'q3d_plugin', *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=here, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f'in {site / "q3d_plugin" / "configs"}' in run('configs')
    assert 'toy-data' in run('--help')
    run(
        'toy-data',
        '--out',
        'd',
        '--train-scenes',
        '1',
        '--val-scenes',
        '1',
        '--frames',
        '1',
        '--infos',
        'none',
    )
    assert (here / 'd' / 'v1.0-mini' / 'sample.json').is_file()
