"""Files of checkpoints: whole ones pass; missing, cut off, damaged and foreign ones are refused."""

import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from q3d_plugin import checkpoints, lifecycle
from q3d_plugin.checkpoint_file import check_checkpoint_file
from q3d_plugin.errors import Q3DError
from q3d_plugin.recipe import Recipe
from q3d_plugin.transforms.insert import quantize_

SEEDS = range(60)


def quantized_checkpoint():
    """Weights, ranges and recipe of a small calibrated model, as ``save_checkpoint`` writes them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1)).eval()
    quantize_(model)
    recipe = Recipe()
    lifecycle.configure(model, recipe)
    lifecycle.calibrate(model, [torch.randn(1, 3, 8, 8)], model)
    state = {k: v.detach() for k, v in model.state_dict().items()}
    return {'meta': {checkpoints.META_KEY: checkpoints.stamp(recipe)}, 'state_dict': state}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Whole checkpoints, as every writer of them makes them."""
    folder = tmp_path_factory.mktemp('files')
    content = quantized_checkpoint()
    torch.save(content, folder / 'zip.pth')
    torch.save(content, folder / 'old.pth', _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / 'zip.pth') as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(folder / 'deflated.pth', 'w', zipfile.ZIP_DEFLATED) as out:
        for name, record in records.items():
            out.writestr(name, record)
    try:
        from torch.serialization import set_crc32_options  # torch 2.5 and newer
    except ImportError:
        return folder
    set_crc32_options(False)
    try:
        torch.save(content, folder / 'unchecked.pth')
    finally:
        set_crc32_options(True)
    return folder


def same(a, b):
    """Whether two contents are the same, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
        )
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def is_refused(path):
    """Whether the file is refused; anything but one clear line fails."""
    try:
        check_checkpoint_file(str(path))
    except Q3DError as error:
        message = str(error)
        assert message.startswith(f'checkpoint {str(path)!r} ') and '\n' not in message
        assert 'copy it again' in message or 'is not a PyTorch checkpoint' in message
        return True
    return False


def zeroed(content, rng):
    """A stretch of zeros, of a length between one byte and a third of the file."""
    length = int(len(content) ** rng.uniform(0, 1)) // 3 + 1
    start = rng.randrange(len(content) - length)
    return content[:start] + bytes(length) + content[start + length :]


def flipped(content, rng):
    """One wrong bit."""
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def damaged_index(content, rng):
    """One to eight wrong bytes in the last part of the file, where an archive has its index."""
    damaged, first = bytearray(content), content.find(b'PK\x01\x02')
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(first, len(content))] = rng.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize('name', ['zip.pth', 'deflated.pth'])
@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('damage', [zeroed, flipped, damaged_index])
def test_a_damaged_file_is_refused_or_holds_exactly_what_it_held(files, tmp_path, damage, seed, name):
    """The wrong bytes may lie in padding or in a field that no one reads; then the content is the same."""
    whole = files / name
    path = tmp_path / 'damaged.pth'
    path.write_bytes(damage(whole.read_bytes(), random.Random(seed)))
    if not is_refused(path):
        assert same(torch.load(path, weights_only=True), torch.load(whole, weights_only=True))


def test_every_byte_of_every_record_counts(files, tmp_path):
    """Wrong bytes inside a record are always refused, whatever record it is."""
    content = (files / 'zip.pth').read_bytes()
    rng = random.Random(0)
    with zipfile.ZipFile(files / 'zip.pth') as archive:
        records = [record for record in archive.infolist() if record.compress_size]
    assert len(records) > 8
    path = tmp_path / 'damaged.pth'
    for record in records:
        at = record.header_offset
        start = at + 30 + sum(int.from_bytes(content[at + i : at + i + 2], 'little') for i in (26, 28))
        for _ in range(3):
            damaged = bytearray(content)
            damaged[start + rng.randrange(record.compress_size)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(Q3DError, match='is damaged'):
                check_checkpoint_file(str(path))


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('damage', [zeroed, flipped])
def test_a_damaged_file_of_the_old_format_is_refused_or_can_be_loaded(files, tmp_path, damage, seed):
    """The format has no checksums: of a wrong number in a tensor nothing can be known."""
    path = tmp_path / 'damaged.pth'
    path.write_bytes(damage((files / 'old.pth').read_bytes(), random.Random(seed)))
    if not is_refused(path):
        loaded = torch.load(path, map_location='cpu', weights_only=True)
        assert len(loaded) == 2 and all(isinstance(part, dict) for part in loaded.values())


def test_the_old_format_names_the_length_of_every_tensor_twice(tmp_path):
    path = tmp_path / 'one.pth'
    torch.save({'state_dict': {'weight': torch.randn(5)}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    count = len(content) - 5 * 4 - 8
    assert content[count : count + 8] == (5).to_bytes(8, 'little')
    for byte in range(8):
        damaged = bytearray(content)
        damaged[count + byte] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(Q3DError, match='has another length than its tensor'):
            check_checkpoint_file(str(path))


def test_a_wrong_index_in_a_pickle_takes_no_memory(tmp_path):
    """The unpickler in C would make a table of that many entries."""
    path = tmp_path / 'index.pth'
    path.write_bytes(b'\x80\x02}r' + (1 << 23).to_bytes(4, 'little') + b'.' + bytes(100))
    tracemalloc.start()
    try:
        assert is_refused(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_nothing_that_a_file_names_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)

    path = tmp_path / 'bomb.pth'
    for new in (True, False):
        torch.save({'state_dict': {}, 'meta': Bomb()}, path, _use_new_zipfile_serialization=new)
        check_checkpoint_file(str(path))  # well-formed; the framework's loader decides about its objects
        assert not (tmp_path / 'ran').exists()
        torch.load(path, weights_only=False)
        (tmp_path / 'ran').unlink()


@pytest.mark.parametrize('name', ['zip.pth', 'old.pth', 'deflated.pth', 'unchecked.pth'])
def test_whole_files_pass(files, name):
    """Also those without checksums (``unchecked.pth``), which torch 2.5 and newer can write."""
    if name == 'unchecked.pth' and not (files / name).exists():
        pytest.skip('this version of torch always writes checksums')
    check_checkpoint_file(str(files / name))


@pytest.mark.parametrize('name', ['zip.pth', 'old.pth'])
@pytest.mark.parametrize('keep', [0, 1, 3, 4, 10, 64, 500, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, -100, -21, -1])
def test_a_file_that_was_cut_off_is_refused(files, tmp_path, name, keep):
    content = (files / name).read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else keep % len(content)
    path = tmp_path / 'cut.pth'
    path.write_bytes(content[:length])
    with pytest.raises(Q3DError) as caught:
        check_checkpoint_file(str(path))
    assert str(caught.value).startswith(f'checkpoint {str(path)!r}') and 'copy it again' in str(caught.value)


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Q3DError) as caught:
        check_checkpoint_file('float.pth')
    assert "'float.pth' is not a file" in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(Q3DError, match='is not a file'):
        check_checkpoint_file(str(tmp_path))


@pytest.mark.parametrize(
    'content', [b'<html>404', b'version https://git-lfs', b'\x93NUMPY\x01\x00', b'{"a": 1}']
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / 'page.pth'
    path.write_bytes(content)
    with pytest.raises(Q3DError, match='is not a PyTorch checkpoint'):
        check_checkpoint_file(str(path))


def test_urls_and_objects_of_a_framework_are_left_to_its_loader(tmp_path):
    check_checkpoint_file('https://example.com/a.pth')
    path = tmp_path / 'objects.pth'
    torch.save(dict(meta=dict(where=Path('somewhere'), when=Recipe()), state_dict={}), path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    check_checkpoint_file(str(path))
