"""Files of checkpoints: damage is found before anything is loaded from them.

``torch.save`` writes a zip archive whose index holds a CRC-32 of every record. ``torch.load`` does not
compare it, and would load a file with wrong bytes inside without a word. Torch's old format (before torch
1.6, or ``_use_new_zipfile_serialization=False``) has no checksums: there, lengths are compared with those
that the file declares, and wrong numbers inside a tensor cannot be told from right ones.
"""

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Dict, Set, Tuple

import torch

from q3d_plugin.errors import Q3DError

__all__ = ['check_checkpoint_file']

_CHUNK = 1 << 22  # bytes
# PKWARE's APPNOTE.TXT: sections 4.3.7 (header of a record), 4.4.4 (flags), 4.4.15 (attributes).
_LOCAL_HEADER = struct.Struct('<4s5H3L2H')
_UTF_8, _ENCRYPTED, _FOLDER = 0x800, 0x2061, 0x10

_ELEMENT_BYTES = {
    f'{kind}Storage': width
    for width, kinds in {
        1: 'Byte Char Bool QInt8 QUInt8 QUInt4x2 QUInt2x4 Untyped',
        2: 'Half BFloat16 Short',
        4: 'Float Int QInt32',
        8: 'Double Long ComplexFloat',
        16: 'ComplexDouble',
    }.items()
    for kind in kinds.split()
}


class _DamageError(Exception):
    """Why a file cannot be trusted."""


def check_checkpoint_file(path: str) -> None:
    """Raises :class:`Q3DError` where ``path`` is missing, no checkpoint, cut off or damaged.

    The file is read in pieces (about a second a gigabyte), and no code in it is run. URLs are not looked at;
    objects that torch's safe loader does not know are left to the framework's loader.

    Args:
        path: The file.

    Raises:
        Q3DError: As above; it names the file and what is wrong with it.
    """
    if '://' in str(path):
        return
    file = Path(path).expanduser()
    if not file.is_file():
        raise Q3DError(f'checkpoint {str(path)!r} is not a file (looked in {Path.cwd()})')
    size = file.stat().st_size
    try:
        with file.open('rb') as f:
            start = f.read(4)
        if len(start) < 4:
            raise Q3DError(f'checkpoint {str(path)!r} has only {size} bytes: copy it again')
        archive = start.startswith(b'PK')
        if not archive and not start.startswith(b'\x80'):
            raise Q3DError(f'checkpoint {str(path)!r} is not a PyTorch checkpoint: it starts with {start!r}')
        if archive and not zipfile.is_zipfile(file):
            raise Q3DError(
                f'checkpoint {str(path)!r} is truncated ({size} bytes, its end is missing): copy it again'
            )
        if archive:
            _check_archive(file)
        else:
            _check_old_format(file, size)
        torch.load(file, map_location='meta', weights_only=True)
    except pickle.UnpicklingError:
        pass  # objects that the framework's loader may allow; it decides
    except Q3DError:
        raise
    except _DamageError as error:
        raise Q3DError(f'checkpoint {str(path)!r} is damaged ({error}): copy it again') from error
    except Exception as error:
        # What structure and checksums do not show ends in errors of any type, some without a text.
        reason = _first_line(error)
        raise Q3DError(f'checkpoint {str(path)!r} cannot be read ({reason}): copy it again') from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_archive(file: Path) -> None:
    """Compares every record of a zip archive with its index: place, name, length and CRC-32.

    Raises:
        _DamageError: They differ, or the index cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records, index = archive.infolist(), archive.start_dir
    except Exception as error:  # BadZipFile, UnicodeDecodeError, NotImplementedError, struct.error, ...
        raise _DamageError(f'its index cannot be read: {_first_line(error)}') from error
    records.sort(key=lambda record: record.header_offset)
    # torch.serialization.set_crc32_options(False) writes zeros.
    has_checksums = any(record.CRC for record in records)
    ends = [*(record.header_offset for record in records[1:]), index]
    with file.open('rb', buffering=0) as f:
        for record, end in zip(records, ends):
            _find(f, record)
            length, crc = _unpacked(f, record)
            if length != record.file_size or (has_checksums and crc != record.CRC):
                raise _DamageError(f'{record.filename!r} does not have the checksum and length of the index')
            if f.read(max(0, end - f.tell())) not in _descriptors(record):
                raise _DamageError(f'{record.filename!r} does not end where the index says')


def _find(f: BinaryIO, record: zipfile.ZipInfo) -> None:
    """Goes to a record's first byte, by the way that torch takes."""
    f.seek(record.header_offset)
    header = f.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b'PK\x03\x04'):
        raise _DamageError(f'{record.filename!r} does not begin where the index says')
    *_, name_length, padding = _LOCAL_HEADER.unpack(header)
    if f.read(name_length) != record.orig_filename.encode('utf-8' if record.flag_bits & _UTF_8 else 'cp437'):
        raise _DamageError(f'{record.filename!r} has another name in the index')
    f.seek(padding, 1)


def _unpacked(f: BinaryIO, record: zipfile.ZipInfo) -> Tuple[int, int]:
    """Length in bytes and CRC-32 of what a record holds; ``f`` is at its first byte, and then at its end."""
    known = record.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    # Of what the index calls a folder, torch reads nothing: the tensor keeps what was in its memory.
    folder = record.file_size and (record.external_attr & _FOLDER or record.filename.endswith('/'))
    if not known or folder or record.flag_bits & _ENCRYPTED:
        raise _DamageError(f'{record.filename!r} is marked as torch marks no record')
    inflate = None if record.compress_type == zipfile.ZIP_STORED else zlib.decompressobj(-zlib.MAX_WBITS)
    length, crc, left = 0, 0, record.compress_size
    while left:
        packed = f.read(min(left, _CHUNK))
        if not packed:
            raise _DamageError(f'{record.filename!r} ends {left} bytes early')
        left -= len(packed)
        while packed:
            try:
                part = packed if inflate is None else inflate.decompress(packed, _CHUNK)
            except zlib.error as error:
                raise _DamageError(f'{record.filename!r} cannot be unpacked: {error}') from error
            packed = b'' if inflate is None else inflate.unconsumed_tail
            length, crc = length + len(part), zlib.crc32(part, crc)
    return length, crc


def _descriptors(record: zipfile.ZipInfo) -> Set[bytes]:
    """What may stand behind a record: nothing, or checksum and lengths in one of four forms."""
    sizes = record.compress_size, record.file_size
    forms = [struct.pack('<L2Q', record.CRC, *sizes)]
    if max(sizes) < 1 << 32:
        forms.append(struct.pack('<3L', record.CRC, *sizes))
    return {b'', *forms, *(b'PK\x07\x08' + form for form in forms)}


class _Anything:
    """Stands for every class and function that a pickle names, and takes whatever is done to it."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _ignore(self, *args: Any, **kwargs: Any) -> '_Anything':
        return self

    __call__ = __setitem__ = __setstate__ = append = extend = add = _ignore


# The unpickler in Python: the one in C allocates a table as long as the largest index that it meets, which is
# gigabytes where one bit is wrong.
class _Content(pickle._Unpickler):
    """Reads a pickle of torch's old format without running anything that it names.

    Attributes:
        storages: For each key of a storage: number of elements, bytes of an element.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding='latin1')
        self.storages: Dict[str, Tuple[int, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        return _ELEMENT_BYTES.get(name, _Anything)

    def persistent_load(self, pid: Any) -> _Anything:
        if pid[0] == 'storage':
            element_bytes, key, _, count = pid[1:5]
            self.storages.setdefault(str(key), (int(count), int(element_bytes)))
        return _Anything()


def _check_old_format(file: Path, size: int) -> None:
    """Follows a file of torch's old format to its end.

    It holds five pickles (a magic number, a version, sizes of types, the content, the keys of the storages)
    and the storages: for each, the number of elements (int64) and their bytes.

    Raises:
        _DamageError: It ends early, or its parts contradict each other.
    """
    with file.open('rb') as f:
        try:
            magic, *_ = [_Content(f).load() for _ in range(3)]
            content = _Content(f)
            content.load()
            keys = [str(key) for key in _Content(f).load()]
        except Exception as error:  # wrong bytes may stand for any operation of a pickle
            raise _DamageError(f'its content cannot be read: {_first_line(error)}') from error
        if magic != torch.serialization.MAGIC_NUMBER:
            raise _DamageError('it does not begin with the number that torch writes')
        if sorted(keys) != sorted(content.storages):
            raise _DamageError('its list of tensors is not that of its content')
        for key in keys:
            count, element_bytes = content.storages[key]
            declared = f.read(8)
            if declared == count.to_bytes(8, 'little', signed=True):
                f.seek(count * element_bytes, 1)
            elif len(declared) == 8:
                raise _DamageError(f'storage {key!r} has another length than its tensor')
            if len(declared) < 8 or f.tell() > size:
                raise _DamageError(f'it ends early, in storage {key!r}')
