"""Whether a model's upgraded configuration may be built: every name in it is on the allow-list or given by the user.

All problems are found before anything is built, so that all missing custom objects are asked for at once.
Pure: imports the allow-list and the errors only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transferkit.building import allowed
from transferkit.building.upgrading_layers import OLD_HARD_SIGMOID
from transferkit.errors import ModelError, TransferKitError, UnsafeFileError, did_you_mean, shorten

__all__ = ["Findings", "names_of", "operation_name", "refuse", "vet"]

_FILES = ("vocabulary", "idf_weights", "filepath")


@dataclass(frozen=True)
class Findings:
    """What stands between an upgraded configuration and a model.

    Args:
        custom: Name of each class or function that only its author has -> the layers that need it.
        code: Layers that hold a function's code (`Lambda`) -> what the file says of it.
        operations: Layers that call a function of TensorFlow that isn't on the allow-list -> its name.
        unsafe: What a file must not hold, one sentence each.
    """

    custom: Mapping[str, tuple[str, ...]]
    code: Mapping[str, str]
    operations: Mapping[str, str]
    unsafe: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """One sentence for each."""
        listed = [f"{name!r} in layer {shorten(layers)} is no class or function of Keras" for name, layers in self.custom.items()]
        listed += [f"layer {layer!r} is a Lambda: {said}" for layer, said in self.code.items()]
        listed += [f"layer {layer!r} calls {name}, which has no counterpart here" for layer, name in self.operations.items()]
        return [*listed, *self.unsafe]

    @property
    def needed(self) -> list[str]:
        """The keys to give in `custom_objects`."""
        return [name.rpartition(">")[2] for name in self.custom] + list(self.code) + list(self.operations)


def names_of(plain: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under which `custom_objects` may hold a layer's class, the most exact first."""
    registered = plain.get("registered_name", "")
    listed = [registered, plain["said"], registered.rpartition(">")[2], plain["said"].rpartition(">")[2], plain["class_name"]]
    return tuple(dict.fromkeys(name for name in listed if name))


def operation_name(plain: Mapping[str, Any]) -> str:
    """The function that an operation layer calls, as the file words it: `math.add`, `Mul`, `__operators__.getitem`."""
    config = plain["config"]
    if plain.get("operation"):
        return f"keras.{plain['class_name']}"
    if plain["class_name"] == "TensorFlowOpLayer":
        node = config.get("node_def")
        return str(node.get("op", "")) if isinstance(node, Mapping) else "TensorFlowOpLayer"
    for key in ("function", "method_name", "attr_name"):
        if isinstance(config.get(key), str):
            return str(config[key])
    return str(plain["class_name"])


def vet(architecture: Mapping[str, Any], *, given: Iterable[str] = (), operations: Iterable[str] = ()) -> Findings:
    """What keeps the upgraded `architecture` from being built.

    Args:
        architecture: A model in the plain form of `upgrading`.
        given: The names in `custom_objects`.
        operations: The functions of TensorFlow that can be put into words of Keras.
    """
    known, calls = set(given), set(operations)
    custom: dict[str, list[str]] = {}
    code: dict[str, str] = {}
    unknown_calls: dict[str, str] = {}
    unsafe: list[str] = []
    for plain in _layers(architecture):
        name, config = plain["name"], plain["config"]
        if "layers" in config and plain["class_name"] in ("Sequential", "Functional"):
            continue
        if known & {name, str(config.get("name"))}:
            continue
        is_given = bool(known & set(names_of(plain)))
        if plain.get("operation") or plain["class_name"] in allowed.OPERATION_LAYERS:
            if operation_name(plain) not in calls and not is_given:
                unknown_calls[name] = operation_name(plain)
            continue
        if plain["class_name"] == "Lambda" and "registered_name" not in plain:
            if not known & {str(config.get("function"))}:
                code[name] = _said_of(config)
            continue
        own = "registered_name" not in plain and plain["class_name"] in allowed.LAYERS | allowed.RETIRED
        if not own and not is_given:
            custom.setdefault(names_of(plain)[0], []).append(name)
        for wanted in _functions(config):
            if wanted not in known and wanted.rpartition(">")[2] not in known:
                custom.setdefault(wanted, []).append(name)
        if own and not is_given:
            unsafe += [f"layer {name!r}: {problem}" for problem in _unsafe_values(config)]
    return Findings({k: tuple(dict.fromkeys(v)) for k, v in custom.items()}, code, unknown_calls, tuple(unsafe))


def refuse(findings: Findings, *, path: str, given: Iterable[str] = ()) -> None:
    """Raises the one error for everything found; none when nothing was.

    Raises:
        UnsafeFileError: when the file asks for what no custom object can mend, or holds code.
        ModelError: when only names are missing.
    """
    if not findings.problems:
        return
    kind: type[TransferKitError] = UnsafeFileError if findings.unsafe or findings.code else ModelError
    known = [*given, *allowed.ACTIVATIONS]
    hints = "".join(did_you_mean(name, [k for k in known if k not in findings.needed]) for name in findings.needed[:3])
    objects = ", ".join(f"{name!r}: …" for name in findings.needed)
    causes = []
    if findings.custom:
        causes.append("the model uses classes or functions of its author, which only Python code has")
    if findings.code:
        causes.append("a Lambda holds a function as Python bytecode, which is never run from a file")
    if findings.operations:
        causes.append("the model calls TensorFlow between its layers")
    fix = f"open_model(path, custom_objects={{{objects}}})" if objects else "get the model from a source you trust"
    if findings.code or findings.operations:
        fix += ", with the function that stands at a layer's name taking the layer's inputs"
    raise kind(f"Opening {path!r}.", found=findings.problems, cause="; ".join(causes) or None, fix=fix + hints)


def _layers(architecture: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    waiting: list[Mapping[str, Any]] = [architecture]
    while waiting:
        plain = waiting.pop()
        yield plain
        waiting.extend(reversed(list(allowed.inner_layers(plain["config"]))))


def _said_of(config: Mapping[str, Any]) -> str:
    function = config.get("function")
    if isinstance(function, str) and config.get("function_type") == "function":
        return f"it calls a function named {function!r}"
    return "it holds Python bytecode"


def _functions(config: Mapping[str, Any]) -> Iterator[str]:
    """The names of activations, regularizers and constraints that Keras doesn't have."""
    for key, value in config.items():
        if key == "activation" or key.endswith("_activation"):
            if isinstance(value, str) and value not in allowed.ACTIVATIONS and value != OLD_HARD_SIGMOID:
                yield value
        elif isinstance(value, Mapping) and isinstance(value.get("class_name"), str) and "said" not in value:
            kind = key.rpartition("_")[2]
            known = {"regularizer": allowed.REGULARIZERS, "constraint": allowed.CONSTRAINTS}.get(kind)
            if known is not None and value["class_name"] not in known:
                yield value["class_name"]


def _unsafe_values(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key in _FILES and isinstance(value, str):
            yield f"its {key} is a file to open, {value[:60]!r}"
        elif key == "dtype" and value not in allowed.DTYPES:
            yield f"its dtype is {str(value)[:60]!r}"
        elif key.endswith(("_initializer", "_regularizer", "_constraint", "activation")):
            if value is not None and not isinstance(value, (str, Mapping)):
                yield f"its {key} is {str(value)[:60]!r}"
        elif isinstance(value, Mapping) and "said" not in value:
            yield f"its {key} is an object of the kind {str(value.get('class_name', value))[:60]!r}"
        elif isinstance(value, list) and any(isinstance(item, Mapping) and "said" not in item for item in value):
            yield f"its {key} holds objects"
