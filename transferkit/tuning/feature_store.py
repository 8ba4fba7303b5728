"""A folder of arrays found by content: whole, verified and never out of date, whatever happens to the processes that write it.

An entry is a directory named by its key. It is written under another name, flushed, and renamed, so it is there whole or not at
all; its manifest holds a SHA-256 of each file, checked whenever it is opened. Writers of one key wait for each other by `flock`
where the system has it; without it they do the work twice and the first to rename wins. Standard library and NumPy only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transferkit.errors import StorageError
from transferkit.storage import flush_directory, sweep, temporary_directory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Entry", "FeatureStore"]

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """A verified entry.

    Args:
        path: Its directory.
        files: The content of each of its arrays as bytes, mapped from the disk, to be read only.
        metadata: What was written with it.
    """

    path: Path
    files: tuple[np.ndarray[Any, Any], ...]
    metadata: Mapping[str, Any]


@dataclass
class _Writer:
    """Takes arrays piece by piece, in order."""

    folder: Path
    count: int
    durable: bool
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._files = [(self.folder / f"{index}.bin").open("wb") for index in range(self.count)]
        self._digests = [hashlib.sha256() for _ in range(self.count)]

    def append(self, pieces: Sequence[np.ndarray[Any, Any]]) -> None:
        """Adds rows to each of the arrays."""
        with _told(self.folder.parent):
            for file, digest, piece in zip(self._files, self._digests, pieces, strict=True):
                raw = np.ascontiguousarray(piece).view(np.uint8).reshape(-1).data
                file.write(raw)
                digest.update(raw)

    def close(self) -> None:
        """Flushes all to the disk, the manifest last."""
        sizes = []
        for file in self._files:
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
            sizes.append(file.tell())
            file.close()
        manifest = {
            "format": FORMAT,
            "files": [{"bytes": size, "sha256": digest.hexdigest()} for size, digest in zip(sizes, self._digests, strict=True)],
            "metadata": self.metadata,
        }
        with open(self.folder / "manifest.json", "wb") as file:
            file.write(json.dumps(manifest, indent=1).encode())
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
        if self.durable:
            flush_directory(self.folder)

    def abandon(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # a full disk, which was told of before
                file.close()


class FeatureStore:
    """A folder that keeps entries by key.

    Args:
        folder: Where; made when it isn't there, for this user only.
        durable: Whether what was written is to outlive a loss of power, or at least this run.

    Raises:
        StorageError: when others may write to the folder, or it can't be used.
    """

    def __init__(self, folder: str | os.PathLike[str], *, durable: bool = True) -> None:
        self.folder = Path(folder)
        self.durable = durable
        with _told(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
        if os.name == "posix":
            problems = []
            if status.st_mode & stat.S_IWOTH:
                problems.append("everyone may write to it")
            if status.st_uid not in (os.geteuid(), 0):
                problems.append(f"it belongs to another user (id {status.st_uid})")
            if problems:
                raise StorageError(
                    _asked(self.folder),
                    found=problems,
                    cause="whoever can write there can change what the model is trained on",
                    fix="name a folder of your own, or take the right away: chmod o-w",
                )
        sweep(self.folder)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Waits until no other process holds the key, and holds it; the system lets go of it when a process dies."""
        if fcntl is None:
            yield
            return
        with open(self.folder / f"{key}.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def holds(self, prefix: str) -> bool:
        """Whether there is any entry whose key begins so."""
        return any(path.is_dir() for path in self.folder.glob(f"{prefix}*"))

    def open(self, key: str) -> Entry | None:
        """The entry of that key, or None. One that is damaged is removed."""
        path = self.folder / key
        if not path.is_dir():
            return None
        try:
            return _verified(path)
        except _NoRoomError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            _remove(path)
            return None

    @contextlib.contextmanager
    def writer(self, count: int) -> Iterator[_Writer]:
        """Gives a writer of `count` arrays; what it wrote is kept only by `keep`."""
        with contextlib.ExitStack() as stack:
            with _told(self.folder):
                writer = _Writer(stack.enter_context(temporary_directory(self.folder)), count, self.durable)
            stack.callback(writer.abandon)
            yield writer

    def keep(self, writer: _Writer, key: str) -> Entry:
        """Ends the writing and gives the entry, which from now on is found under the key."""
        path = self.folder / key
        with _told(self.folder):
            writer.close()
            try:
                os.rename(writer.folder, path)
            except OSError:
                found = self.open(key)  # another process was first, with the same content
                if found is not None:
                    return found
                os.rename(writer.folder, path)
            flush_directory(self.folder)
            return _mapped(path, json.loads((path / "manifest.json").read_bytes()))


def _asked(folder: Path) -> str:
    return f"Keeping features in {str(folder)!r}."


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            _asked(folder),
            found=f"{error.strerror or error}; nothing was kept",
            fix="free some space, or name a folder that you may write to",
        ) from error


def _remove(path: Path) -> None:
    """Out of sight first, in one step, so that nobody opens it half removed."""
    with contextlib.suppress(OSError), temporary_directory(path.parent) as away:
        os.rename(path, away / path.name)


def _verified(path: Path) -> Entry:
    manifest = json.loads((path / "manifest.json").read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError("another format")
    for index, wanted in enumerate(manifest["files"]):
        digest, size = hashlib.sha256(), 0
        with open(path / f"{index}.bin", "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
                size += len(piece)
        if size != wanted["bytes"] or digest.hexdigest() != wanted["sha256"]:
            raise ValueError("damaged")
    return _mapped(path, manifest)


def _mapped(path: Path, manifest: Mapping[str, Any]) -> Entry:
    # Mapped to be read only: the files stay as they are, and a limit on the process's data (RLIMIT_DATA) doesn't count them.
    files: list[np.ndarray[Any, Any]] = []
    for index, wanted in enumerate(manifest["files"]):
        try:
            size = wanted["bytes"]
            files.append(np.memmap(path / f"{index}.bin", np.uint8, "r", shape=(size,)) if size else np.empty(0, np.uint8))
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise _NoRoomError(
                f"Reading features from {str(path.parent)!r}.",
                found=f"no room to map a file of {size:,} bytes; the features are kept and whole",
                cause="a limit on what the process may address (ulimit -v, RLIMIT_AS)",
                fix='raise the limit, or keep features smaller: .cache("folder", dtype="float16")',
            ) from error
    return Entry(path, tuple(files), manifest["metadata"])


class _NoRoomError(StorageError):
    """There is no room in the process for what is whole on the disk."""
