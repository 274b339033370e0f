"""Files on disk: every one appears whole or not at all."""

import contextlib
import csv
import io
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from q3d_plugin.errors import Q3DError

__all__ = [
    'check_writable',
    'plain',
    'read_json',
    'replacing',
    'write_bytes',
    'write_csv',
    'write_json',
    'write_text',
]


def check_writable(folder: Path) -> None:
    """Raises :class:`Q3DError` unless files can be made in ``folder``, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise Q3DError(f'work_dir {str(folder)!r} cannot be made: {existing} is a file, not a folder')
    probe = existing / f'.q3d-{uuid.uuid4().hex}'
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Q3DError(f'work_dir {str(folder)!r} cannot be written: {error.strerror}') from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write in place of ``path``; it becomes ``path`` where no error came up.

    Args:
        path: The file to make or replace; its folder is made where it is missing.

    Yields:
        Path: The temporary file, in the same folder and with the same suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file by way of a temporary name; its folder is made where it is missing."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a text and a line end."""
    write_bytes(path, f'{text}\n'.encode())


def plain(value: Any) -> Any:
    """``value`` in plain data, as JSON and a ``weights_only`` load take it.

    Keys and everything that is no plain data become text; tuples and sets become lists.

    Examples:
        >>> plain({1: (2.5, Path('a'))})
        {'1': [2.5, 'a']}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _finite(value: Any) -> Any:
    # JSON has no NaN and no infinity; readers other than Python's refuse them.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


def write_json(path: Path, content: Any) -> None:
    """Writes plain data; NaN and infinities become null."""
    write_bytes(path, (json.dumps(_finite(plain(content)), indent=1) + '\n').encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same keys; None becomes an empty cell."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_json(path: Path, what: str) -> Any:
    """Reads a file of results.

    Args:
        path: The file.
        what: What to call it in messages.

    Raises:
        Q3DError: It is missing or no JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise Q3DError(f'{what}: {str(path)!r} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise Q3DError(f'{what}: {str(path)!r} is no JSON: {error}') from error
