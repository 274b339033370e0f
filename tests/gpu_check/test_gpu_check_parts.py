"""The parts: what is skipped, what is kept, what the report says, and how the command ends without a GPU."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from q3d_plugin.commands import main
from q3d_plugin.errors import Q3DError
from q3d_plugin.gpu_check import checks, install, packing, parts
from q3d_plugin.gpu_check.checks import FAILED, PASSED, SKIPPED, Result, Settings
from q3d_plugin.gpu_check.machine import GPU

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path):
    """Of a made-up machine."""
    facts = {'python': '3.12.3', 'torch': '2.11.0', 'cuda': '13.0', 'available': True}
    gpu = GPU('NVIDIA H200', '580.159.03', '9.0', '143771 MiB')
    return Settings(ROOT, tmp_path, None, [], gpu, facts)


def without_gpu(*arguments):
    """What the command says on a machine without nvidia-smi."""
    path = '/usr/bin:/bin'
    environment = {**os.environ, 'PATH': path, 'PYTHON': sys.executable, 'PYTHONPATH': str(ROOT)}
    command = ['bash', str(ROOT / 'tools' / 'check_gpu.sh')]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.skipif(Path('/usr/bin/nvidia-smi').exists(), reason='this machine may have a GPU')
def test_without_a_gpu_it_ends_with_one_line_and_a_status():
    done = without_gpu()
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.splitlines() == [
        'q3d_plugin: there is no NVIDIA GPU here: nvidia-smi is not to be found'
    ]


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--part', 'test'], "'test' is no part; did you mean 'tests'?"),
        (['--python', '3.12'], '--python goes with --collect'),
        (['--collect', 'd', '--python', '3.12'], '--cuda is missing'),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['check-gpu', *arguments]) == 2
    assert words in capsys.readouterr().err


def test_versions_that_nothing_can_be_collected_for_are_refused(capsys, tmp_path):
    given = ['check-gpu', '--collect', str(tmp_path / 'd'), '--python', '3.12']
    assert main([*given, '--cuda', 'new']) == 2
    assert "--cuda: 'new' was given" in capsys.readouterr().err


def test_a_part_that_lacks_a_package_is_skipped_with_one_line(settings, capsys):
    result = parts.run_part('demo', settings, missing=lambda python, modules: ['mmcv._ext', 'mmdet3d'])
    assert result.status == SKIPPED
    assert result.summary == 'needs mmcv._ext, mmdet3d, which cannot be imported'
    assert json.loads((settings.out / 'results' / 'demo.json').read_text())['status'] == SKIPPED


def test_modules_that_cannot_be_imported_are_found():
    assert parts.missing_modules(Path(sys.executable), ['json', 'no_such_module_here']) == [
        'no_such_module_here'
    ]


def test_parts_run_in_their_order_and_a_failure_is_the_exit_status(settings, monkeypatch, capsys):
    table = {
        'setup': parts.Part(lambda s: Result(PASSED, 'torch 2', data={'versions': {'mmcv': '2.1.0'}})),
        'tests': parts.Part(lambda s: Result(FAILED, '1 failed', ['E  assert'])),
        'report': parts.PARTS['report'],
    }
    monkeypatch.setattr(parts, 'PARTS', table)
    assert parts.run_parts(['report', 'setup'], settings) == 0
    # Another run keeps what the first one found.
    assert parts.run_parts(['tests', 'report'], settings) == 1
    shown = capsys.readouterr().out
    assert shown.index('setup: passed: torch 2') < shown.index('tests: failed: 1 failed')
    page = (settings.out / 'report.md').read_text()
    for words in ('NVIDIA H200', '580.159.03', '2.11.0, CUDA 13.0', '| mmcv | 2.1.0 |', '| tests | failed |'):
        assert words in page
    content = json.loads((settings.out / 'report.json').read_text())
    assert [r['part'] for r in content['results']] == ['setup', 'tests']


def test_a_report_of_nothing_is_skipped(settings):
    assert parts.PARTS['report'].run(settings).status == SKIPPED


@pytest.mark.parametrize(
    ('difference', 'apart'), [(0.0009, []), (-0.0011, ['float']), (float('nan'), ['float'])]
)
def test_map_is_compared_within_a_tenth_of_a_point(difference, apart):
    cpu = {'float': {'mAP': 0.5}, 'frame': 'token', 'seed': 0}
    found = {'float': {'mAP': 0.5 + difference}, 'frame': 'token', 'seed': 0}
    rows, other = checks.compare_demo(found, cpu)
    assert len(rows) == 1 and other == apart


def test_tests_are_counted(tmp_path):
    path = tmp_path / 'tests.xml'
    path.write_text(
        '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"></testsuite></testsuites>'
    )
    assert checks.count_tests(path) == {'tests': 10, 'passed': 4, 'failed': 3, 'skipped': 3}


def test_mmcv_is_compiled_for_one_gpu_alone():
    found = install.compile_environment('9.0', '/venv/bin:/usr/bin', 16)
    assert found == {
        'MMCV_WITH_OPS': '1',
        'FORCE_CUDA': '1',
        'TORCH_CUDA_ARCH_LIST': '9.0',
        'MAX_JOBS': '16',
        'PATH': '/venv/bin:/usr/bin',
    }


def test_the_environment_sees_the_packages_that_are_there_and_takes_wheels_of_its_own(tmp_path):
    python = install.make_environment(tmp_path)
    assert python == install.interpreter_of(tmp_path)
    here = install.installed_versions(python)
    assert here['torch'].partition('+')[0] == torch.__version__.partition('+')[0]
    prefix = subprocess.run(
        [str(python), '-c', 'import sys; print(sys.prefix)'], capture_output=True, text=True, check=True
    )
    assert Path(prefix.stdout.strip()) == tmp_path / 'venv'


def test_a_failure_of_pip_is_one_line(tmp_path):
    with pytest.raises(Q3DError, match=r'pip install failed: .*\(log: ') as error:
        install._pip(
            Path(sys.executable), ['install', '--no-index', 'no-such-package-here'], tmp_path / 'log'
        )
    assert '\n' not in str(error.value)


def test_openpcdet_is_skipped_without_a_checkout(settings, monkeypatch):
    monkeypatch.delenv('OPENPCDET_ROOT', raising=False)
    result = checks.openpcdet(settings)
    assert result.status == SKIPPED and 'OPENPCDET_ROOT' in result.summary


def tiny_wheel(folder, name):
    """A wheel of one module that can be installed."""
    package, version = name.split('-')[:2]
    info = f'{package}-{version}.dist-info'
    with zipfile.ZipFile(folder / name, 'w') as archive:
        archive.writestr(f'{package}.py', 'PLACE = __file__\n')
        archive.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n')
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        archive.writestr(
            f'{info}/RECORD', f'{package}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n'
        )
    return folder / name


def test_a_folder_of_wheels_is_installed_and_what_does_not_fit_is_named(tmp_path, monkeypatch):
    source, wheels, out = (tmp_path / n for n in ('source', 'wheels', 'out'))
    source.mkdir()
    names = ['q3dtiny-1.0-py3-none-any.whl', 'q3dother-1.0-cp27-cp27m-linux_x86_64.whl']
    paths = [tiny_wheel(source, name) for name in names]
    entries = [packing.entry_of(path, path) for path in paths]
    packing.write_parts(paths, entries, {'python': '3.12', 'cuda': '12.6'}, wheels, 100_000)
    monkeypatch.setattr(install, '_has_mmcv', lambda python: True)
    facts = {
        'python': '.'.join(map(str, sys.version_info[:3])),
        'torch': torch.__version__,
        'cuda': '12.6',
        'available': True,
    }
    notes, versions = install.install(ROOT, out, wheels, facts, '9.0')
    assert versions['q3dtiny'] == '1.0' and 'q3dother' not in versions
    assert torch.__version__.partition('+')[0] == versions['torch'].partition('+')[0]
    assert any('q3dother-1.0-cp27' in note and 'for Python cp27' in note for note in notes)
    assert not any('q3dtiny' in note or 'it must stay' in note for note in notes)
    # On this machine spconv has no CUDA, or is not here at all: what to install is said.
    assert any('pip install spconv-cu126' in note for note in notes) or any(
        name.startswith('spconv-cu') for name in versions
    )
    command = [str(install.interpreter_of(out)), '-c', 'import q3dtiny; print(q3dtiny.PLACE)']
    place = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert place.startswith(str(out / 'venv'))
