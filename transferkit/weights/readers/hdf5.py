"""HDF5 files behind guards: what they hold as plain values, and the content of one dataset when asked.

The structure is parsed here (`hdf5_format`), so HDF5's library never sees a foreign file. The few files that use rarer parts of
the format are listed and read by the library in a process of its own, under limits of time and memory; here if `trusted`.
Refused are links of every kind but the plain one, a second name for the same object or bytes, virtual datasets and external
storage, types that are no numbers, datasets that were never allocated, unknown filters, and shapes the file can't hold.
Imports NumPy and ml_dtypes only (h5py where the file is trusted).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError
from transferkit.weights.readers.archive import Limits
from transferkit.weights.readers.checks import verified
from transferkit.weights.readers.hdf5_chunks import read_chunks
from transferkit.weights.readers.hdf5_format import (
    MOST_INFLATION,
    SIGNATURE,
    DamageError,
    H5Dataset,
    HostileError,
    Parsed,
    UnusualError,
    parse,
)
from transferkit.weights.readers.source import Piece, asked_of

__all__ = ["H5Tree", "is_hdf5", "open_hdf5"]

_CHILD = os.path.join(os.path.dirname(__file__), "hdf5_child.py")
_SECONDS = 10.0
_CHILD_MEMORY = 2 << 30


@dataclass(frozen=True)
class H5Tree:
    """Everything in an HDF5 file but the content of its datasets.

    Args:
        groups: The attributes of each group by its path; the root is the empty path. A value is a `str`, a number, or a list.
        children: The names in each group, in the file's order.
        datasets: The datasets by path.
        addresses: Where each object begins; what was made earlier mostly stands earlier.
        read: Gives the content of one dataset by path.
        close: Releases what reading holds.
    """

    groups: Mapping[str, Mapping[str, Any]]
    children: Mapping[str, tuple[str, ...]]
    datasets: Mapping[str, H5Dataset]
    addresses: Mapping[str, int]
    read: Callable[[str], np.ndarray[Any, Any]] = field(repr=False)
    close: Callable[[], None] = field(repr=False)


def is_hdf5(piece: Piece) -> bool:
    """Whether HDF5 content starts here, or after a user block, which is refused later with its own message."""
    if piece.size < 96:
        return False
    return any(offset + 8 <= piece.size and piece.bytes(offset, 8) == SIGNATURE for offset in (0, 512, 1024, 2048))


def open_hdf5(piece: Piece, *, limits: Limits, trusted: bool = False) -> H5Tree:
    """What an HDF5 file holds.

    Args:
        piece: The file, or the part of a file that holds it.
        limits: What it may ask for.
        trusted: Whether HDF5's library may read rarer structures in this process.

    Raises:
        WeightsFileError: when the file is damaged or no HDF5 file.
        UnsafeFileError: when it holds what a weights file must not.
    """
    asked = asked_of(piece.path)
    if piece.size < 96 or piece.bytes(0, 8) != SIGNATURE:
        raise WeightsFileError(
            asked,
            found="the file doesn't start with HDF5's signature",
            cause="it isn't an HDF5 file, or something was put before its content",
            fix="get the file again",
        )
    reader: Callable[[str], np.ndarray[Any, Any]] | None = None
    close = _nothing
    try:
        try:
            parsed = parse(piece.view(0, piece.size), max_objects=limits.max_arrays, max_metadata=limits.max_metadata_bytes)
        except UnusualError:
            parsed, reader, close = (_here if trusted else _in_child)(piece, limits)
    except HostileError as error:
        raise UnsafeFileError(
            asked,
            found=str(error),
            cause="the file was made to mislead its reader, or is larger than the limits",
            fix="get the file from a source you trust, save the model again, or raise limits=Limits(…)",
        ) from error
    except DamageError as error:
        raise WeightsFileError(
            asked,
            found=f"damaged HDF5: {error}",
            cause="the file was cut off, changed or never finished",
            fix="get the file again",
        ) from error
    datasets = {path: _named_type(dataset) for path, dataset in parsed.datasets.items()}

    def read(name: str) -> np.ndarray[Any, Any]:
        dataset = datasets[name]
        refuse(piece.path, dataset)
        if dataset.offset is not None:
            raw = piece.view(dataset.offset, dataset.nbytes, repr(name))
            plain = np.frombuffer(raw, _bytes_type(dataset.stored)).reshape(dataset.shape)
            return _finished(plain, dataset, piece.path)
        try:
            content = reader(name) if reader is not None else read_chunks(piece.view(0, piece.size), dataset)
        except (DamageError, HostileError) as error:
            raise WeightsFileError(
                asked, found=f"{name!r}: {error}", cause="the file was changed or damaged", fix="get the file again"
            ) from error
        return _finished(content, dataset, piece.path)

    return H5Tree(parsed.groups, parsed.children, datasets, parsed.addresses, read, close)


def refuse(path: str, dataset: H5Dataset) -> None:
    """Raises the error of a dataset that can't be read as numbers."""
    if dataset.problem:
        kind = UnsafeFileError if dataset.unsafe else WeightsFileError
        raise kind(asked_of(path), found=f"{dataset.path!r}: {dataset.problem}", fix="save the model again from its source")


def _nothing() -> None:
    return None


def _named_type(dataset: H5Dataset) -> H5Dataset:
    # h5py has no bfloat16: Keras stores the two bytes as opaque and says the type in an attribute.
    if dataset.stored == np.dtype("V2"):
        if dataset.attributes.get("dtype") == "bfloat16":
            return replace(dataset, stored=np.dtype(ml_dtypes.bfloat16))
        return replace(
            dataset, stored=np.dtype("u2"), problem=dataset.problem or "its type is opaque, which isn't read as weights"
        )
    return dataset


def _bytes_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype("u1") if dtype == np.dtype(bool) else dtype


def _finished(content: np.ndarray[Any, Any], dataset: H5Dataset, path: str) -> np.ndarray[Any, Any]:
    if dataset.stored == np.dtype(bool):
        if content.size and int(content.view(np.uint8).max()) > 1:
            raise WeightsFileError(
                asked_of(path), found=f"{dataset.path!r}: truth values other than 0 and 1", fix="get the file again"
            )
        return content.view(bool)
    native = content if content.dtype.isnative else content.astype(dataset.dtype)
    expected = dataset.attributes.get("sha256")  # files of ours keep it at each dataset
    return verified(path, dataset.path, native, expected if isinstance(expected, str) else None)


# -- HDF5's library, for the rarer parts of the format --------------------------------------------------------------------------


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


def _here(piece: Piece, limits: Limits) -> _Opened:
    h5py = importlib.import_module("h5py")
    child = importlib.import_module("transferkit.weights.readers.hdf5_child")
    try:
        file = h5py.File(piece.path if piece.whole else io.BytesIO(piece.bytes(0, piece.size)), "r")
        found = child.listing(file, max_objects=4 * limits.max_arrays, max_metadata=limits.max_metadata_bytes)
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

    def answer(self, most: int) -> bytearray:
        """The child's next answer of at most `most` bytes."""
        output = self.process.stdout
        assert output is not None
        end = time.monotonic() + _SECONDS + most / 20e6
        head = bytearray()
        content: bytearray | None = None
        filled = 0
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while content is None or filled < len(content):
                if not selector.select(max(0.0, end - time.monotonic())):
                    self.close()
                    raise HostileError(f"reading it took more than {_SECONDS:.0f} seconds; the process that tried was stopped")
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
        content = self.answer(dataset.nbytes + 4096)
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


def _in_child(piece: Piece, limits: Limits) -> _Opened:
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
