"""Files on disk: every one appears whole or not at all."""

import csv
import io
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from q3d_plugin.errors import Q3DError

__all__ = ['check_writable', 'read_json', 'write_bytes', 'write_csv', 'write_json', 'write_text']


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


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file by way of a temporary name; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text and a line end."""
    write_bytes(path, f'{text}\n'.encode())


def _plain(value: Any) -> Any:
    # JSON has no NaN and no infinity; readers other than Python's refuse them.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def write_json(path: Path, content: Any) -> None:
    """Writes plain data; NaN and infinities become null."""
    write_bytes(path, (json.dumps(_plain(content), indent=1) + '\n').encode())


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
