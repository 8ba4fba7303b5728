"""Processes that die, or whose disk refuses, while they save: a forked child saves, its parent looks at what is left.

A child is a copy of this process, so nothing is imported anew, and hundreds can die in a minute. `traced` stops it at each call
to the system (ptrace(2), Linux on x86-64): every one that changes a file can be made to fail, or be the last.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CAN_FORK = hasattr(os, "fork")
CAN_TRACE = sys.platform == "linux" and platform.machine() == "x86_64"

SAID_SO, RAW, _FORBIDDEN = 3, 4, 5  # the child's exit codes: an error of the library's own kind, any other, no tracing here
_SECONDS = 120  # a child that takes longer hangs


class TracingForbiddenError(Exception):
    """This system lets no process trace another."""


@dataclass(frozen=True)
class Kind:
    """A kind of file, and how it is saved.

    Args:
        name: Of the kind.
        save: Writes version number n to a path.
        load: Gives the number of the version at a path; raises for a file that is damaged or mixed of two.
        file: The file's name; its ending often chooses the format.
        crashes: Whether a write that fails may end the process without a word, as it does within the HDF5 library (1.14) where
            Keras has it write to the disk.
    """

    name: str
    save: Callable[[Path, int], object]
    load: Callable[[Path], int]
    file: str
    crashes: bool = False


@dataclass
class Tally:
    """What was found after each fault: the old version, the new one, or neither."""

    counts: Counter[str] = field(default_factory=Counter)
    #: Faults that were neither survived nor told by an error of the library's.
    untold: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    #: Faults after which a process that lived on left temporaries behind; what failed was no removal.
    littered: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        return f"{self.faults} faults: {self.counts['old']} old, {self.counts['new']} new, {self.counts['lost']} lost"


class Saved:
    """A good file in a folder of its own, over which children save."""

    def __init__(self, kind: Kind, folder: Path, *, told: tuple[type[BaseException], ...]) -> None:
        folder.mkdir(parents=True)
        self.kind, self.folder, self.path, self._told = kind, folder, folder / kind.file, told
        self.version = 1
        kind.save(self.path, 1)
        assert kind.load(self.path) == 1
        self._good = self._content()
        started = time.perf_counter()
        os.waitpid(self.start(), 0)
        self.seconds = time.perf_counter() - started
        assert self.look(Tally(), "nothing", 0) == "new"

    def _content(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".transferkit") for part in path.relative_to(self.folder).parts)
        }

    def start(self, *, before: Callable[[], object] = lambda: None) -> int:
        """Begins to save the next version in a child, and gives its number."""
        return forked(lambda: self.kind.save(self.path, self.version + 1), before=before, told=self._told)

    def look(self, tally: Tally, fault: str, status: int) -> str:
        """What is there after a child ended, counted; a new version becomes the old one, a lost one is put back."""
        died = os.WIFSIGNALED(status)
        code = -os.WTERMSIG(status) if died else os.WEXITSTATUS(status)
        content = self._content()
        if content == self._good:
            found = "old"
        else:
            try:
                found = {self.version: "old", self.version + 1: "new"}.get(self.kind.load(self.path), "lost")
            except Exception:  # whatever a damaged file makes the loader raise, the file is lost
                found = "lost"
        tally.counts[found] += 1
        if found == "lost":
            tally.lost.append(fault)
        expected = {SAID_SO, -signal.SIGKILL, *((-signal.SIGSEGV, -signal.SIGABRT) if self.kind.crashes else ())}
        wrong = found == "old" if code == 0 else code not in expected
        if wrong:
            tally.untold.append(f"{fault}: exit {code}, {found}")
        if not died and self._left() and not fault.startswith(("unlink", "rmdir")):
            tally.littered.append(fault)
        if found == "new":
            self.version += 1
            self._good = self._content()
        elif found == "lost":
            for path, raw in self._good.items():
                Path(path).write_bytes(raw)
        return found

    def is_clean(self) -> bool:
        """Whether one more save leaves nothing behind that is no part of the file."""
        self.kind.save(self.path, self.version + 1)
        self.version += 1
        self._good = self._content()
        return not self._left()

    def _left(self) -> list[Path]:
        return list(self.folder.rglob(".transferkit-*.tmp"))


def forked(
    action: Callable[[], object], *, told: tuple[type[BaseException], ...], before: Callable[[], object] = lambda: None
) -> int:
    """Runs `action` in a copy of this process and gives its number; its exit code says how the action ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads; the child uses none of them
        child = os.fork()
    if child:
        return child
    code = RAW
    try:
        signal.alarm(_SECONDS)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # what dies complains
        before()
        action()
        code = 0
    except told:
        code = SAID_SO
    finally:
        os._exit(code)


def killed_at_random(saved: Saved, times: int, *, seed: int = 0) -> Tally:
    """Kills the child at a random moment of the time that saving takes, so many times."""
    import numpy as np

    random, tally = np.random.default_rng(seed), Tally()
    for _ in range(times):
        moment = random.uniform(0, saved.seconds)
        child = saved.start()
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        saved.look(tally, f"killed after {moment:.4f} s", os.waitpid(child, 0)[1])
    return tally


def full_at_offsets(saved: Saved, times: int) -> Tally:
    """Lets no file grow beyond an offset, at so many offsets from nothing to just under the whole file."""
    import resource

    tally = Tally()
    size = max(path.stat().st_size for path in saved.folder.rglob("*") if path.is_file())
    for number in range(times):
        offset = size * number // times

        def small(offset: int = offset) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))

        saved.look(tally, f"full at {offset} of {size} bytes", os.waitpid(saved.start(before=small), 0)[1])
    return tally


# Linux on x86-64: the numbers of the calls that change files, and where the registers lie in struct user_regs_struct.
_CALLS = {
    1: "write", 18: "pwrite64", 20: "writev", 40: "sendfile", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
    82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink", 90: "chmod", 91: "fchmod", 257: "openat", 258: "mkdirat",
    263: "unlinkat", 264: "renameat", 268: "fchmodat", 285: "fallocate", 296: "pwritev", 316: "renameat2", 326: "copy_file_range",
}  # fmt: skip
_GROWING = {"write", "pwrite64", "writev", "pwritev", "sendfile", "fallocate", "copy_file_range", "openat", "mkdir", "mkdirat"}
_RAX, _RDX, _RDI, _ORIG_RAX = 80, 96, 112, 120
_TRACEME, _PEEKUSER, _POKEUSER, _SYSCALL, _SETOPTIONS = 0, 3, 6, 24, 0x4200
_SYSGOOD, _EXITKILL = 1, 0x100000

KILL = -1


@functools.cache
def _call() -> Callable[..., int]:
    function = ctypes.CDLL(None).ptrace
    function.argtypes, function.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_long
    return function


def _ptrace(request: int, child: int, address: int = 0, value: int = 0) -> int:
    return _call()(request, child, address, value)


def _stops(child: int) -> Iterator[int]:
    """Yields at each entry into the system and each return from it, and at last the status with which the child ended."""
    signalled = 0
    while True:
        _ptrace(_SYSCALL, child, 0, signalled)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            yield status
            return
        signalled = 0 if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80 else os.WSTOPSIG(status)
        if not signalled:
            yield -1


def traced(saved: Saved, decide: Callable[[int, str], int]) -> tuple[int, list[str]]:
    """Saves in a child that is stopped at each call which changes a file.

    Args:
        saved: What is saved over.
        decide: Gets a call's number from 0 and its name; gives 0 to let it be, the error it is to fail with, or `KILL`.

    Returns:
        The status with which the child ended, and the names of its calls.
    """

    def stop() -> None:
        if _ptrace(_TRACEME, 0):
            os._exit(_FORBIDDEN)
        os.kill(os.getpid(), signal.SIGSTOP)

    child = saved.start(before=stop)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        raise TracingForbiddenError
    _ptrace(_SETOPTIONS, child, 0, _SYSGOOD | _EXITKILL)
    calls: list[str] = []
    entering, failing = True, 0
    for status in _stops(child):
        if status != -1:
            return status, calls
        if entering:
            name = _CALLS.get(_ptrace(_PEEKUSER, child, _ORIG_RAX))
            if name == "openat" and not _ptrace(_PEEKUSER, child, _RDX) & (os.O_WRONLY | os.O_RDWR):
                name = None
            if name in ("write", "writev") and _ptrace(_PEEKUSER, child, _RDI) <= 2:
                name = None
            if name is not None:
                verdict = decide(len(calls), name)
                calls.append(name)
                if verdict == KILL:
                    os.kill(child, signal.SIGKILL)
                elif verdict:
                    failing = verdict
                    _ptrace(_POKEUSER, child, _ORIG_RAX, -1)  # no such call
        elif failing:
            _ptrace(_POKEUSER, child, _RAX, -failing)
            failing = 0
        entering = not entering
    raise AssertionError("the child neither ended nor stopped")


def at_each_call(saved: Saved, fault: str, *, every: int = 1) -> Tally:
    """Puts a fault at each call that changes a file, one save for each.

    Args:
        saved: What is saved over.
        fault: `fails`: the call does, once. `killed`: it is the last. `full`: the disk is, from then on.
        every: 1 for each call, 2 for every other …
    """

    def decide(at: int) -> Callable[[int, str], int]:
        def verdict(number: int, name: str) -> int:
            if fault == "full":
                return errno.ENOSPC if number >= at and name in _GROWING else 0
            return 0 if number != at else KILL if fault == "killed" else errno.EIO

        return verdict

    tally = Tally()
    at = 0
    while True:
        status, calls = traced(saved, decide(at))
        if at >= len(calls):
            break
        saved.look(tally, f"{calls[at]} (number {at}) {fault}", status)
        at += every
    saved.look(Tally(), "nothing", status)
    return tally
