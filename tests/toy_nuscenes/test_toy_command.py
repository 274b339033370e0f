"""The command line: arguments, reuse, refusal to overwrite, determinism."""

import hashlib
import json

import numpy as np
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


def test_the_data_of_a_seed_is_what_it_always_was(root):
    """The shipped checkpoints were trained on it; whoever changes it raises GENERATOR_VERSION."""
    tables = {
        n: json.loads((root / 'v1.0-mini' / f'{n}.json').read_text())
        for n in ('instance', 'sample_annotation')
    }
    assert {k: len(v) for k, v in tables.items()} == {'instance': 111, 'sample_annotation': 303}
    centres = [a['translation'] for a in tables['sample_annotation']]
    assert np.allclose(np.mean(centres, 0), [200.684944, 564.770861, 1.469741], atol=1e-5)
    files = sorted(root.glob('s*/LIDAR_TOP/*.bin'))
    points = np.concatenate([np.fromfile(f, np.float32).reshape(-1, 5) for f in files]).astype(float)
    # Another machine's arithmetic may move a point across the edge of an object.
    assert len(points) == pytest.approx(103347, abs=5)
    assert np.allclose(points.mean(0), [0.26526, -0.22091, -1.03835, 42.32735, 14.34903], atol=5e-3)


def test_look_alikes_differ_by_colour_alone(root, generator, tmp_path):
    out = tmp_path / 'set'
    assert generator(out, *SMALL, '--profile', 'look-alikes').returncode == 0
    assert 'profile' not in json.loads((root / 'toy_nuscenes.json').read_text())
    assert json.loads((out / 'toy_nuscenes.json').read_text())['profile'] == 'look-alikes'
    assert {(r['width'], r['height']) for r in table_of(out, 'sample_data')} == {(400, 225), (0, 0)}
    for name, twin in (('truck', 'construction'), ('bus.rigid', 'trailer'), ('bicycle', 'motorcycle')):
        assert mean_width(out, name) == pytest.approx(mean_width(out, twin), rel=0.05)
    assert mean_width(root, 'motorcycle') > 1.2 * mean_width(root, 'bicycle')
    # The same set again is reused, and the default one is another set.
    assert 'reusing' in generator(out, *SMALL, '--profile', 'look-alikes').stdout
    assert 'reusing' not in generator(out, *SMALL).stdout
    assert digest(out) == digest(root)


def table_of(folder, name):
    return json.loads((folder / 'v1.0-mini' / f'{name}.json').read_text())


def mean_width(folder, name):
    category = next(r['token'] for r in table_of(folder, 'category') if r['name'] == f'vehicle.{name}')
    mine = {r['token'] for r in table_of(folder, 'instance') if r['category_token'] == category}
    sizes = [r['size'][0] for r in table_of(folder, 'sample_annotation') if r['instance_token'] in mine]
    return np.mean(sizes)


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
    assert done.stderr.startswith('q3d_plugin: --out: ') and done.stderr.count('\n') == 1
    assert digest(tmp_path / 'set').keys() == {'precious.txt'}


@pytest.mark.parametrize(
    'option, value', [('--train-scenes', 9), ('--train-scenes', 0), ('--val-scenes', 3), ('--frames', 0)]
)
def test_bad_arguments(generator, tmp_path, option, value):
    done = generator(tmp_path / 'set', option, value)
    assert done.returncode == 2
    assert done.stderr.startswith(f'q3d_plugin: {option}: {value} was given; ')
    assert done.stderr.count('\n') == 1
    assert list(tmp_path.iterdir()) == []
