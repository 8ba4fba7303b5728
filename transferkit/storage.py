"""Files that are whole or not there, and locks on directories.

A file is written to a temporary beside its target, flushed to the disk and renamed. A rename within one file system is atomic
(POSIX rename(2)), so a reader and a crash see the old file or the new one. The directory is flushed too, or the rename itself
could be lost with the power. Temporaries lie in a directory whose lock their writer holds, so that what a killed writer left can
be told from what another is writing, and removed. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transferkit.errors import StorageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "atomic_path",
    "flush_directory",
    "lock",
    "sha256_of_file",
    "sweep",
    "temporary_directory",
    "write_bytes",
    "write_json",
    "write_text",
]

_TEMPORARY = re.compile(r"\.transferkit-[0-9a-f]{16}\.tmp")
_LOCK = ".transferkit.lock"
#: What a file system says of what it can't do (locks, on some network and cluster file systems).
_NOT_KNOWN = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})
#: The locked files this process has open. A forked child must not keep them: it would hold them beyond its parent's death.
_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _try_lock(descriptor: int) -> bool:
    """Locks an open file without waiting; the system lets go of it when the file is closed or the process dies.

    Raises:
        OSError: where the file system knows no locks.
    """
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # what is locked there can't be read by others, so far from what is to be read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _close(descriptor: int) -> None:
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a directory for this process until the end of the block; whoever else asks for it gets an error.

    The system lets go of it when the process ends, however it ends, so the file `.transferkit.lock` that stays behind is no
    obstacle. What killed writers left in the directory is removed. A file system without locks gives a warning instead.

    Args:
        directory: The directory; made when it isn't there.

    Raises:
        StorageError: when it is held, naming the process and since when, or can't be written to.
    """
    directory = Path(directory)
    asked = f"Locking {str(directory)!r}, so that no other run writes there."
    path = directory / _LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise StorageError(asked, found=f"{error.strerror or error}", fix="name a directory that you may write to") from error
    _held.add(descriptor)
    try:
        try:
            free = _try_lock(descriptor)
        except OSError as error:
            if error.errno not in _NOT_KNOWN:
                raise StorageError(asked, found=f"{error.strerror or error}", fix="name a directory on another disk") from error
            warnings.warn(f"{directory} lies on a file system without locks: see that no other run writes there", stacklevel=3)
            free = True
        if not free:
            raise _taken(asked, path)
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the note
            os.truncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, json.dumps(about).encode())
        sweep(directory)
        yield
    finally:
        _close(descriptor)


def _taken(asked: str, path: Path) -> StorageError:
    """The error for a directory that is held, with what its holder wrote into the lock."""
    try:
        about = json.loads(path.read_bytes())
        process, host, since = int(about["process"]), str(about["host"]), str(about["since"])
    except (OSError, ValueError, KeyError, TypeError):  # the holder is just about to write it
        found, fix = "another process holds it", "wait until it ends"
    else:
        here = host == socket.gethostname()
        if here and process == os.getpid():
            found, fix = f"this process ({process}) holds it itself, since {since}", "end the first run"
        else:
            found = f"process {process} on {host} holds it, since {since}"
            fix = f"wait until it ends, or stop it (kill {process}{'' if here else f' on {host}'})"
    return StorageError(
        asked,
        found=found,
        cause="two runs in one directory would write over each other's files",
        fix=f"{fix}; or give this run a directory of its own",
    )


@contextlib.contextmanager
def temporary_directory(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a directory in `parent` that goes at the end of the block, or with the next `sweep` when the process is killed.

    It may be renamed in the block, and then stays. Its file `lock` is this writer's sign of life.

    Raises:
        OSError: when it can't be made.
    """
    parent = Path(parent)
    while True:
        path = parent / f".transferkit-{secrets.token_hex(8)}.tmp"
        path.mkdir(mode=0o700)
        try:
            descriptor = os.open(path / "lock", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except FileNotFoundError:  # swept, before it had its lock
            continue
        except OSError:
            path.rmdir()
            raise
        _held.add(descriptor)
        try:
            ours = _try_lock(descriptor) and (os.name == "nt" or os.fstat(descriptor).st_nlink > 0)
        except OSError:  # no locks here, so nobody sweeps either
            ours = True
        if ours:
            break
        _close(descriptor)
    try:
        yield path
    finally:
        _close(descriptor)
        shutil.rmtree(path, ignore_errors=True)


def sweep(directory: str | os.PathLike[str]) -> None:
    """Removes what killed writers left in a directory, and nothing that is being written."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _remove_if_left(Path(entry.path))


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):
        try:
            descriptor = os.open(path / "lock", os.O_RDWR)
        except FileNotFoundError:
            path.rmdir()  # killed before it had its lock; a writer that lives makes another
            return
        try:
            if not _try_lock(descriptor):
                return
            if os.name == "nt":  # what is open can't be removed there, by us or under a writer
                os.close(descriptor)
                descriptor = -1
            shutil.rmtree(path)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def flush_directory(path: str | os.PathLike[str]) -> None:
    """Has the disk keep a directory's list of names. Windows can't open directories, and needs no flush of them."""
    if hasattr(os, "O_DIRECTORY"):
        try:
            _flush(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno not in _NOT_KNOWN:  # some network file systems flush no directories
                raise


def _flush(path: str | os.PathLike[str], flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path of the same name to write to; at the end of the block it takes the target's place.

    When the block raises, or the process dies, the target stays as it was. A link is followed, and a file that was there hands
    its permissions on. What killed writers left in the directory is removed.

    Args:
        target: The file to write. Its directory must exist.

    Raises:
        StorageError: when the directory isn't there, the target is no regular file, or the disk refuses.
    """
    asked = f"Writing {os.fspath(target)!r}."
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise StorageError(asked, found="a directory of that name", fix="give the path of a file")
    if not target.parent.is_dir():
        raise StorageError(asked, found=f"no directory {str(target.parent)!r}", fix="make the directory first")
    try:
        mode = target.stat().st_mode
    except OSError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        raise StorageError(asked, found="a device, pipe or socket of that name", fix="give the path of a file")
    if mode is not None and not os.access(target, os.W_OK):
        raise StorageError(asked, found="a file of that name that may not be written to", fix="give another path, or chmod u+w")
    sweep(target.parent)
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(temporary_directory(target.parent)) / target.name
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except OSError as error:
            raise StorageError(
                asked, found=f"{error.strerror or error}", fix="free some space, or choose a directory you may write to"
            ) from error
        kept = "the old file, if there was one, is untouched"
        try:
            yield temporary
            _flush(temporary, os.O_RDWR)
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            os.replace(temporary, target)
            kept = "the new file is in its place, but a loss of power may still bring the old one back"
            flush_directory(target.parent)
        except Exception as error:
            said = _of_the_disk(error)
            if said is None or isinstance(error, StorageError):
                raise
            raise StorageError(asked, found=f"{said}; {kept}", fix="free some space and write again") from error


def _of_the_disk(error: BaseException) -> str | None:
    """What the disk said, where an error comes from it. The HDF5 library puts it into the text of errors of several kinds."""
    within: BaseException | None = error
    while within is not None:
        if found := re.search(r"errno = \d+, error message = '([^']*)'", str(within)):
            return found[1]
        within = within.__cause__ or within.__context__
    return error.strerror or str(error) if isinstance(error, OSError) else None


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
