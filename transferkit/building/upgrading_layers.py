"""One layer's configuration of Keras 1, 2 or tf_keras, as Keras 3 would word it.

Names come from the tables in `old_names`; what is more than a name (kernel sizes in two arguments, the kinds of `Merge`, defaults
that changed) is a function here. Initializers, regularizers and constraints become `{"class_name", "config"}` or None; an
activation
becomes its name, or a layer. Where a value means something else now, the old meaning is kept.
Imports the tables and the errors only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transferkit.building import old_names as old
from transferkit.building.allowed import OPERATION_LAYERS
from transferkit.errors import ModelError

__all__ = ["OLD_HARD_SIGMOID", "Change", "Context", "is_custom", "layer_name", "upgraded_layer"]

#: `hard_sigmoid` as Keras 1 and 2 computed it, clip(0.2 x + 0.5, 0, 1); the slope of Keras 3's is 1/6.
OLD_HARD_SIGMOID = "hard_sigmoid_of_keras_2"

_OPERATION_MODULES = ("keras.src.ops.", "keras.ops", "keras.src.operations", "keras.operations")
_OWN_MODULES = ("keras", "tf_keras", "tensorflow", "builtins")
_SPATIAL = frozenset(name for name, family in old.FAMILIES.items() if family != "dropout" and ("2D" in name or "3D" in name))
_INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

Config = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One thing that was put into other words.

    Args:
        layer: The layer's name; empty for the model.
        what: The old wording and the new.
    """

    layer: str
    what: str


@dataclass
class Context:
    """What holds for the whole file, and the list of changes that grows.

    Args:
        generation: 1, 2 or 3, of the Keras that wrote it.
        data_format: What a layer has that doesn't say.
        inner: Upgrades a layer or model inside another.
        changes: What was changed so far.
    """

    generation: int
    data_format: str
    inner: Callable[[Context, Any], Config]
    changes: list[Change] = field(default_factory=list)

    def note(self, layer: str, what: str) -> None:
        """Adds to the list, once."""
        change = Change(layer, what)
        if change not in self.changes[-50:]:
            self.changes.append(change)


def layer_name(entry: Mapping[str, Any]) -> str:
    """The name of a layer as the file lists it; empty where it has none."""
    inner = entry.get("config")
    name = entry.get("name") or (inner.get("name") if isinstance(inner, Mapping) else None)
    return name if isinstance(name, str) else ""


def is_custom(entry: Mapping[str, Any]) -> bool:
    """Whether the file says that this class isn't one of Keras's own."""
    module, registered = entry.get("module"), entry.get("registered_name")
    if isinstance(registered, str) and ">" in registered:
        return not registered.startswith("keras>")
    return isinstance(module, str) and module.split(".")[0] not in _OWN_MODULES


def upgraded_layer(context: Context, entry: Mapping[str, Any]) -> Config:
    """The layer `entry` in the plain form, without nodes."""
    said = str(entry["class_name"])
    inner = entry.get("config")
    if not isinstance(inner, Mapping):
        raise ModelError(
            "Reading the configuration of a model.", found=f"layer {layer_name(entry) or said!r} has no configuration"
        )
    config: Config = {str(key): _unwrapped(value) for key, value in inner.items()}
    name = layer_name(entry) or said.lower()
    plain: Config = {"class_name": said, "said": said, "name": name, "config": config, "nodes": []}
    if isinstance(build := entry.get("build_config"), Mapping):
        plain["build_config"] = dict(build)
    # In HDF5 files Keras 3 says no modules; an operation has neither a dtype nor `trainable`, which every layer has.
    bare = context.generation == 3 and "module" not in entry and "trainable" not in inner and said != "InputLayer"
    if bare or str(entry.get("module")).startswith(_OPERATION_MODULES):
        return plain | {"operation": True}
    if said in OPERATION_LAYERS:
        if isinstance(config.get("node_def"), str):
            config["node_def"] = _graph_node(name, config["node_def"])
        return plain
    if is_custom(entry):
        plain["registered_name"] = str(entry.get("registered_name") or said)
    else:
        _rename(context, plain)
        if (special := _SPECIAL.get(plain["class_name"])) is not None:
            special(context, plain)
    _values(context, plain)
    _drop(context, plain)
    if "/" in name:
        config["name"] = name.replace("/", "_")
        context.note(name, f"name → {config['name']!r}, since Keras 3 allows no '/'")
    elif isinstance(config.get("name"), str):
        config["name"] = name
    return plain


def _graph_node(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError("Reading the configuration of a model.", found=f"layer {name!r}: a node that is no JSON") from error


def _unwrapped(value: Any) -> Any:
    """Keras 2.1 wrote NumPy scalars and arrays as `{"type": "ndarray", "value": …}`."""
    if isinstance(value, Mapping) and set(value) == {"type", "value"}:
        return value["value"]
    return value


def _rename(context: Context, plain: Config) -> None:
    said, name, config = plain["class_name"], plain["name"], plain["config"]
    plain["class_name"] = old.CLASSES.get(said, said)
    if plain["class_name"] != said:
        context.note(name, f"class {said} → {plain['class_name']}")
    renamed = []
    for before, after in old.ARGUMENTS.get(old.FAMILIES.get(plain["class_name"], ""), {}).items():
        if before in config:
            value = config.pop(before)
            if after not in config:
                config[after] = value
                renamed.append(f"{before} → {after}")
    if renamed:
        context.note(name, ", ".join(renamed))


def _values(context: Context, plain: Config) -> None:
    """Upgrades the values that are objects, by the argument's name."""
    name, config = plain["name"], plain["config"]
    for key, value in config.items():
        if key.endswith("_initializer"):
            config[key] = _initializer(value)
        elif key.endswith("_regularizer"):
            config[key] = _regularizer(value)
        elif key.endswith("_constraint"):
            config[key] = _constraint(value)
        elif key == "activation" or key.endswith("_activation"):
            config[key] = _activation(context, name, value)
        elif key in ("layer", "backward_layer", "cell", "forward_layer") and isinstance(value, Mapping):
            config[key] = context.inner(context, value)
        elif key in ("cells", "layers") and isinstance(value, list):
            config[key] = [context.inner(context, item) if isinstance(item, Mapping) else item for item in value]
    if "dtype" in config:
        config["dtype"] = _dtype(config["dtype"])
        if config["dtype"] is None or (plain["class_name"] == "Embedding" and config["dtype"] in _INTEGER_DTYPES):
            del config["dtype"]
    if plain["class_name"] in _SPATIAL and "registered_name" not in plain:
        given = {"th": "channels_first", "tf": "channels_last"}.get(config.get("data_format"), config.get("data_format"))
        if given in (None, "default"):
            given = context.data_format
            if given == "channels_first":
                context.note(name, "data_format not said → channels_first, as the model's other layers have it")
        config["data_format"] = given


def _drop(context: Context, plain: Config) -> None:
    """Leaves out what says nothing about the layer's function."""
    if plain["class_name"] == "InputLayer":
        return
    name, config = plain["name"], plain["config"]
    if "registered_name" in plain:  # a class of the user's may have arguments of these names
        dropped = frozenset({"batch_input_shape", "dynamic"})
    else:
        dropped = old.DROPPED[""] | old.DROPPED.get(plain["class_name"], frozenset())
    if plain["class_name"] == "Embedding":
        dropped = dropped - {"input_dim"}
        if context.generation == 1 and config.get("dropout"):
            context.note(name, "dropout of whole words left out: it had an effect in training only")
    for key in [key for key in config if key in dropped]:
        del config[key]
    for key in [key for key in config if key in old.WITHOUT_EFFECT and plain["class_name"] != "Lambda"]:
        if any(config[key] is value or config[key] == value for value in old.WITHOUT_EFFECT[key]):
            del config[key]


# --- Values ---------------------------------------------------------------------------------------------------------


def _parts(value: Any) -> tuple[str, Config] | None:
    """The name and arguments of an initializer, regularizer or constraint, in any of the ways they were written."""
    if isinstance(value, str):
        return value, {}
    if isinstance(value, Mapping):
        inner = value.get("config")
        if isinstance(value.get("class_name"), str):
            said = value.get("registered_name") if is_custom(value) else None
            return str(said or value["class_name"]), {k: _unwrapped(v) for k, v in inner.items()} if isinstance(
                inner, Mapping
            ) else {}
        if isinstance(value.get("name"), str):  # Keras 1
            return value["name"], {k: v for k, v in value.items() if k != "name"}
    return None


def _initializer(value: Any) -> Any:
    parts = _parts(value)
    if parts is None:
        return value
    name, config = parts
    base = name[:-2] if name.endswith(("V1", "V2")) else name
    known = old.INITIALIZERS.get(base)
    if known is not None:
        base, config = known[0], {**known[1], **config}
    return {
        "class_name": base,
        "config": {k: v for k, v in config.items() if k not in ("dtype", "partition_info", "verify_shape")},
    }


def _regularizer(value: Any) -> Any:
    parts = _parts(value)
    if parts is None:
        return value
    name, config = parts
    return {"class_name": old.REGULARIZERS.get(name, name), "config": {{"l": "l2"}.get(k, k): v for k, v in config.items()}}


def _constraint(value: Any) -> Any:
    parts = _parts(value)
    if parts is None:
        return value
    name, config = parts
    new = {"m": "max_value", "low": "min_value", "high": "max_value"}
    return {"class_name": old.CONSTRAINTS.get(name, name), "config": {new.get(k, k): v for k, v in config.items()}}


def _activation(context: Context, layer: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        inner = value.get("config")
        if value.get("class_name") == "function" and isinstance(inner, str):  # how Keras 3 writes a user's function
            value = value.get("registered_name") if is_custom(value) else inner
        elif isinstance(inner, Mapping) and isinstance(value.get("class_name"), str):
            return context.inner(context, value)
    if not isinstance(value, str):
        return value
    if value == "hard_sigmoid" and context.generation < 3:
        context.note(layer, "hard_sigmoid keeps the slope 0.2 it had; Keras 3's own has 1/6")
        return OLD_HARD_SIGMOID
    return old.ACTIVATIONS.get(value, value)


def _dtype(value: Any) -> Any:
    """A dtype or policy by its name; the scaling of the loss belongs to the optimizer now."""
    if isinstance(value, Mapping):
        inner = value.get("config")
        return inner.get("name") if isinstance(inner, Mapping) else None
    return value


# --- Classes that need more than other names ------------------------------------------------------------------------


def _refusal(plain: Config, found: str, fix: str) -> ModelError:
    return ModelError("Putting an old model into the words of Keras 3.", found=f"layer {plain['name']!r}: {found}", fix=fix)


def _convolution(context: Context, plain: Config) -> None:
    config = plain["config"]
    for pieces in (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3")):
        if all(piece in config for piece in pieces):
            config["kernel_size"] = [config.pop(piece) for piece in pieces]
            context.note(plain["name"], f"{', '.join(pieces)} → kernel_size")
    if (
        plain["class_name"].startswith(("Separable", "Depthwise"))
        and context.generation == 1
        and "depthwise_initializer" in config
    ):
        config.setdefault("pointwise_initializer", config["depthwise_initializer"])
    if plain["class_name"].endswith("Transpose") and isinstance(config.get("output_shape"), list):
        plain["output_shape"] = config["output_shape"]


def _normalization(context: Context, plain: Config) -> None:
    config = plain["config"]
    if config.get("mode", 0) != 0:
        raise _refusal(
            plain,
            f"BatchNormalization with mode={config['mode']!r}, which Keras 2 gave up",
            "pass a layer of your own: custom_objects={'BatchNormalization': …}",
        )
    axis = config.get("axis")
    if isinstance(axis, list) and len(axis) == 1:
        config["axis"] = axis[0]
    if plain["said"] == "SyncBatchNormalization":
        config["synchronized"] = True
    if config.get("renorm"):
        context.note(plain["name"], "renorm left out: it had an effect in training only")
    for key in ("renorm", "renorm_clipping", "renorm_momentum"):
        config.pop(key, None)


def _recurrent(context: Context, plain: Config) -> None:
    config, name = plain["config"], plain["name"]
    if "forget_bias_init" in config:
        config["unit_forget_bias"] = config.pop("forget_bias_init") in ("one", "ones")
        context.note(name, "forget_bias_init → unit_forget_bias")
    if config.get("time_major"):
        raise _refusal(plain, "time_major=True: Keras 3 has the batch first", "save the model again with time_major=False")
    if plain["class_name"].startswith("ConvLSTM"):
        _convolution(context, plain)
    if plain["said"].startswith("CuDNN"):
        config.update(activation="tanh", recurrent_activation="sigmoid")
    if plain["class_name"] in ("GRU", "GRUCell"):
        if plain["said"] == "CuDNNGRU":
            config["reset_after"] = True
        elif "reset_after" not in config and context.generation < 3:
            config["reset_after"] = False
            context.note(name, "reset_after=False, the default of its time")


def _merge(context: Context, plain: Config) -> None:
    config = plain["config"]
    mode = config.get("mode")
    if config.get("mode_type", "raw") != "raw" or not isinstance(mode, str):
        plain["class_name"] = "Lambda"
        config["function"] = mode
        config["function_type"] = config.get("mode_type", "lambda")
        return
    if mode not in old.MERGE_MODES:
        raise _refusal(plain, f"Merge(mode={mode!r}), which has no counterpart", "save the model again without it")
    plain["class_name"] = old.MERGE_MODES[mode]
    kept: Config = {"name": config.get("name", plain["name"])}
    if mode == "concat":
        kept["axis"] = config.get("concat_axis", -1)
    if mode == "dot":
        axes = config.get("dot_axes", -1)
        kept["axes"] = (
            [axis[0] if isinstance(axis, list) and len(axis) == 1 else axis for axis in axes] if isinstance(axes, list) else axes
        )
    plain["config"] = kept
    context.note(plain["name"], f"Merge(mode={mode!r}) → {plain['class_name']}")


def _padding(_context: Context, plain: Config) -> None:
    config = plain["config"]
    padding = config.get("padding")
    if isinstance(padding, Mapping):
        sides = [[padding.get(f"{a}_pad", 0), padding.get(f"{b}_pad", 0)] for a, b in (("top", "bottom"), ("left", "right"))]
        config["padding"] = (
            sides if plain["class_name"] == "ZeroPadding2D" else [padding.get("left_pad", 0), padding.get("right_pad", 0)]
        )
    elif isinstance(padding, list) and len(padding) == 4 and plain["class_name"] == "ZeroPadding2D":
        config["padding"] = [padding[:2], padding[2:]]


def _flatten(_context: Context, plain: Config) -> None:
    plain["config"].setdefault("data_format", "channels_last")  # before Keras 2.2 it kept the order whatever it was


def _input_layer(_context: Context, plain: Config) -> None:
    config = plain["config"]
    shape = config.get("batch_input_shape", config.get("batch_shape"))
    if not isinstance(shape, list):
        shape = [config.get("batch_size"), *config["input_shape"]] if isinstance(config.get("input_shape"), list) else shape
    if config.get("ragged"):
        raise _refusal(plain, "an input of ragged tensors", "pad the sequences and save the model again")
    dtype = _dtype(config.get("input_dtype") or config.get("dtype"))
    plain["config"] = {"name": config.get("name", plain["name"]), "batch_shape": shape}
    if dtype is not None:
        plain["config"]["dtype"] = dtype
    if config.get("sparse"):
        plain["config"]["sparse"] = True
    if config.get("optional"):
        plain["config"]["optional"] = True


def _relu(_context: Context, plain: Config) -> None:
    config = plain["config"]
    if plain["class_name"] == "ReLU" and config.get("negative_slope") is None:
        config.pop("negative_slope", None)
    if plain["class_name"] == "ReLU" and config.get("threshold") is None:
        config.pop("threshold", None)


def _random_size(context: Context, plain: Config) -> None:
    plain["class_name"] = "Identity"
    plain["config"] = {key: value for key, value in plain["config"].items() if key in ("name", "dtype", "trainable")}
    context.note(plain["name"], f"{plain['said']} → Identity: it had an effect in training only")


def _random_crop(context: Context, plain: Config) -> None:
    """Keras 3 leaves the image whole when it predicts; before, the middle was cut out and brought to size."""
    if context.generation < 3:
        plain["class_name"] = "Resizing"
        kept = {key: value for key, value in plain["config"].items() if key in ("name", "dtype", "trainable", "height", "width")}
        plain["config"] = {**kept, "crop_to_aspect_ratio": True}
        context.note(plain["name"], "RandomCrop → Resizing, what it did outside of training")


def _categories(_context: Context, plain: Config) -> None:
    if plain["config"].get("output_mode") == "binary":
        plain["config"]["output_mode"] = "multi_hot"


_SPECIAL: Mapping[str, Callable[[Context, Config], None]] = {
    **dict.fromkeys((name for name, family in old.FAMILIES.items() if family in ("convolution", "separable")), _convolution),
    **dict.fromkeys(
        (name for name, family in old.FAMILIES.items() if family in ("recurrent", "recurrent convolution")), _recurrent
    ),
    "RNN": _recurrent,
    "BatchNormalization": _normalization,
    "Merge": _merge,
    "ZeroPadding1D": _padding,
    "ZeroPadding2D": _padding,
    "Flatten": _flatten,
    "InputLayer": _input_layer,
    "ReLU": _relu,
    "CategoryEncoding": _categories,
    "RandomCrop": _random_crop,
    "RandomHeight": _random_size,
    "RandomWidth": _random_size,
}
