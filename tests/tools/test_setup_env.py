"""setup_env.sh, with a stand-in for Python that notes what it is asked for."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = r"""#!/usr/bin/env bash
echo "$*" >>"$LOG"
case "$*" in
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        ;;
    *"pip"*" wheel "*)
        while [ "$1" != --wheel-dir ]; do shift; done
        touch "$2/mmcv-2.1.0-made.whl"
        ;;
    *"torch.__version__"*)
        echo "cp311-torch$TORCH"
        ;;
    *"import mmcv.ops"*)
        [ -z "${BROKEN:-}" ] || { echo 'undefined symbol: _ZN3c10' >&2; exit 1; }
        ;;
esac
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A copy of the script and of what it reads: ``checkout(*arguments, **environment)`` runs it."""
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements')
    for name in ('pyproject.toml', 'setup.py'):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'tools').mkdir()
    shutil.copy(ROOT / 'tools' / 'setup_env.sh', tmp_path / 'tools')
    (tmp_path / 'bin').mkdir()
    executable(tmp_path / 'bin' / 'g++', '#!/bin/sh\n')
    python = executable(tmp_path / 'bin' / 'stand-in', STAND_IN)

    def run(*arguments, **environment):
        log = tmp_path / 'log'
        log.write_text('')
        env = {**os.environ, 'PYTHON': str(python), 'Q3D_CACHE': str(tmp_path / 'cache'), 'LOG': str(log)}
        env['PATH'] = f'{tmp_path / "bin"}:{env["PATH"]}'
        command = ['bash', str(tmp_path / 'tools' / 'setup_env.sh'), *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**env, 'TORCH': '2.13.0', **environment},
        )
        return done, log.read_text().splitlines()

    return run


def wheels(tmp_path):
    return sorted(
        str(p.relative_to(tmp_path / 'cache' / 'wheels')) for p in tmp_path.glob('cache/wheels/*/*')
    )


def test_mmcv_is_compiled_once_for_each_torch_and_never_taken_from_the_cache_of_pip(checkout, tmp_path):
    done, calls = checkout()
    assert done.returncode == 0, done.stderr
    (compiled,) = (c for c in calls if ' wheel ' in c)
    assert '--no-cache-dir' in compiled and '--no-build-isolation' in compiled
    assert wheels(tmp_path) == ['cp311-torch2.13.0/mmcv-2.1.0-made.whl']
    # What is installed is that file, also over an mmcv of the same version.
    installed = [c for c in calls if ' install ' in c and 'mmcv-2.1.0' in c]
    assert len(installed) == 1 and '--force-reinstall' in installed[0]
    assert installed[0].endswith(wheels(tmp_path)[0])

    done, calls = checkout()
    assert done.returncode == 0 and calls == []


def test_another_torch_has_a_wheel_of_its_own(checkout, tmp_path):
    checkout()
    (tmp_path / '.venv' / 'q3d-stamp').unlink()
    done, calls = checkout(TORCH='2.14.0')
    assert done.returncode == 0 and any(' wheel ' in c for c in calls)
    assert [w.split('/')[0] for w in wheels(tmp_path)] == ['cp311-torch2.13.0', 'cp311-torch2.14.0']


def test_a_wheel_that_cannot_be_imported_is_compiled_again(checkout, tmp_path):
    done, _ = checkout(BROKEN='yes')
    assert done.returncode == 1
    assert 'undefined symbol' in done.stderr and 'was deleted; the next call compiles another' in done.stderr
    assert wheels(tmp_path) == [] and not (tmp_path / '.venv' / 'q3d-stamp').exists()
    done, calls = checkout()
    assert done.returncode == 0 and any(' wheel ' in c for c in calls)


def test_the_oldest_versions_have_an_environment_of_their_own(checkout, tmp_path):
    done, calls = checkout('--oldest', TORCH='2.1.2')
    assert done.returncode == 0, done.stderr
    pinned = [c.split('/requirements/')[1] for c in calls if '/requirements/' in c]
    assert pinned == ['oldest-build.txt', 'oldest.txt']
    assert (tmp_path / '.venv-oldest' / 'q3d-stamp').exists() and not (tmp_path / '.venv').exists()
    done, calls = checkout()
    assert done.returncode == 0 and any('/requirements/dev.txt' in c for c in calls)


def test_an_unknown_option_is_refused(checkout):
    done, calls = checkout('--newest')
    assert done.returncode == 2 and "'--newest' is not known; --oldest" in done.stderr and calls == []


@pytest.mark.parametrize('kind', ['', 'oldest'])
def test_both_files_of_requirements_pin_the_same_torch_and_every_line(kind):
    build, full = (f'{kind}-build.txt', f'{kind}.txt') if kind else ('build.txt', 'dev.txt')

    def pins(name):
        lines = (ROOT / 'requirements' / name).read_text().splitlines()
        return dict(line.split('==') for line in lines if '==' in line and not line.startswith('#'))

    for name in ('torch', 'numpy'):
        assert pins(build)[name] == pins(full)[name]
    text = (ROOT / 'requirements' / full).read_text().splitlines()
    assert all('==' in line for line in text if line and not line.startswith('#'))
    assert pins(full)['mmcv'] == '2.1.0'
