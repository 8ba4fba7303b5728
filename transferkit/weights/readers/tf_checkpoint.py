"""TensorFlow's checkpoints (one file of the first version; index and data of the second, by name or by object) and SavedModels.

Read here without TensorFlow, whose own reader may end the process over a damaged file. A SavedModel's graph is never looked at.
Source: TensorFlow's `tensor_bundle.proto`, `saved_tensor_slice.proto` and `trackable_object_graph.proto`. Imports NumPy only.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from transferkit.errors import UnsafeFileError, WeightsError, WeightsFileError, WeightsNotFoundError, did_you_mean, shorten
from transferkit.weights.readers.archive import Archive, ArrayInfo, LayerInfo, Limits
from transferkit.weights.readers.checks import check_sizes, json_object, natural
from transferkit.weights.readers.source import Source, asked_of
from transferkit.weights.readers.tables import TableError, masked_crc32c, message, table, varint

__all__ = ["checkpoint_index", "read_checkpoint"]

_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("f4"),
    2: np.dtype("f8"),
    3: np.dtype("i4"),
    4: np.dtype("u1"),
    5: np.dtype("i2"),
    6: np.dtype("i1"),
    8: np.dtype("c8"),
    9: np.dtype("i8"),
    10: np.dtype(bool),
    14: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype("u2"),
    18: np.dtype("c16"),
    19: np.dtype("f2"),
    22: np.dtype("u4"),
    23: np.dtype("u8"),
}
_STRING = 7
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = "/.OPTIMIZER_SLOT/"
# What TensorFlow 1's optimizers append to a variable's name for its slots.
_SLOT_NAMES = re.compile(r"/(Momentum|Adam|Adam_1|RMSProp|RMSProp_1|Adagrad|Adadelta|Adadelta_1|Ftrl|Ftrl_1|AdaMax|AdaMax_1)$")
_COUNTERS = re.compile(r"(^|/)(global_step|beta[12]_power(_\d+)?|save_counter)$")


@dataclass(frozen=True)
class _Entry:
    """A tensor's place: in a shard's file, or in the index itself."""

    dtype: int
    shape: tuple[int, ...]
    shard: int = 0
    offset: int = 0
    size: int = 0
    crc: int | None = None
    content: Callable[[], np.ndarray[Any, Any]] | None = None


def _damaged(path: str, found: str) -> WeightsFileError:
    return WeightsFileError(
        asked_of(path), found=found, cause="the checkpoint was cut off or changed", fix="get all its files again"
    )


def checkpoint_index(path: str) -> str | None:
    """The index file of a checkpoint or SavedModel named by its directory, its prefix or one of its files; None when it is none.

    Raises:
        WeightsNotFoundError: when a directory's `checkpoint` file names one that isn't there.
    """
    if os.path.isdir(path):
        saved = os.path.join(path, "variables", "variables.index")
        if os.path.isfile(saved):
            return saved
        found = sorted(name for name in os.listdir(path) if name.endswith(".index"))
        named = _latest(os.path.join(path, "checkpoint"))
        if named and f"{named}.index" in found:
            return os.path.join(path, f"{named}.index")
        if len(found) == 1 and not named:
            return os.path.join(path, found[0])
        if found:
            said = f"its 'checkpoint' file names {named!r}, which isn't there; " if named else ""
            raise WeightsNotFoundError(
                asked_of(path), found=f"{said}the directory holds {shorten(found)}", fix="give the path of one of these files"
            )
        return None
    shard = re.fullmatch(r"(.*)\.data-\d{5}-of-\d{5}", path)
    if shard and os.path.isfile(f"{shard[1]}.index"):
        return f"{shard[1]}.index"
    if not os.path.exists(path) and os.path.isfile(f"{path}.index"):
        return f"{path}.index"
    return None


def _latest(path: str) -> str:
    """The name of the newest checkpoint, as the file `checkpoint` of its directory tells it."""
    if not os.path.isfile(path) or os.path.getsize(path) > 1 << 20:
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.search(r'^model_checkpoint_path: "([^"]*)"', file.read(), re.MULTILINE)
    return os.path.basename(found[1]) if found else ""


def read_checkpoint(source: Source, *, limits: Limits) -> Archive:
    """The `Archive` of a checkpoint from its index, or from the one file of the first version.

    Raises:
        WeightsFileError: when it is damaged.
        UnsafeFileError: when it asks for more than the limits.
    """
    shards: dict[int, Source] = {}

    def close() -> None:
        for shard in shards.values():
            shard.close()

    try:
        return replace(_read(source, shards, limits), close=close)
    except WeightsError:
        close()
        raise
    except (TableError, UnicodeError, ValueError, OverflowError) as error:
        close()
        raise _damaged(source.path, str(error)) from error


def _read(source: Source, shards: dict[int, Source], limits: Limits) -> Archive:
    rows = table(source.view(0, source.size), most_entries=limits.max_arrays, most_bytes=limits.max_metadata_bytes)
    found = {key.decode("utf-8", "surrogateescape"): value for key, value in rows}
    header = found.pop("", None)
    if header is None:
        raise TableError("no header")
    first = dict(message(header))
    if isinstance(first.get(1), memoryview):  # a message, where the second version counts its shards
        entries = _old_entries(first[1], found)
        content: Callable[[str, _Entry], memoryview] = _old_content
    else:
        count, endianness = int(first.get(1, 0)), first.get(2, 0)
        if endianness:
            raise TableError("a checkpoint in big-endian order")
        if not 0 < count <= limits.max_arrays or not source.path.endswith(".index"):
            raise TableError(f"an index of {count} shards in {os.path.basename(source.path)!r}")
        entries = {key: _entry(key, value) for key, value in found.items()}
        prefix = source.path.removesuffix(".index")
        content = _bundle(prefix, count, shards)
    return _archive(source.path, entries, content, limits)


# -- the second version: an index, and the bytes in shards ----------------------------------------------------------------------


def _shape(data: memoryview) -> tuple[int, ...]:
    sizes = []
    for number, value in message(data):
        if number == 2:
            size = dict(message(value)).get(1, 0)
            if not isinstance(size, int) or size >= 1 << 62:
                raise TableError("a shape that isn't known")
            sizes.append(size)
        elif number == 3 and value:
            raise TableError("a shape that isn't known")
    if len(sizes) > 32:
        raise TableError(f"{len(sizes)} dimensions")
    return tuple(sizes)


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise TableError("a field of another type")
    return value


def _bytes(value: Any) -> memoryview:
    if not isinstance(value, memoryview):
        raise TableError("a field of another type")
    return value


def _entry(key: str, data: memoryview) -> _Entry:
    fields: dict[int, Any] = {}
    for number, value in message(data):
        if number == 7:
            raise TableError(f"{key!r} is a partitioned variable; save the checkpoint again without a partitioner")
        fields[number] = value
    crc = fields.get(6)
    return _Entry(
        _integer(fields.get(1, 0)),
        _shape(_bytes(fields.get(2, memoryview(b"")))),
        _integer(fields.get(3, 0)),
        _integer(fields.get(4, 0)),
        _integer(fields.get(5, 0)),
        int.from_bytes(_bytes(crc), "little") if crc is not None else None,
    )


def _bundle(prefix: str, count: int, shards: dict[int, Source]) -> Callable[[str, _Entry], memoryview]:
    def content(key: str, entry: _Entry) -> memoryview:
        if entry.shard >= count:
            raise TableError(f"{key!r} stands in shard {entry.shard} of {count}")
        if entry.shard not in shards:
            shards[entry.shard] = Source(f"{prefix}.data-{entry.shard:05d}-of-{count:05d}")
        return shards[entry.shard].view(entry.offset, entry.size, repr(key))

    return content


# -- the first version: everything in one table ---------------------------------------------------------------------------------


def _old_content(key: str, entry: _Entry) -> memoryview:
    raise TableError(f"{key!r} of {entry.size} bytes has no shard")


_OLD_FIELDS: dict[int, tuple[int, str]] = {
    1: (5, "<f4"),
    2: (6, "<f8"),
    3: (7, "i"),
    9: (10, "i"),
    10: (11, "i"),
    5: (7, "i"),
    6: (7, "i"),
}


def _old_entries(meta: memoryview, rows: Mapping[str, memoryview]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for number, value in message(meta):
        if number != 1:
            continue
        name, dtype, slices = "", 0, 0
        shape: tuple[int, ...] = ()
        for inner, field in message(_bytes(value)):
            if inner == 1:
                name = bytes(_bytes(field)).decode("utf-8")
            elif inner == 2:
                shape = _shape(_bytes(field))
            elif inner == 3:
                dtype = _integer(field)
            elif inner == 4:
                slices += 1
        if slices > 1:
            raise TableError(f"{name!r} is a partitioned variable; save the checkpoint again without a partitioner")
        if name in entries:
            raise TableError(f"{name!r} stands twice")
        entries[name] = _Entry(dtype, shape)
    for row in rows.values():
        for number, value in message(row):
            if number == 2:
                parts = dict(message(_bytes(value)))
                name = bytes(_bytes(parts.get(1, memoryview(b"")))).decode("utf-8")
                if name in entries and 3 in parts:
                    entries[name] = replace(entries[name], content=_old_reader(name, entries[name], _bytes(parts[3])))
    for name, entry in entries.items():
        if entry.content is None:
            raise TableError(f"{name!r} has no bytes")
    return entries


def _old_reader(name: str, entry: _Entry, data: memoryview) -> Callable[[], np.ndarray[Any, Any]]:
    def read() -> np.ndarray[Any, Any]:
        number, form = _OLD_FIELDS.get(entry.dtype, (0, ""))
        values: list[np.ndarray[Any, Any]] = []
        dtype = _DTYPES[entry.dtype]
        for found, value in message(data):
            if found == 4 and isinstance(value, memoryview):  # tensor_content
                values.append(np.frombuffer(value, dtype))
            elif found == number and number and form != "i":
                values.append(np.frombuffer(_bytes(value), form))
            elif found == number and number:
                values.append(_integers(value).astype(dtype))
        flat = np.concatenate(values) if values else np.zeros(0, dtype)
        if flat.size != math.prod(entry.shape):
            raise TableError(f"{name!r} of shape {entry.shape} has {flat.size} elements")
        return flat.astype(dtype, copy=False).reshape(entry.shape)

    return read


def _integers(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, int):
        return np.array([value], np.uint64).view(np.int64)
    found = []
    at = 0
    while at < len(value):
        number, at = varint(value, at)
        found.append(number)
    return np.array(found, np.uint64).view(np.int64)


# -- names ----------------------------------------------------------------------------------------------------------------------


def _full_names(data: memoryview) -> dict[str, str]:
    """The variables' own names by their keys, from the graph of objects an object-based checkpoint holds."""
    found = {}
    for number, node in message(data):
        if number != 1:
            continue
        for inner, attribute in message(_bytes(node)):
            if inner == 2:
                fields = dict(message(_bytes(attribute)))
                if isinstance(fields.get(2), memoryview) and isinstance(fields.get(3), memoryview):
                    found[bytes(fields[3]).decode("utf-8", "replace")] = bytes(fields[2]).decode("utf-8", "replace")
    return found


def _graph(entries: dict[str, _Entry], content: Callable[[str, _Entry], memoryview], limits: Limits) -> dict[str, str]:
    entry = entries.get(_GRAPH)
    if entry is None or entry.dtype != _STRING or entry.shape or entry.size > limits.max_metadata_bytes:
        return {}
    raw = content(_GRAPH, entry)
    length, at = varint(raw, 0)
    if at + 4 + length != len(raw):  # the length, its checksum, the bytes
        raise TableError("the graph of objects is cut off")
    return _full_names(raw[at + 4 :])


def _archive(path: str, entries: dict[str, _Entry], content: Callable[[str, _Entry], memoryview], limits: Limits) -> Archive:
    full = _graph(entries, content, limits)
    arrays: dict[str, ArrayInfo] = {}
    slots: dict[str, ArrayInfo] = {}
    keys: dict[str, str] = {}
    texts = []
    for key, entry in sorted(entries.items(), key=lambda item: natural(item[0])):
        name = key.removesuffix(_VALUE)
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            texts.append(name)  # text, and resources, which are no weights
            continue
        needed = math.prod(entry.shape) * dtype.itemsize
        if entry.content is None and needed != entry.size:
            raise UnsafeFileError(
                asked_of(path),
                found=f"{name!r} of shape {entry.shape} needs {needed} bytes, the file has {entry.size}",
                fix="get the checkpoint from a source you trust",
            )
        layer, _, variable = full.get(key, name).rpartition("/")
        slot = _SLOT_NAMES.search(name)
        # Keras 3's optimizer also lists the model's own variables.
        own = name.startswith(("optimizer/", "_optimizer")) and "/_trainable_variables/" not in name
        state = _SLOT in key or own or (slot and name[: slot.start()] in entries)
        state = state or _COUNTERS.search(name) is not None
        (slots if state else arrays)[name] = ArrayInfo(name, entry.shape, dtype, layer, variable)
        keys[name] = key
    check_sizes(path, [*arrays.values(), *slots.values()], limits)
    for name in _exported_twice(arrays, {name: entries[key] for name, key in keys.items()}):
        del arrays[name], keys[name]
    layers: dict[str, list[str]] = {}
    for info in arrays.values():
        layers.setdefault(info.layer, []).append(info.name)

    def read(name: str) -> np.ndarray[Any, Any]:
        if name not in keys:
            raise WeightsFileError(
                asked_of(path), found=f"no array {name!r}{did_you_mean(name, keys)}", fix="see `arrays` for the names"
            )
        entry, info = entries[keys[name]], arrays.get(name) or slots[name]
        try:
            if entry.content is not None:
                return entry.content()
            raw = content(keys[name], entry)
        except TableError as error:
            raise _damaged(path, str(error)) from error
        if entry.crc is not None and masked_crc32c(raw) != entry.crc:
            raise _damaged(path, f"{name!r} doesn't match its checksum")
        if info.dtype == np.dtype(bool):
            return np.asarray(np.frombuffer(raw, np.uint8) != 0).reshape(info.shape)
        array: np.ndarray[Any, Any] = np.frombuffer(
            raw, info.dtype.newbyteorder("<") if info.dtype.kind in "iufc" else info.dtype
        ).reshape(info.shape)
        return array if array.dtype.isnative else array.astype(info.dtype)

    about = _keras_metadata(path, limits)
    return Archive(
        path=path,
        format="tf_checkpoint",
        arrays=arrays,
        read=read,
        layers=tuple(LayerInfo(layer, "", tuple(names)) for layer, names in layers.items()),
        framework="tensorflow",
        version=str((about or {}).get("keras_version", "")),
        config=_config(about),
        training_config=(about or {}).get("training_config")
        if isinstance((about or {}).get("training_config"), Mapping)
        else None,
        metadata={"no_numbers": shorten(texts)} if texts else {},
        optimizer_arrays=slots,
    )


def _exported_twice(arrays: Mapping[str, ArrayInfo], entries: Mapping[str, _Entry]) -> list[str]:
    """What `export` of Keras 3 lists under `_all_variables` besides the equal array of the same variable under `variables`."""

    def marks(group: str) -> dict[str, tuple[Any, ...]]:
        return {
            name: (info.layer, info.variable, info.shape, info.dtype, entries[name].crc)
            for name, info in arrays.items()
            if name.startswith(group) and entries[name].crc is not None
        }

    first = set(marks("variables/").values())
    return [name for name, mark in marks("_all_variables/").items() if mark in first]


def _config(about: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    said = (about or {}).get("model_config")
    return said if isinstance(said, Mapping) else None


def _keras_metadata(path: str, limits: Limits) -> dict[str, Any] | None:
    """What Keras 2 wrote beside a SavedModel's graph of its root object, where there is such a file."""
    place = os.path.join(os.path.dirname(os.path.dirname(path)), "keras_metadata.pb")
    if os.path.basename(path) != "variables.index" or not os.path.isfile(place):
        return None
    source = Source(place)
    try:
        if source.size > limits.max_metadata_bytes:
            return None
        for number, node in message(source.view(0, source.size)):
            fields = dict(message(node)) if number == 1 and isinstance(node, memoryview) else {}
            if isinstance(fields.get(3), memoryview) and bytes(fields[3]) == b"root" and isinstance(fields.get(5), memoryview):
                return json_object(place, "the root's metadata", bytes(fields[5]), limits)
        return None
    finally:
        source.close()
