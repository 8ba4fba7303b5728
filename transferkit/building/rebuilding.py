"""An upgraded and vetted configuration made into a plain Keras model.

Every class comes from the tables below by a name on the allow-list, or from what the user gave; Keras's own deserialization is
never
called, since it looks names up and imports modules. Initializers, regularizers, constraints, activations and inner layers are
made
first and handed over as objects, so a layer's constructor finds no string to look up either. A layer's size is checked before
it is
built. May import Keras.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit.building import allowed, retired_layers
from transferkit.building.operations import operation
from transferkit.building.upgrading_layers import OLD_HARD_SIGMOID, Change
from transferkit.building.vetting import names_of, operation_name
from transferkit.errors import ModelError, TransferKitError, UnsafeFileError, did_you_mean

__all__ = ["Built", "Rebuilt", "rebuild"]

Config = Mapping[str, Any]
_BASE = frozenset(("name", "trainable", "dtype", "activity_regularizer", "autocast"))
#: An unrolled loop is a graph as long as the sequence; the results are the same without.
_MAX_UNROLL = 500
_NAMED_LIKE_OPERATIONS = (
    *("Add", "Average", "Concatenate", "Dot", "Identity", "Maximum", "Minimum", "Multiply", "Reshape", "Softmax", "Subtract"),
)

_LAYERS: dict[str, Any] = {name: getattr(keras.layers, name) for name in allowed.LAYERS if hasattr(keras.layers, name)}
_LAYERS |= {name: getattr(retired_layers, name) for name in allowed.RETIRED}
_ACTIVATIONS: dict[str, Any] = {
    name: getattr(keras.activations, name) for name in allowed.ACTIVATIONS if hasattr(keras.activations, name)
}
_ACTIVATIONS[OLD_HARD_SIGMOID] = retired_layers.hard_sigmoid_of_keras_2
_OBJECTS: dict[str, dict[str, Any]] = {
    kind: {name: getattr(getattr(keras, kind), name) for name in names if hasattr(getattr(keras, kind), name)}
    for kind, names in (
        ("initializers", allowed.INITIALIZERS),
        ("regularizers", allowed.REGULARIZERS),
        ("constraints", allowed.CONSTRAINTS),
    )
}


@dataclass(frozen=True)
class Built:
    """A layer that was built, beside the words it was built from.

    Args:
        plain: The layer in the plain form of `upgrading`.
        layer: The Keras layer or model; None for an operation between layers.
        inner: Of a model, its layers in the order of the file.
    """

    plain: Config
    layer: Any
    inner: tuple[Built, ...] = ()


@dataclass(frozen=True)
class Rebuilt:
    """A model, and what it was built from.

    Args:
        model: The Keras model, with fresh weights.
        top: Its layers beside their words.
        changes: What had to be left out to build it.
    """

    model: Any
    top: Built
    changes: tuple[Change, ...]


@dataclass
class _Workshop:
    """What all the functions below share while one model is built."""

    custom: Mapping[str, Any]
    budget: int | None
    generation: int
    changes: list[Change] = field(default_factory=list)
    spent: int = 0

    def spend(self, name: str, count: int) -> None:
        self.spent += count
        if self.budget is not None and self.spent > self.budget:
            raise UnsafeFileError(
                "Rebuilding the model of a file.",
                found=f"at layer {name!r} the model has {self.spent:,} numbers; the file has weights for {self.budget:,} at most",
                cause="the file asks for more memory than its weights need, or the weights of another model are in it",
                fix="get the file from a source you trust",
            )


def rebuild(
    architecture: Config, *, custom_objects: Mapping[str, Any] | None = None, budget: int | None = None, generation: int = 3
) -> Rebuilt:
    """The Keras model of an upgraded configuration that `vetting` found nothing against.

    Args:
        architecture: A model in the plain form of `upgrading`.
        custom_objects: Name -> class or function: of layers, activations, regularizers, constraints; at a layer's own name, a
            function
            or layer that stands for it.
        budget: How many numbers the weights may hold together; None for no limit.
        generation: 1, 2 or 3, of the Keras that wrote it.

    Raises:
        ModelError: when Keras refuses to build it, with the layer's name.
        UnsafeFileError: when it would hold more than the budget.
    """
    shop = _Workshop(custom_objects or {}, budget, generation)
    built = _layer(shop, architecture)
    return Rebuilt(built.layer, built, tuple(shop.changes))


# --- Layers ---------------------------------------------------------------------------------------------------------


def _failed(plain: Config, found: str, cause: str | None = None) -> ModelError:
    return ModelError(f"Rebuilding layer {plain['name']!r} ({plain['class_name']}).", found=found, cause=cause)


def _one_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _given(shop: _Workshop, plain: Config) -> Any:
    """What the user gave for this layer: at its own name, or a class at its class's name."""
    for name in (plain["name"], plain["config"].get("name")):
        if name in shop.custom and not _is_class_name(plain, name):
            return shop.custom[name]
    for name in names_of(plain):
        if name in shop.custom:
            return shop.custom[name]
    return None


def _is_class_name(plain: Config, name: str) -> bool:
    return name in names_of(plain)


def _layer(shop: _Workshop, plain: Config) -> Built:
    given = _given(shop, plain)
    if plain["class_name"] == "Sequential" and "layers" in plain["config"]:
        return _sequential(shop, plain)
    if plain["class_name"] == "Functional" and "layers" in plain["config"]:
        return _functional(shop, plain)
    config = dict(plain["config"])
    if isinstance(given, keras.layers.Layer):
        return Built(plain, given)
    if (plain["class_name"] == "Lambda" and "registered_name" not in plain) or _is_function(given):
        function = given if given is not None else shop.custom.get(str(config.get("function")))
        if function is None:
            raise _failed(plain, "no function was given for it")
        if isinstance(function, type):
            return Built(plain, _made(plain, function, {"name": config.get("name", plain["name"])}))
        if plain["class_name"] != "Lambda":
            return Built(plain, function)
        arguments = config.get("arguments")
        settings = {"arguments": arguments} if isinstance(arguments, Mapping) and arguments else {}
        return Built(plain, _made(plain, keras.layers.Lambda, {"function": function, "name": config.get("name"), **settings}))
    if plain.get("operation") or plain["class_name"] in allowed.OPERATION_LAYERS:
        return Built(plain, operation(plain["class_name"], config, operation_name(plain)))
    own = given if given is not None else _LAYERS.get(plain["class_name"])
    if own is None:
        raise _failed(plain, "this version of Keras has no such layer", "it came with a later version")
    if plain["class_name"] == "TimeDistributed" and given is None and "layers" in config.get("layer", {}).get("config", {}):
        model = _layer(shop, config["layer"])
        return Built(plain, _made(plain, own, _accepted(plain, own, {**config, "layer": model.layer})), (model,))
    arguments = {key: _value(shop, plain, key, value) for key, value in config.items()}
    if given is not None:
        return Built(plain, _custom(plain, own, arguments))
    return Built(plain, _made(plain, own, _accepted(plain, own, arguments)))


def _is_function(given: Any) -> bool:
    return given is not None and callable(given) and not isinstance(given, (type, keras.layers.Layer))


def _accepted(plain: Config, own: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments the class takes; those it doesn't know are an error unless they say nothing."""
    # The layers in `retired_layers` hand what they don't name to a base class of theirs.
    family = own.__mro__ if own.__module__ == retired_layers.__name__ else (own,)
    parameters = {
        name: p for one in family if one.__module__ == own.__module__ for name, p in inspect.signature(one).parameters.items()
    }
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD} | (_BASE if open_ended else set())
    if plain["class_name"] in ("LSTM", "GRU", "SimpleRNN"):
        known.add("zero_output_for_mask")  # the base class takes it, and Bidirectional sets it
    unknown = [key for key, value in arguments.items() if key not in known and value is not None and key not in _BASE]
    if unknown:
        raise ModelError(
            f"Rebuilding layer {plain['name']!r} ({plain['class_name']}).",
            found=[
                f"the argument {key}={str(arguments[key])[:60]!r}, which Keras 3 doesn't have{did_you_mean(key, known)}"
                for key in unknown
            ],
            cause="it came with a version of Keras that isn't known here, or the file was edited",
            fix=f"give a layer that takes it: open_model(path, custom_objects={{{plain['said']!r}: …}})",
        )
    return {key: value for key, value in arguments.items() if key in known}


def _made(plain: Config, own: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return own(**arguments)
    except TransferKitError:
        raise
    except Exception as error:
        raise _failed(plain, _one_line(error)) from error


def _custom(plain: Config, own: Any, arguments: Mapping[str, Any]) -> Any:
    """A layer of the user's class, by its own `from_config` where it has one."""
    if not (isinstance(own, type) and issubclass(own, keras.layers.Layer)):
        raise ModelError(
            f"Rebuilding layer {plain['name']!r} ({plain['said']}).",
            found=f"{own!r} in custom_objects is no subclass of keras.layers.Layer",
            fix="give the class of the layer",
        )
    make: Callable[[dict[str, Any]], Any] = getattr(own, "from_config")  # noqa: B009 - Keras has no types
    try:
        return make(dict(arguments))
    except Exception as error:
        raise ModelError(
            f"Rebuilding layer {plain['name']!r} ({plain['said']}).",
            found=_one_line(error),
            cause=f"{own.__name__} doesn't take the arguments that the file holds: {sorted(arguments)}",
            fix=f"let {own.__name__}.__init__ take them, with **kwargs for keras.layers.Layer",
        ) from error


def _value(shop: _Workshop, plain: Config, key: str, value: Any) -> Any:
    """A value as a constructor takes it: objects made, lists as they are."""
    if isinstance(value, Mapping) and "said" in value:
        return _layer(shop, value).layer
    if key.endswith("_initializer"):
        return _object(shop, plain, "initializers", key, value)
    if key.endswith("_regularizer"):
        return _object(shop, plain, "regularizers", key, value)
    if key.endswith("_constraint"):
        return _object(shop, plain, "constraints", key, value)
    if (key == "activation" or key.endswith("_activation")) and isinstance(value, str):
        return shop.custom.get(value, shop.custom.get(value.rpartition(">")[2], _ACTIVATIONS.get(value)))
    if isinstance(value, list):
        return [_layer(shop, item).layer if isinstance(item, Mapping) and "said" in item else item for item in value]
    return value


def _object(shop: _Workshop, plain: Config, kind: str, key: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    name, config = str(value["class_name"]), dict(value["config"])
    given = shop.custom.get(name, shop.custom.get(name.rpartition(">")[2]))
    if given is not None and not isinstance(given, type):
        return given
    own = given or _OBJECTS[kind].get(name)
    if own is None:  # an initializer: `vetting` asks for the others
        shop.changes.append(Change(plain["name"], f"{key} {name!r} left out: the weights come from the file"))
        return "zeros"
    if kind == "initializers" and given is None:
        known = inspect.signature(own).parameters
        config = {k: v for k, v in config.items() if k in known and not isinstance(v, Mapping)}
        if not all(isinstance(v, (int, float, str, type(None))) for v in config.values()):
            own, config = keras.initializers.Zeros, {}
    try:
        return own(**config)
    except Exception as error:
        if kind == "initializers":
            return "zeros"
        raise _failed(plain, f"{key}: {_one_line(error)}") from error


# --- Models ---------------------------------------------------------------------------------------------------------


def _check_size(shop: _Workshop, plain: Config, layer: Any, shape: Sequence[Any]) -> None:
    """Foretells what building the layer will allocate, its inner layers included."""
    if not isinstance(layer, keras.layers.Layer) or layer.built:
        return

    def count(item: Config, shape: Sequence[Any]) -> int:
        inner = list(allowed.inner_layers(item["config"]))
        if inner:
            twice = 2 if item["class_name"] == "Bidirectional" else 1
            shape = [shape[0], *shape[2:]] if item["class_name"] == "TimeDistributed" and len(shape) > 2 else shape
            return twice * sum(count(one, shape) for one in inner if "layers" not in one["config"])
        known = None if "registered_name" in item else allowed.elements(item["class_name"], item["config"], shape)
        if known is None and item["class_name"] in allowed.LAYERS:
            largest = allowed.size_product(item["config"])
            known = largest if largest > 1 << 28 else 0
        return known or 0

    shop.spend(plain["name"], count(plain, shape))
    if plain["config"].get("unroll") and len(shape) > 1 and isinstance(shape[1], int) and shape[1] > _MAX_UNROLL:
        layer.unroll = False
        shop.changes.append(Change(plain["name"], f"not unrolled, its sequence being {shape[1]} long"))


def _check_bias(shop: _Workshop, plain: Config, layer: Any, shape: Sequence[Any]) -> None:
    """Refuses where Keras 3 adds a bias along the width: `keras.ops.add` of (n, c, h, w) and (1, c, 1, 1) when w = c (3.15.1)."""
    config = plain["config"]
    biased = config.get("data_format") == "channels_first" and config.get("use_bias", True) and "Conv" in plain["class_name"]
    if shop.generation == 3 or not biased or plain["class_name"] not in allowed.LAYERS or "registered_name" in plain:
        return
    try:
        width = layer.compute_output_shape(shape)[-1]
    except Exception:  # the layer's own call says what is wrong
        return
    if width is None or width != getattr(layer, "filters", None):
        return
    probe = keras.ops.add(np.zeros((1, 2, 1, 2), "float32"), np.array([[[[0.0]], [[1.0]]]], "float32"))
    if float(probe[0, 1, 0, 0]) != 1.0:
        raise _failed(
            plain,
            f"{width} filters on a width of {width}, channels first: this version of Keras adds the bias along the width",
            "a defect of keras.ops.add, which takes (1, c, 1, 1) for a bias of the last axis when that has the length c",
        )


def _sequential(shop: _Workshop, plain: Config) -> Built:
    config = plain["config"]
    inner = [_layer(shop, item) for item in config["layers"]]
    # The shapes are foretold, since calling the layers here would give each a second output.
    shape: Any = None
    for built in inner:
        if isinstance(built.layer, keras.layers.InputLayer):
            shape = built.layer.batch_shape
            continue
        _check_size(shop, built.plain, built.layer, shape or (None,))
        try:
            if shape is not None:
                _with_output_shape(built.plain, built.layer, shape)
                _check_bias(shop, built.plain, built.layer, shape)
                shape = built.layer.compute_output_shape(shape)
        except TransferKitError:
            raise
        except Exception:  # a layer of the user's that doesn't foretell its shape
            shape = None
        if not (isinstance(shape, (list, tuple)) and all(isinstance(n, (int, type(None))) for n in shape)):
            shape = None
    try:
        model = keras.Sequential([built.layer for built in inner], name=config["name"])
    except Exception as error:
        raise _failed(plain, _one_line(error)) from error
    if config.get("trainable") is False:
        model.trainable = False
    return Built(plain, model, tuple(inner))


def _functional(shop: _Workshop, plain: Config) -> Built:
    config = plain["config"]
    inner = [_layer(shop, item) for item in config["layers"]]
    if any(not isinstance(built.layer, keras.layers.Layer) for built in inner):
        _pass_names([built.layer.name for built in inner if isinstance(built.layer, keras.layers.Layer)])
    outputs: dict[tuple[str, int], list[Any]] = {}
    waiting: list[tuple[Built, int]] = []
    for built in inner:
        name = built.plain["name"]
        if isinstance(built.layer, keras.layers.InputLayer):
            outputs[name, 0] = [built.layer.output]
        waiting.extend((built, i) for i in range(len(built.plain["nodes"])))

    def tensors(value: Any) -> Any:
        if isinstance(value, Mapping):
            if set(value) == {"tensor"}:
                name, node, index = value["tensor"]
                return outputs[name, node][index]
            return {key: tensors(item) for key, item in value.items()}
        if isinstance(value, list):
            return [tensors(item) for item in value]
        return value

    while waiting:
        left = []
        for built, i in waiting:
            node = built.plain["nodes"][i]
            if not _ready(node, outputs) or (i and (built.plain["name"], i - 1) not in outputs):
                left.append((built, i))
                continue
            result = _called(shop, built, tensors(node["args"]), tensors(node["kwargs"]))
            outputs[built.plain["name"], i] = _outputs(result)
        if len(left) == len(waiting):
            names = sorted({built.plain["name"] for built, _ in left})
            raise ModelError(
                f"Rebuilding the model {plain['name']!r}.",
                found=f"the layers {names[:5]} wait for each other's outputs",
                cause="the file's configuration was edited or damaged",
            )
        waiting = left
    try:
        model = keras.Model(tensors(config["inputs"]), tensors(config["outputs"]), name=config["name"])
    except (KeyError, IndexError) as error:
        raise _failed(plain, f"an input or output that no layer gives: {error}") from error
    except Exception as error:
        raise _failed(plain, _one_line(error)) from error
    if config.get("trainable") is False:
        model.trainable = False
    if "subclass" in plain:
        shop.changes.append(Change(plain["name"], f"class {plain['subclass']} → a functional model of the same layers"))
    return Built(plain, model, tuple(inner))


def _outputs(result: Any) -> list[Any]:
    """What a call gave, one by one; lengths of a shape stay together, since a file knows them as one tensor."""
    flat = keras.tree.flatten(result)
    if not any(isinstance(item, keras.KerasTensor) for item in flat):
        return [result]
    return list(result) if type(result) is tuple else flat


def _pass_names(names: Sequence[str]) -> None:
    """Lets Keras's automatic names run past those of the file's layers: operations get one, and it must not be taken."""
    for kind in _NAMED_LIKE_OPERATIONS:
        own = re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
        taken = [int(found[1] or 0) for name in names if (found := re.fullmatch(rf"{own}(?:_(\d{{1,4}}))?", name))]
        while taken:
            made = getattr(keras.layers, kind)(
                **({"target_shape": (1,)} if kind == "Reshape" else {"axes": 1} if kind == "Dot" else {})
            )
            last = re.fullmatch(rf"{own}(?:_(\d+))?", made.name)
            if last is None or int(last[1] or 0) >= max(taken):
                break


def _ready(value: Any, outputs: Mapping[tuple[str, int], Any]) -> bool:
    if isinstance(value, Mapping):
        if set(value) == {"tensor"}:
            return (value["tensor"][0], value["tensor"][1]) in outputs
        return all(_ready(item, outputs) for item in value.values())
    return all(_ready(item, outputs) for item in value) if isinstance(value, list) else True


def _called(shop: _Workshop, built: Built, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    layer, plain = built.layer, built.plain
    first = keras.tree.flatten(args[0])[0] if args and keras.tree.flatten(args[0]) else None
    shape = tuple(getattr(first, "shape", (None,)))
    _check_size(shop, plain, layer, shape)
    _with_output_shape(plain, layer, shape)
    _check_bias(shop, plain, layer, shape)
    call: Callable[..., Any] = layer
    try:
        if isinstance(layer, keras.layers.Layer):
            kwargs = _call_arguments(plain, layer, kwargs)
        return call(*args, **kwargs)
    except TransferKitError:
        raise
    except Exception as error:
        raise _failed(plain, _one_line(error)) from error


def _call_arguments(plain: Config, layer: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(layer.call).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {key: value for key, value in kwargs.items() if value is not None}
    unknown = [key for key, value in given.items() if key not in parameters and not open_ended and value is not False]
    if unknown:
        raise _failed(plain, f"it is called with {unknown}, which Keras 3 doesn't have")
    return {key: value for key, value in given.items() if key in parameters or open_ended}


def _with_output_shape(plain: Config, layer: Any, shape: Sequence[Any]) -> None:
    """Keras 1's Deconvolution2D was told the size of its output, where several fit; that is `output_padding` now."""
    if "output_shape" not in plain or not isinstance(layer, (keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)):
        return
    wanted = plain["output_shape"]
    given = layer.compute_output_shape(shape)
    if len(wanted) != len(given) or layer.output_padding is not None or None in given[1:]:
        return
    spatial = range(2, len(given)) if layer.data_format == "channels_first" else range(1, len(given) - 1)
    if all(wanted[i] in (None, given[i]) for i in spatial):
        return
    padding = []
    for i, k, s in zip(spatial, layer.kernel_size, layer.strides, strict=True):
        trimmed = 2 * (k // 2) if layer.padding == "same" else 0
        padding.append(int(wanted[i]) - ((int(shape[i]) - 1) * s + k - trimmed))
    if any(not 0 <= p < s for p, s in zip(padding, layer.strides, strict=True)):
        raise _failed(plain, f"an output of the shape {wanted}, which its input of shape {tuple(shape)} can't give")
    layer.output_padding = tuple(padding)
