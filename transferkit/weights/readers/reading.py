"""Opens any weights file: tells its format by its content and gives it to that format's reader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transferkit.errors import UnsafeFileError, WeightsFileError, shorten
from transferkit.weights.readers.archive import Archive, Limits
from transferkit.weights.readers.checks import json_object
from transferkit.weights.readers.hdf5 import is_hdf5, open_hdf5
from transferkit.weights.readers.keras_v3 import is_weights_h5, read_keras, read_sharded, read_weights_h5
from transferkit.weights.readers.legacy_h5 import is_legacy_h5, read_legacy_h5
from transferkit.weights.readers.npz import read_npz
from transferkit.weights.readers.safetensors import is_safetensors, read_safetensors, read_safetensors_shards
from transferkit.weights.readers.source import Source, asked_of
from transferkit.weights.readers.tf_checkpoint import checkpoint_index, is_checkpoint, read_checkpoint
from transferkit.weights.readers.tfjs import read_tfjs
from transferkit.weights.readers.torch_state import is_torch_pickle, read_torch_pickle, read_torch_zip, torch_prefix
from transferkit.weights.readers.zipped import Zip

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
    source = Source(checkpoint_index(os.path.expanduser(os.fspath(path))) or path)
    try:
        if sha256 is not None:
            source.verify_sha256(sha256)
        return _owning(_open(source, limits, trusted), source)
    except BaseException:
        source.close()
        raise


def _owning(archive: Archive, source: Source) -> Archive:
    """The archive with a `close` that also releases the file."""
    inner = archive.close

    def close() -> None:
        inner()
        source.close()

    return replace(archive, close=close)


def _open(source: Source, limits: Limits, trusted: bool) -> Archive:
    head = source.bytes(0, min(8, source.size))
    if is_hdf5(source):
        tree = open_hdf5(source, limits=limits, trusted=trusted)
        if is_legacy_h5(tree):
            return read_legacy_h5(source.path, tree, limits=limits)
        if is_weights_h5(tree):
            return read_weights_h5(source.path, [("", tree)], limits=limits)
        raise _unknown(source, f"an HDF5 file that holds {shorten(tree.children.get('', ()))}, and no Keras weights")
    if head[:4] == b"PK\3\4":
        archive = Zip(source, limits=limits)
        if "config.json" in archive.members:
            return read_keras(source, archive, limits=limits, trusted=trusted)
        if torch_prefix(archive) is not None:
            return read_torch_zip(source, archive, limits=limits)
        if any(name.endswith(".npy") for name in archive.members):
            return read_npz(source, archive, limits=limits)
        raise _unknown(source, f"a zip archive that holds {shorten(archive.members)}, and no weights known here")
    if is_checkpoint(source):
        return read_checkpoint(source, limits=limits)
    if is_torch_pickle(source):
        return read_torch_pickle(source, limits=limits)
    if is_safetensors(source):
        return read_safetensors(source, limits=limits)
    if head.lstrip()[:1] == b"{":
        return _open_index(source, limits, trusted)
    if head[:1] == b"\x80" and head[1] <= 5:
        raise UnsafeFileError(
            asked_of(source.path),
            found="a Python pickle, which can run any code when it is opened",
            fix="save the arrays themselves: torch.save(model.state_dict(), path), numpy.savez or safetensors",
        )
    raise _unknown(source, f"no known format; the file starts with {head!r}")


def _open_index(source: Source, limits: Limits, trusted: bool) -> Archive:
    if source.size > limits.max_metadata_bytes:
        raise _unknown(source, f"JSON of {source.size} bytes, longer than the limit of {limits.max_metadata_bytes}")
    index = json_object(source.path, "the file", source.bytes(0, source.size), limits) or {}
    if "weight_map" in index:
        if all(isinstance(file, str) and file.endswith(".safetensors") for file in _files(index)):
            return read_safetensors_shards(source, index, limits=limits)
        return read_sharded(source, index, limits=limits, trusted=trusted)
    if "weightsManifest" in index:
        return read_tfjs(source, index, limits=limits)
    raise _unknown(source, f"JSON with {shorten(index)}, which is no index of weights")


def _files(index: Mapping[str, Any]) -> list[Any]:
    mapped = index["weight_map"]
    return list(mapped.values()) if isinstance(mapped, Mapping) else [None]


def _unknown(source: Source, found: str) -> WeightsFileError:
    return WeightsFileError(
        asked_of(source.path), found=found, fix="give a weights file of Keras, TensorFlow, PyTorch, safetensors or NumPy"
    )
