"""The configuration of a model of Keras 1, 2 or tf_keras, as Keras 3 would word it, with a list of what was changed.

From dicts to dicts: nothing is looked up, imported or built here. The result is no Keras configuration but a plain form of it
that `rebuilding` reads. A layer is `{"class_name", "said", "name", "config", "nodes"}`, where `said` and `name` are the file's
words
for its class and name, and `config["name"]` the name it will have; a node, one call of a layer, is `{"args", "kwargs"}` with
tensors
as `{"tensor": [layer, node, index]}`. A model is a layer whose config has `layers`, and `inputs` and `outputs` unless Sequential.

This file knows models: lists of layers, calls, inputs, nesting. The words of single layers are in `upgrading_layers`.
Imports that file and the errors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transferkit.building.allowed import OPERATION_LAYERS
from transferkit.building.upgrading_layers import Change, Context, is_custom, layer_name, upgraded_layer
from transferkit.errors import ModelError, UnsafeFileError

__all__ = ["Change", "Upgraded", "upgrade"]

_MODELS = frozenset({"Container", "Functional", "Model", "Sequential"})
_RECURRENT = frozenset({"RNN", "LSTM", "GRU", "SimpleRNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "Bidirectional"})
_OPERATIONS = frozenset(
    {"TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer", "ClassMethod", "InstanceMethod", "InstanceProperty"}
)
_MAX_DEPTH = 100
_CONSTANT = "_CONSTANT_VALUE"

Config = dict[str, Any]


@dataclass(frozen=True)
class Upgraded:
    """A model's configuration in the plain form, and what was changed to get it.

    Args:
        architecture: The model as a layer, see the head of this file.
        changes: In the order of the layers.
        generation: 1, 2 or 3, of the Keras that wrote the file; tf_keras and tf.keras are 2.
    """

    architecture: Config
    changes: tuple[Change, ...]
    generation: int


def upgrade(config: Mapping[str, Any], *, keras_version: str = "", max_layers: int = 2000) -> Upgraded:
    """The model in `config` as Keras 3 would word it.

    Args:
        config: A model's configuration as it stands in a file: `{"class_name": …, "config": …}`.
        keras_version: What the file says wrote it, such as `1.2.2`; may be empty.
        max_layers: How many layers the model may have, those inside others counted.

    Raises:
        ModelError: when it is no configuration of a model, or of a kind that has no counterpart in Keras 3.
        UnsafeFileError: when it is nested too deeply or has too many layers.

    Example:
        >>> dense = {"class_name": "Dense", "config": {"name": "d", "output_dim": 2, "input_dim": 3}}
        >>> new = upgrade({"class_name": "Sequential", "config": [dense]}, keras_version="1.2.2")
        >>> new.architecture["config"]["layers"][1]["config"]
        {'name': 'd', 'units': 2}
    """
    _check_size(config, max_layers)
    if not isinstance(config.get("class_name"), str) or "config" not in config:
        raise ModelError(
            "Reading the configuration of a model.",
            found=f"no model, but something with the keys {sorted(map(str, config))}",
            cause=(
                "Keras 0.x wrote it, whose configurations are laid out in another way"
                if config.get("name") in ("Sequential", "Graph")
                else "the file holds something else, or was damaged"
            ),
        )
    generation = _generation(config, keras_version)
    context = Context(generation, _data_format(config), _layer)
    architecture = _layer(context, config)
    if "layers" not in architecture["config"] and not is_custom(config):
        raise ModelError(
            "Reading the configuration of a model.",
            found=f"a {config['class_name']!r} without a list of layers",
            cause="a subclassed model keeps its architecture in Python code, not in the file",
            fix="build the model with its own class, then WeightLoader(path).load(model)",
        )
    return Upgraded(architecture, tuple(context.changes), generation)


def _check_size(config: Mapping[str, Any], max_layers: int) -> None:
    """Refuses what would exhaust the stack or the time of those that come after; walks without recursion."""
    layers = 0
    waiting: list[tuple[Any, int]] = [(config, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise UnsafeFileError("Reading the configuration of a model.", found=f"a nesting of more than {_MAX_DEPTH} levels")
        if isinstance(value, Mapping):
            listed = value.get("layers")
            layers += len(listed) if isinstance(listed, list) else 0
            waiting.extend((item, depth + 1) for item in value.values() if isinstance(item, (Mapping, list)))
        elif isinstance(value, list):
            waiting.extend((item, depth + 1) for item in value if isinstance(item, (Mapping, list)))
        if layers > max_layers:
            break
    own = config.get("config")
    if layers + (len(own) if isinstance(own, list) else 0) > max_layers:
        raise UnsafeFileError(
            "Reading the configuration of a model.",
            found=f"more than {max_layers} layers",
            fix="pass max_layers=… if you trust the file",
        )


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _generation(config: Mapping[str, Any], version: str) -> int:
    first = version.split(".")[0]
    if first.isdigit():
        return min(max(int(first), 1), 3)
    for item in _mappings(config):
        if "nb_filter" in item or "border_mode" in item or "W_regularizer" in item or "inner_init" in item:
            return 1
        if "batch_shape" in item or item.get("class_name") == "__keras_tensor__":
            return 3
        if "batch_input_shape" in item:
            return 2
    return 2


def _data_format(config: Mapping[str, Any]) -> str:
    """What layers that don't say have: some of Keras 1's (UpSampling2D, ZeroPadding2D …) didn't write it down."""
    said = {item.get("dim_ordering") or item.get("data_format") for item in _mappings(config)}
    first, last = said & {"th", "channels_first"}, said & {"tf", "channels_last"}
    return "channels_first" if first and not last else "channels_last"


def _layer(context: Context, entry: Any) -> Config:
    """A layer or a model in the plain form; without nodes."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_name"), str):
        raise ModelError("Reading the configuration of a model.", found=f"{str(entry)[:80]!r} where a layer should stand")
    inner = entry.get("config")
    listed = inner.get("layers") if isinstance(inner, Mapping) else inner
    if not isinstance(listed, list) or (entry["class_name"] not in _MODELS and "input_layers" not in (inner or ())):
        return upgraded_layer(context, entry)
    content: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {"layers": inner}
    if entry["class_name"] == "Sequential" and "input_layers" not in content:
        return _sequential(context, entry, content)
    return _functional(context, entry, content)


def _model(context: Context, entry: Mapping[str, Any], content: Mapping[str, Any], class_name: str, **parts: Any) -> Config:
    name = layer_name({"config": content}) or layer_name(entry) or class_name.lower()
    plain: Config = {
        "class_name": class_name,
        "said": entry["class_name"],
        "name": name,
        "config": {"name": name.replace("/", "_"), **parts},
    }
    if content.get("trainable") is False:
        plain["config"]["trainable"] = False
    if is_custom(entry) or entry["class_name"] not in _MODELS:
        plain["subclass"] = str(entry.get("registered_name") or entry["class_name"])
    elif entry["class_name"] != class_name:
        context.note(name, f"class {entry['class_name']} → {class_name}")
    return plain


# --- Sequential -----------------------------------------------------------------------------------------------------


def _sequential(context: Context, entry: Mapping[str, Any], content: Mapping[str, Any]) -> Config:
    listed = content["layers"]
    if isinstance(entry["config"], list):
        context.note("", "a Sequential kept as a list of layers → with a name and a list of layers")
    first = listed[0] if listed and isinstance(listed[0], Mapping) else {}
    if first.get("class_name") == "Merge":
        return _merged(context, entry, content)
    layers = [_layer(context, item) for item in listed]
    _name_apart(layers)
    if layers and layers[0]["class_name"] != "InputLayer":
        built = entry.get("build_config")
        shape = input_shape_of(first) or content.get("build_input_shape")
        shape = shape or (built.get("input_shape") if isinstance(built, Mapping) else None)
        if isinstance(shape, list) and "layers" not in layers[0]["config"]:
            layers.insert(0, _input(context, layers[0], shape, first))
    return _model(context, entry, content, "Sequential", layers=layers)


def _name_apart(layers: Sequence[Config]) -> None:
    """Gives models within a Sequential names of their own: one kept as a list of layers has none."""
    taken: set[str] = set()
    for plain in layers:
        name, count = plain["name"], 0
        while plain["name"] in taken and "layers" in plain["config"]:
            count += 1
            plain["name"] = f"{name}_{count}"
            plain["config"]["name"] = plain["name"].replace("/", "_")
        taken.add(plain["name"])


def _input(context: Context, layer: Config, shape: Sequence[Any], said: Mapping[str, Any]) -> Config:
    """The input that a Sequential's first layer stood for."""
    own = said.get("config") if isinstance(said.get("config"), Mapping) else {}
    dtype = own.get("input_dtype") or own.get("dtype")  # type: ignore[union-attr]
    name = f"{layer['name']}_input"
    config: Config = {"name": name.replace("/", "_"), "batch_shape": list(shape)}
    if isinstance(dtype, str) and not dtype.startswith("mixed_"):
        config["dtype"] = dtype
    if context.generation < 3:
        context.note(layer["name"], f"batch_input_shape → an input {name!r}")
    return {"class_name": "InputLayer", "said": "InputLayer", "name": name, "config": config, "nodes": []}


def input_shape_of(entry: Mapping[str, Any]) -> list[Any] | None:
    """The shape, batch first, that a Sequential's first layer was told of in one of the ways there were."""
    inner = entry.get("config")
    if not isinstance(inner, Mapping):
        return None
    for key in ("batch_input_shape", "batch_shape"):
        if isinstance(inner.get(key), list):
            return list(inner[key])
    if isinstance(inner.get("input_shape"), list):
        return [inner.get("batch_size"), *inner["input_shape"]]
    length = inner.get("input_length")
    if entry.get("class_name") == "Embedding":
        return [None, *(length if isinstance(length, list) else [length])]
    if isinstance(inner.get("input_dim"), int):
        flat = entry.get("class_name") in ("Dense", "MaxoutDense", "Highway")
        return [None, inner["input_dim"]] if flat else [None, length, inner["input_dim"]]
    if isinstance(inner.get("layer"), Mapping):
        return input_shape_of(inner["layer"])
    return None


def _merged(context: Context, entry: Mapping[str, Any], content: Mapping[str, Any]) -> Config:
    """A Sequential of Keras 1 that starts by merging others, as a graph of all branches' layers, as the file lists them."""
    layers: list[Config] = []
    inputs: list[Any] = []

    def chain(listed: Sequence[Any], start: Any) -> Any:
        end = start
        for item in listed:
            if isinstance(item, Mapping) and item.get("class_name") == "Merge" and isinstance(item.get("config"), Mapping):
                branches = item["config"].get("layers") or []
                end = [branch(one) for one in branches]
            elif isinstance(item, Mapping) and item.get("class_name") == "Sequential" and isinstance(item.get("config"), list):
                end = chain(item["config"], end)
                continue
            plain = _layer(context, item)
            if end is None:
                if plain["class_name"] == "InputLayer":
                    source = {**plain, "nodes": []}
                elif (shape := input_shape_of(item)) is not None:
                    source = _input(context, plain, shape, item)
                else:
                    raise ModelError(
                        "Reading the configuration of a model.",
                        found=f"the branch that starts with {plain['name']!r} doesn't say the shape of its input",
                    )
                layers.append(source)
                inputs.append({"tensor": [source["name"], 0, 0]})
                end = inputs[-1]
                if plain["class_name"] == "InputLayer":
                    continue
            known = next((layer for layer in layers if layer["name"] == plain["name"]), None)
            if known is None:
                layers.append(plain | {"nodes": [{"args": [end], "kwargs": {}}]})
                end = {"tensor": [plain["name"], 0, 0]}
            else:  # a branch that is used twice
                known["nodes"].append({"args": [end], "kwargs": {}})
                end = {"tensor": [plain["name"], len(known["nodes"]) - 1, 0]}
        return end

    def branch(one: Any) -> Any:
        inner = one.get("config") if isinstance(one, Mapping) else None
        if isinstance(inner, list):
            return chain(inner, None)
        return chain([one], None)

    end = chain(content["layers"], None)
    context.note("", "a Sequential that begins with a Merge → a model of several inputs")
    outputs = end
    return _model(
        context, {**entry, "class_name": "Functional"}, content, "Functional", layers=layers, inputs=inputs, outputs=outputs
    )


# --- Functional -----------------------------------------------------------------------------------------------------


def _functional(context: Context, entry: Mapping[str, Any], content: Mapping[str, Any]) -> Config:
    names = {layer_name(item) for item in content["layers"] if isinstance(item, Mapping)}
    layers = []
    for item in content["layers"]:
        plain = _layer(context, item)
        nodes = item.get("inbound_nodes") or []
        if not isinstance(nodes, list):
            raise ModelError(
                "Reading the configuration of a model.", found=f"layer {plain['name']!r} has no list of inbound nodes"
            )
        plain["nodes"] = [_node(node, plain["class_name"], names) for node in nodes]
        layers.append(plain)
    inputs = _references(content.get("input_layers"), names, "inputs")
    outputs = _references(content.get("output_layers"), names, "outputs")
    _shift_nodes(layers, [inputs, outputs])
    if context.generation < 3:  # one input in a list and one alone were the same; Keras 3 tells them apart
        inputs, outputs = (end[0] if isinstance(end, list) and len(end) == 1 else end for end in (inputs, outputs))
    return _model(context, entry, content, "Functional", layers=layers, inputs=inputs, outputs=outputs)


def _is_reference(value: Any, names: set[str]) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and value[0] in names
        and isinstance(value[1], int)
        and isinstance(value[2], int)
        and (len(value) == 3 or isinstance(value[3], Mapping))
    )


def _references(value: Any, names: set[str], what: str) -> Any:
    """A model's inputs or outputs: one tensor, a list or a dict of them."""
    if _is_reference(value, names):
        return {"tensor": list(value[:3])}
    if isinstance(value, list) and value:
        return [_references(item, names, what) for item in value]
    if isinstance(value, Mapping) and value:
        return {str(key): _references(item, names, what) for key, item in value.items()}
    raise ModelError("Reading the configuration of a model.", found=f"{str(value)[:80]!r} where its {what} should stand")


def _node(node: Any, class_name: str, names: set[str]) -> Config:
    """One call of a layer, from either way of writing it."""
    if isinstance(node, Mapping) and isinstance(node.get("args"), list):
        return {"args": [_new_argument(item) for item in node["args"]], "kwargs": _new_argument(node.get("kwargs") or {})}
    kwargs: Config = {}

    def first(value: Any) -> Any:
        if _is_reference(value, names) or (isinstance(value, list) and value and value[0] == _CONSTANT):
            if len(value) == 4 and isinstance(value[3], Mapping):
                kwargs.update({key: _old_argument(item, names) for key, item in value[3].items()})
            return value[2] if value[0] == _CONSTANT else {"tensor": list(value[:3])}
        if isinstance(value, list):
            return [first(item) for item in value]
        if isinstance(value, Mapping):
            return {str(key): first(item) for key, item in value.items()}
        raise ModelError("Reading the configuration of a model.", found=f"{str(value)[:80]!r} where a layer's input should stand")

    argument = first(node)
    if isinstance(argument, list) and len(argument) == 1 and class_name not in OPERATION_LAYERS:
        argument = argument[0]
    if class_name in _RECURRENT and isinstance(argument, list):  # Keras 2 passed states beside the sequence
        argument, *states = argument
        kwargs = {**kwargs, "initial_state": states}
    return {"args": [argument], "kwargs": kwargs}


def _old_argument(value: Any, names: set[str]) -> Any:
    if _is_reference(value, names) and len(value) == 3:
        return {"tensor": list(value)}
    if isinstance(value, list):
        return [_old_argument(item, names) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _old_argument(item, names) for key, item in value.items()}
    return value


def _new_argument(value: Any) -> Any:
    """An argument as Keras 3 writes it, its `__keras_tensor__` as references."""
    if isinstance(value, Mapping):
        inner = value.get("config")
        if value.get("class_name") == "__keras_tensor__" and isinstance(inner, Mapping):
            history = inner.get("keras_history")
            if isinstance(history, list) and len(history) == 3:
                return {"tensor": list(history)}
            raise ModelError("Reading the configuration of a model.", found="a tensor that doesn't say where it comes from")
        return {str(key): _new_argument(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_new_argument(item) for item in value]
    return value


def _all_references(value: Any) -> Iterator[list[Any]]:
    for item in _mappings(value):
        if set(item) == {"tensor"} and isinstance(item["tensor"], list) and len(item["tensor"]) == 3:
            yield item["tensor"]


def _shift_nodes(layers: Sequence[Config], ends: Any) -> None:
    """Counts the calls of every layer from 0: for a model inside a model, Keras counts the call that made it as the first."""
    calls = {layer["name"]: max(len(layer["nodes"]), 1) for layer in layers}
    found = [*_all_references([layer["nodes"] for layer in layers]), *_all_references(ends)]
    highest: dict[str, int] = {}
    for name, node, _ in found:
        if name not in calls:
            raise ModelError(
                "Reading the configuration of a model.", found=f"an output of {str(name)!r} is used, but there is no such layer"
            )
        highest[name] = max(highest.get(name, 0), node)
    shifted = {name for name, node in highest.items() if node >= calls[name]}
    for name in shifted:
        if highest[name] > calls[name]:
            raise ModelError(
                "Reading the configuration of a model.",
                found=f"the output of call {highest[name]} of {name!r} is used, but it is called {calls[name]} times",
            )
    for reference in found:
        if reference[0] in shifted:
            reference[1] = max(reference[1] - 1, 0)
