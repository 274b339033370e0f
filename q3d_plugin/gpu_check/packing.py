"""Wheels in parts of limited size: packed tighter, cut into pieces, joined again, and checked."""

import copy
import hashlib
import lzma
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Dict, List

from q3d_plugin import files
from q3d_plugin.errors import Q3DError

__all__ = ['LIST', 'MIB', 'entry_of', 'pack', 'parts_of', 'read_list', 'sha256', 'unpack', 'write_parts']

MIB = 2**20
LIST = 'wheels.json'
"""Lists all packages of a collection; a copy is in every part."""

# Smaller files are hardly worth the time.
_WORTH = 16 * MIB
_BLOCK = 2**20


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        for block in iter(lambda: f.read(_BLOCK), b''):
            digest.update(block)
    return digest.hexdigest()


def pack(path: Path, folder: Path, worth: int = _WORTH) -> Path:
    """A tighter copy of a wheel: its files without compression of their own, all of it in xz.

    The build of spconv for CUDA shrinks from 67 to 29 MiB in this way.

    Args:
        path: The wheel, or another file.
        folder: Where to put the copy.
        worth: Files below this size are left as they are.

    Returns:
        Path: ``NAME.whl.xz`` in ``folder``, or ``path`` where that would not be smaller.
    """
    if path.suffix != '.whl' or path.stat().st_size < worth:
        return path
    plain, packed = folder / path.name, folder / f'{path.name}.xz'
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(plain, 'w', zipfile.ZIP_STORED) as target:
        for info in source.infolist():
            copied = copy.copy(info)
            copied.compress_type = zipfile.ZIP_STORED
            with source.open(info) as f, target.open(copied, 'w') as g:
                shutil.copyfileobj(f, g, _BLOCK)
    with open(plain, 'rb') as f, lzma.open(packed, 'wb', preset=2) as g:
        shutil.copyfileobj(f, g, _BLOCK)
    if packed.stat().st_size >= path.stat().st_size:
        return path
    return packed


def entry_of(path: Path, packed: Path) -> Dict[str, Any]:
    """What the list says of a package.

    Args:
        path: The wheel or source distribution.
        packed: What travels in its place, which may be the same.
    """
    return {
        'file': path.name,
        'travels': packed.name,
        'sha256': sha256(packed),
        'bytes': packed.stat().st_size,
    }


def parts_of(sizes: Sequence[int], limit: int) -> List[List[Any]]:
    """Which bytes of which file go into which part, in the given order and without a gap.

    A file goes into one part where it fits into the rest of one, or into an empty one; else it is cut.

    Args:
        sizes: Bytes of each file.
        limit: Bytes of a part.

    Returns:
        list: For each part (index of the file, first byte, byte after the last).

    Examples:
        >>> parts_of([4, 7, 3, 15], limit=10)
        [[(0, 0, 4), (2, 0, 3)], [(1, 0, 7)], [(3, 0, 10)], [(3, 10, 15)]]
    """
    parts: List[List[Any]] = []
    room: List[int] = []
    for number, size in enumerate(sizes):
        start = 0
        while size - start > limit:
            parts.append([(number, start, start + limit)])
            room.append(0)
            start += limit
        place = next((i for i, left in enumerate(room) if left >= size - start), len(parts))
        if place == len(parts):
            parts.append([])
            room.append(limit)
        parts[place].append((number, start, size))
        room[place] -= size - start
    return parts


def write_parts(
    packed: Sequence[Path], entries: Sequence[Dict[str, Any]], head: Dict[str, Any], out: Path, limit: int
) -> List[Dict[str, Any]]:
    """Writes the folders ``part-01`` and so on, each with a copy of the list.

    Args:
        packed: The files.
        entries: What the list says of each; ``pieces`` is added.
        head: What the list says of all of them.
        out: Where the folders go; parts of an earlier collection are removed.
        limit: Bytes of a part, with its list.

    Returns:
        list: Name, bytes and pieces of each part.
    """
    for old in out.glob('part-[0-9][0-9]'):
        shutil.rmtree(old)
    # The list itself is a few hundred bytes a package.
    plan = parts_of([p.stat().st_size for p in packed], limit - 600 * len(packed) - 4096)
    for entry in entries:
        entry['pieces'] = []
    shown = []
    for number, pieces in enumerate(plan, 1):
        folder, names = out / f'part-{number:02d}', []
        folder.mkdir(parents=True)
        for index, start, end in pieces:
            path, entry = packed[index], entries[index]
            whole = start == 0 and end == path.stat().st_size
            name = path.name if whole else f'{path.name}.{len(entry["pieces"]) + 1:03d}'
            with open(path, 'rb') as f, open(folder / name, 'wb') as g:
                f.seek(start)
                for _ in range(0, end - start, _BLOCK):
                    g.write(f.read(min(_BLOCK, end - g.tell() - start)))
            entry['pieces'].append(f'{folder.name}/{name}')
            names.append(name)
        shown.append({'part': folder.name, 'pieces': names})
    for row in shown:
        folder = out / row['part']
        files.write_json(folder / LIST, {**head, 'packages': list(entries)})
        row['bytes'] = sum(f.stat().st_size for f in folder.iterdir())
    return shown


def read_list(folder: Path) -> Dict[str, Any]:
    """The list of a collection, from any of its parts.

    Args:
        folder: Has some parts, or is one.

    Raises:
        Q3DError: There is no list.
    """
    found = sorted(folder.rglob(LIST))
    if not found:
        raise Q3DError(
            f'--wheels: {str(folder)!r} has no {LIST}; a folder that "tools/check_gpu.sh --collect" filled '
            'would work'
        )
    return files.read_json(found[0], 'list of wheels')


def _pieces(folder: Path, wanted: Iterable[str]) -> List[Path]:
    """The pieces that are at hand, wherever they lie below ``folder``."""
    return [p for name in wanted for p in sorted(folder.rglob(Path(name).name))[:1]]


def unpack(entry: Dict[str, Any], folder: Path, out: Path) -> Path:
    """Joins the pieces of a package, checks them, and unpacks what was packed.

    Args:
        entry: Of the list.
        folder: Where the parts are.
        out: Where to put the wheel; one that is there is kept.

    Returns:
        Path: The wheel.

    Raises:
        Q3DError: A piece is missing or damaged.
    """
    done = out / entry['file']
    if done.is_file():
        return done
    pieces = _pieces(folder, entry['pieces'])
    if len(pieces) < len(entry['pieces']):
        at_hand = {p.name for p in pieces}
        missing = [name for name in entry['pieces'] if Path(name).name not in at_hand]
        raise Q3DError(f'{entry["file"]}: {", ".join(missing)} is not in {str(folder)!r}')
    out.mkdir(parents=True, exist_ok=True)
    with files.replacing(out / entry['travels']) as joined:
        with open(joined, 'wb') as g:
            for piece in pieces:
                with open(piece, 'rb') as f:
                    shutil.copyfileobj(f, g, _BLOCK)
        if sha256(joined) != entry['sha256']:
            raise Q3DError(f'{entry["file"]} is damaged: its checksum is not that of the list; copy it again')
        if entry['travels'] != entry['file']:
            with files.replacing(done) as plain, lzma.open(joined, 'rb') as f, open(plain, 'wb') as g:
                shutil.copyfileobj(f, g, _BLOCK)
    if done != out / entry['travels']:
        (out / entry['travels']).unlink()
    return done
