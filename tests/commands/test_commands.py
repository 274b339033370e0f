"""The command ``q3d``: its list of commands, and how it ends."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from q3d_plugin import __version__, commands
from q3d_plugin.errors import Q3DError

ROOT = Path(__file__).resolve().parents[2]
MINE = {
    *('configs', 'demo', 'infos', 'spoil-checkpoint', 'strip-checkpoint', 'test', 'toy-data', 'train'),
}


def run(*command, cwd=None):
    """A process with the checkout on its path."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=env, cwd=cwd, check=False
    )


def test_help_lists_every_command_with_its_first_line(capsys):
    assert commands.main(['--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(commands.command_names()) >= MINE
    for name in commands.command_names():
        source = (ROOT / 'q3d_plugin' / 'commands' / f'{name.replace("-", "_")}.py').read_text()
        first = source.split('\n')[0].strip('"')
        assert first.endswith('.') and commands.summary(name) == first
        assert [line.split() for line in lines].count([name, *first.split()]) == 1
    assert commands.main([]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_help_imports_no_torch_and_no_framework():
    code = (
        'import sys; from q3d_plugin.commands import main; main(["--help"]); '
        'print(sorted({m.partition(".")[0] for m in sys.modules} & '
        '{"torch", "numpy", "mmdet3d", "mmengine", "pcdet", "matplotlib", "pytorch_quantization"}))'
    )
    done = run('-c', code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '[]'
    assert 'toy-data' in done.stdout


@pytest.mark.parametrize('name', sorted(MINE))
def test_every_command_has_help_under_its_own_name(name, capsys):
    try:
        status = commands.main([name, '--help'])
    except SystemExit as error:
        status = error.code
    out = capsys.readouterr().out
    assert status == 0
    assert f'q3d {name}' in out and commands.summary(name) in out.replace('\n', ' ')


def test_an_unknown_command_names_the_nearest_one(capsys):
    assert commands.main(['toydata', '--out', 'x']) == 2
    captured = capsys.readouterr()
    assert captured.err == "q3d_plugin: 'toydata' is no command; did you mean 'toy-data'?\n"
    assert captured.out == ''
    assert commands.main(['xyz']) == 2
    assert 'known: ' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['toy_data', '__init__', '../demo', ''])
def test_names_of_modules_are_no_commands(name, capsys):
    assert commands.main([name]) == 2
    assert f'{name!r} is no command' in capsys.readouterr().err


def test_version(capsys):
    assert commands.main(['--version']) == 0
    assert capsys.readouterr().out == f'q3d_plugin {__version__}\n'
    assert f'version = "{__version__}"' in (ROOT / 'pyproject.toml').read_text()


@pytest.fixture
def failing(monkeypatch):
    """Makes ``q3d configs`` raise: ``failing(error)``."""
    from q3d_plugin.commands import configs

    def set_error(error):
        def main(argv):
            raise error

        monkeypatch.setattr(configs, 'main', main)

    return set_error


def test_a_mistake_ends_with_one_line_and_status_2(failing, capsys):
    failing(Q3DError('that cannot work'))
    assert commands.main(['configs']) == 2
    assert capsys.readouterr().err == 'q3d_plugin: that cannot work\n'


def test_a_missing_package_ends_with_the_extra_that_brings_it(failing, capsys):
    failing(ModuleNotFoundError("No module named 'matplotlib'", name='matplotlib'))
    assert commands.main(['configs']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'q3d configs needs the package matplotlib' in error
    assert "pip install 'q3d-plugin[report]'" in error
    # One that no extra brings is a mistake in the code, not of the user.
    failing(ModuleNotFoundError("No module named 'q3d_plugin.none'", name='q3d_plugin.none'))
    with pytest.raises(ModuleNotFoundError):
        commands.main(['configs'])


def test_a_module_and_the_scripts_of_the_checkout_start_the_same_command(tmp_path):
    for command in (
        ('-m', 'q3d_plugin', 'strip-checkpoint'),
        (ROOT / 'tools' / 'strip_checkpoint.py',),
    ):
        done = run(*command, 'none.pth', 'out.pth', cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith('q3d_plugin: ') and 'none.pth' in done.stderr
        assert done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    'script, words',
    [
        ('demo.py', ['demo']),
        ('make_infos.py', ['infos', 'mmdet3d']),
        ('make_openpcdet_infos.py', ['infos', 'openpcdet']),
        ('spoil_checkpoint.py', ['spoil-checkpoint']),
        ('strip_checkpoint.py', ['strip-checkpoint']),
        ('test.py', ['test']),
        ('toy_nuscenes', ['toy-data', '--infos', 'none']),
        ('train.py', ['train']),
    ],
)
def test_the_scripts_of_the_checkout_hand_over_to_their_command(script, words, monkeypatch):
    given = []
    monkeypatch.setattr(commands, 'main', lambda argv: given.append(argv) or 7)
    monkeypatch.setattr(sys, 'argv', [str(ROOT / 'tools' / script), '--more', 'x'])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(sys.argv[0], run_name='__main__')
    assert caught.value.code == 7 and given == [[*words, '--more', 'x']]


def test_the_folder_of_a_script_leaves_the_path_and_others_stay(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'argparse.py').write_text('raise SystemExit("the neighbour was imported")\n')
    (tmp_path / 'scripts' / 'statistics.py').write_text('raise SystemExit("the neighbour was imported")\n')
    (tmp_path / 'scripts' / 'start.py').write_text(
        'import sys\n'
        'here = sys.path.pop(0)\n'
        'from q3d_plugin.commands import main\n'
        'sys.path.insert(0, here)\n'
        "main(['--version'])\n"
        'import statistics\n'
        'print(here in sys.path, statistics.__name__)\n'
    )
    done = run(tmp_path / 'scripts' / 'start.py')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'False statistics'


def test_a_process_without_a_script_keeps_its_path(tmp_path):
    (tmp_path / 'neighbour.py').write_text('')
    code = "from q3d_plugin.commands import main; main(['--version']); import neighbour"
    done = run('-c', code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
