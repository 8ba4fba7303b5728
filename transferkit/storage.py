"""Files that are whole or not there: write to a temporary beside the target, flush to the disk, rename.

A rename within one directory is atomic (POSIX rename(2)), so a reader and a crash see the old file or the new one. The
directory is flushed too, or the rename itself could be lost with the power. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transferkit.errors import StorageError

__all__ = ["atomic_path", "sha256_of_file", "write_bytes", "write_json", "write_text"]


def _flush(path: str | os.PathLike[str], flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `target` to write to; at the end of the block it takes the target's place.

    When the block raises, or the process dies, the target stays as it was. The temporary keeps the target's suffixes, because
    some writers choose the format by them.

    Args:
        target: The file to write. Its directory must exist.

    Raises:
        StorageError: when the directory isn't there, or the disk refuses.
    """
    target = Path(target)
    asked = f"Writing {str(target)!r}."
    if target.is_dir():
        raise StorageError(asked, found="a directory of that name", fix="give the path of a file")
    if not target.parent.is_dir():
        raise StorageError(asked, found=f"no directory {str(target.parent)!r}", fix="make the directory first")
    temporary = target.parent / f".tmp-{secrets.token_hex(8)}-{target.name}"
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise StorageError(
            asked, found=f"{error.strerror}", fix="free some space, or choose a directory you may write to"
        ) from error
    try:
        yield temporary
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, target)
        if hasattr(os, "O_DIRECTORY"):  # Windows can't open directories, and needs no flush of them
            _flush(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            asked,
            found=f"{error.strerror or error}; the old file, if there was one, is untouched",
            fix="free some space and write again",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """Writes the bytes to `target`, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: str | os.PathLike[str], content: str) -> None:
    """Writes the text to `target` as UTF-8, whole or not at all."""
    write_bytes(target, content.encode())


def write_json(target: str | os.PathLike[str], content: Any) -> None:
    """Writes `content` as JSON text to `target`, whole or not at all."""
    write_text(target, json.dumps(content, indent=1) + "\n")


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
