"""Files appear whole or not at all; folders are checked before long work."""

import json
import math
import os
from pathlib import Path

import pytest

from q3d_plugin import files
from q3d_plugin.errors import Q3DError


def test_folders_that_can_be_written_are_left_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.check_writable(tmp_path)
    files.check_writable(Path('new/deep/er'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('folder', ['config.py', 'config.py/run', 'config.py/run/1'])
def test_a_file_in_the_way_is_named(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.py').touch()
    with pytest.raises(Q3DError) as caught:
        files.check_writable(Path(folder))
    message = str(caught.value)
    assert repr(folder) in message and f'{tmp_path / "config.py"} is a file' in message


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root can write everywhere')
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / 'closed').mkdir(mode=0o500)
    with pytest.raises(Q3DError, match='cannot be written'):
        files.check_writable(tmp_path / 'closed' / 'run')


@pytest.mark.parametrize(
    'folder, error', [('closed', PermissionError(13, 'Permission denied')), ('full', OSError(28, 'No space'))]
)
def test_what_the_system_says_of_a_folder_is_in_the_error(tmp_path, monkeypatch, folder, error):
    def refuse(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(Path, 'touch', refuse)
    with pytest.raises(Q3DError, match=f'{folder}.*{error.strerror}'):
        files.check_writable(tmp_path / folder)


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'result.json'
    files.write_json(path, {'mAP': 0.5, 'bad': [math.nan, math.inf]})
    assert json.loads(path.read_text()) == {'mAP': 0.5, 'bad': [None, None]}

    def refuse(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(OSError, match='No space'):
        files.write_text(path, 'half')
    assert json.loads(path.read_text())['mAP'] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ['result.json']


def test_text_ends_with_a_line_end(tmp_path):
    files.write_text(tmp_path / 'a.txt', 'one\ntwo')
    assert (tmp_path / 'a.txt').read_text() == 'one\ntwo\n'


@pytest.mark.parametrize('text, words', [(None, 'cannot be read'), ('{"a": ', 'no JSON')])
def test_results_that_cannot_be_read_are_named(tmp_path, text, words):
    if text is not None:
        (tmp_path / 'r.json').write_text(text)
    with pytest.raises(Q3DError, match=f'sweep: .*r.json.*{words}'):
        files.read_json(tmp_path / 'r.json', 'sweep')
