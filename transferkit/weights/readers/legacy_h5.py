"""Keras's legacy HDF5 files: whole models and weights alone, of Keras 0.x, 1, 2, tf.keras and 3.

The layers stand in the attribute `layer_names`, a layer's arrays in its attribute `weight_names`, in the order in which they were
written: for a nested model the trainable ones first, whatever is frozen now, so only the names tell what is what. Attributes over
64 kB were cut into `layer_names0`, `layer_names1` ….
The layout is that of Keras's `legacy_h5_format`. Imports NumPy and the HDF5 reader only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError, did_you_mean, shorten
from transferkit.weights.readers.archive import Archive, ArrayInfo, LayerInfo, Limits, Stretch
from transferkit.weights.readers.checks import check_sizes, json_object, said_class_names
from transferkit.weights.readers.hdf5 import H5Tree, refuse
from transferkit.weights.readers.source import asked_of

__all__ = ["config_layers", "is_legacy_h5", "read_legacy_h5"]

_MODELS = frozenset({"Functional", "Model", "Sequential", "Graph"})


def is_legacy_h5(tree: H5Tree) -> bool:
    """Whether the file is laid out as Keras's legacy HDF5 files are."""
    return any(
        "layer_names" in attributes or "layer_names0" in attributes or "nb_layers" in attributes
        for attributes in (tree.groups.get(""), tree.groups.get("model_weights"))
        if attributes is not None
    )


def config_layers(config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The name and class of each layer of a model's configuration, in its order; empty where it doesn't say."""
    inner = (config or {}).get("config")
    listed = inner.get("layers") if isinstance(inner, Mapping) else inner  # Keras 1 and 2 kept a Sequential as a list
    found = []
    for layer in listed if isinstance(listed, Sequence) and not isinstance(listed, str) else ():
        if not isinstance(layer, Mapping):
            continue
        own = layer.get("config")
        name = layer.get("name") or (own.get("name") if isinstance(own, Mapping) else None)
        if isinstance(name, str) and isinstance(layer.get("class_name"), str):
            found.append((name, layer["class_name"]))
    return found


def _names(path: str, attributes: Mapping[str, Any], key: str, limits: Limits) -> list[str]:
    values = attributes.get(key)
    if values is None:
        values = []
        while len(values) <= limits.max_arrays and isinstance(piece := attributes.get(f"{key}{len(values)}"), list):
            values.append(piece)
        values = [name for piece in values for name in piece]
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        if isinstance(values, list) and not any(isinstance(v, str) and v for v in values):
            return []  # Keras writes an empty list of names as an array of floats
        raise WeightsFileError(asked_of(path), found=f"the attribute {key!r} is no list of names", fix="get the file again")
    if len(values) > limits.max_arrays:
        raise UnsafeFileError(
            asked_of(path), found=f"{len(values)} entries in {key!r}", fix="raise Limits.max_arrays if you trust the file"
        )
    if len(set(values)) != len(values):
        twice = sorted({v for v in values if values.count(v) > 1}) if len(values) < 5000 else ["…"]
        raise WeightsFileError(
            asked_of(path),
            found=f"{key!r} lists {shorten(twice)} more than once",
            cause="the file was damaged, or made so that a tensor takes another's place",
            fix="get the file from a source you trust, or save the model again",
        )
    return values


def _variable(layer: str, weight: str, class_name: str, scopes: Set[str]) -> str:
    """The name of a weight within its layer, from the name the file gives it; `scopes` are the first parts of all names."""
    parts = re.sub(r":\d+$", "", weight).split("/")
    if layer in parts[:-1]:  # what stands before is the scope of a model around it
        return "/".join(parts[parts.index(layer) + 1 :])
    if len(parts) == 1:  # Keras 1: `dense_1_W`
        name = parts[0]
        return name[len(layer) + 1 :] if name.startswith(f"{layer}_") and len(name) > len(layer) + 1 else name
    renamed = re.fullmatch(rf"{re.escape(layer)}(_\d+)+", parts[0]) is not None
    if (
        scopes == {parts[0]} and class_name not in _MODELS and (class_name or renamed)
    ):  # `conv_9/kernel` in `conv`: made unique by TensorFlow
        return "/".join(parts[1:])
    return "/".join(parts)


def _info(path: str, tree: H5Tree, group: str, weight: str, name: str, layer: str, variable: str) -> tuple[str, ArrayInfo]:
    where = "/".join(part for part in (group, *weight.split("/")) if part)
    dataset = tree.datasets.get(where)
    if dataset is None:
        inside = [d[len(group) + 1 :] for d in tree.datasets if d.startswith(f"{group}/")]
        raise WeightsFileError(
            asked_of(path),
            found=f"layer {layer!r} lists the array {weight!r}, which isn't there{did_you_mean(weight, inside)}",
            cause="the file was damaged",
            fix="get the file again",
        )
    refuse(path, dataset)
    return where, ArrayInfo(name, dataset.shape, dataset.dtype, layer, variable)


def _old_layers(tree: H5Tree, root: str, limits: Limits) -> list[tuple[str, list[str]]]:
    """The layers of Keras 0.x: `layer_0/param_0` and so on, counted in attributes."""
    count = tree.groups[root].get("nb_layers")
    found = []
    for i in range(min(count, limits.max_arrays) if isinstance(count, int) else 0):
        group = f"{root}/layer_{i}" if root else f"layer_{i}"
        parameters = tree.groups.get(group, {}).get("nb_params", 0)
        found.append((f"layer_{i}", [f"param_{p}" for p in range(min(int(parameters or 0), limits.max_arrays))]))
    return found


def read_legacy_h5(path: str, tree: H5Tree, *, limits: Limits) -> Archive:
    """The `Archive` of a legacy HDF5 file whose content is `tree`.

    Raises:
        WeightsFileError: when its lists and its content don't agree.
        UnsafeFileError: when it asks for more than the limits.
    """
    top = tree.groups[""]
    whole = "model_weights" in tree.groups and not {"layer_names", "layer_names0", "nb_layers"} & set(top)
    root = "model_weights" if whole else ""
    attributes = tree.groups[root]
    config = json_object(path, "the model's configuration", top.get("model_config"), limits)
    training = json_object(path, "the training configuration", top.get("training_config"), limits)
    listed = config_layers(config)
    classes = dict(listed)

    if "nb_layers" in attributes and "layer_names" not in attributes:
        layers = _old_layers(tree, root, limits)
    else:
        layers = []
        for name in _names(path, attributes, "layer_names", limits):
            group = "/".join(part for part in (root, *name.split("/")) if part)
            if group not in tree.groups:
                raise WeightsFileError(
                    asked_of(path),
                    found=f"'layer_names' lists {name!r}, which isn't there{did_you_mean(name, tree.children[root])}",
                    cause="the file was damaged",
                    fix="get the file again",
                )
            layers.append((name, _names(path, tree.groups[group], "weight_names", limits)))
    _check_order(path, [name for name, _ in layers], [name for name, _ in listed])
    extra = "top_level_model_weights"  # what Keras 3 keeps of the model itself
    if (group := f"{root}/{extra}" if root else extra) in tree.groups and extra not in dict(layers):
        weights = _names(path, tree.groups[group], "weight_names", limits)
        if weights:
            layers.append((extra, weights))

    arrays: dict[str, ArrayInfo] = {}
    places: dict[str, str] = {}
    infos = []
    for layer, weights in layers:
        group = "/".join(part for part in (root, *layer.split("/")) if part)
        own = []
        scopes = {weight.split("/")[0] for weight in weights}
        for weight in weights:
            variable = _variable(layer, weight, classes.get(layer, ""), scopes)
            name = f"{layer}/{variable}"
            if name in arrays:
                name = variable = f"{layer}/{weight}"
            where, info = _info(path, tree, group, weight, name, layer, variable)
            arrays[name], places[name] = info, where
            own.append(name)
        infos.append(LayerInfo(layer, classes.get(layer, ""), tuple(own)))
    slots: dict[str, ArrayInfo] = {}
    if "optimizer_weights" in tree.groups:
        for weight in _names(path, tree.groups["optimizer_weights"], "weight_names", limits):
            name = f"optimizer_weights/{weight}"
            where, slots[name] = _info(path, tree, "optimizer_weights", weight, name, "", re.sub(r":\d+$", "", weight))
            places[name] = where
    check_sizes(path, [*arrays.values(), *slots.values()], limits)

    def read(name: str) -> np.ndarray[Any, Any]:
        if name not in places:
            raise WeightsFileError(
                asked_of(path), found=f"no array {name!r}{did_you_mean(name, places)}", fix="see `arrays` for the names"
            )
        return tree.read(places[name])

    def stretch(name: str) -> Stretch | None:
        return tree.stretch(places[name])

    version = top.get("keras_version") or attributes.get("keras_version") or ""
    said = {k: v for k, v in top.items() if isinstance(v, str) and k not in ("model_config", "training_config", "keras_version")}
    names = [weight for _, weights in layers for weight in weights]
    first = str(version).startswith(("0.", "1.")) or (
        not version and any(re.search(r"_[WU](_\d+|_[icfozrh])?(:0)?$", w) for w in names)
    )
    if "backend" not in said and first and names:
        # Keras 1 didn't write it down, but TensorFlow's variables end in `:0` and Theano's don't.
        said["backend"] = "tensorflow" if any(name.endswith(":0") for name in names) else "theano"
    unlisted = len(tree.datasets) - len(set(places.values()))
    return Archive(
        path=path,
        format="legacy_h5",
        arrays=arrays,
        read=read,
        stretch=stretch,
        layers=tuple(infos),
        framework="tf_keras" if str(version).endswith("-tf") else "keras",
        version=str(version).removesuffix("-tf"),
        config=config,
        training_config=training,
        metadata=said | ({"unlisted_arrays": str(unlisted)} if unlisted else {}),
        class_names=said_class_names(top),
        optimizer_arrays=slots,
        close=tree.close,
    )


def _check_order(path: str, layers: Sequence[str], listed: Sequence[str]) -> None:
    both = set(layers) & set(listed)
    in_file, in_config = ([name for name in names if name in both] for names in (layers, listed))
    if in_file != in_config and len(set(listed)) == len(listed):
        first = next(a for a, b in zip(in_file, in_config, strict=True) if a != b)
        raise WeightsFileError(
            asked_of(path),
            found=f"'layer_names' has another order than the file's own configuration, from {first!r} on",
            cause="the file was edited so that layers change places",
            fix="get the file from a source you trust, or save the model again",
        )
