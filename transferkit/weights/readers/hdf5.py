"""HDF5 files behind guards: what they hold as plain values, and the bytes of one dataset when asked.

Refused are links out of their place (soft and external ones), a second name for the same object, virtual datasets and external
storage, types that are no numbers (variable-length, reference, compound, opaque, empty), datasets that were never allocated,
filters HDF5 doesn't always have, shapes larger than the limit or than what the file can hold.
Imports NumPy and h5py only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError
from transferkit.weights.readers.archive import Limits
from transferkit.weights.readers.source import Source, asked_of

__all__ = ["SIGNATURE", "H5Dataset", "H5Tree", "open_hdf5"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What zlib can make of one byte at most; anything beyond is a shape that lies.
_MOST_INFLATION = 1032
_KNOWN_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}


@dataclass(frozen=True)
class H5Dataset:
    """A dataset without its content.

    Args:
        path: From the root, parts joined by `/`.
        shape: Its shape.
        dtype: Its dtype in the machine's byte order.
        stored: Its dtype with the byte order of the file.
        offset: Where its bytes begin in the file, when they lie in one plain piece; else None.
        address: What tells the object from others in the file.
        problem: Why it can't be read as numbers; empty when it can.
        attributes: Its attributes.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored: np.dtype[Any]
    offset: int | None
    address: int
    problem: str = ""
    unsafe: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class H5Tree:
    """Everything in an HDF5 file but the content of its datasets.

    Args:
        groups: The attributes of each group by its path; the root is the empty path. A value is a `str`, a number, or a list.
        children: The names in each group, in the file's order.
        datasets: The datasets by path.
        read: Gives the content of one dataset by path.
        close: Releases the file.
    """

    groups: Mapping[str, Mapping[str, Any]]
    children: Mapping[str, tuple[str, ...]]
    datasets: Mapping[str, H5Dataset]
    read: Callable[[str], np.ndarray[Any, Any]] = field(repr=False)
    close: Callable[[], None] = field(repr=False)


def _attribute(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return [_attribute(v) for v in value.tolist()] if value.ndim == 1 else _attribute(value.tolist())
    if isinstance(value, np.generic):
        return _attribute(value.item())
    if isinstance(value, (str, int, float, bool, list)):
        return value
    return None


def _walk(
    file: h5py.File, path: str, limits: Limits
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[str, ...]], dict[str, H5Dataset]]:
    groups: dict[str, dict[str, Any]] = {}
    children: dict[str, tuple[str, ...]] = {}
    datasets: dict[str, H5Dataset] = {}
    seen: dict[int, str] = {}
    metadata = 0
    todo: list[tuple[str, Any]] = [("", file)]
    while todo:
        where, node = todo.pop()
        address = h5py.h5o.get_info(node.id).addr
        if address in seen:
            raise UnsafeFileError(
                asked_of(path),
                found=f"{where!r} and {seen[address]!r} are two names for one object",
                cause="the file was made so that a tensor takes another's place",
                fix="get the file from a source you trust, or save the model again",
            )
        seen[address] = where or "/"
        attributes = {}
        for name in node.attrs:
            value = _attribute(node.attrs[name])
            attributes[name] = value
            metadata += len(name) + (len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list) else 8)
        if metadata > limits.max_metadata_bytes:
            raise UnsafeFileError(
                asked_of(path),
                found=f"more than {limits.max_metadata_bytes} bytes of attributes",
                fix="raise Limits.max_metadata_bytes",
            )
        if len(seen) > 4 * limits.max_arrays:
            raise UnsafeFileError(asked_of(path), found=f"more than {limits.max_arrays} arrays", fix="raise Limits.max_arrays")
        if isinstance(node, h5py.Dataset):
            datasets[where] = _dataset(where, node, address, attributes)
            continue
        groups[where] = attributes
        names = tuple(node)
        children[where] = names
        for name in reversed(names):
            inner = f"{where}/{name}" if where else name
            link = node.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise UnsafeFileError(
                    asked_of(path),
                    found=f"{inner!r} is a link to {getattr(link, 'path', '?')!r}"
                    + (f" in the file {link.filename!r}" if isinstance(link, h5py.ExternalLink) else ""),
                    fix="get the file from a source you trust, or save the model again",
                )
            todo.append((inner, node[name]))
    return groups, children, datasets


def _dataset(where: str, node: Any, address: int, attributes: Mapping[str, Any]) -> H5Dataset:
    problem, unsafe = "", False
    plist = node.id.get_create_plist()
    layout = plist.get_layout()
    kind = node.id.get_type()
    shape = node.shape
    dtype = np.dtype(node.dtype)
    if shape is None:
        problem, shape = "it is empty (no shape)", ()
    elif plist.get_external_count():
        problem, unsafe = "its bytes lie in another file", True
    elif layout == h5py.h5d.VIRTUAL:
        problem, unsafe = "it is a virtual dataset, which reads other files", True
    elif kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM) or dtype.kind not in "biufc":
        problem = f"its type is {dtype}, which isn't a number"
    elif not node.id.get_storage_size() and math.prod(shape):
        problem = "its bytes were never written"
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if not problem and (unknown := [f for f in filters if f not in _KNOWN_FILTERS]):
        problem = f"it is compressed with HDF5 filter {unknown[0]}, which isn't known here"
    nbytes = math.prod(shape) * dtype.itemsize
    if not problem and nbytes > max(node.id.get_storage_size(), 1) * _MOST_INFLATION:
        problem, unsafe = f"its shape {shape} needs {nbytes} bytes, the file holds {node.id.get_storage_size()} for it", True
    return H5Dataset(
        where,
        tuple(int(n) for n in shape),
        dtype.newbyteorder("="),
        dtype,
        node.id.get_offset(),
        address,
        problem,
        unsafe,
        attributes,
    )


def open_hdf5(source: Source, *, limits: Limits) -> H5Tree:
    """What an HDF5 file holds.

    Args:
        source: The open file.
        limits: What it may ask for.

    Raises:
        WeightsFileError: when the file is damaged or no HDF5 file.
        UnsafeFileError: when it holds what a weights file must not.
    """
    path = source.path
    if source.bytes(0, min(8, source.size)) != SIGNATURE:
        raise WeightsFileError(asked_of(path), found="no HDF5 signature at the start of the file", fix="get the file again")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise WeightsFileError(
            asked_of(path),
            found=f"HDF5 can't open it: {error}",
            cause="the file was cut off or damaged",
            fix="get the file again",
        ) from error
    try:
        groups, children, datasets = _walk(file, path, limits)
    except (WeightsFileError, UnsafeFileError):
        file.close()
        raise
    except Exception as error:
        file.close()
        raise WeightsFileError(
            asked_of(path), found=f"HDF5 can't list it: {error}", cause="the file is damaged", fix="get the file again"
        ) from error

    def read(name: str) -> np.ndarray[Any, Any]:
        dataset = datasets[name]
        if dataset.problem:
            kind = UnsafeFileError if dataset.unsafe else WeightsFileError
            raise kind(asked_of(path), found=f"{name!r}: {dataset.problem}", fix="save the model again from its source")
        nbytes = math.prod(dataset.shape) * dataset.stored.itemsize
        if dataset.offset is not None:
            plain = np.frombuffer(source.view(dataset.offset, nbytes, repr(name)), dataset.stored).reshape(dataset.shape)
            return plain if plain.dtype.isnative else plain.astype(dataset.dtype)
        try:
            return np.asarray(file[name][()]).astype(dataset.dtype, copy=False)
        except Exception as error:
            raise WeightsFileError(
                asked_of(path), found=f"{name!r} can't be read: {error}", cause="the file is damaged", fix="get the file again"
            ) from error

    def close() -> None:
        file.close()
        source.close()

    return H5Tree(groups, children, datasets, read, close)


def is_hdf5(source: Source) -> bool:
    """Whether the file starts as HDF5 files do."""
    return source.size >= 8 and source.bytes(0, 8) == SIGNATURE and os.fstat(source.descriptor).st_size > 0
