"""The variables of a Keras model with the layer that owns each, in the model's order; by public means only.

Models are opened by `.layers`. A layer that holds others without being a model (a wrapper, attention, a block of the user's) has
no public list of them, so its attributes are looked through, lists and dicts included. Names come from `variable.path`, which
Keras's own files use too.
May import Keras.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit.errors import ModelError, shorten
from transferkit.weights.matching import ModelVariable
from transferkit.weights.names import covers

__all__ = ["Slot", "check_built", "slots_of"]


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
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which its values are kept."""
        return np.dtype(keras.backend.standardize_dtype(self.variable.dtype))


def _leaves(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer with its path, nested models opened; a shared one at each place."""
    for layer in model.layers:
        path = f"{prefix}{layer.name}"
        if isinstance(layer, keras.Model):
            yield from _leaves(layer, f"{path}/")
            # What a subclassed model keeps besides its layers is a leaf of its own.
            yield path, layer
        else:
            yield path, layer


def _held(layer: Any) -> Iterator[Any]:
    """The layers a layer holds in its attributes."""

    def inside(value: Any, depth: int) -> Iterator[Any]:
        if isinstance(value, keras.Layer):
            yield value
        elif depth and isinstance(value, (list, tuple)):
            for item in value:
                yield from inside(item, depth - 1)
        elif depth and isinstance(value, Mapping):
            for item in value.values():
                yield from inside(item, depth - 1)

    for value in list(vars(layer).values()):
        yield from inside(value, 3)


def _owners(layer: Any, found: dict[int, Any], seen: set[int]) -> None:
    """Fills `found` with the innermost layer that owns each variable of `layer`."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    own = {id(v) for v in layer.weights}
    for held in _held(layer):
        if {id(v) for v in held.weights} <= own:  # otherwise it is held by reference only
            _owners(held, found, seen)
    for variable in layer.weights:
        found.setdefault(id(variable), layer)


def _tail(variable: Any, layer: Any, owner: Any) -> str:
    """The variable's name within the layer at which the model lists it."""
    parts = str(variable.path).split("/")
    places = [i for i, part in enumerate(parts[:-1]) if part == layer.name]
    if places:
        return "/".join(parts[places[-1] + 1 :])
    return parts[-1] if owner is layer else f"{owner.name}/{parts[-1]}"


def slots_of(model: Any) -> list[Slot]:
    """The variables of a model that a weights file can hold, each once, in the model's order.

    Random seeds and metrics are no weights and aren't among them.

    Raises:
        ModelError: when the model, or one of its layers, isn't built.
    """
    owners: dict[int, Any] = {}
    _owners(model, owners, set())
    found: dict[int, Slot] = {}
    names: dict[str, int] = {}
    for path, layer in [*_leaves(model), ("", model)]:
        for variable in layer.weights:
            owner = owners[id(variable)]
            tail = _tail(variable, layer, owner)
            name = f"{path}/{tail}" if path else tail
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
        children = list(layer.layers) if isinstance(layer, keras.Model) else list(_held(layer))
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
