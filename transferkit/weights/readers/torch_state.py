"""PyTorch's saved state dicts (`.pt`, `.pth`, `.th`, `.bin`), zip and old format, without torch.

The pickle in them is read by `pickled`, which calls nothing: tensors, their storages and plain containers are understood, a few
harmless values are kept as names, and anything else is refused. A tensor must lie within its storage.
Source: `torch/serialization.py` and `torch/_utils.py` of PyTorch. Imports NumPy and ml_dtypes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError, did_you_mean, shorten
from transferkit.weights.readers.archive import Archive, ArrayInfo, LayerInfo, Limits
from transferkit.weights.readers.checks import check_sizes
from transferkit.weights.readers.pickled import Global, Inert, PickleError, RefusedError, unpickled
from transferkit.weights.readers.source import Part, Piece, Source, asked_of, check_range
from transferkit.weights.readers.zipped import Zip

__all__ = ["read_torch_pickle", "read_torch_zip"]

_BEGIN = 15  # the old format begins with a pickle of one integer, by which it is told
_DTYPES: dict[str, np.dtype[Any]] = {
    "Float": np.dtype("f4"),
    "Double": np.dtype("f8"),
    "Half": np.dtype("f2"),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Long": np.dtype("i8"),
    "Int": np.dtype("i4"),
    "Short": np.dtype("i2"),
    "Char": np.dtype("i1"),
    "Byte": np.dtype("u1"),
    "Bool": np.dtype(bool),
    "ComplexFloat": np.dtype("c8"),
    "ComplexDouble": np.dtype("c16"),
    "Untyped": np.dtype("u1"),
}
_NAMED: dict[str, np.dtype[Any]] = {
    **{kind: np.dtype(kind) for kind in ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")},
    **{kind: np.dtype(kind) for kind in ("uint16", "uint32", "uint64", "complex64", "complex128")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_parameter_with_state")
# Named in training checkpoints beside the weights; kept as names, never called.
_HARMLESS = frozenset(
    {
        ("torch", "device"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),
        ("argparse", "Namespace"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("builtins", "set"),
        ("__builtin__", "set"),
        ("builtins", "slice"),
        ("datetime", "datetime"),
        ("collections", "defaultdict"),
        ("collections", "Counter"),
    }
)
_ROOTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "params_ema",
    "ema",
)
_PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
_MOST_DEPTH = 8
_Order = Literal["<", ">"]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    numel: int
    offset: int = 0


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]


def _damaged(path: str, found: str) -> WeightsFileError:
    return WeightsFileError(asked_of(path), found=found, cause="the file was cut off or changed", fix="get the file again")


def torch_prefix(archive: Zip) -> str:
    """The directory in a zip archive that torch.save made."""
    found = [name[: -len("data.pkl")] for name in archive.members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise _damaged(archive.source.path, f"{len(found)} members 'data.pkl' in a directory, where one should be")
    return found[0]


# -- what the pickle's names stand for ------------------------------------------------------------------------------------------


def _find(name: Global) -> Any:
    if name == Global("collections", "OrderedDict"):
        return dict
    if name.module == "torch._utils" and name.name in _REBUILD:
        return name
    if name.module in ("torch", "torch.storage", "torch.cuda"):
        if name.name in _NAMED:
            return _NAMED[name.name]
        kind = name.name.removeprefix("_").removesuffix("Storage")
        if name.name.endswith("Storage") and kind in _DTYPES:
            return _DTYPES[kind]
    if (name.module, name.name) in _HARMLESS:
        return name
    raise RefusedError(f"{name.module}.{name.name}, which isn't a tensor")


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    if function is dict:
        pairs = arguments[0] if arguments else ()
        return {key: value for key, value in pairs if isinstance(key, (str, int, float))}
    if not isinstance(function, Global):
        raise RefusedError("a call of something that isn't data")
    if function.module == "torch._utils":
        if function.name.startswith("_rebuild_parameter"):
            return arguments[0]
        return _tensor(function.name, arguments)
    return Inert(function, arguments)


def _tensor(function: str, arguments: tuple[Any, ...]) -> _Tensor:
    storage, offset, shape, strides = arguments[:4]
    if isinstance(shape, Inert):  # torch.Size
        shape = tuple(shape.arguments[0]) if shape.arguments else ()
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise PickleError("a tensor without storage or shape")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise PickleError(f"a tensor of shape {shape} and strides {strides}")
    dtype, numel = storage.dtype, storage.numel
    if function == "_rebuild_tensor_v3":
        dtype = arguments[6]
        if not isinstance(dtype, np.dtype) or storage.dtype.itemsize != 1:
            raise PickleError("a tensor without dtype")
        numel //= dtype.itemsize
    last = offset + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= numel or math.prod(shape) > numel):
        raise RefusedError(f"a tensor of shape {shape}, strides {strides} and offset {offset} in a storage of {numel} elements")
    return _Tensor(storage, offset, shape, strides, dtype)


def _persistent(said: Any) -> _Storage:
    if not isinstance(said, tuple) or len(said) not in (5, 6) or said[0] != "storage" or not isinstance(said[1], np.dtype):
        raise PickleError("a reference that is no storage")
    key, numel = said[2], said[4]
    if not isinstance(key, (str, int)) or type(numel) is not int or not 0 <= numel < 1 << 62:
        raise PickleError("a storage without key or size")
    view = said[5] if len(said) == 6 else None
    offset = 0
    if isinstance(view, tuple) and len(view) == 3:  # old files: a part of a larger storage
        _, offset, numel = view
        if type(offset) is not int or type(numel) is not int or min(offset, numel) < 0:
            raise PickleError("a view of a storage without place")
    return _Storage(str(key), said[1], numel, offset)


def _value(path: str, data: memoryview) -> tuple[Any, int]:
    try:
        return unpickled(data, find=_find, call=_call, persistent=_persistent)
    except RefusedError as error:
        raise UnsafeFileError(
            asked_of(path),
            found=f"the pickle asks for {error}",
            cause="a whole module was saved in place of its tensors, or the file was made to run code",
            fix="save it again with torch.save(model.state_dict(), path)",
        ) from error
    except PickleError as error:
        raise _damaged(path, str(error)) from error


# -- the tensors among the values -----------------------------------------------------------------------------------------------


def _tensors(value: Any, prefix: str = "", depth: int = 0) -> dict[str, _Tensor]:
    """The tensors in nested dicts by name, parts joined by `.`."""
    found: dict[str, _Tensor] = {}
    if depth > _MOST_DEPTH or not isinstance(value, dict):
        return found
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, _Tensor):
            found[name] = item
        elif isinstance(item, dict):
            found.update(_tensors(item, f"{name}.", depth + 1))
    return found


def _sorted_out(value: Any) -> tuple[dict[str, _Tensor], dict[str, _Tensor], dict[str, str]]:
    """The weights, the optimizer's tensors, and what else the file says."""
    if not isinstance(value, dict):
        return {}, {}, {}
    said = {str(k): str(v) for k, v in value.items() if isinstance(v, (str, int, float, bool))}
    slots: dict[str, _Tensor] = {}
    parts: dict[str, dict[str, _Tensor]] = {}
    direct: dict[str, _Tensor] = {}
    for key, item in value.items():
        if isinstance(item, _Tensor):
            direct[str(key)] = item
        elif isinstance(item, dict):
            inner = _tensors(item, f"{key}.")
            if "optim" in str(key).lower():
                slots.update(inner)
            elif inner:
                parts[str(key)] = inner
    known = [key for key in _ROOTS if key in parts]
    if direct or not parts:
        return {**direct, **{k: v for part in parts.values() for k, v in part.items()}}, slots, said
    if len(parts) == 1 or known:
        root = known[0] if known else next(iter(parts))
        others = [key for key in parts if key != root]
        said["taken_from"] = root
        if others:
            said["left_out"] = shorten(others)
        return {name[len(root) + 1 :]: tensor for name, tensor in parts[root].items()}, slots, said
    return {k: v for part in parts.values() for k, v in part.items()}, slots, said


def _class_names(value: Any) -> tuple[str, ...]:
    for key in ("class_to_idx", "classes", "class_names", "idx_to_class"):
        said = value.get(key) if isinstance(value, dict) else None
        if isinstance(said, list) and said and all(isinstance(v, str) for v in said):
            return tuple(said)
        if isinstance(said, dict) and said:
            pairs = [(v, k) if isinstance(k, str) else (k, v) for k, v in said.items()]
            if all(type(i) is int and isinstance(n, str) for i, n in pairs) and sorted(i for i, _ in pairs) == list(
                range(len(pairs))
            ):
                return tuple(n for _, n in sorted(pairs))
    return ()


def _archive(path: str, value: Any, content: Callable[[_Storage], Piece], order: _Order, limits: Limits) -> Archive:
    tensors, slots, said = _sorted_out(value)
    if not tensors:
        raise WeightsFileError(
            asked_of(path), found="no tensor under a name", fix="save a state dict: torch.save(model.state_dict(), path)"
        )
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
            said["stripped_prefix"] = prefix
    arrays = {}
    layers: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        layer, _, variable = name.rpartition(".")
        arrays[name] = ArrayInfo(name, tensor.shape, tensor.dtype, layer, variable)
        layers.setdefault(layer, []).append(name)
    states = {f"optimizer.{name}": tensor for name, tensor in slots.items()}
    infos = {name: ArrayInfo(name, tensor.shape, tensor.dtype) for name, tensor in states.items()}
    check_sizes(path, [*arrays.values(), *infos.values()], limits)
    known = {**tensors, **states}

    def read(name: str) -> np.ndarray[Any, Any]:
        tensor = known.get(name)
        if tensor is None:
            raise WeightsFileError(
                asked_of(path), found=f"no array {name!r}{did_you_mean(name, known)}", fix="see `arrays` for the names"
            )
        return _strided(path, name, tensor, content(tensor.storage), order)

    return Archive(
        path=path,
        format="torch",
        arrays=arrays,
        read=read,
        layers=tuple(LayerInfo(layer, "", tuple(names)) for layer, names in layers.items()),
        framework="torch",
        metadata=said,
        class_names=_class_names(value),
        optimizer_arrays=infos,
    )


def _strided(path: str, name: str, tensor: _Tensor, storage: Piece, order: _Order) -> np.ndarray[Any, Any]:
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, tensor.dtype)
    truth = tensor.dtype == np.dtype(bool)
    stored = np.dtype(np.uint8) if truth else tensor.dtype.newbyteorder(order) if tensor.dtype.kind in "iufc" else tensor.dtype
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if (last + 1) * stored.itemsize > storage.size:
        raise _damaged(path, f"{name!r} reaches past its storage of {storage.size} bytes")
    # No more of the storage than the tensor covers: a thousand tensors may share a large one.
    count = last + 1 - tensor.offset
    flat = np.frombuffer(storage.view(tensor.offset * stored.itemsize, count * stored.itemsize, repr(name)), stored)
    strides = tuple(stride * stored.itemsize for stride in tensor.strides)
    # Within bounds: the last element was checked above, and no stride is negative.
    array = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    array = np.ascontiguousarray(array).reshape(tensor.shape)
    if truth:
        if array.size and int(array.max()) > 1:
            raise _damaged(path, f"{name!r}: truth values other than 0 and 1")
        return array.view(bool)
    return array if array.dtype.isnative else array.astype(tensor.dtype)


# -- the two formats ------------------------------------------------------------------------------------------------------------


def read_torch_zip(source: Source, archive: Zip, *, limits: Limits) -> Archive:
    """The `Archive` of a file of torch.save since PyTorch 1.6.

    Raises:
        WeightsFileError: when it is damaged.
        UnsafeFileError: when its pickle asks for anything but tensors.
    """
    prefix = torch_prefix(archive)
    value, _ = _value(source.path, memoryview(archive.content(f"{prefix}data.pkl")))
    order: _Order = ">" if f"{prefix}byteorder" in archive.members and archive.content(f"{prefix}byteorder") == b"big" else "<"

    def content(storage: _Storage) -> Piece:
        member = f"{prefix}data/{storage.key}"
        listed = archive.members.get(member)
        expected = (storage.numel + storage.offset) * storage.dtype.itemsize
        if listed is None or listed.size != expected:
            raise _damaged(source.path, f"the storage {storage.key!r} of {expected} bytes isn't there")
        piece = archive.piece(member, most=max(expected, 1) * 2 + limits.max_metadata_bytes)
        archive.verify(member)
        begin = storage.offset * storage.dtype.itemsize
        return Part(piece, begin, expected - begin)

    return _archive(source.path, value, content, order, limits)


def read_torch_pickle(source: Source, *, limits: Limits) -> Archive:
    """The `Archive` of a file of torch.save before PyTorch 1.6.

    Raises:
        WeightsFileError: when it is damaged.
        UnsafeFileError: when its pickle asks for anything but tensors.
    """
    path = source.path
    at = _BEGIN

    def value(most: int) -> Any:
        nonlocal at
        found, used = _value(path, source.view(at, min(most, source.size - at)))
        at += used
        return found

    protocol, system = value(64), value(4096)
    if protocol != 1001 or not isinstance(system, Mapping):
        raise _damaged(path, f"protocol {protocol!r}; 1001 is known")
    order: _Order = "<" if system.get("little_endian", True) else ">"
    saved, keys = value(limits.max_metadata_bytes), value(limits.max_metadata_bytes)
    storages = _storages(saved)
    if not isinstance(keys, list) or len(keys) > limits.max_arrays:
        raise _damaged(path, "no list of storages")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(source.bytes(at, 8, "the size of a storage"), "little")
        itemsize = storages.get(str(key), np.dtype("u1")).itemsize
        check_range(source, at + 8, count * itemsize, f"the storage {key!r}")
        if str(key) in places:
            raise _damaged(path, f"the storage {key!r} twice")
        places[str(key)] = (at + 8, count * itemsize)
        at += 8 + count * itemsize
    if at != source.size:
        raise _damaged(path, f"{source.size - at} bytes after the last storage")

    def content(storage: _Storage) -> Piece:
        place, size = places.get(storage.key, (0, -1))
        start, expected = storage.offset * storage.dtype.itemsize, storage.numel * storage.dtype.itemsize
        if start + expected > size:
            raise _damaged(path, f"the storage {storage.key!r} of {start + expected} bytes isn't there")
        return Part(source, place + start, expected)

    return _archive(path, saved, content, order, limits)


def _storages(value: Any) -> dict[str, np.dtype[Any]]:
    """The dtype of each storage the tensors in a value use, wherever they stand."""
    found: dict[str, np.dtype[Any]] = {}
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, _Tensor):
            found[item.storage.key] = item.storage.dtype
        elif isinstance(item, (dict, list, tuple, Inert)) and id(item) not in seen:
            seen.add(id(item))
            inner = item.values() if isinstance(item, dict) else item.arguments if isinstance(item, Inert) else item
            todo.extend(inner)
    return found
