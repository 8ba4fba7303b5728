"""Writes named arrays to a weights file, and converts one weights file to another: whole and verified, or not at all.

Each tensor's SHA-256 goes along, and the readers check it. A file is read back before it takes its place.
Imports NumPy, h5py and the readers only: nothing here knows Keras.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from transferkit.errors import StorageError, WeightsError
from transferkit.storage import atomic_path
from transferkit.weights.readers import Limits, open_archive
from transferkit.weights.readers.checks import DIGESTS, tensor_digest
from transferkit.weights.sources import file_arrays

__all__ = ["Written", "convert_weights", "format_of", "not_as_written", "read_back", "write_flat", "write_legacy"]

_ABOUT = "transferkit.json"
_ATTRIBUTE_BYTES = 60_000  # HDF5 keeps at most 64 kB in an attribute; Keras cuts lists of names the same way
_SAFETENSORS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@dataclass(frozen=True)
class Written:
    """A weights file that was written.

    Args:
        path: The file.
        format: Its format.
        arrays: How many arrays it holds.
        nbytes: Their bytes together.
    """

    path: str
    format: str
    arrays: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.format}, {self.arrays} arrays, {self.nbytes:,} bytes."

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"path": self.path, "format": self.format, "arrays": self.arrays, "nbytes": self.nbytes}


Array = np.ndarray[Any, Any]
Named = Mapping[str, Callable[[], Array]]
Progress = Callable[[int, int], None]


def _nothing(done: int, total: int) -> None:
    del done, total


def format_of(path: str, asked: str) -> str:
    """The format that the ending of `path` names.

    Raises:
        StorageError: when it names none.
    """
    name = os.path.basename(path).lower()
    for suffix, kind in ((".weights.h5", "weights_h5"), (".h5", "legacy_h5"), (".hdf5", "legacy_h5")):
        if name.endswith(suffix):
            return kind
    for suffix in ("safetensors", "npz"):
        if name.endswith(f".{suffix}"):
            return suffix
    raise StorageError(
        asked,
        found=f"no format known by the ending of {os.path.basename(path)!r}",
        fix="end it with .weights.h5, .h5, .safetensors or .npz",
    )


def convert_weights(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    limits: Limits | None = None,
    sha256: str | None = None,
    progress: Progress = _nothing,
) -> Written:
    """Writes the arrays of one weights file to a file of another format, values and names as they are.

    Layouts are kept: a PyTorch file stays in PyTorch's layout, to be loaded with `.layout("torch")`. For a format that follows
    the model (`.weights.h5`), load the file into one and use `save_weights`.

    Args:
        source: Any weights file.
        path: The file to write: `.safetensors`, `.npz` or legacy `.h5`.
        limits: What the source may ask for.
        sha256: The source's expected SHA-256.
        progress: Called with the bytes done and in all.

    Returns:
        What was written.

    Raises:
        WeightsError: when the source can't be read.
        StorageError: when the target's format can't hold it, or the disk refuses.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> np.savez(folder / "w.npz", kernel=np.eye(3, dtype="float32"))
        >>> written = convert_weights(folder / "w.npz", folder / "w.safetensors")
        >>> (folder / "w.safetensors").exists()
        True
    """
    path = os.path.expanduser(os.fspath(path))
    asked = f"Converting {os.fspath(source)!r} to {path!r}."
    kind = format_of(path, asked)
    if kind == "weights_h5":
        raise StorageError(
            asked,
            found="a format that follows the model's attributes, which a weights file doesn't tell",
            fix="load the file into a model, then save_weights(model, path); or convert to .h5, .safetensors or .npz",
        )
    with open_archive(source, limits=limits, sha256=sha256) as archive:
        found = file_arrays(archive)
        torch = archive.framework == "torch" or archive.format == "torch"
        names = {a.name: a.name if torch else "/".join(p for p in (a.path, a.variable) if p) for a in found}
        if len(set(names.values())) < len(names):
            names = {a.name: a.name for a in found}
        arrays = {new: _reading(archive.read, old) for old, new in names.items()}
        said = {"format": "pt" if torch else archive.framework or "keras"}
        if archive.class_names:
            said["class_names"] = json.dumps(list(archive.class_names))
        with atomic_path(path) as temporary:
            if kind == "legacy_h5":
                layers: dict[str, list[str]] = {}
                for name in arrays:
                    layers.setdefault(name.partition("/")[0] if "/" in name else name, []).append(name)
                write_legacy(temporary, layers, arrays, said, version=archive.version, progress=progress)
            else:
                write_flat(kind, temporary, arrays, said, asked, progress)
            nbytes = read_back(temporary, asked)
    return Written(path, kind, len(arrays), nbytes)


def _reading(read: Callable[[str], Array], name: str) -> Callable[[], Array]:
    return lambda: read(name)


def read_back(path: Path, asked: str) -> int:
    """Reads the new file back, digests included; gives the bytes of its arrays."""
    try:
        with open_archive(path, trusted=True) as archive:
            return sum(archive.read(name).nbytes for name in archive.arrays)
    except WeightsError as error:
        raise not_as_written(asked, error.found[0]) from error


def not_as_written(asked: str, found: str) -> StorageError:
    """The error for a new file that isn't what was to be written."""
    return StorageError(
        asked,
        found=f"the file read back isn't what was written: {found}; the old file, if there was one, is untouched",
        cause="the disk is full, or the disk or the memory is failing",
        fix="free some space, or write to another disk",
    )


def write_legacy(
    path: Path,
    layers: Mapping[str, Sequence[str]],
    arrays: Named,
    said: Mapping[str, str],
    *,
    version: str = "",
    progress: Progress = _nothing,
) -> None:
    """Writes Keras's legacy layout: `layer_names` at the root, `weight_names` at each layer.

    Args:
        path: The file.
        layers: The names of the arrays of each layer, in the order in which Keras reads them back.
        arrays: Functions that give the arrays by name.
        said: What the file says of itself.
        version: Of the Keras that wrote it.
        progress: Called with the arrays done and in all.
    """
    total, done = len(arrays), 0
    # In memory first: a write that fails within the HDF5 library may crash the process instead of raising (HDF5 1.14).
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        listed = [name for name in layers if name != "top_level_model_weights"]
        _name_list(file, "layer_names", listed)
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = version.encode()
        for key, value in said.items():
            file.attrs[key] = value
        for layer, names in layers.items():
            group = file.create_group(layer)
            # A variable that two layers share is written in both places, as plain Keras does.
            _name_list(group, "weight_names", list(names))
            for name in names:
                array = arrays[name]()
                dataset = group.create_dataset(name, data=array)
                dataset.attrs["sha256"] = tensor_digest(f"{layer}/{name}", array)
                done += 1
                progress(done, total)
    path.write_bytes(content.getbuffer())


def _name_list(node: Any, key: str, names: Sequence[str]) -> None:
    encoded = [name.encode() for name in names]
    if sum(map(len, encoded)) <= _ATTRIBUTE_BYTES and len(encoded) * max(map(len, encoded), default=1) <= _ATTRIBUTE_BYTES:
        node.attrs[key] = np.array(encoded, dtype=f"S{max(map(len, encoded), default=1)}")
        return
    width = max(map(len, encoded))
    per = max(_ATTRIBUTE_BYTES // width, 1)
    for number, start in enumerate(range(0, len(encoded), per)):
        node.attrs[f"{key}{number}"] = np.array(encoded[start : start + per])


def write_flat(kind: str, path: Path, arrays: Named, said: Mapping[str, str], asked: str, progress: Progress = _nothing) -> None:
    """Writes `.safetensors` or `.npz`.

    Args:
        kind: `safetensors` or `npz`.
        path: The file.
        arrays: Functions that give the arrays by name.
        said: What the file says of itself.
        asked: The first line of an error's message.
        progress: Called with what is done and what there is in all.

    Raises:
        StorageError: when the format can't hold one of the dtypes.
    """
    problems = []
    known: dict[str, tuple[str, tuple[int, ...], int]] = {}
    digests: dict[str, str] = {}
    for name, value in arrays.items():
        array = value()
        if kind == "npz" and array.dtype.kind == "V":
            problems.append(f"{name!r} is {array.dtype.name}, which .npz can't hold")
        if kind == "safetensors" and array.dtype.name not in _SAFETENSORS:
            problems.append(f"{name!r} is {array.dtype.name}, which safetensors can't hold")
        known[name] = (array.dtype.name, array.shape, array.nbytes)
        digests[name] = tensor_digest(name, array)
    if problems:
        raise StorageError(asked, found=problems, fix="write .safetensors or .h5 instead")
    said = {**said, DIGESTS: json.dumps(digests)}
    if kind == "safetensors":
        _write_safetensors(path, known, arrays, said, progress)
    else:
        _write_npz(path, arrays, said, progress)


def _write_safetensors(
    path: Path,
    known: Mapping[str, tuple[str, tuple[int, ...], int]],
    arrays: Named,
    said: Mapping[str, str],
    progress: Progress,
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(said)}
    at = 0
    for name, (dtype, shape, nbytes) in known.items():
        header[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64 + 56)  # so that the arrays begin on a multiple of 64 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        done = 0
        for piece in _bytes_of(arrays):
            file.write(piece)
            done += len(piece)
            progress(done, at)


def _bytes_of(arrays: Named) -> Iterator[memoryview]:
    for value in arrays.values():
        array = np.ascontiguousarray(value())
        yield array.reshape(-1).view(np.uint8).data


def _write_npz(path: Path, arrays: Named, said: Mapping[str, str], progress: Progress) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_ABOUT, json.dumps(dict(said)))
        for done, (name, value) in enumerate(arrays.items(), 1):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(value()), allow_pickle=False)
            progress(done, len(arrays))
