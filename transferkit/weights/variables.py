"""The variables of a Keras model with the layer that owns each, in the model's order; by public means only.

Models are opened by `.layers`. A layer that holds others without being a model (a wrapper, attention, a block of the user's) has
no public list of them, so its attributes are looked through, lists and dicts included.
May import Keras.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit.errors import ModelError, shorten
from transferkit.weights.digest import digest_of
from transferkit.weights.mapping import ModelVariable
from transferkit.weights.names import covers

__all__ = ["Slot", "check_built", "digests_of", "flattened_shapes", "leaf_layers_of", "slots_of", "values_of"]


@dataclass(frozen=True)
class Slot:
    """A variable of a model, where it stands, and the layer whose state it is.

    Args:
        info: What matching sees of it.
        layer: The path of the layer as the model lists it; blocks and wrappers aren't opened.
        variable: The Keras variable.
        owner: The Keras layer that made it.
    """

    info: ModelVariable
    layer: str
    variable: Any
    owner: Any

    @property
    def name(self) -> str:
        """The variable's path in the model."""
        return self.info.name

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.info.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return self.size * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which its values are kept."""
        return _dtype_of(self.variable.dtype)


@functools.lru_cache(64)
def _dtype_of(dtype: Any) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(keras.backend.standardize_dtype(dtype))
    return found


def leaf_layers_of(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer with its path, nested models opened; a shared one at each place, a nested model after its layers."""
    for layer in model.layers:
        path = f"{prefix}{layer.name}"
        if isinstance(layer, keras.Model):
            yield from leaf_layers_of(layer, f"{path}/")
            # What a subclassed model keeps besides its layers is a leaf of its own.
            yield path, layer
        else:
            yield path, layer


def _held(layer: Any) -> list[Any]:
    """The layers a layer holds in its attributes."""
    found: list[Any] = []

    def look(values: Iterable[Any], depth: int) -> None:
        for value in values:
            nature = _nature(type(value))
            if nature is keras.Layer:
                found.append(value)
            elif nature is not None and depth and value:
                look(value.values() if nature is dict else value, depth - 1)

    look(list(vars(layer).values()), 3)
    return found


def _nature_of(kind: type) -> type | None:
    """Of which of the kinds that are looked into a class is."""
    return next((base for base in (keras.Layer, list, tuple, dict) if issubclass(kind, base)), None)


# Remembered, because a layer has dozens of attributes.
_nature: Callable[[type], type | None] = functools.lru_cache(1024)(_nature_of)


def _all_its_own(layer: Any, weights: Sequence[Any]) -> bool:
    """Whether every variable's path says the layer made it itself, so that no layer inside it need be looked for."""
    path = getattr(layer, "path", None)
    return path is not None and all(variable.path == f"{path}/{variable.name}" for variable in weights)


@dataclass(frozen=True)
class _Owned:
    """Where a variable lives inside a layer: the innermost layer that made it, and the names on the way there."""

    owner: Any
    inside: str


def _owned(layer: Any, weights: Sequence[Any], inside: str, found: dict[int, _Owned], seen: set[int]) -> None:
    """Fills `found` with the innermost owner of each variable of `layer`.

    The names on the way come from the layers: `variable.path` is another one after a model was rebuilt from its configuration.
    """
    if id(layer) in seen:
        return
    seen.add(id(layer))
    own = {id(variable) for variable in weights}
    used: dict[str, int] = {}
    inner = [] if _all_its_own(layer, weights) else _held(layer)
    for held in {id(held): held for held in inner}.values():
        its = held.weights
        if not its or not {id(variable) for variable in its} <= own or id(held) in seen:  # held by reference, or empty
            continue
        count = used.get(held.name, 0)
        used[held.name] = count + 1
        name = held.name if not count else f"{held.name}_{count}"
        _owned(held, its, f"{inside}{name}/", found, seen)
    mine = _Owned(layer, inside)
    for variable in weights:
        found.setdefault(id(variable), mine)


def slots_of(model: Any) -> list[Slot]:
    """The variables of a model that a weights file can hold, each once, in the model's order.

    Random seeds and metrics are no weights and aren't among them.

    Raises:
        ModelError: when the model, or one of its layers, isn't built.
    """
    found: dict[int, Slot] = {}
    names: dict[str, int] = {}
    for path, layer in [*leaf_layers_of(model), ("", model)]:
        weights = layer.weights  # Keras puts the list together at every call
        if not weights or (not path and all(id(variable) in found for variable in weights)):
            continue
        owned: dict[int, _Owned] = {}
        _owned(layer, weights, "", owned, set())
        for variable in weights:
            owner, inside = owned[id(variable)].owner, owned[id(variable)].inside
            name = f"{path}/{inside}{variable.name}" if path else f"{inside}{variable.name}"
            if id(variable) in found:
                slot = found[id(variable)]
                if path and layer.name == slot.layer.rpartition("/")[2] and path != slot.layer:
                    info = dataclasses.replace(slot.info, also=(*slot.info.also, name))
                    found[id(variable)] = dataclasses.replace(slot, info=info)
                continue
            count = names.get(name, 0)
            names[name] = count + 1
            if count:
                name = f"{name}_{count}"
            inner, _, word = name.rpartition("/")
            info = ModelVariable(name, tuple(int(n) for n in variable.shape), inner, word, type(owner).__name__)
            found[id(variable)] = Slot(info, path, variable, owner)
    return list(found.values())


def values_of(variable: Any) -> np.ndarray[Any, Any]:
    """The values a Keras variable holds."""
    values: np.ndarray[Any, Any] = keras.ops.convert_to_numpy(variable)
    return values


def digests_of(model: Any) -> dict[str, str]:
    """The digest of each variable's values, by its path in the model."""
    return {slot.name: digest_of(values_of(slot.variable)) for slot in slots_of(model)}


def check_built(model: Any, *, asked: str, except_for: tuple[str, ...] = ()) -> None:
    """Refuses what isn't a Keras model, has layers whose variables don't exist yet, or has no variables at all.

    Args:
        model: The model.
        asked: The first line of the message.
        except_for: Patterns of layers that may stay unbuilt.
    """
    if not isinstance(model, keras.Model):
        kind = type(model).__name__
        raise ModelError(
            asked,
            found=f"a {kind}, not a Keras model" + (" but the builder of one" if hasattr(model, "build") else ""),
            fix="build it first: model = builder.build()" if hasattr(model, "build") else "give a keras.Model",
        )
    unbuilt = [] if model.built else [model.name]
    seen: set[int] = set()

    def look(layer: Any, path: str) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if isinstance(layer, keras.Model):
            children = list(layer.layers)
        else:
            weights = layer.weights
            children = [] if weights and layer.built and _all_its_own(layer, weights) else _held(layer)
        for child in children:
            where = f"{path}/{child.name}" if path else child.name
            if not child.built and not any(covers(pattern, where) or covers(pattern, f"{where}/*") for pattern in except_for):
                unbuilt.append(where)
            look(child, where)

    look(model, "")
    if unbuilt:
        raise ModelError(
            asked,
            found=f"the model {model.name!r} isn't built: {shorten(dict.fromkeys(unbuilt))} have no variables yet",
            cause="Keras makes a layer's variables when it first sees an input",
            fix="call it once on data before loading: model(x[:1]); "
            'for a layer that is never called, leave it out: .skip("its name")',
        )
    if not model.weights:
        raise ModelError(
            asked,
            found=f"the model {model.name!r} has no variables, so any file would seem to fit",
            fix="give the model whose layers are to take the weights",
        )


def flattened_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """For each Dense layer behind a Flatten, by path, the shape `(height, width, channels)` in whose order its rows are.

    Layers that leave the order of features alone may stand between the two. A model that keeps channels first and flattens them
    so isn't among them. Found in functional and Sequential models only: a subclassed model has no graph to look at.
    """
    layers = list(leaf_layers_of(model))
    producer = {}
    for _, layer in layers:
        try:
            producer[id(layer.output)] = layer
        except (AttributeError, ValueError):  # never called symbolically, or called more than once
            continue
    between = (keras.layers.Dropout, keras.layers.Activation, keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.Identity)
    found = {}
    for path, layer in layers:
        if not isinstance(layer, keras.layers.Dense):
            continue
        try:
            before = producer.get(id(layer.input))
            while isinstance(before, between):
                before = producer.get(id(before.input))
            if isinstance(before, (keras.layers.Flatten, keras.layers.Reshape)) and before.input is not None:
                shape = tuple(before.input.shape[1:])
                if len(shape) < 2 or None in shape or len(before.output.shape) != 2:
                    continue
                if _channels_first(before, producer):
                    if getattr(before, "data_format", None) != "channels_first":
                        continue
                    shape = (*shape[1:], shape[0])  # Keras brings the channels to the end before it flattens
                found[path] = tuple(int(n) for n in shape)
        except (AttributeError, ValueError):
            continue
    return found


def _channels_first(flatten: Any, producer: Mapping[int, Any]) -> bool:
    """Whether what a Flatten gets has its channels first, as the nearest layer before it that knows says."""
    layer = flatten
    for _ in range(1000):
        inputs = layer.input
        layer = producer.get(id(inputs[0] if isinstance(inputs, (list, tuple)) else inputs))
        if layer is None:
            return False
        if getattr(layer, "data_format", None) in ("channels_first", "channels_last"):
            return bool(layer.data_format == "channels_first")
    return False
