"""Wheels in parts of limited size, and back."""

import random
import shutil
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3d_plugin.errors import Q3DError
from q3d_plugin.gpu_check import packing

LIMIT = 100_000


def make_wheel(path, size, seed):
    """A wheel with a file that can be packed tighter and one that cannot."""
    noise = random.Random(seed).randbytes(size // 2)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        # Too far apart for zip's window, not for that of xz.
        archive.writestr('pkg/core.so', noise + bytes(40_000) + noise)
        archive.writestr('pkg-1.dist-info/RECORD', 'pkg/core.so,,\n')
    return path


@pytest.fixture
def collection(tmp_path):
    """A folder of parts, its files before, and the entries of its list."""
    source, space, out = (tmp_path / n for n in ('source', 'space', 'out'))
    source.mkdir()
    space.mkdir()
    sizes = [150_000, 500_000, 30_000]
    paths = [make_wheel(source / f'p{i}-1-py3-none-any.whl', s, i) for i, s in enumerate(sizes)]
    other = source / 'mmcv-2.1.0.tar.gz'
    other.write_bytes(random.Random(9).randbytes(20_000))
    paths.append(other)
    packed = [packing.pack(p, space, worth=100_000) for p in paths]
    entries = [packing.entry_of(p, t) for p, t in zip(paths, packed)]
    parts = packing.write_parts(packed, entries, {'python': '3.12'}, out, LIMIT)
    return out, paths, parts


def contents(path):
    if path.suffix != '.whl':
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_no_part_is_larger_than_the_limit(collection):
    out, _, parts = collection
    assert len(parts) > 3
    for part in parts:
        folder = out / part['part']
        assert sum(f.stat().st_size for f in folder.iterdir()) == part['bytes'] <= LIMIT


def test_what_is_unpacked_is_what_was_packed(collection, tmp_path):
    out, paths, _ = collection
    entries = packing.read_list(out)['packages']
    assert [e['travels'].endswith('.xz') for e in entries] == [True, True, False, False]
    assert len(entries[1]['pieces']) > 1
    for path, entry in zip(paths, entries):
        restored = packing.unpack(entry, out, tmp_path / 'restored')
        assert restored.name == path.name
        assert contents(restored) == contents(path)
    assert sorted(p.name for p in (tmp_path / 'restored').iterdir()) == sorted(p.name for p in paths)


def test_a_wheel_that_is_packed_is_smaller(tmp_path):
    wheel = make_wheel(tmp_path / 'a-1-py3-none-any.whl', 200_000, 0)
    assert packing.pack(wheel, tmp_path, worth=10**9) == wheel
    space = tmp_path / 'space'
    space.mkdir()
    assert packing.pack(wheel, space, worth=1).stat().st_size < 0.7 * wheel.stat().st_size


def test_every_part_has_the_whole_list(collection):
    out, _, parts = collection
    lists = [packing.read_list(out / part['part']) for part in parts]
    assert all(one == lists[0] for one in lists) and len(lists[0]['packages']) == 4


def test_a_missing_part_is_named(collection, tmp_path):
    out, _, _ = collection
    entry = packing.read_list(out)['packages'][1]
    lost = entry['pieces'][1]
    shutil.rmtree((out / lost).parent)
    with pytest.raises(Q3DError, match=f'{lost} is not in'):
        packing.unpack(entry, out, tmp_path / 'restored')


def test_a_damaged_piece_is_found(collection, tmp_path):
    out, _, _ = collection
    entry = packing.read_list(out)['packages'][1]
    piece = out / entry['pieces'][0]
    content = bytearray(piece.read_bytes())
    content[1000] ^= 1
    piece.write_bytes(content)
    with pytest.raises(Q3DError, match='is damaged: its checksum'):
        packing.unpack(entry, out, tmp_path / 'restored')
    assert not list((tmp_path / 'restored').iterdir())


def test_a_folder_without_a_list_is_refused(tmp_path):
    with pytest.raises(Q3DError, match=r'--wheels: .* has no wheels\.json.*--collect'):
        packing.read_list(tmp_path)


@given(st.lists(st.integers(1, 400), max_size=20), st.integers(1, 100))
def test_every_byte_goes_into_one_part(sizes, limit):
    parts = packing.parts_of(sizes, limit)
    assert all(0 < sum(end - start for _, start, end in part) <= limit for part in parts)
    pieces = sorted(piece for part in parts for piece in part)
    expected = []
    for number, size in enumerate(sizes):
        mine = [(start, end) for n, start, end in pieces if n == number]
        expected += [(number, *piece) for piece in mine]
        assert mine[0][0] == 0 and mine[-1][1] == size
        assert all(a[1] == b[0] for a, b in zip(mine, mine[1:]))
        assert len(mine) == -(-size // limit)
    assert expected == pieces
