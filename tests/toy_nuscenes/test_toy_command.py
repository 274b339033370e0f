"""The command line: arguments, reuse, refusal to overwrite, determinism."""

import hashlib

import pytest

SMALL = ('--train-scenes', 1, '--val-scenes', 1, '--frames', 3)


def digest(root):
    return {
        str(f.relative_to(root)): hashlib.md5(f.read_bytes()).hexdigest()
        for f in sorted(root.rglob('*'))
        if f.is_file()
    }


def test_same_arguments_same_bytes(root, generator, tmp_path):
    assert generator(tmp_path / 'again', *SMALL, '--processes', 1).returncode == 0
    assert digest(tmp_path / 'again') == digest(root)
    assert [p.name for p in tmp_path.iterdir()] == ['again']


def test_another_seed_other_data(root, generator, tmp_path):
    assert generator(tmp_path / 'other', *SMALL, '--seed', 1).returncode == 0
    mine, other = digest(root), digest(tmp_path / 'other')
    sweeps = {v for k, v in mine.items() if k.endswith('.bin')}
    assert sweeps and sweeps.isdisjoint(other.values())
    assert mine['v1.0-mini/instance.json'] != other['v1.0-mini/instance.json']


def test_same_set_is_reused(root, generator):
    before = {f: f.stat().st_mtime_ns for f in root.rglob('*')}
    done = generator(root, *SMALL)
    assert done.returncode == 0
    assert 'reusing' in done.stdout
    assert {f: f.stat().st_mtime_ns for f in root.rglob('*')} == before


def test_another_toy_set_is_replaced(generator, tmp_path):
    out = tmp_path / 'set'
    assert generator(out, '--train-scenes', 1, '--val-scenes', 1, '--frames', 1).returncode == 0
    first = digest(out)
    done = generator(out, '--train-scenes', 1, '--val-scenes', 1, '--frames', 1, '--seed', 5)
    assert done.returncode == 0
    assert digest(out).keys() != first.keys()
    assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_foreign_folder_is_left_alone(generator, tmp_path):
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / 'precious.txt').write_text('mine')
    done = generator(tmp_path / 'set', *SMALL)
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert digest(tmp_path / 'set').keys() == {'precious.txt'}


@pytest.mark.parametrize(
    'option, value', [('--train-scenes', 9), ('--train-scenes', 0), ('--val-scenes', 3), ('--frames', 0)]
)
def test_bad_arguments(generator, tmp_path, option, value):
    done = generator(tmp_path / 'set', option, value)
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {option} must be')
    assert done.stderr.count('\n') == 1
    assert list(tmp_path.iterdir()) == []
