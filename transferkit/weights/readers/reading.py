"""Opens any weights file: tells its format by its content and gives it to that format's reader."""

from __future__ import annotations

import os
from dataclasses import replace

from transferkit.errors import WeightsFileError
from transferkit.weights.readers.archive import Archive, Limits
from transferkit.weights.readers.hdf5 import is_hdf5, open_hdf5
from transferkit.weights.readers.legacy_h5 import is_legacy_h5, read_legacy_h5
from transferkit.weights.readers.source import Source, asked_of

__all__ = ["open_archive"]


def open_archive(
    path: str | os.PathLike[str], *, limits: Limits | None = None, trusted: bool = False, sha256: str | None = None
) -> Archive:
    """The named arrays of a weights file; nothing in it is executed, and no other file is opened unless it is one of its shards.

    Args:
        path: The file. Its format is told by its content.
        limits: What the file may ask for; by default `Limits()`.
        trusted: Skips the separate process in which unusual HDF5 structures are read.
        sha256: The expected SHA-256 of the file, 64 hexadecimal digits.

    Returns:
        An `Archive`; close it, or use it in a `with` statement. The arrays it reads may be read-only views of the file.

    Raises:
        WeightsNotFoundError: when there is no such file.
        WeightsFileError: when it is damaged, or no weights file.
        UnsafeFileError: when it asks for what a weights file must not.
    """
    limits = limits or Limits()
    source = Source(path)
    try:
        if sha256 is not None:
            source.verify_sha256(sha256)
        if is_hdf5(source):
            tree = open_hdf5(source, limits=limits, trusted=trusted)
            if is_legacy_h5(tree):
                return owning(read_legacy_h5(source.path, tree, limits=limits), source)
        raise WeightsFileError(
            asked_of(path),
            found=f"no known format: it starts with {source.bytes(0, min(8, source.size))!r}",
            fix="give a file of Keras, TensorFlow, PyTorch, safetensors or NumPy",
        )
    except BaseException:
        source.close()
        raise


def owning(archive: Archive, source: Source) -> Archive:
    """The archive with a `close` that also releases the file."""
    inner = archive.close

    def close() -> None:
        inner()
        source.close()

    return replace(archive, close=close)
