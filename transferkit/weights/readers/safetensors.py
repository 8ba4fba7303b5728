"""`.safetensors` files, and sets of them with an index.

The header is 8 bytes of length and JSON; the arrays follow without gap or overlap, which is checked, as is every size.
Source: the format's description at https://github.com/huggingface/safetensors. Imports NumPy and ml_dtypes only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError, did_you_mean, shorten
from transferkit.weights.readers.archive import Archive, ArrayInfo, Limits, Stretch
from transferkit.weights.readers.checks import DIGESTS, check_sizes, json_object, said_class_names, verified
from transferkit.weights.readers.shards import shard_names
from transferkit.weights.readers.source import Source, asked_of

__all__ = ["read_safetensors", "read_safetensors_shards"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def _damaged(path: str, found: str) -> WeightsFileError:
    return WeightsFileError(asked_of(path), found=found, cause="the file was cut off or changed", fix="get the file again")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(path: str, name: str, said: Any, room: int) -> tuple[ArrayInfo, int, int]:
    """The array of one entry of the header, and where it begins and ends."""
    if not isinstance(said, Mapping) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name!r} isn't made of dtype, shape and data_offsets")
    dtype = _DTYPES.get(said["dtype"]) if isinstance(said["dtype"], str) else None
    if dtype is None:
        raise WeightsFileError(
            asked_of(path), found=f"{name!r} is of dtype {said['dtype']!r}", fix=f"save it again as one of {', '.join(_DTYPES)}"
        )
    shape, offsets = said["shape"], said["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_whole, shape)):
        raise _damaged(path, f"{name!r} has the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)) or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name!r} stands at {offsets!r}")
    nbytes = math.prod(tuple(shape)) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise UnsafeFileError(
            asked_of(path),
            found=f"{name!r} of shape {tuple(shape)} needs {nbytes} bytes, the file holds {offsets[1] - offsets[0]} for it",
            fix="get the file from a source you trust",
        )
    if offsets[1] > room:
        raise _damaged(path, f"{name!r} ends at byte {offsets[1]} of the data, which has {room}")
    return ArrayInfo(name, tuple(shape), dtype), offsets[0], offsets[1]


def read_safetensors(source: Source, *, limits: Limits) -> Archive:
    """The `Archive` of a `.safetensors` file.

    Raises:
        WeightsFileError: when it breaks the format's rules.
        UnsafeFileError: when it asks for more than the limits, or than it holds.
    """
    path = source.path
    length = int.from_bytes(source.bytes(0, 8, "the length of the header"), "little")
    if length > source.size - 8:
        raise _damaged(path, f"a header of {length} bytes in a file of {source.size}")
    if length > limits.max_metadata_bytes:
        raise UnsafeFileError(asked_of(path), found=f"a header of {length} bytes", fix="raise Limits.max_metadata_bytes")
    header = json_object(path, "the header", source.bytes(8, length), limits) or {}
    said = header.pop("__metadata__", {})
    if not isinstance(said, Mapping) or not all(isinstance(v, str) for v in said.values()):
        raise _damaged(path, "'__metadata__' isn't text only")
    begin = 8 + length
    entries = sorted((_entry(path, name, entry, source.size - begin) for name, entry in header.items()), key=lambda e: e[1:])
    at = 0
    for info, start, end in entries:
        if start != at:
            raise UnsafeFileError(
                asked_of(path),
                found=f"{info.name!r} begins at byte {start} of the data, where {at} is next",
                cause="arrays that share bytes, or a gap that hides something",
                fix="get the file from a source you trust",
            )
        at = end
    if begin + at != source.size:
        raise _damaged(path, f"{source.size - begin - at} bytes after the last array")
    arrays = {info.name: info for info, _, _ in entries}
    places = {info.name: begin + start for info, start, _ in entries}
    check_sizes(path, list(arrays.values()), limits)
    framework = str(said.get("format", ""))
    digests = json_object(path, "the digests", said.get(DIGESTS), limits) or {}

    def read(name: str) -> np.ndarray[Any, Any]:
        info = arrays.get(name)
        if info is None:
            raise WeightsFileError(
                asked_of(path), found=f"no array {name!r}{did_you_mean(name, arrays)}", fix="see `arrays` for the names"
            )
        raw = source.view(places[name], info.nbytes, repr(name))
        if info.dtype == np.dtype(bool):
            truth = np.frombuffer(raw, np.uint8)
            if truth.size and int(truth.max()) > 1:
                raise _damaged(path, f"{name!r}: truth values other than 0 and 1")
            array = truth.view(bool).reshape(info.shape)
        else:
            array = np.frombuffer(raw, info.dtype).reshape(info.shape)
        native = array if array.dtype.isnative else array.astype(info.dtype.newbyteorder("="))
        return verified(path, name, native, digests.get(name))

    def stretch(name: str) -> Stretch | None:
        info = arrays[name]
        if info.dtype == np.dtype(bool) or not info.dtype.isnative:
            return None
        return Stretch(source, places[name], name, info.dtype, info.shape, str(digests.get(name, "")))

    return Archive(
        path=path,
        format="safetensors",
        arrays=arrays,
        read=read,
        stretch=stretch,
        framework={"pt": "torch", "tf": "tensorflow"}.get(framework, framework),
        metadata={k: v for k, v in said.items() if k != DIGESTS},
        class_names=said_class_names(said),
    )


def read_safetensors_shards(source: Source, index: Mapping[str, Any], *, limits: Limits) -> Archive:
    """The `Archive` of a sharded set, from the content of its `.safetensors.index.json`.

    Raises:
        WeightsNotFoundError: when a shard isn't there.
        WeightsFileError: when index and shards don't agree.
        UnsafeFileError: when the index names a file that isn't beside it.
    """
    mapped = shard_names(source.path, index, limits)
    opened: list[Source] = []
    shards: dict[str, Archive] = {}

    def close() -> None:
        for shard in opened:
            shard.close()

    try:
        for file in mapped:
            opened.append(Source(os.path.join(os.path.dirname(source.path), file)))
            shards[file] = read_safetensors(opened[-1], limits=limits)
        problems = []
        owner: dict[str, str] = {}
        for file, shard in shards.items():
            present = set(shard.arrays)
            problems += [f"{file!r} lacks {name!r}" for name in sorted(mapped[file] - present)]
            problems += [f"{file!r} holds {name!r}, which the index puts elsewhere" for name in sorted(present - mapped[file])]
            owner.update(dict.fromkeys(shard.arrays, file))
        if problems:
            raise WeightsFileError(
                asked_of(source.path),
                found=problems[:20],
                cause="a shard of another run in the same directory",
                fix="get all the shards again",
            )
        arrays = {name: shards[file].arrays[name] for name, file in owner.items()}
        check_sizes(source.path, list(arrays.values()), limits)
    except BaseException:
        close()
        raise

    def read(name: str) -> np.ndarray[Any, Any]:
        if name not in owner:
            raise WeightsFileError(
                asked_of(source.path), found=f"no array {name!r}{did_you_mean(name, owner)}", fix="see `arrays` for the names"
            )
        return shards[owner[name]].read(name)

    def stretch(name: str) -> Stretch | None:
        return shards[owner[name]].stretch(name)

    first = next(iter(shards.values()), None)
    if first is None:
        raise _damaged(source.path, "an index without a shard")
    metadata = {**first.metadata, "shards": shorten(mapped)}
    return replace(first, path=source.path, arrays=arrays, read=read, stretch=stretch, metadata=metadata, close=close)
