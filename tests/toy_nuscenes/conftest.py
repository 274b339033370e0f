"""A small generated set that all tests of this folder share."""

import subprocess
import sys

import pytest


def run_generator(out, *options):
    """Runs the command line as a user does and returns the finished process."""
    command = [sys.executable, '-m', 'q3d_plugin', 'toy-data', '--infos', 'none', '--out', str(out)]
    return subprocess.run([*command, *map(str, options)], capture_output=True, text=True, check=False)


SMALL = ('--train-scenes', 1, '--val-scenes', 1, '--frames', 3)


@pytest.fixture(scope='session')
def root(tmp_path_factory):
    """Folder of a set with one training and one validation scene of three keyframes each, seed 0."""
    out = tmp_path_factory.mktemp('toy') / 'set'
    done = run_generator(out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope='session')
def nusc(root):
    """The set, loaded by the nuScenes devkit."""
    module = pytest.importorskip('nuscenes.nuscenes')
    return module.NuScenes('v1.0-mini', str(root), verbose=False)


@pytest.fixture
def generator():
    """The command line: `generator(out, *options)`."""
    return run_generator
