"""HDF5's own library for the rarer parts of the format: in a process of its own under limits, or here for a file one trusts.

Imports NumPy and h5py only.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import h5py
import numpy as np

from transferkit.weights.readers.archive import Limits
from transferkit.weights.readers.hdf5_child import listing
from transferkit.weights.readers.hdf5_values import MOST_INFLATION, DamageError, H5Dataset, HostileError, Parsed
from transferkit.weights.readers.source import Piece

__all__ = ["here", "in_child"]

_CHILD = os.path.join(os.path.dirname(__file__), "hdf5_child.py")
_SECONDS = 4.0
_CHILD_MEMORY = 2 << 30


def _from_listing(found: Mapping[str, Any], size: int) -> Parsed:
    if "refused" in found:
        raise HostileError(str(found["refused"]))
    if "damaged" in found:
        raise DamageError(str(found["damaged"]))
    parsed = Parsed(
        groups=dict(found["groups"]),
        children={k: tuple(v) for k, v in found["children"].items()},
        addresses=dict(found["addresses"]),
    )
    extents = []
    for path, said in found["datasets"].items():
        dataset = H5Dataset(
            path,
            tuple(said["shape"]),
            np.dtype(said["dtype"]),
            offset=said["offset"],
            problem=said["problem"],
            unsafe=said["unsafe"],
            attributes=found["attributes"].get(path, {}),
        )
        if not dataset.problem and dataset.nbytes > said["stored"] * (1 if dataset.offset is not None else MOST_INFLATION):
            problem = f"its shape {dataset.shape} needs {dataset.nbytes} bytes, the file holds {said['stored']} for it"
            dataset = replace(dataset, problem=problem, unsafe=True)
        if dataset.offset is not None and dataset.nbytes and not dataset.problem:
            if dataset.offset + dataset.nbytes > size:
                raise DamageError(f"{path!r} reaches past the end of the file")
            extents.append((dataset.offset, dataset.offset + dataset.nbytes, path))
        parsed.datasets[path] = dataset
    extents.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(extents):
        if start < end:
            raise HostileError(f"{first!r} and {second!r} share bytes")
    return parsed


_Opened = tuple[Parsed, Callable[[str], np.ndarray[Any, Any]], Callable[[], None]]


def here(piece: Piece, limits: Limits) -> _Opened:
    """What the file holds, by HDF5's library in this process: for files one trusts.

    Raises:
        DamageError: when the library can't read it.
        HostileError: when it holds what a weights file must not.
    """
    try:
        file = h5py.File(piece.path if piece.whole else io.BytesIO(piece.bytes(0, piece.size)), "r")
        found = listing(file, max_objects=4 * limits.max_arrays, max_metadata=limits.max_metadata_bytes)
    except Exception as error:
        raise DamageError(str(error)) from error
    return _from_listing(found, piece.size), lambda name: np.asarray(file[name][()]), file.close


class _Child:
    """The process that reads the file, and what is said between it and us."""

    def __init__(self, piece: Piece, limits: Limits) -> None:
        descriptor = piece.descriptor
        inherit = piece.whole and os.path.isdir("/dev/fd")
        # The open file itself is handed over, not its name: nobody can exchange it in between.
        path = f"/dev/fd/{descriptor}" if inherit else piece.path
        self.process = subprocess.Popen(
            [sys.executable, _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,) if inherit else (),
            env={**os.environ, "HDF5_PLUGIN_PATH": "::", "HDF5_USE_FILE_LOCKING": "FALSE"},
        )
        request = {
            "path": path,
            "size": 0 if piece.whole else piece.size,
            "memory": _CHILD_MEMORY + piece.size,
            "max_objects": 4 * limits.max_arrays,
            "max_metadata": limits.max_metadata_bytes,
        }
        self.send(json.dumps(request).encode() + b"\n")
        if not piece.whole:
            self.send(piece.view(0, piece.size))

    def send(self, content: bytes | memoryview) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(content)
            self.process.stdin.flush()

    def answer(self, most: int, *, seconds: float = _SECONDS) -> bytearray:
        """The child's next answer of at most `most` bytes."""
        output = self.process.stdout
        assert output is not None
        end = time.monotonic() + seconds
        head = bytearray()
        content: bytearray | None = None
        filled = 0
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while content is None or filled < len(content):
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise HostileError(f"reading it took more than {seconds:.0f} seconds; the process that tried was stopped")
                got = os.read(output.fileno(), 1 if content is None else min(len(content) - filled, 1 << 20))
                if not got:
                    self.close()
                    raise HostileError(f"it crashed HDF5's library (code {self.process.returncode}), in a process of its own")
                if content is not None:
                    content[filled : filled + len(got)] = got
                    filled += len(got)
                elif got == b"\n":
                    if int(head) > most:
                        self.close()
                        raise HostileError(f"an answer of {int(head)} bytes, where {most} were expected")
                    content = bytearray(int(head))
                else:
                    head += got
        return content

    def read(self, dataset: H5Dataset) -> np.ndarray[Any, Any]:
        if "\n" in dataset.path:
            raise DamageError("a name with a line break")
        self.send(dataset.path.encode() + b"\n")
        content = self.answer(dataset.nbytes + 4096, seconds=_SECONDS + dataset.nbytes / 20e6)
        if content[:1] != b"+":
            raise DamageError(content[1:].decode("utf-8", "replace"))
        if len(content) != dataset.nbytes + 1:
            raise DamageError(f"{len(content) - 1} bytes in place of {dataset.nbytes}")
        return np.frombuffer(content, dataset.stored, offset=1).reshape(dataset.shape)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def in_child(piece: Piece, limits: Limits) -> _Opened:
    """What the file holds, by HDF5's library in a process of its own, which ends when the archive is closed.

    Raises:
        DamageError: when the library can't read it.
        HostileError: when it holds what a weights file must not, crashes the library, or takes too long.
    """
    child = _Child(piece, limits)
    try:
        try:
            found = json.loads(child.answer(limits.max_metadata_bytes * 4))
        except (ValueError, RecursionError) as error:
            raise DamageError("its listing is no JSON") from error
        parsed = _from_listing(found, piece.size)
    except BaseException:
        child.close()
        raise
    return parsed, lambda name: child.read(parsed.datasets[name]), child.close
