"""HDF5 files behind guards: what they hold as plain values, and the content of one dataset when asked.

The structure is parsed here (`hdf5_format`), so HDF5's library never sees a foreign file. The few files that use rarer parts of
the format are listed and read by the library in a process of its own, under limits of time and memory; here if `trusted`.
Refused are links of every kind but the plain one, a second name for the same object or bytes, virtual datasets and external
storage, types that are no numbers, datasets that were never allocated, unknown filters, and shapes the file can't hold.
Imports NumPy and ml_dtypes only .
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError
from transferkit.weights.readers.archive import Limits, Stretch
from transferkit.weights.readers.checks import verified
from transferkit.weights.readers.hdf5_chunks import read_chunks
from transferkit.weights.readers.hdf5_format import parse
from transferkit.weights.readers.hdf5_pages import Pages
from transferkit.weights.readers.hdf5_values import SIGNATURE, DamageError, H5Dataset, HostileError, UnusualError
from transferkit.weights.readers.source import Piece, asked_of

__all__ = ["H5Tree", "open_hdf5"]


@dataclass(frozen=True)
class H5Tree:
    """Everything in an HDF5 file but the content of its datasets.

    Args:
        groups: The attributes of each group by its path; the root is the empty path. A value is a `str`, a number, or a list.
        children: The names in each group, in the file's order.
        datasets: The datasets by path.
        addresses: Where each object begins; what was made earlier mostly stands earlier.
        read: Gives the content of one dataset by path.
        stretch: Says where the content of a dataset lies that needs no more than being copied; else None.
        close: Releases what reading holds.
    """

    groups: Mapping[str, Mapping[str, Any]]
    children: Mapping[str, tuple[str, ...]]
    datasets: Mapping[str, H5Dataset]
    addresses: Mapping[str, int]
    read: Callable[[str], np.ndarray[Any, Any]] = field(repr=False)
    stretch: Callable[[str], Stretch | None] = field(repr=False)
    close: Callable[[], None] = field(repr=False)


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
    close: Callable[[], None] = _nothing
    try:
        try:
            parsed = parse(Pages(piece), max_objects=limits.max_arrays, max_metadata=limits.max_metadata_bytes)
        except UnusualError:
            # Loaded only here: few files need a process, and the machinery for one takes a while to import.
            process = importlib.import_module("transferkit.weights.readers.hdf5_process")
            parsed, reader, close = (process.here if trusted else process.in_child)(piece, limits)
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
            content = reader(name) if reader is not None else read_chunks(piece, dataset)
        except (DamageError, HostileError) as error:
            raise WeightsFileError(
                asked, found=f"{name!r}: {error}", cause="the file was changed or damaged", fix="get the file again"
            ) from error
        return _finished(content, dataset, piece.path)

    def stretch(name: str) -> Stretch | None:
        dataset = datasets[name]
        if dataset.offset is None or dataset.problem or not dataset.stored.isnative or dataset.stored.kind == "b":
            return None
        expected = dataset.attributes.get("sha256")
        said = expected if isinstance(expected, str) else ""
        return Stretch(piece, dataset.offset, name, dataset.dtype, dataset.shape, said)

    return H5Tree(parsed.groups, parsed.children, datasets, parsed.addresses, read, stretch, close)


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
