"""Keras 3's files: `.weights.h5`, sharded weights with a `.weights.json`, and `.keras` archives, also those of tf_keras.

An array stands at a path made of attributes and of the layers' classes with a count: `layers/conv2d_1/vars/0`. Newer files say
each layer's own name in an attribute; in a `.keras` archive the configuration tells names, classes and order as well.
The layout is that of Keras's `saving_lib`. Nothing is unpacked to the disk. Imports NumPy and the HDF5 reader only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError, did_you_mean, shorten
from transferkit.weights.readers.archive import Archive, ArrayInfo, LayerInfo, Limits, Stretch
from transferkit.weights.readers.checks import check_sizes, json_object, natural, said_class_names
from transferkit.weights.readers.hdf5 import H5Tree, open_hdf5, refuse
from transferkit.weights.readers.shards import shard_names
from transferkit.weights.readers.source import Piece, Source, asked_of
from transferkit.weights.readers.zipped import Zip

__all__ = ["is_weights_h5", "read_keras", "read_sharded", "read_weights_h5"]

_STATE = ("optimizer",)
_TRAINING = ("metrics", "_metrics", "compile_metrics", "_compile_metrics", "_compile_loss", "loss_tracker", "_loss_tracker")
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_RECURRENT = ("kernel", "recurrent_kernel", "bias")
_SEPARABLE = ("depthwise_kernel", "pointwise_kernel", "bias")
_KERNEL = ("kernel", "bias")

# The classes of Keras that own variables, and the order in which each writes them.
_VARIABLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Dense", "EinsumDense", "Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"), _KERNEL),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _KERNEL),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _SEPARABLE),
    **dict.fromkeys(("LSTMCell", "GRUCell", "SimpleRNNCell", "ConvLSTMCell"), _RECURRENT),
    "BatchNormalization": _NORM,
    "LayerNormalization": ("gamma", "beta"),
    "GroupNormalization": ("gamma", "beta"),
    "Embedding": ("embeddings",),
    "PReLU": ("alpha",),
}
_STOCK = (
    *_VARIABLES,
    *("InputLayer", "Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Flatten", "Reshape", "Permute", "RepeatVector"),
    *("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *("MaxPooling1D", "MaxPooling2D", "MaxPooling3D", "AveragePooling1D", "AveragePooling2D", "AveragePooling3D"),
    *("GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D", "GlobalAveragePooling1D"),
    *("GlobalAveragePooling2D", "GlobalAveragePooling3D", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D"),
    *("Cropping1D", "Cropping2D", "Cropping3D", "UpSampling1D", "UpSampling2D", "UpSampling3D"),
    *("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Dot"),
    *("LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional", "TimeDistributed", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"),
    *("MultiHeadAttention", "GroupQueryAttention", "Attention", "AdditiveAttention", "Normalization", "Rescaling", "Resizing"),
    *("Functional", "Sequential", "Model", "Masking", "UnitNormalization", "SpectralNormalization", "SeedGenerator"),
)


def _snake(name: str) -> str:
    """The name under which Keras 3 files an object of the class."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


_CLASSES = {_snake(name): name for name in _STOCK}


def is_weights_h5(tree: H5Tree) -> bool:
    """Whether the file is laid out as Keras 3 lays out weights."""
    return any(path == "vars" or path.endswith("/vars") for path in tree.groups)


# -- what the configuration says ------------------------------------------------------------------------------------------------


def _configured(config: Mapping[str, Any] | None) -> dict[str, tuple[str, str, Mapping[str, Any]]]:
    """By path: name, class and configuration of each layer a model's configuration tells of, in its order."""
    found: dict[str, tuple[str, str, Mapping[str, Any]]] = {}
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        path, node = todo.pop()
        own = node.get("config") if isinstance(node, Mapping) else None
        if not isinstance(own, Mapping):
            continue
        if path:
            found[path] = _said(node)
        prefix = f"{path}/" if path else ""
        inner: list[tuple[str, Any]] = []
        used: dict[str, int] = {}
        layers = own.get("layers")
        for layer in layers if isinstance(layers, list) else ():
            if isinstance(layer, Mapping) and isinstance(layer.get("class_name"), str):
                kind = _snake(layer["class_name"])
                used[kind] = used.get(kind, -1) + 1
                inner.append((f"{prefix}layers/{kind}" + (f"_{used[kind]}" if used[kind] else ""), layer))
        for key in ("layer", "forward_layer", "backward_layer", "cell"):
            if isinstance(own.get(key), Mapping) and isinstance(own[key].get("class_name"), str):
                inner.append((prefix + key, own[key]))
        todo.extend(reversed(inner))
    return found


def _said(layer: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    own = layer.get("config")
    own = own if isinstance(own, Mapping) else {}
    name = own.get("name", layer.get("name"))
    return (name if isinstance(name, str) else "", str(layer["class_name"]), own)


# -- what the file says ---------------------------------------------------------------------------------------------------------


def _class_of(container: str, name: str, configured: Mapping[str, tuple[str, str, Any]]) -> str:
    """The class the group's name tells; of a recurrent layer's cell, the layer around it, or its default name."""
    around, _, last = container.rpartition("/")
    told = _CLASSES.get(re.sub(r"_\d+$", "", last), "")
    if last == "cell":
        layer = around.rpartition("/")[0] + "/layer" if around.endswith(("/forward_layer", "/backward_layer")) else around
        kind = configured[layer][1] if layer in configured else _class_of(layer, "", configured)
        own = _CLASSES.get(re.sub(r"_\d+$", "", name.rpartition("/")[2]), "")
        told = own or (f"{kind}Cell" if f"{kind}Cell" in _VARIABLES else "")
    return told


def _variable_names(class_name: str, own: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """The names of a layer's variables by the keys under which they are filed."""
    if sorted(keys) != sorted(str(i) for i in range(len(keys))):
        return {key: key for key in keys}
    names = _VARIABLES.get(class_name, ())
    if "gamma" in names and len(keys) < len(names) and own:
        names = tuple(
            n
            for n in names
            if not (n == "gamma" and own.get("scale") is False) and not (n == "beta" and own.get("center") is False)
        )
    # With fewer arrays than names only a leading kernel is sure: a normalization may lack its scale or its offset.
    sure = len(keys) == len(names) or (len(keys) == len(names) - 1 and names[-1:] == ("bias",))
    return {key: names[int(key)] if sure else key for key in keys}


def _layer_name(
    tree_groups: Mapping[str, Mapping[str, Any]], container: str, configured: Mapping[str, tuple[str, str, Any]]
) -> str:
    """The names of the layers on the way to `container`, joined by `/`."""
    parts = container.split("/")
    words = []
    for i in range(1, len(parts) + 1):
        where = "/".join(parts[:i])
        if parts[i - 1] in ("layers", "_layer_checkpoint_dependencies") and i < len(parts):
            continue
        said = tree_groups.get(f"{where}/vars", {}).get("name") or configured.get(where, ("",))[0]
        words.append(str(said) if said else parts[i - 1])
    return "/".join(words)


def read_weights_h5(
    path: str,
    trees: Sequence[tuple[str, H5Tree]],
    *,
    limits: Limits,
    config: Mapping[str, Any] | None = None,
    check: Callable[[str], None] = lambda _: None,
) -> Archive:
    """The `Archive` of Keras 3 weights.

    Args:
        path: The file.
        trees: The content of each HDF5 file, with its name.
        limits: What it may ask for.
        config: The model's configuration, where there is one.
        check: Called with the name of the HDF5 file before an array is read from it.

    Raises:
        WeightsFileError: when an array is damaged.
        UnsafeFileError: when an array is larger than the file or the limits allow.
    """
    configured = _configured(config)
    groups: dict[str, Mapping[str, Any]] = {}
    owner: dict[str, tuple[str, H5Tree]] = {}
    containers: dict[str, list[str]] = {}
    rank: dict[str, tuple[int, int]] = {}
    for number, (file, tree) in enumerate(trees):
        for where, attributes in tree.groups.items():
            if attributes or where not in groups:
                groups[where] = attributes
            if where == "vars" or where.endswith("/vars"):
                container = where[: -len("/vars")] if "/" in where else ""
                containers.setdefault(container, [])
                rank.setdefault(container, (number, tree.addresses.get(where, 0)))
        for where in tree.datasets:
            if where in owner:
                raise UnsafeFileError(
                    asked_of(path),
                    found=f"{where!r} stands in {owner[where][0]!r} and in {file!r}",
                    cause="shards of two runs in one directory",
                    fix="save the weights again into an empty directory",
                )
            owner[where] = (file, tree)
            inside = where.rpartition("/")[0]
            container = inside.removesuffix("vars").rstrip("/") if inside.endswith("vars") else inside
            containers.setdefault(container, []).append(where)
            rank.setdefault(container, (number, tree.addresses.get(where, 0)))

    order = {container: i for i, container in enumerate(configured)}
    arrays: dict[str, ArrayInfo] = {}
    slots: dict[str, ArrayInfo] = {}
    layers = []
    left_out = 0
    for container in sorted(containers, key=lambda c: (_first(c, order), rank[c])):
        wheres = sorted(containers[container], key=natural)
        top = container.split("/")[0]
        if top in _TRAINING:
            left_out += len(wheres)
            continue
        said_name, said_class, own = configured.get(container, ("", "", {}))
        layer = _layer_name(groups, container, configured) if container else said_name
        class_name = said_class or _class_of(container, layer, configured)
        variables = _variable_names(class_name, own, [where.rpartition("/")[2] for where in wheres])
        for where in wheres:
            dataset = owner[where][1].datasets[where]
            refuse(path, dataset)
            state = top in _STATE
            key = where.rpartition("/")[2]
            info = ArrayInfo(where, dataset.shape, dataset.dtype, "" if state else layer, key if state else variables[key])
            (slots if state else arrays)[where] = info
        if container and top not in _STATE:
            layers.append(LayerInfo(layer, class_name, tuple(wheres)))
    check_sizes(path, [*arrays.values(), *slots.values()], limits)

    def read(name: str) -> np.ndarray[Any, Any]:
        if name not in owner:
            raise WeightsFileError(
                asked_of(path), found=f"no array {name!r}{did_you_mean(name, owner)}", fix="see `arrays` for the names"
            )
        file, tree = owner[name]
        check(file)
        return tree.read(name)

    def stretch(name: str) -> Stretch | None:
        file, tree = owner[name]
        check(file)
        return tree.stretch(name)

    def close() -> None:
        for _, tree in trees:
            tree.close()

    return Archive(
        path=path,
        format="weights_h5",
        arrays=arrays,
        read=read,
        stretch=stretch,
        layers=tuple(layers),
        framework="keras",
        config=config,
        metadata={"training_arrays": str(left_out)} if left_out else {},
        class_names=said_class_names(groups.get("", {})),
        optimizer_arrays=slots,
        close=close,
    )


def _first(container: str, order: Mapping[str, int]) -> int:
    """The place of the container, or of the nearest one around it, in the configuration; past the end where it isn't there."""
    while container:
        if container in order:
            return order[container]
        container = container.rpartition("/")[0]
    return len(order)


# -- shards ---------------------------------------------------------------------------------------------------------------------


def _check_shards(
    path: str, index: Mapping[str, Any], mapped: Mapping[str, set[str]], trees: Sequence[tuple[str, H5Tree]]
) -> None:
    problems = []
    for file, tree in trees:
        present = {"/" + where.rpartition("/")[0] for where in tree.datasets}
        problems += [f"{file!r} lacks {where!r}" for where in sorted(mapped[file] - present)]
        problems += [f"{file!r} holds {where!r}, which the index puts elsewhere" for where in sorted(present - mapped[file])]
    said = index.get("metadata")
    total = said.get("total_size") if isinstance(said, Mapping) else None
    stored = sum(dataset.nbytes for _, tree in trees for dataset in tree.datasets.values())
    if not problems and isinstance(total, (int, float)) and int(total) != stored:
        problems.append(f"the index says the arrays have {int(total)} bytes together, the shards hold {stored}")
    if problems:
        raise WeightsFileError(
            asked_of(path),
            found=problems[:20],
            cause="a shard of another run in the same directory",
            fix="save the weights again into an empty directory",
        )


def read_sharded(source: Source, index: Mapping[str, Any], *, limits: Limits, trusted: bool) -> Archive:
    """The `Archive` of sharded Keras weights, from the content of their `.weights.json`.

    Raises:
        WeightsNotFoundError: when a shard isn't there.
        WeightsFileError: when index and shards don't agree.
        UnsafeFileError: when the index names a file that isn't beside it.
    """
    mapped = shard_names(source.path, index, limits)
    opened: list[Source] = []
    trees: list[tuple[str, H5Tree]] = []

    def close() -> None:
        for _, tree in trees:
            tree.close()
        for shard in opened:
            shard.close()

    try:
        for file in mapped:
            opened.append(Source(os.path.join(os.path.dirname(source.path), file)))
            trees.append((file, open_hdf5(opened[-1], limits=limits, trusted=trusted)))
        _check_shards(source.path, index, mapped, trees)
        archive = read_weights_h5(source.path, trees, limits=limits)
    except BaseException:
        close()
        raise
    return replace(archive, metadata={**archive.metadata, "shards": shorten(mapped)}, close=close)


# -- .keras ---------------------------------------------------------------------------------------------------------------------


def read_keras(source: Source, archive: Zip, *, limits: Limits, trusted: bool) -> Archive:
    """The `Archive` of a `.keras` file of Keras 3 or tf_keras.

    Raises:
        WeightsFileError: when a member is missing or damaged.
        UnsafeFileError: when the archive holds what it must not.
    """
    path = source.path
    config = json_object(path, "config.json", archive.content("config.json"), limits)
    about = json_object(
        path, "metadata.json", archive.content("metadata.json") if "metadata.json" in archive.members else None, limits
    )
    ours = None
    if "transferkit.json" in archive.members:  # beside what Keras writes
        ours = json_object(path, "transferkit.json", archive.content("transferkit.json"), limits)
    trees: list[tuple[str, H5Tree]] = []

    def opened(name: str) -> H5Tree:
        piece: Piece = archive.piece(name, most=limits.max_bytes)
        return open_hdf5(piece, limits=limits, trusted=trusted)

    if "model.weights.h5" in archive.members:
        trees.append(("model.weights.h5", opened("model.weights.h5")))
    elif "model.weights.json" in archive.members:
        index = json_object(path, "model.weights.json", archive.content("model.weights.json"), limits) or {}
        mapped = shard_names(path, index, limits)
        trees.extend((file, opened(file)) for file in mapped)
        _check_shards(path, index, mapped, trees)
    else:
        raise WeightsFileError(
            asked_of(path),
            found=f"no member 'model.weights.h5'; it has {shorten(archive.members)}",
            cause="weights in a format that can hold code, or none",
            fix="save the model again with model.save('model.keras')",
        )
    result = read_weights_h5(path, trees, limits=limits, config=config, check=archive.verify)
    compiled = (config or {}).get("compile_config")
    module = str((config or {}).get("module", ""))
    version = str((about or {}).get("keras_version", ""))
    return replace(
        result,
        format="keras",
        framework="tf_keras" if module.startswith("tf_keras") or version.startswith("2.") else "keras",
        version=version,
        training_config=compiled if isinstance(compiled, Mapping) else None,
        metadata={**result.metadata, **{k: str(v) for k, v in (about or {}).items() if k != "keras_version"}},
        class_names=result.class_names or said_class_names(ours or {}) or said_class_names(about or {}),
    )
