"""``q3d configs``: the shipped files, listed and copied."""

from q3d_plugin import shipped
from q3d_plugin.commands import main


def test_the_list_has_every_name_and_the_folder(capsys):
    assert main(['configs']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*shipped.config_names(), f'in {shipped.configs_folder()}']


def test_copies_are_whole_and_never_replace_what_was_changed(tmp_path, capsys):
    target = tmp_path / 'mine'
    for _ in range(2):
        assert main(['configs', '--copy', str(target)]) == 0
    copied = sorted(p.relative_to(target).as_posix() for p in target.rglob('*') if p.is_file())
    assert copied == shipped.config_names()
    for name in copied:
        assert (target / name).read_bytes() == (shipped.configs_folder() / name).read_bytes()
    changed, gone = target / 'mmdet3d' / 'study' / 'recipes.py', target / copied[0]
    changed.write_text('changed')
    gone.unlink()
    capsys.readouterr()
    assert main(['configs', '--copy', str(target)]) == 2
    error = capsys.readouterr().err
    assert str(changed) in error and error.count('\n') == 1
    assert changed.read_text() == 'changed' and not gone.exists()
