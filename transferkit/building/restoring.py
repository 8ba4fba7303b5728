"""The weights of a whole-model file put into the model that was rebuilt from its configuration.

File and model come from one configuration, so nothing is guessed: a layer's arrays are those the file lists under its name
(legacy
HDF5) or at its path (Keras 3's and tf_keras's archives), in the order in which they were written, put into Keras 3's layout by
`weights.old_layouts`. Every weight must get an array of its shape, and every array must go somewhere.
May import Keras.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit.building.rebuilding import Built, Rebuilt
from transferkit.building.upgrading_layers import Change
from transferkit.errors import WeightsError, shorten
from transferkit.weights.names import is_automatic, kind_of
from transferkit.weights.old_layouts import convert_layer
from transferkit.weights.readers import Archive, ArrayInfo
from transferkit.weights.readers.archive import LayerInfo

__all__ = ["restore"]

_TOP_LEVEL = "top_level_model_weights"
_NUMBERS = "fiubV"  # V: bfloat16 and float8 of ml_dtypes


class _Restorer:
    """Goes through the file layer by layer and keeps account of what was used and set."""

    def __init__(self, archive: Archive, generation: int, backend: str) -> None:
        self.archive = archive
        self.generation = generation
        self.backend = backend
        self.used: set[str] = set()
        self.done: set[int] = set()
        self.problems: list[str] = []
        self.changes: list[Change] = []

    def set(self, variables: Sequence[Any], arrays: Sequence[np.ndarray[Any, Any]], layer: str) -> None:
        """Assigns arrays to variables, one to one; a difference in number or shape is a problem, and nothing is assigned."""
        if len(variables) != len(arrays):
            self.problems.append(f"layer {layer!r} has {len(variables)} weights, the file has {len(arrays)} arrays for it")
            self.done.update(id(v) for v in variables)
            return
        for variable, array in zip(variables, arrays, strict=True):
            self.done.add(id(variable))
            if tuple(variable.shape) != array.shape and not (array.ndim == 0 and math.prod(variable.shape) == 1):
                self.problems.append(
                    f"layer {layer!r}: {variable.name!r} has the shape {tuple(variable.shape)}, the file's array {array.shape}"
                )
                continue
            if array.dtype.kind not in _NUMBERS:
                self.problems.append(f"layer {layer!r}: the file's array for {variable.name!r} is of the kind {array.dtype}")
                continue
            dtype = keras.backend.standardize_dtype(variable.dtype)
            with np.errstate(over="ignore"):
                value = array.astype(dtype, copy=False).reshape(tuple(variable.shape))
            if array.dtype != value.dtype and np.isfinite(array).all() and not np.isfinite(value).all():
                self.problems.append(f"layer {layer!r}: {variable.name!r} has values that {dtype} can't hold")
                continue
            variable.assign(value)

    def read(self, names: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        self.used.update(names)
        return [self.archive.read(name) for name in names]

    def convert(self, built: Built, names: Sequence[str]) -> None:
        """Reads a layer's arrays, converts them and sets its weights."""
        plain = built.plain
        variables = weights_of(built.layer)
        if not variables:
            left = [name for name in names if self.archive.arrays[name].dtype.kind in "iu"]
            self.used.update(left)  # the state of a random generator
            if len(left) < len(names):
                self.problems.append(f"layer {plain['name']!r} has no weights, the file has {len(names)} arrays for it")
            elif left:
                self.changes.append(Change(plain["name"], "the state of its random generator left out"))
            return
        converted = convert_layer(
            plain["class_name"], plain["config"], self.read(names), generation=self.generation, backend=self.backend
        )
        arrays = converted.arrays
        self.changes += [Change(plain["name"], what) for what in converted.changes]
        if len(arrays) > len(variables) and plain["class_name"] in ("BatchNormalization", "Normalization"):
            arrays = arrays[: len(variables)]  # what only training used: renorm's statistics, a count of examples
        self.set(variables, arrays, plain["name"])
        if hasattr(built.layer, "finalize_state") and plain["class_name"] == "Normalization":
            built.layer.finalize_state()


def weights_of(layer: Any) -> list[Any]:
    """A layer's weights without the states of recurrent layers, which old files didn't keep."""
    states = {id(state) for one in _with_inner(layer) for state in keras.tree.flatten(getattr(one, "states", None) or [])}
    return [weight for weight in getattr(layer, "weights", []) if id(weight) not in states]


def _children(layer: Any) -> Iterator[tuple[str, Any]]:
    """The layers a layer holds in its attributes, with the attribute's name as Keras files it."""
    for name, value in vars(layer).items():
        if isinstance(value, keras.layers.Layer):
            yield name.lstrip("_"), value
        elif isinstance(value, (list, tuple)) and not name.startswith("_"):
            used: dict[str, int] = {}
            for item in value:
                if isinstance(item, keras.layers.Layer):
                    yield f"{name}/{_counted(_snake(type(item).__name__), used)}", item


def _with_inner(layer: Any) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [layer]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen and isinstance(one, keras.layers.Layer):
            seen.add(id(one))
            yield one
            waiting.extend(child for _, child in _children(one))


def _leaves(built: Built) -> Iterator[Built]:
    """The layers that hold weights of their own, models opened, in the order of the file."""
    for one in built.inner:
        if one.inner:
            yield from _leaves(one)
        elif isinstance(one.layer, keras.layers.Layer):
            yield one


def restore(rebuilt: Rebuilt, archive: Archive, *, generation: int, backend: str) -> tuple[Change, ...]:
    """Sets every weight of the model to the file's.

    Args:
        rebuilt: The model with what it was built from.
        archive: The file.
        generation: 1, 2 or 3, of the Keras that wrote it.
        backend: What the model was trained on.

    Returns:
        What was left out.

    Raises:
        WeightsError: when a weight has no array of its shape, or an array no weight.
    """
    unbuilt = [one.plain["name"] for one in _leaves(rebuilt.top) if not one.layer.built]
    if unbuilt or not rebuilt.model.built:
        raise WeightsError(
            f"Opening {archive.path!r}.",
            found=f"no weights yet in {shorten(unbuilt or [rebuilt.model.name])}: the file doesn't say the model's input shape",
            cause="a Sequential without an input shape was saved before it was used",
            fix="pass input_shape=(…), the batch left out",
        )
    restorer = _Restorer(archive, generation, backend)
    if archive.format == "legacy_h5":
        _from_legacy(restorer, rebuilt.top)
    else:
        _from_paths(restorer, rebuilt.top)
    missing = [w.path for w in weights_of(rebuilt.model) if id(w) not in restorer.done]
    if missing:
        restorer.problems.append(f"{len(missing)} weights have no array in the file: {shorten(missing)}")
    unused = [name for name in archive.arrays if name not in restorer.used]
    if unused:
        restorer.problems.append(f"{len(unused)} arrays of the file belong to no layer: {shorten(unused)}")
    if restorer.problems:
        shown = restorer.problems[:20]
        if not archive.arrays:
            raise WeightsError(
                f"Opening {archive.path!r}.",
                found=[f"no weights at all in the file, for a model that has {len(weights_of(rebuilt.model))}"],
                cause="the model was saved before it had any: it wasn't called on data, nor told its input's shape",
                fix="call the model on data once, and save it again",
            )
        raise WeightsError(
            f"Opening {archive.path!r}.",
            found=[*shown, f"and {len(restorer.problems) - 20} more"] if len(restorer.problems) > 20 else shown,
            cause="the file's configuration and its weights aren't of one model, or its layout isn't known here",
            fix="build the model with its own code, then WeightLoader(path).match(model) shows what fits",
        )
    return tuple(restorer.changes)


# --- Legacy HDF5: by the names of layers ----------------------------------------------------------------------------


def _from_legacy(restorer: _Restorer, top: Built) -> None:
    archive = restorer.archive
    by_name: dict[str, list[Built]] = {}
    for one in top.inner:
        by_name.setdefault(one.plain["name"], []).append(one)
    inner: dict[str, list[Built]] = {}
    for one in _leaves(top):
        inner.setdefault(one.plain["name"], []).append(one)
    listed = [layer for layer in archive.layers if layer.arrays]
    counted = _counted_otherwise([layer for layer in listed if layer.name != _TOP_LEVEL], top)
    for layer in listed:
        # Keras 1 listed the layers of a Sequential within a Sequential one by one.
        found = counted.get(layer.name) or by_name.get(layer.name) or inner.get(layer.name) or []
        if not found:
            if layer.name == _TOP_LEVEL:
                _own_weights(restorer, top, layer.arrays)
            else:
                restorer.problems.append(f"the file has arrays for a layer {layer.name!r}, which its configuration hasn't")
            continue
        one = found.pop(0) if len(found) > 1 else found[0]
        if one.inner:
            _nested(restorer, one, layer.arrays)
        else:
            restorer.convert(one, layer.arrays)


def _counted_otherwise(listed: Sequence[LayerInfo], top: Built) -> dict[str, list[Built]]:
    """The layers by the file's names, where weights and configuration come from models whose layers Keras counted otherwise.

    A JSON and a weights file often come from two runs: `conv2d_5` in the one is `conv2d_1` in the other. Both list the same
    layers in the same order, and only numbers behind names that Keras made up may differ.
    """
    holding = [one for one in top.inner if weights_of(one.layer)]
    if len(listed) != len(holding) or {layer.name for layer in listed} == {one.plain["name"] for one in holding}:
        return {}
    found = {}
    for layer, one in zip(listed, holding, strict=True):
        name, said = layer.name, one.plain["name"]
        alike = is_automatic(name) and is_automatic(said, one.plain["said"]) and kind_of(name) == kind_of(said)
        if name != said and not alike:
            return {}
        found[name] = [one]
    return found


def _own_weights(restorer: _Restorer, top: Built, names: Sequence[str]) -> None:
    inner = {id(weight) for one in _leaves(top) for weight in one.layer.weights}
    restorer.set([w for w in weights_of(top.layer) if id(w) not in inner], restorer.read(names), top.plain["name"])


def _nested(restorer: _Restorer, model: Built, names: Sequence[str]) -> None:
    """A model inside a model: its layers' arrays in one list, those that were trainable when it was saved first."""
    leaves = [leaf for leaf in _leaves(model) if weights_of(leaf.layer)]
    infos = [restorer.archive.arrays[name] for name in names]
    groups = _by_name(leaves, infos) or _by_order(restorer, leaves, infos)
    if groups is None:
        count = sum(len(weights_of(leaf.layer)) for leaf in leaves)
        restorer.problems.append(
            f"the model {model.plain['name']!r} has {count} weights, the file has {len(names)} arrays for it"
        )
        restorer.used.update(names)
        restorer.done.update(id(w) for leaf in leaves for w in weights_of(leaf.layer))
        return
    for leaf, listed in zip(leaves, groups, strict=True):
        restorer.convert(leaf, listed)


def _by_name(leaves: Sequence[Built], infos: Sequence[ArrayInfo]) -> list[list[str]] | None:
    """The arrays of each leaf by the layer's name in the array's; None unless every array names one, and every leaf has some."""
    places: dict[str, list[int]] = {}
    for i, leaf in enumerate(leaves):
        places.setdefault(leaf.plain["name"], []).append(i)
    if any(len(found) > 1 for found in places.values()):
        return None
    groups: list[list[str]] = [[] for _ in leaves]
    for info in infos:
        parts = info.variable.split("/")
        found = {places[part][0] for part in parts[:-1] if part in places}
        if not found and len(parts) == 1:  # Keras 1: `dense_1_W`
            near = [name for name in places if parts[0].startswith(f"{name}_")]
            found = {places[max(near, key=len)][0]} if near else set()
        if len(found) != 1:
            return None
        groups[found.pop()].append(info.name)
    complete = all(groups) and all(len(g) == _count_in_file(leaf, len(g)) for g, leaf in zip(groups, leaves, strict=True))
    return groups if complete else None


def _count_in_file(leaf: Built, given: int) -> int:
    """How many arrays a file has for a leaf, which gates of Keras 1 make more than the layer has weights."""
    count = len(weights_of(leaf.layer))
    return (
        given
        if given in (count, 3 * count, 4 * count) or leaf.plain["class_name"] in ("Normalization", "BatchNormalization")
        else count
    )


def _trainable_count(leaf: Built) -> int:
    """How many of a leaf's arrays were trainable when the file was written."""
    if leaf.plain["config"].get("trainable") is False:
        return 0
    inner = [item for item in (leaf.plain["config"].get("layer"),) if isinstance(item, Mapping)]
    if any(item["config"].get("trainable") is False for item in inner):
        return 0
    held = {id(weight) for weight in leaf.layer.trainable_weights}
    return sum(id(weight) in held for weight in weights_of(leaf.layer))


def _by_order(restorer: _Restorer, leaves: Sequence[Built], infos: Sequence[ArrayInfo]) -> list[list[str]] | None:
    """The arrays of each leaf by their order: all trainable ones first, as the file's configuration says what was trainable."""
    joined = restorer.generation == 1 and any(leaf.plain["class_name"] in ("LSTM", "GRU", "ConvLSTM2D") for leaf in leaves)
    counts = [len(weights_of(leaf.layer)) * (_gates(leaf) if joined else 1) for leaf in leaves]
    if sum(counts) != len(infos):
        return None
    trained = [_trainable_count(leaf) * (_gates(leaf) if joined else 1) for leaf in leaves]
    names = [info.name for info in infos]
    groups: list[list[str]] = []
    first, second = 0, sum(trained)
    for count, train in zip(counts, trained, strict=True):
        groups.append([*names[first : first + train], *names[second : second + count - train]])
        first, second = first + train, second + count - train
    return groups


def _gates(leaf: Built) -> int:
    return {"LSTM": 4, "ConvLSTM2D": 4, "GRU": 3}.get(leaf.plain["class_name"], 1)


# --- Archives of Keras 3 and tf_keras: by path ----------------------------------------------------------------------


def _snake(name: str) -> str:
    """The name under which Keras files an object of a class: `Conv2DTranspose` as `conv2d_transpose`."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _counted(kind: str, used: dict[str, int]) -> str:
    used[kind] = used.get(kind, -1) + 1
    return f"{kind}_{used[kind]}" if used[kind] else kind


def _from_paths(restorer: _Restorer, top: Built) -> None:
    tree: dict[str, list[str]] = {}
    for name in restorer.archive.arrays:
        container = name.rpartition("/")[0]
        tree.setdefault(container.removesuffix("vars").rstrip("/"), []).append(name)
    for names in tree.values():
        names.sort(key=lambda name: [int(part) if part.isdigit() else -1 for part in re.split(r"(\d+)", name)])
    _model_at(restorer, tree, top, "")


def _model_at(restorer: _Restorer, tree: Mapping[str, list[str]], model: Built, path: str) -> None:
    prefix = f"{path}/" if path else ""
    used: dict[str, int] = {}
    if path in tree:
        _own_weights(restorer, model, tree[path])
    for one in model.inner:
        if not isinstance(one.layer, keras.layers.Layer):
            continue
        where = f"{prefix}layers/{_counted(_snake(one.plain['said'].rpartition('>')[2]), used)}"
        if one.inner:
            wrapped = one.inner[0] if one.plain["class_name"] == "TimeDistributed" else None
            _model_at(restorer, tree, wrapped or one, f"{where}/layer" if wrapped else where)
            continue
        names = _layer_at(tree, one.layer, where, set())
        if names or weights_of(one.layer):
            restorer.convert(one, names)


def _layer_at(tree: Mapping[str, list[str]], layer: Any, path: str, seen: set[int]) -> list[str]:
    """The arrays of a layer in the order of its weights: its own, then those of the layers it holds."""
    if id(layer) in seen:
        return []
    seen.add(id(layer))
    children = [child for child in _children(layer) if id(child[1]) not in seen]
    inner = {id(weight) for _, child in children for weight in child.weights}
    own = [weight for weight in layer.weights if id(weight) not in inner]
    places: dict[int, str] = {}
    listed = tree.get(path, [])
    if not children:
        return list(listed)
    for weight, name in zip(own, listed, strict=False):
        places[id(weight)] = name
    extra = listed[len(own) :]
    for attribute, child in children:
        for candidate in (f"{path}/{attribute}", f"{path}/_{attribute}"):
            names = _layer_at(tree, child, candidate, set(seen))
            if names:
                places.update({id(weight): name for weight, name in zip(weights_of(child), names, strict=False)})
                break
    return [places[id(weight)] for weight in weights_of(layer) if id(weight) in places] + extra
