"""TensorFlow.js models: a `model.json` with the configuration and a list of arrays, whose bytes lie in files beside it.

Arrays of a group follow one another without gap through the group's files; quantized ones are scaled back to float32.
Source: the format of the TensorFlow.js converter. Imports NumPy only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError, did_you_mean, shorten
from transferkit.weights.readers.archive import Archive, ArrayInfo, LayerInfo, Limits
from transferkit.weights.readers.checks import check_sizes, said_class_names
from transferkit.weights.readers.legacy_h5 import config_layers
from transferkit.weights.readers.source import Source, asked_of

__all__ = ["read_tfjs"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int32": np.dtype("<i4"),
    "bool": np.dtype("u1"),
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "complex64": np.dtype("<c8"),
}


@dataclass(frozen=True)
class _Place:
    group: int
    offset: int
    stored: np.dtype[Any]
    final: np.dtype[Any]
    scale: float | None = None
    least: float = 0.0


def _damaged(path: str, found: str) -> WeightsFileError:
    return WeightsFileError(
        asked_of(path), found=found, cause="a file was cut off, changed or left out", fix="get all its files again"
    )


def _entry(path: str, said: Any, group: int, offset: int) -> tuple[ArrayInfo, _Place]:
    if not isinstance(said, Mapping) or not isinstance(said.get("name"), str) or not isinstance(said.get("shape"), list):
        raise _damaged(path, f"an array described as {str(said)[:80]!r}")
    name, shape = said["name"], said["shape"]
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise _damaged(path, f"{name!r} has the shape {shape!r}")
    final = _DTYPES.get(str(said.get("dtype")))
    how = said.get("quantization")
    how = how if isinstance(how, Mapping) else {}
    stored = _DTYPES.get(str(how.get("dtype", said.get("dtype"))))
    if final is None or stored is None:
        raise WeightsFileError(asked_of(path), found=f"{name!r} is of dtype {said.get('dtype')!r}", fix="save it as float32")
    if said["dtype"] == "bool":
        final = np.dtype(bool)
    scale, least = how.get("scale"), how.get("min", 0.0)
    if how and stored.kind == "u" and not (isinstance(scale, (int, float)) and isinstance(least, (int, float))):
        raise _damaged(path, f"{name!r} is quantized without a scale")
    place = _Place(
        group, offset, stored, final.newbyteorder("="), float(scale) if how and scale is not None else None, float(least)
    )
    return ArrayInfo(name, tuple(shape), place.final), place


def _groups(path: str, manifest: Any, limits: Limits) -> list[tuple[list[str], list[Any]]]:
    found = []
    for group in manifest if isinstance(manifest, list) else [None]:
        files, weights = (group.get("paths"), group.get("weights")) if isinstance(group, Mapping) else (None, None)
        if not isinstance(files, list) or not isinstance(weights, list):
            raise _damaged(path, "'weightsManifest' isn't made of paths and weights")
        for file in files:
            if not isinstance(file, str) or not file or os.path.basename(file) != file or "\\" in file or file in (".", ".."):
                raise UnsafeFileError(
                    asked_of(path),
                    found=f"the manifest names {file!r}, which isn't a file beside it",
                    fix="get the model from a source you trust",
                )
        found.append((files, weights))
    if sum(len(files) + len(weights) for files, weights in found) > limits.max_arrays:
        raise UnsafeFileError(asked_of(path), found="more files and arrays than the limit allows", fix="raise Limits.max_arrays")
    return found


def read_tfjs(source: Source, model: Mapping[str, Any], *, limits: Limits) -> Archive:
    """The `Archive` of a TensorFlow.js model, from the content of its `model.json`.

    Raises:
        WeightsNotFoundError: when a file with bytes isn't there.
        WeightsFileError: when list and bytes don't agree.
        UnsafeFileError: when it names a file that isn't beside it.
    """
    path = source.path
    topology = model.get("modelTopology")
    topology = topology if isinstance(topology, Mapping) else {}
    config = topology.get("model_config", topology if "class_name" in topology else None)
    config = config if isinstance(config, Mapping) else None
    arrays: dict[str, ArrayInfo] = {}
    places: dict[str, _Place] = {}
    opened: list[list[Source]] = []
    names = dict(config_layers(config))
    layers: dict[str, list[str]] = {name: [] for name in names}

    def close() -> None:
        for group in opened:
            for file in group:
                file.close()

    try:
        for number, (files, weights) in enumerate(_groups(path, model.get("weightsManifest"), limits)):
            opened.append([])
            for file in files:
                opened[-1].append(Source(os.path.join(os.path.dirname(path), file)))
            offset = 0
            for said in weights:
                info, place = _entry(path, said, number, offset)
                if info.name in arrays:
                    raise UnsafeFileError(asked_of(path), found=f"{info.name!r} is listed twice", fix="get the model again")
                parts = info.name.split("/")
                inside = next((i for i, part in enumerate(parts[:-1]) if part in names), None)
                cut = len(parts) - 1 if inside is None else inside + 1
                layer = "/".join(parts[:cut]) if inside is None else parts[inside]
                arrays[info.name] = ArrayInfo(info.name, info.shape, info.dtype, layer, "/".join(parts[cut:]))
                layers.setdefault(layer, []).append(info.name)
                places[info.name] = place
                offset += math.prod(info.shape) * place.stored.itemsize
            room = sum(file.size for file in opened[-1])
            if offset != room:
                raise _damaged(path, f"the arrays of {shorten(files)} need {offset} bytes, the files have {room}")
        check_sizes(path, list(arrays.values()), limits)
    except BaseException:
        close()
        raise

    def read(name: str) -> np.ndarray[Any, Any]:
        if name not in places:
            raise WeightsFileError(
                asked_of(path), found=f"no array {name!r}{did_you_mean(name, places)}", fix="see `arrays` for the names"
            )
        place, info = places[name], arrays[name]
        raw = _joined(opened[place.group], place.offset, math.prod(info.shape) * place.stored.itemsize)
        array: np.ndarray[Any, Any] = np.frombuffer(raw, place.stored).reshape(info.shape)
        if place.scale is not None:
            array = (array * np.float64(place.scale) + place.least).astype(place.final)
        elif place.final == np.dtype(bool):
            array = np.asarray(array != 0)
        return array if array.dtype == place.final else array.astype(place.final)

    about = model.get("userDefinedMetadata")
    about = about if isinstance(about, Mapping) else {}
    training = topology.get("training_config")
    said = {key: model[key] for key in ("format", "generatedBy", "convertedBy") if isinstance(model.get(key), str)}
    quantized = [name for name, place in places.items() if place.stored.itemsize < place.final.itemsize]
    return Archive(
        path=path,
        format="tfjs",
        arrays=arrays,
        read=read,
        layers=tuple(LayerInfo(layer, names.get(layer, ""), tuple(own)) for layer, own in layers.items()),
        framework="keras" if "keras_version" in topology else "tensorflow",
        version=str(topology.get("keras_version", "")),
        config=config,
        training_config=training if isinstance(training, Mapping) else None,
        metadata={**said, **({"quantized": shorten(quantized)} if quantized else {})},
        class_names=said_class_names(about),
        close=close,
    )


def _joined(files: list[Source], offset: int, length: int) -> memoryview:
    """A stretch of the group's files, as if they were one; a copy only where it lies in more than one."""
    parts = []
    for file in files:
        if offset < file.size and length:
            taken = min(length, file.size - offset)
            parts.append(file.view(offset, taken))
            length -= taken
            offset = 0
        else:
            offset = max(0, offset - file.size)
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
