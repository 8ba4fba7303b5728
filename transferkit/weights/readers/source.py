"""The bytes of one file, opened once: a regular file only, told by the open descriptor, so nobody can exchange it in between.

The file is read and never mapped: where a disk fails, or another process cuts the file, a mapping kills the process (SIGBUS),
and a read gives an error. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from typing import Protocol

from transferkit.errors import UnsafeFileError, WeightsFileError, WeightsNotFoundError

__all__ = ["Memory", "Part", "Piece", "Source", "asked_of", "check_range"]

_MOST_AT_ONCE = 1 << 30  # the kernel gives at most 2 GiB at a time
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def asked_of(path: str | os.PathLike[str]) -> str:
    """The first line of every message about the file."""
    return f"Reading weights from {os.fspath(path)!r}."


class Piece(Protocol):
    """Bytes that a reader takes its content from: a file, a part of one, or what was unpacked of one."""

    path: str
    size: int

    @property
    def whole(self) -> bool:
        """Whether it is a whole file on the disk."""

    @property
    def descriptor(self) -> int:
        """The open file's descriptor, -1 where there is none."""

    def view(self, offset: int, length: int, what: str = "") -> memoryview:
        """`length` bytes from `offset` on, read-only. `what` names them in messages."""

    def bytes(self, offset: int, length: int, what: str = "") -> bytes:
        """A copy of `length` bytes from `offset` on."""

    def read_into(self, buffer: memoryview, offset: int, what: str = "") -> None:
        """Fills `buffer` with the bytes from `offset` on."""


class Source:
    """An open regular file that gives pieces of itself, each checked against its size.

    Args:
        path: The file; `~` stands for the home directory.

    Raises:
        WeightsNotFoundError: when there is none.
        UnsafeFileError: when it is a pipe, a device or a socket.
        WeightsFileError: when it is a directory, empty, or may not be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.expanduser(os.fspath(path))
        asked = asked_of(path)
        self.whole = True
        self._descriptor = -1
        self._lock = threading.Lock()
        try:
            # O_NONBLOCK: opening a pipe nobody writes to would wait for ever; regular files don't mind the flag.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self.path, flags)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise WeightsNotFoundError(asked, found="no file at that path", fix=self._not_found_fix()) from error
        except (OSError, ValueError) as error:
            found = getattr(error, "strerror", None) or str(error)
            raise WeightsFileError(
                asked, found=f"the file can't be opened: {found}", fix="check the path and its rights"
            ) from error
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            kind = next((words for test, words in _KINDS if test(status.st_mode)), "no regular file")
            self.close()
            if kind == "a directory":
                raise WeightsFileError(asked, found="a directory, not a file", fix="give the path of a file")
            raise UnsafeFileError(asked, found=f"{kind}, not a regular file", fix="copy its content into a file first")
        if not self.size:
            self.close()
            raise WeightsFileError(
                asked, found="an empty file", cause="a download or a save that was cut off", fix="get the file again"
            )

    def _not_found_fix(self) -> str:
        if "://" in self.path:
            return "download the file first; transferkit opens local files only"
        near = []
        with contextlib.suppress(OSError):
            near = sorted(os.listdir(os.path.dirname(self.path) or "."))[:8]
        return (
            f"check the path; its directory holds {', '.join(near)}"
            if near
            else "check the path; its directory isn't there either"
        )

    @property
    def descriptor(self) -> int:
        """The open file's descriptor."""
        return self._descriptor

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._descriptor < 0

    def _check(self, offset: int, length: int, what: str) -> None:
        if self.closed:
            raise WeightsFileError(asked_of(self.path), found="the archive is closed already", fix="read before it is closed")
        check_range(self, offset, length, what)

    def _cut(self) -> WeightsFileError:
        return WeightsFileError(
            asked_of(self.path),
            found=f"the file was {self.size} bytes when it was opened and is shorter now",
            cause="another process is writing it",
            fix="wait until the file is complete, and open it again",
        )

    def view(self, offset: int, length: int, what: str = "") -> memoryview:
        """`length` bytes from `offset` on, read-only."""
        return memoryview(self.bytes(offset, length, what))

    def bytes(self, offset: int, length: int, what: str = "") -> bytes:
        """`length` bytes from `offset` on."""
        self._check(offset, length, what)
        if length <= _MOST_AT_ONCE and hasattr(os, "pread"):
            try:
                content = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise self._failing(error, offset, what) from error
            if len(content) == length:
                return content
        room = bytearray(length)
        self.read_into(memoryview(room), offset, what)
        return bytes(room)

    def read_into(self, buffer: memoryview, offset: int, what: str = "") -> None:
        """Fills `buffer` with the bytes from `offset` on; several threads may do so at a time."""
        self._check(offset, len(buffer), what)
        done = 0
        while done < len(buffer):
            try:
                count = self._read_once(buffer[done : done + _MOST_AT_ONCE], offset + done)
            except OSError as error:
                raise self._failing(error, offset + done, what) from error
            if not count:
                raise self._cut()
            done += count

    def _read_once(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._lock, os.fdopen(os.dup(self._descriptor), "rb", buffering=0) as file:  # Windows has no reads at an offset
            file.seek(offset)
            return file.readinto(buffer) or 0

    def _failing(self, error: OSError, offset: int, what: str) -> WeightsFileError:
        """An error of the disk in the library's words."""
        return WeightsFileError(
            asked_of(self.path),
            found=f"{what or 'the file'} can't be read at byte {offset}: {error.strerror or error}",
            cause="the disk, or the connection to it, is failing",
            fix="copy the file to another disk and open it there",
        )

    def pieces(self, piece: int = 1 << 20) -> Iterator[memoryview]:
        """The whole file, piece by piece."""
        for offset in range(0, self.size, piece):
            yield self.view(offset, min(piece, self.size - offset))

    def verify_sha256(self, expected: str) -> None:
        """Raises `UnsafeFileError` unless the file's SHA-256 is `expected` (64 hexadecimal digits)."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        found = digest.hexdigest()
        if found != expected.strip().lower():
            raise UnsafeFileError(
                asked_of(self.path),
                found=f"its SHA-256 is {found}, expected {expected}",
                cause="another version of the file, or a damaged or exchanged one",
                fix="get the file again, or correct `sha256=` after checking where the file comes from",
            )

    def close(self) -> None:
        """Releases the descriptor."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Part:
    """A stretch of a piece, such as a member of a zip archive that isn't compressed.

    Args:
        piece: What it is a stretch of.
        offset: Where the stretch begins.
        size: Its length in bytes.
    """

    whole = False
    descriptor = -1

    def __init__(self, piece: Piece, offset: int, size: int) -> None:
        check_range(piece, offset, size, "")
        self.path, self.size = piece.path, size
        self._piece, self._offset = piece, offset

    def view(self, offset: int, length: int, what: str = "") -> memoryview:
        """`length` bytes from `offset` on, read-only."""
        check_range(self, offset, length, what)
        return self._piece.view(self._offset + offset, length, what)

    def bytes(self, offset: int, length: int, what: str = "") -> bytes:
        """A copy of `length` bytes from `offset` on."""
        check_range(self, offset, length, what)
        return self._piece.bytes(self._offset + offset, length, what)

    def read_into(self, buffer: memoryview, offset: int, what: str = "") -> None:
        """Fills `buffer` with the bytes from `offset` on."""
        check_range(self, offset, len(buffer), what)
        self._piece.read_into(buffer, self._offset + offset, what)


class Memory:
    """Bytes in memory, such as an unpacked member of a zip archive.

    Args:
        path: The file they came from, for messages.
        content: The bytes.
    """

    whole = False
    descriptor = -1

    def __init__(self, path: str, content: bytes | bytearray | memoryview) -> None:
        self.path, self.size = path, len(content)
        self._content = memoryview(content).toreadonly()

    def view(self, offset: int, length: int, what: str = "") -> memoryview:
        """A read-only view of `length` bytes from `offset` on; no copy."""
        check_range(self, offset, length, what)
        return self._content[offset : offset + length]

    def bytes(self, offset: int, length: int, what: str = "") -> bytes:
        """A copy of `length` bytes from `offset` on."""
        return self.view(offset, length, what).tobytes()

    def read_into(self, buffer: memoryview, offset: int, what: str = "") -> None:
        """Fills `buffer` with the bytes from `offset` on."""
        buffer[:] = self.view(offset, len(buffer), what)


def check_range(piece: Piece, offset: int, length: int, what: str) -> None:
    """Raises `WeightsFileError` unless the piece holds `length` bytes from `offset` on."""
    if offset < 0 or length < 0 or offset + length > piece.size:
        raise WeightsFileError(
            asked_of(piece.path),
            found=f"{what or 'a piece'} at byte {offset} of length {length} is past the end of the content, {piece.size} bytes",
            cause="the file was cut off or damaged",
            fix="get the file again",
        )
