"""Heads: the last layer before each output, how one is made and how it is found in a model somebody else built."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transferkit._keras import keras
from transferkit.building.graph import trace_outer
from transferkit.class_names import class_names_of, name_classes
from transferkit.errors import DataError, ModelError, shorten

__all__ = ["Head", "check_class_names", "head_layers", "heads_of", "leaf_layers", "make_head"]


@dataclass(frozen=True)
class Head:
    """The end of a model at one output.

    Args:
        output: The output's name, or its position as text.
        layer: The last layer with weights on the way to the output.
        shape: The output's shape without the batch; an axis that isn't fixed is None.
        activation: The name of the activation the output went through (`linear`, `softmax`, `sigmoid`, or the user's own).
    """

    output: str
    layer: Any
    shape: tuple[int | None, ...]
    activation: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes by unit, where the builder that made the layer or the file it is from said them; else ()."""
        return () if self.layer is None else class_names_of(self.layer)


def make_head(units: int, activation: str, *, name: str, class_names: tuple[str, ...] = ()) -> Any:
    """A Dense layer for an output, in float32 whatever the precision policy.

    Under `mixed_float16` a softmax in half precision overflows (keras-team/keras#16552).
    """
    layer = keras.layers.Dense(units, activation=activation, name=name, dtype="float32")
    name_classes(layer, class_names)
    return layer


def check_class_names(head: Head, names: Sequence[str], *, asked: str) -> None:
    """Raises a DataError where data numbers the classes otherwise than the head does, so that a label would mean another class.

    Args:
        head: The head.
        names: The data's classes, in the order of its labels.
        asked: What was asked for.
    """
    ours = head.class_names
    if not ours or not names or ours == tuple(names):
        return
    found = [f"no class {name!r} in the data" for name in ours if name not in names]
    found += [f"no class {name!r} in the model" for name in names if name not in ours]
    raise DataError(
        asked,
        found=found or f"the same classes in another order: {shorten(ours)} in the model, {shorten(names)} in the data",
        cause=f"label 0 would stand for {names[0]!r} in the data and for {ours[0]!r} in the model",
        fix=f"give the head the data's order, .classifier({[str(name) for name in names]!r}), or the data the model's",
    )


def leaf_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Every layer of a model with its path, nested models opened, in the order in which the model lists them; each once.

    A layer that holds other layers but is no model (a wrapper, a block of the user's) counts as one leaf.
    """
    seen: set[int] = set()

    def walk(parent: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for layer in parent.layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path = f"{prefix}{layer.name}"
            if isinstance(layer, keras.Model):
                yield from walk(layer, f"{path}/")
            else:
                yield path, layer

    yield from walk(model, "")


def _last_with_weights(layers: list[Any]) -> Any:
    for layer in reversed(layers):
        if isinstance(layer, keras.Model):
            inner = _last_with_weights(list(layer.layers))
            if inner is not None:
                return inner
        elif getattr(layer, "weights", None):  # an operation has none
            return layer
    return None


def _activation_of(layer: Any) -> str:
    """The name of the activation a layer ends with; `linear` for one that has none."""
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    if isinstance(layer, keras.layers.Activation) or hasattr(layer, "activation"):
        function = layer.activation
        if function is None:
            return "linear"
        return str(getattr(function, "__name__", type(function).__name__))
    return "linear" if isinstance(layer, keras.layers.Layer) else type(layer).__name__.lower()  # keras.ops.softmax, say


def _passes_through(layer: Any) -> bool:
    """Whether a layer without weights leaves the meaning of its input's values alone (a reshape, a dropout)."""
    if not isinstance(layer, keras.layers.Layer):
        return type(layer).__name__ in ("Cast", "ExpandDims", "Reshape", "Squeeze")
    return isinstance(
        layer, (keras.layers.Dropout, keras.layers.Flatten, keras.layers.Reshape, keras.layers.Identity, keras.layers.InputLayer)
    )


#: What was read before: a functional model's graph stays as it is.
_chains_of: weakref.WeakKeyDictionary[Any, list[list[Any]]] = weakref.WeakKeyDictionary()


def _chains(model: Any) -> list[list[Any]]:
    """For each output of a functional model, the layers on the way to it; at a merge the first branch is followed."""
    if model not in _chains_of:
        graph = trace_outer(model)
        givers = {number: call for call in graph.calls for number in call.outputs}
        chains = []
        for number in graph.outputs:
            chain: list[Any] = []
            ahead = [number]
            while ahead and ahead[0] in givers:
                chain.append(givers[ahead[0]].operation)
                ahead = list(givers[ahead[0]].inputs)
            chains.append(chain[::-1] or [model.layers[0]])
        _chains_of[model] = chains
    return _chains_of[model]


def heads_of(model: Any) -> list[Head]:
    """The heads of a built model, one for each output, in the order of its outputs.

    Raises:
        ModelError: when the model isn't built, so that it has no outputs to speak of yet.
    """
    if not isinstance(model, keras.Model):
        raise ModelError(
            "Looking for the head of a model.",
            found=f"a {type(model).__name__}",
            fix="give a Keras model; a ModelBuilder makes one by .build()",
        )
    if not model.built:
        raise ModelError(
            f"Looking for the head of the model {model.name!r}.",
            found="a model that isn't built: its layers have no weights yet",
            fix="call it once on a batch, model(x[:1]), or give its first layer an input shape",
        )
    if isinstance(model, keras.Sequential):
        return [_head("output", list(model.layers), model.layers[-1])]
    try:
        chains, names = _chains(model), list(model.output_names)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # A subclassed model: no graph to read, so the order of the layers decides.
        layers = [layer for _, layer in leaf_layers(model)]
        return [_head("output", layers, layers[-1])] if layers else []
    return [_head(name, layers, layers[-1]) for name, layers in zip(names, chains, strict=True)]


def _head(output: str, layers: list[Any], last: Any) -> Head:
    while isinstance(last, keras.Model) and last.layers:
        last = last.layers[-1]
    layer = _last_with_weights(layers)
    ending = last
    index = len(layers) - 1
    while _passes_through(ending) and index > 0:
        index -= 1
        ending = layers[index]
    return Head(output=output, layer=layer, shape=_shape(last), activation=_activation_of(ending))


def _shape(layer: Any) -> tuple[int | None, ...]:
    try:
        return tuple(keras.tree.flatten(layer.output)[0].shape[1:])
    except (AttributeError, ValueError):  # a subclassed model's layers keep no symbolic output
        return (getattr(layer, "units", None),)


def head_layers(model: Any) -> list[Any]:
    """The layers that make up the heads of a model: the last with weights before each output, without repeats."""
    found: list[Any] = []
    for head in heads_of(model):
        if head.layer is not None and not any(head.layer is layer for layer in found):
            found.append(head.layer)
    return found
