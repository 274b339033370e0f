"""From the command line to the framework's own script."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from q3d_plugin import commands, launch
from q3d_plugin.errors import Q3DError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current one, with two configs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').write_text('model = dict()\n')
    (tmp_path / 'pillars.yaml').write_text('MODEL: {}\n')
    return tmp_path


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['config.py', 'float.pth'], 'config.py'),
        (['float.pth', 'config.py'], 'config.py'),
        (['--launcher', 'none', 'config.py'], 'config.py'),
        (['pillars.yaml'], 'pillars.yaml'),
        (['--cfg_file', 'pillars.yaml', '--ckpt', 'a.pth'], 'pillars.yaml'),
        (['--cfg_file=pillars.yaml'], 'pillars.yaml'),
        (['config.py', '--cfg_file', 'pillars.yaml'], 'pillars.yaml'),
        (['--option=other.py', 'config.py'], 'config.py'),
    ],
)
def test_the_config_is_found_among_the_arguments(here, argv, expected):
    assert launch.find_config(argv) == Path(expected)


@pytest.mark.parametrize('argv', [[], ['float.pth'], ['--work-dir', 'out'], ['--cfg_file']])
def test_no_config_is_an_error_that_says_what_to_give(here, argv):
    with pytest.raises(Q3DError, match=r'no config among the arguments.*\.py.*\.yaml'):
        launch.find_config(argv)


@pytest.mark.parametrize('argv', [['missing.py'], ['--cfg_file', 'missing.yaml'], ['sub/config.py']])
def test_a_config_that_is_not_there_is_named_with_where_it_was_looked_for(here, argv):
    with pytest.raises(Q3DError) as caught:
        launch.find_config(argv)
    assert repr(argv[-1]) in str(caught.value) and str(here) in str(caught.value)


def test_a_folder_is_no_config(here):
    (here / 'folder.py').mkdir()
    with pytest.raises(Q3DError, match='not a file'):
        launch.find_config(['folder.py'])


def test_a_script_comes_from_the_checkout_that_is_named(here, monkeypatch):
    (here / 'tools').mkdir()
    (here / 'tools' / 'test.py').write_text('')
    assert launch.find_script('test.py', str(here)) == here / 'tools' / 'test.py'
    monkeypatch.setenv('MMDET3D_ROOT', str(here))
    assert launch.find_script('test.py') == here / 'tools' / 'test.py'
    with pytest.raises(Q3DError, match=r'MMDET3D_ROOT=.* has no tools/train\.py'):
        launch.find_script('train.py')


def run_main(monkeypatch, capsys, argv):
    """Exit status and standard error of ``q3d test``; arguments and path are restored afterwards."""
    monkeypatch.setattr(sys, 'argv', [str(ROOT / 'tools' / 'test.py')])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    return commands.main(['test', *argv]), capsys.readouterr().err


@pytest.mark.parametrize(
    'argv, words',
    [
        ([], 'no config among the arguments'),
        (['missing.py'], "'missing.py' is not a file"),
        (['pillars.yaml'], '--cfg_file pillars.yaml'),
        (['--cfg_file', 'pillars.yaml'], "OPENPCDET_ROOT='empty' has no pcdet"),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2(here, monkeypatch, capsys, argv, words):
    monkeypatch.setenv('OPENPCDET_ROOT', 'empty')
    status, text = run_main(monkeypatch, capsys, argv)
    assert status == 2
    assert text.startswith('q3d_plugin: ') and text.count('\n') == 1
    assert words in text


def test_a_checkout_without_the_script_ends_with_one_line_and_status_2(here, monkeypatch, capsys):
    monkeypatch.setenv('MMDET3D_ROOT', str(here))
    status, text = run_main(monkeypatch, capsys, ['config.py'])
    assert status == 2 and 'has no tools/test.py' in text and text.count('\n') == 1


def test_the_script_runs_as_if_called_directly_with_the_plugin_registered(here):
    pytest.importorskip('mmdet3d')
    (here / 'mm' / 'tools').mkdir(parents=True)
    (here / 'tools').mkdir()
    script = here / 'mm' / 'tools' / 'test.py'
    # profile.py stands beside the launching script, and must not hide the standard library's.
    (here / 'tools' / 'profile.py').write_text('raise SystemExit("the neighbour was imported")\n')
    starter = here / 'tools' / 'test.py'
    starter.write_text((ROOT / 'tools' / 'test.py').read_text())
    script.write_text(
        'import profile, sys\n'
        'from mmengine.registry import HOOKS\n'
        "print('RAN', __name__, sys.argv[0], sys.argv[1:], HOOKS.get('QuantHook') is not None)\n"
        'sys.exit(7)\n'
    )
    env = {**os.environ, 'MMDET3D_ROOT': str(here / 'mm'), 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(starter), 'config.py', '--work-dir', 'out', '--flag']
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 7, done.stderr
    assert f"RAN __main__ {script} ['config.py', '--work-dir', 'out', '--flag'] True" in done.stdout
    assert not (here / 'out').exists()


@pytest.mark.parametrize(
    'argv, lines, expected',
    [
        (['config.py', '--work-dir', 'out'], "work_dir = 'set'", 'out'),
        (['config.py', '--work-dir=out'], "work_dir = 'set'", 'out'),
        (['config.py'], "work_dir = 'set'", 'set'),
        (['config.py'], 'work_dir = None', 'work_dirs/config'),
        (['config.py'], '', 'work_dirs/config'),
    ],
)
def test_a_work_dir_that_cannot_be_made_stops_before_the_script(
    here, monkeypatch, capsys, argv, lines, expected
):
    """The rule of MMDetection3D's scripts says which folder it is: argument, config, name of the config."""
    pytest.importorskip('mmengine')
    # Importing the real adapter takes ten seconds and changes nothing here.
    adapter = types.ModuleType('q3d_plugin.mmdet3d')
    adapter.__path__ = [str(Path(launch.__file__).parent / 'mmdet3d')]
    monkeypatch.setitem(sys.modules, 'q3d_plugin.mmdet3d', adapter)
    monkeypatch.setenv('MMDET3D_ROOT', str(here))
    (here / 'tools').mkdir()
    (here / 'tools' / 'test.py').write_text("raise RuntimeError('the script ran')\n")
    (here / 'config.py').write_text(f'model = dict()\n{lines}\n')
    first = Path(expected).parts[0]
    (here / first).write_text('a file in the way')
    status, text = run_main(monkeypatch, capsys, argv)
    assert status == 2 and text.count('\n') == 1
    assert f'work_dir {expected!r} cannot be made: {here / first} is a file' in text
    (here / first).unlink()
    with pytest.raises(RuntimeError, match='the script ran'):
        launch.main('test.py', argv)


def test_paths_of_openpcdet_mean_the_same_files_elsewhere(here):
    tools = here / 'OpenPCDet' / 'tools'
    (tools / 'cfgs').mkdir(parents=True)
    argv = ['--cfg_file', 'pillars.yaml', '--ckpt=a.pth', '--ckpt_dir', '../runs', '--workers', '2']
    argv += ['--set', '--ckpt', 'b.pth']
    assert launch.absolute_paths(argv, tools) == [
        *('--cfg_file', str(here / 'pillars.yaml'), f'--ckpt={here / "a.pth"}'),
        *('--ckpt_dir', str(here.parent / 'runs'), '--workers', '2', '--set', '--ckpt', 'b.pth'),
    ]
    # OpenPCDet names the output after the path of the config: its own stay as its documentation writes them.
    own = ['--cfg_file', 'OpenPCDet/tools/cfgs/x.yaml', '--pretrained_model']
    assert launch.absolute_paths(own, tools) == ['--cfg_file', 'cfgs/x.yaml', '--pretrained_model']


def test_shipped_files_are_found_by_name_where_there_is_no_such_file_here(here):
    given = [
        'mmdet3d/toy_centerpoint_voxel.py',
        '--ckpt=configs/openpcdet/toy_centerpoint_pillar.pth',
        'config.py',
    ]
    found = launch._named_files([*given, 'missing.py', '--work-dir', 'mmdet3d', 'a=mmdet3d/x.py'])
    assert Path(found[0]).is_file() and Path(found[0]).is_absolute()
    assert found[1].startswith('--ckpt=/') and Path(found[1].partition('=')[2]).is_file()
    assert found[2:] == ['config.py', 'missing.py', '--work-dir', 'mmdet3d', 'a=mmdet3d/x.py']
    (here / 'mmdet3d').mkdir()
    (here / given[0]).write_text('model = dict()')
    assert launch._named_files(given)[0] == given[0]


def test_help_without_a_config_tells_of_both_frameworks_and_imports_none(here, capsys):
    assert commands.main(['test', '--help']) == 0
    out = capsys.readouterr().out
    assert 'q3d test CONFIG.py CHECKPOINT.pth' in out and 'q3d test --cfg_file CONFIG.yaml' in out
