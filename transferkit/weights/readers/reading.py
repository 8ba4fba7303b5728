"""Opens any weights file: tells its format by its content and gives it to that format's reader."""

from __future__ import annotations

import importlib
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from transferkit.errors import UnsafeFileError, WeightsError, WeightsFileError, shorten
from transferkit.weights.readers.archive import Archive, Limits
from transferkit.weights.readers.checks import json_object
from transferkit.weights.readers.source import Source, asked_of

__all__ = ["open_archive"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_TABLE = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the end of TensorFlow's tables
# After the pickle's own two bytes: the integer 0x1950A86A20F9469CFC6C, with which torch.save's old format begins.
_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def _reader(name: str) -> Any:
    """A format's reader, loaded when a file asks for it: opening one format doesn't pay for the imports of all."""
    return importlib.import_module(f"transferkit.weights.readers.{name}")


def open_archive(
    path: str | os.PathLike[str], *, limits: Limits | None = None, trusted: bool = False, sha256: str | None = None
) -> Archive:
    """The named arrays of a weights file; nothing in it is executed, and no other file is opened unless it is one of its shards.

    Args:
        path: The file. Its format is told by its content.
        limits: What the file may ask for; by default `Limits()`.
        trusted: Skips the separate process in which unusual HDF5 structures are read.
        sha256: The expected SHA-256 of the file named (of a set of files, its index), 64 hexadecimal digits.

    Returns:
        An `Archive`; close it, or use it in a `with` statement. The arrays it reads may be read-only views of the file.

    Raises:
        WeightsNotFoundError: when there is no such file.
        WeightsFileError: when it is damaged, or no weights file.
        UnsafeFileError: when it asks for what a weights file must not.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "w.npz"
        >>> np.savez(path, kernel=np.eye(3, dtype="float32"))
        >>> with open_archive(path) as archive:
        ...     print(archive.format, archive.arrays["kernel"].shape)
        npz (3, 3)
    """
    limits = limits or Limits()
    expanded = os.path.expanduser(os.fspath(path))
    if os.path.isdir(expanded) or re.search(r"\.data-\d{5}-of-\d{5}$", expanded) or os.path.isfile(f"{expanded}.index"):
        path = _reader("tf_checkpoint").checkpoint_index(expanded) or path
    source = Source(path)
    try:
        if sha256 is not None:
            source.verify_sha256(sha256)
        return _owning(_open(source, limits, trusted), source)
    except WeightsError:
        source.close()
        raise
    except MemoryError as error:
        source.close()
        raise _too_large(source, "its content") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, struct.error) as error:
        # Every kind of damage known has words of its own; what is left still mustn't reach the user as a bare KeyError.
        source.close()
        raise WeightsFileError(
            asked_of(path),
            found=f"its content makes no sense ({type(error).__name__}: {error})",
            cause="the file was damaged, or written by something unusual",
            fix="get the file again, or save the model again",
        ) from error
    except BaseException:
        source.close()
        raise


def _owning(archive: Archive, source: Source) -> Archive:
    """The archive with a `close` that also releases the file, and with words for what doesn't fit into memory."""

    def read(name: str) -> np.ndarray[Any, Any]:
        try:
            return archive.read(name)
        except MemoryError as error:
            raise _too_large(
                source, f"{name!r} of {archive.arrays[name].nbytes} bytes" if name in archive.arrays else "an array"
            ) from error

    def close() -> None:
        archive.close()
        source.close()

    return replace(archive, read=read, close=close)


def _too_large(source: Source, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        asked_of(source.path),
        found=f"{what}, more than the memory that is left",
        cause="packed content becomes up to a thousand times as large; or the memory is short",
        fix="limits=Limits(max_bytes=…) refuses such a file before it is unpacked",
    )


def _open(source: Source, limits: Limits, trusted: bool) -> Archive:
    head = source.bytes(0, min(8, source.size))
    found: Archive
    if any(source.size >= offset + 96 and source.bytes(offset, 8) == _HDF5 for offset in (0, 512, 1024, 2048)):
        tree = _reader("hdf5").open_hdf5(source, limits=limits, trusted=trusted)
        try:
            return _open_tree(source, tree, limits)
        except BaseException:
            tree.close()
            raise
    if head[:4] == b"PK\3\4":
        return _open_zip(source, limits, trusted)
    if source.size >= 48 and source.bytes(source.size - 8, 8) == _TABLE:
        found = _reader("tf_checkpoint").read_checkpoint(source, limits=limits)
        return found
    if source.size > 20 and head[:1] == b"\x80" and source.bytes(2, len(_TORCH)) == _TORCH:
        found = _reader("torch_state").read_torch_pickle(source, limits=limits)
        return found
    if source.size >= 10 and source.bytes(8, 1) == b"{" and 2 <= int.from_bytes(head, "little") < 1 << 40:
        found = _reader("safetensors").read_safetensors(source, limits=limits)
        return found
    if head.lstrip()[:1] == b"{":
        return _open_index(source, limits, trusted)
    if head[:1] == b"\x80" and head[1:2] <= b"\5":
        raise UnsafeFileError(
            asked_of(source.path),
            found="a Python pickle, which can run any code when it is opened",
            fix="save the arrays themselves: torch.save(model.state_dict(), path), numpy.savez or safetensors",
        )
    raise _unknown(source, f"no known format; the file starts with {head!r}")


def _open_tree(source: Source, tree: Any, limits: Limits) -> Archive:
    legacy, current = _reader("legacy_h5"), _reader("keras_v3")
    found: Archive
    if legacy.is_legacy_h5(tree):
        found = legacy.read_legacy_h5(source.path, tree, limits=limits)
    elif current.is_weights_h5(tree):
        found = current.read_weights_h5(source.path, [("", tree)], limits=limits)
    else:
        raise _unknown(source, f"an HDF5 file that holds {shorten(tree.children.get('', ()))}, and no Keras weights")
    return found


def _open_zip(source: Source, limits: Limits, trusted: bool) -> Archive:
    archive = _reader("zipped").Zip(source, limits=limits)
    found: Archive
    if "config.json" in archive.members:
        found = _reader("keras_v3").read_keras(source, archive, limits=limits, trusted=trusted)
    elif any(name.endswith("/data.pkl") for name in archive.members):
        found = _reader("torch_state").read_torch_zip(source, archive, limits=limits)
    elif any(name.endswith(".npy") for name in archive.members):
        found = _reader("npz").read_npz(source, archive, limits=limits)
    else:
        raise _unknown(source, f"a zip archive that holds {shorten(archive.members)}, and no weights known here")
    return found


def _open_index(source: Source, limits: Limits, trusted: bool) -> Archive:
    if source.size > limits.max_metadata_bytes:
        raise _unknown(source, f"JSON of {source.size} bytes, longer than the limit of {limits.max_metadata_bytes}")
    index = json_object(source.path, "the file", source.bytes(0, source.size), limits) or {}
    found: Archive
    if "weight_map" in index and all(isinstance(file, str) and file.endswith(".safetensors") for file in _files(index)):
        found = _reader("safetensors").read_safetensors_shards(source, index, limits=limits)
    elif "weight_map" in index:
        found = _reader("keras_v3").read_sharded(source, index, limits=limits, trusted=trusted)
    elif "weightsManifest" in index:
        found = _reader("tfjs").read_tfjs(source, index, limits=limits)
    else:
        if "class_name" in index and "config" in index:
            raise WeightsFileError(
                asked_of(source.path),
                found="the configuration of a Keras model as JSON, which holds no weights",
                cause="model.to_json() keeps the architecture alone; the weights are in a file of their own",
                fix="give the weights file; open_model(weights, config=this_file) makes a model of the two",
            )
        raise _unknown(source, f"JSON with {shorten(index)}, which is no index of weights")
    return found


def _files(index: Mapping[str, Any]) -> list[Any]:
    mapped = index["weight_map"]
    return list(mapped.values()) if isinstance(mapped, Mapping) else [None]


def _unknown(source: Source, found: str) -> WeightsFileError:
    return WeightsFileError(
        asked_of(source.path), found=found, fix="give a weights file of Keras, TensorFlow, PyTorch, safetensors or NumPy"
    )
