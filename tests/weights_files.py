"""Small weights files of every format, written by hand or by the format's own library, with what is in them.

Shared by the tests of the readers and by the fuzz harness; TensorFlow is not needed.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np

from transferkit.weights.readers.tables import TABLE_MAGIC, masked_crc32c

Arrays = dict[str, np.ndarray[Any, Any]]

CONFIG = {
    "class_name": "Sequential",
    "config": {
        "name": "net",
        "layers": [
            {"class_name": "InputLayer", "config": {"name": "input_1", "batch_input_shape": [None, 5]}},
            {"class_name": "Dense", "config": {"name": "first", "units": 7, "use_bias": True}},
            {"class_name": "BatchNormalization", "config": {"name": "norm", "scale": True, "center": True}},
            {"class_name": "Dense", "config": {"name": "second", "units": 3, "use_bias": True}},
        ],
    },
}


def save_arrays(path: Path, held: Any) -> None:
    """Writes an npz file. NumPy's types take keyword arrays for `savez`'s one flag, so `held` is Any."""
    np.savez(path, **held)


def arrays() -> Arrays:
    """The weights of the network in `CONFIG`, by layer and variable."""
    rng = np.random.default_rng(7)
    shapes = {
        "first/kernel": (5, 7),
        "first/bias": (7,),
        "norm/gamma": (7,),
        "norm/beta": (7,),
        "norm/moving_mean": (7,),
        "norm/moving_variance": (7,),
        "second/kernel": (7, 3),
        "second/bias": (3,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def by_layer(content: Arrays) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for name, array in content.items():
        layer, variable = name.split("/")
        found.setdefault(layer, {})[variable] = array
    return found


def legacy_h5(folder: Path) -> tuple[Path, Arrays]:
    """A whole model as Keras 2 wrote it."""
    path = folder / "legacy.h5"
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.9.0"
        file.attrs["backend"] = "tensorflow"
        file.attrs["model_config"] = json.dumps(CONFIG)
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [b"first", b"norm", b"second"]
        for layer, variables in by_layer(arrays()).items():
            group = weights.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{variable}:0".encode() for variable in variables]
            for variable, array in variables.items():
                group.create_dataset(f"{layer}/{variable}:0", data=array)
    return path, arrays()


def compressed_h5(folder: Path) -> tuple[Path, Arrays]:
    """Weights alone, chunked and compressed, with HDF5's own checksums."""
    path = folder / "compressed.h5"
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"first", b"norm", b"second"]
        for layer, variables in by_layer(arrays()).items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{variable}:0".encode() for variable in variables]
            for variable, array in variables.items():
                chunks = tuple(max(1, n // 2) for n in array.shape)
                group.create_dataset(
                    f"{layer}/{variable}:0", data=array, chunks=chunks, compression="gzip", shuffle=True, fletcher32=True
                )
    return path, arrays()


PATHS = {"first": "layers/dense", "norm": "layers/batch_normalization", "second": "layers/dense_1"}


def in_keras_3_paths(content: Arrays) -> Arrays:
    return {
        f"{PATHS[layer]}/vars/{i}": array
        for layer, variables in by_layer(content).items()
        for i, array in enumerate(variables.values())
    }


def fill_weights_h5(file: h5py.File) -> None:
    for layer, variables in by_layer(arrays()).items():
        group = file.create_group(f"{PATHS[layer]}/vars")
        group.attrs["name"] = layer
        for i, array in enumerate(variables.values()):
            group[str(i)] = array


def weights_h5(folder: Path) -> tuple[Path, Arrays]:
    """Weights as Keras 3 writes them."""
    path = folder / "net.weights.h5"
    with h5py.File(path, "w") as file:
        fill_weights_h5(file)
    return path, in_keras_3_paths(arrays())


def keras(folder: Path) -> tuple[Path, Arrays]:
    """A `.keras` archive as Keras 3 writes it."""
    path = folder / "net.keras"
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        fill_weights_h5(file)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1", "date_saved": "2025-01-01@00:00:00"}))
        archive.writestr("config.json", json.dumps({"module": "keras", **CONFIG}))
        archive.writestr("model.weights.h5", content.getvalue())
    return path, in_keras_3_paths(arrays())


def sharded(folder: Path) -> tuple[Path, Arrays]:
    """Keras weights in two shards with their index."""
    path = folder / "net.weights.json"
    found: dict[str, str] = {}
    total = 0
    for number, layers in enumerate((("first", "norm"), ("second",))):
        shard = f"net_{number:05}.weights.h5"
        with h5py.File(folder / shard, "w") as file:
            for layer in layers:
                found[f"/{PATHS[layer]}/vars"] = shard
                group = file.create_group(f"{PATHS[layer]}/vars")
                for i, array in enumerate(by_layer(arrays())[layer].values()):
                    group[str(i)] = array
                    total += array.nbytes
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": found}))
    return path, in_keras_3_paths(arrays())


def safetensors_bytes(content: Arrays, *, metadata: dict[str, str] | None = None, dtypes: dict[str, str] | None = None) -> bytes:
    """A safetensors file of arrays; `dtypes` gives another word for an array's dtype than F32."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, array in content.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": (dtypes or {}).get(name, "F32"),
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def safetensors(folder: Path) -> tuple[Path, Arrays]:
    path = folder / "net.safetensors"
    path.write_bytes(safetensors_bytes(arrays(), metadata={"format": "pt"}))
    return path, arrays()


def npz(folder: Path) -> tuple[Path, Arrays]:
    path = folder / "net.npz"
    np.savez(path, **arrays())  # type: ignore[arg-type]
    return path, arrays()


def npz_deflated(folder: Path) -> tuple[Path, Arrays]:
    path = folder / "packed.npz"
    np.savez_compressed(path, **arrays())  # type: ignore[arg-type]
    return path, arrays()


# -- PyTorch, whose pickles are put together from the instructions it emits ----------------------------------------------------


class FloatStorage:
    """Stands for torch.FloatStorage in a pickle."""


class _Reference:
    """A storage: pickled as a reference to something outside."""

    def __init__(self, key: str, count: int) -> None:
        self.key, self.count = key, count


class Tensor:
    """Pickled as torch pickles a tensor."""

    def __init__(self, storage: _Reference, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> None:
        self.arguments: tuple[Any, ...] = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_tensor_v2, self.arguments


def _rebuild_tensor_v2(*_: Any) -> None:
    raise AssertionError("only its name is used")


_InPython: Any = pickle._Pickler  # the one whose names can be exchanged


class _Pickler(_InPython):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", FloatStorage, value.key, "cpu", value.count) if isinstance(value, _Reference) else None

    def save_global(self, value: Any, name: str | None = None) -> None:
        renamed = {_rebuild_tensor_v2: "torch._utils\n_rebuild_tensor_v2", FloatStorage: "torch\nFloatStorage"}
        if value in renamed:
            self.write(b"c" + renamed[value].encode() + b"\n")
            self.memoize(value)
        else:
            super().save_global(value, name)

    dispatch: ClassVar[dict[type, Any]] = {
        **_InPython.dispatch,
        type: save_global,
        type(_rebuild_tensor_v2): save_global,
    }


def pickled(value: Any) -> bytes:
    """The value as a pickle in which our stand-ins bear torch's names."""
    file = io.BytesIO()
    _Pickler(file, 2).dump(value)
    return file.getvalue()


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.insert(0, strides[0] * extent)
    return tuple(strides[: len(shape)]) if shape else ()


def torch_content() -> tuple[OrderedDict[str, Tensor], dict[str, bytes], Arrays]:
    """A state dict, the bytes of its storages, and the arrays it describes."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    storages = {}
    expected = {}
    for i, (name, array) in enumerate(arrays().items()):
        name = name.replace("/", ".")
        storages[str(i)] = array.tobytes()
        state[name] = Tensor(_Reference(str(i), array.size), array.shape, strides_of(array.shape))
        expected[name] = array
    return state, storages, expected


def torch_zip(folder: Path, value: Any = None, storages: dict[str, bytes] | None = None) -> tuple[Path, Arrays]:
    """A file of torch.save since PyTorch 1.6."""
    state, bytes_of, expected = torch_content()
    path = folder / "net.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", value if isinstance(value, bytes) else pickled(state if value is None else value))
        archive.writestr("net/byteorder", "little")
        for key, raw in (bytes_of if storages is None else storages).items():
            archive.writestr(f"net/data/{key}", raw)
        archive.writestr("net/version", "3\n")
    return path, expected


def torch_old(folder: Path, value: Any = None, storages: dict[str, bytes] | None = None) -> tuple[Path, Arrays]:
    """A file of torch.save before PyTorch 1.6."""
    state, bytes_of, expected = torch_content()
    path = folder / "net.pth"
    stored = bytes_of if storages is None else storages
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps(system, 2)]
    parts += [pickled(state if value is None else value), pickle.dumps(list(stored), 2)]
    parts += [struct.pack("<q", len(raw) // 4) + raw for raw in stored.values()]
    path.write_bytes(b"".join(parts))
    return path, expected


# -- TensorFlow -----------------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    found = b""
    while True:
        value, low = value >> 7, value & 127
        found += bytes([low | (128 if value else 0)])
        if not value:
            return found


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sorted_table(rows: dict[bytes, bytes]) -> bytes:
    """A table with one block of data, as TensorFlow's writer makes it for few rows."""

    def block(entries: dict[bytes, bytes]) -> bytes:
        body = b"".join(varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in entries.items())
        body += struct.pack("<II", 0, 1)
        whole = body + b"\0"
        return whole + struct.pack("<I", masked_crc32c(memoryview(whole)))

    data, empty = block(dict(sorted(rows.items()))), block({})
    handle = varint(0) + varint(len(data) - 5)
    index = block({b"~": handle})
    footer = varint(len(data)) + varint(len(empty) - 5) + varint(len(data) + len(empty)) + varint(len(index) - 5)
    return data + empty + index + footer.ljust(40, b"\0") + TABLE_MAGIC


def checkpoint(folder: Path) -> tuple[Path, Arrays]:
    """A checkpoint of TensorFlow's second version with one shard."""
    rows = {b"": field(1, 1) + field(3, field(1, 1))}
    data = b""
    for name, array in arrays().items():
        raw = array.tobytes()
        shape = b"".join(field(2, field(1, extent)) for extent in array.shape)
        crc = varint(6 << 3 | 5) + struct.pack("<I", masked_crc32c(memoryview(raw)))
        rows[name.encode()] = field(1, 1) + field(2, shape) + field(4, len(data)) + field(5, len(raw)) + crc
        data += raw
    (folder / "net.index").write_bytes(sorted_table(rows))
    (folder / "net.data-00000-of-00001").write_bytes(data)
    return folder / "net.index", arrays()


def tfjs(folder: Path) -> tuple[Path, Arrays]:
    """A TensorFlow.js model whose arrays lie in two files."""
    content = arrays()
    raw = b"".join(array.tobytes() for array in content.values())
    (folder / "group1-shard1of2.bin").write_bytes(raw[:130])
    (folder / "group1-shard2of2.bin").write_bytes(raw[130:])
    weights = [{"name": name, "shape": list(array.shape), "dtype": "float32"} for name, array in content.items()]
    files = ["group1-shard1of2.bin", "group1-shard2of2.bin"]
    model = {
        "format": "layers-model",
        "modelTopology": {"keras_version": "2.9.0", "backend": "tensorflow", "model_config": CONFIG},
        "weightsManifest": [{"paths": files, "weights": weights}],
    }
    path = folder / "model.json"
    path.write_text(json.dumps(model))
    return path, content


WRITERS: dict[str, Callable[[Path], tuple[Path, Arrays]]] = {
    "legacy_h5": legacy_h5,
    "compressed_h5": compressed_h5,
    "weights_h5": weights_h5,
    "keras": keras,
    "sharded": sharded,
    "safetensors": safetensors,
    "npz": npz,
    "npz_deflated": npz_deflated,
    "torch_zip": torch_zip,
    "torch_old": torch_old,
    "checkpoint": checkpoint,
    "tfjs": tfjs,
}
