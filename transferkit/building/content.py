"""What a graph computes, told by content: its layers' settings and all else they hold but their weights.

What is kept under such a mark is taken for the same without a look, so two that differ must never share one: what can't be told
in full has none. May import Keras and the floors below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.graph import NOISE, Call, Ref, is_functional
from transferkit.building.parts import held_by

__all__ = ["held_tensors", "keras_settings", "structure_of", "vocabularies"]


class _UntoldError(Exception):
    """Something that can't be told by content."""


def structure_of(
    calls: Iterable[Call], *, quiet: frozenset[int] = frozenset(), named: frozenset[int] = frozenset()
) -> str | None:
    """A digest of what the calls compute, their weights' values apart; None when some of it is code of the user's.

    Args:
        calls: The calls, in order.
        quiet: Indices of those in inference mode: noise that is off has no settings.
        named: Indices of those whose names count.
    """
    mark = hashlib.sha256()
    numbers: dict[int, int] = {}  # a layer that is called twice isn't two layers of the same settings
    try:
        for index, call in enumerate(calls):
            mark.update(_settings(call.operation, quiet=index in quiet))
            _add_held(mark, call.operation)
            for part in (call.args, call.kwargs, call.outputs, call.training, call.heard, index in quiet):
                _add(mark, part)
            _add(mark, numbers.setdefault(id(call.operation), len(numbers)))
            _add(mark, call.operation.name if index in named else None)
            for variable in getattr(call.operation, "weights", ()):
                mark.update(f"{variable.name} {variable.shape} {variable.dtype};".encode())
    except _UntoldError:
        return None
    return mark.hexdigest()


def _settings(operation: Any, *, quiet: bool) -> bytes:
    """What an operation is and how it is set.

    Code of the user's can't be told by content: a file's text says nothing of the modules it imports, nor of what a function
    closes over.
    """
    if isinstance(operation, keras.layers.Lambda) or is_functional(operation) or "call" in getattr(operation, "__dict__", {}):
        raise _UntoldError
    if any(kind.__module__.split(".")[0] not in ("keras", "tensorflow", "builtins") for kind in type(operation).__mro__):
        raise _UntoldError
    try:
        # Names are numbered by Keras as they come, and who trains changes nothing about what is given.
        config = {key: value for key, value in operation.get_config().items() if key not in ("name", "trainable")}
        text = "off" if quiet and isinstance(operation, tuple(NOISE)) else json.dumps(config, sort_keys=True)
    except (NotImplementedError, TypeError, ValueError) as error:  # no configuration, or one that is no plain text
        raise _UntoldError from error
    if _names_custom_code(config):
        raise _UntoldError
    return f"{type(operation).__module__}.{type(operation).__qualname__}\0{text}\0".encode()


def _names_custom_code(config: Any) -> bool:
    """Whether a configuration names a function or class that isn't Keras's: an activation of the user's, say."""
    if isinstance(config, dict):
        return config.get("registered_name") is not None or any(map(_names_custom_code, config.values()))
    return isinstance(config, (list, tuple)) and any(map(_names_custom_code, config))


def vocabularies(layer: Any) -> list[tuple[str, ...]]:
    """The words of a layer that looks them up, and of those it holds; they are learned, yet neither settings nor weights."""
    # A layer for texts holds one for their words, and both name them.
    return list(dict.fromkeys(map(_words, filter(_looks_up, held_by(layer)))))


def _looks_up(part: Any) -> bool:
    return hasattr(part, "get_vocabulary")


def _words(part: Any) -> tuple[str, ...]:
    return tuple(map(str, part.get_vocabulary()))


def held_tensors(operation: Any) -> list[Any]:
    """The tensors and arrays that an operation holds."""
    return list(filter(_is_tensor, held_by(operation)))


def _is_tensor(part: Any) -> bool:
    return isinstance(part, (tf.Tensor, np.ndarray))


def _add_held(mark: Any, operation: Any) -> None:
    """Adds what an operation holds that is neither a setting nor a weight."""
    for part in held_by(operation):
        if _is_tensor(part):
            _add(mark, part)
        elif _looks_up(part):
            kept: dict[str, Any] = {}
            part.save_own_variables(kept)  # the weights of the words, in some modes
            _add(mark, [_words(part), kept])


def keras_settings() -> dict[str, str]:
    """What layers ask of Keras and TensorFlow while they run."""
    return {
        "float type": keras.config.floatx(),
        "epsilon": repr(keras.config.epsilon()),
        "image data format": keras.config.image_data_format(),
        "flash attention": str(keras.config.is_flash_attention_enabled()),
        "TensorFloat-32": str(tf.config.experimental.tensor_float_32_execution_enabled()),
    }


def _add(mark: Any, value: Any) -> None:
    """Adds a value to a digest, with its type and to the last bit."""
    if isinstance(value, dict):
        _add(mark, sorted(value))
        _add(mark, [value[key] for key in sorted(value)])
    elif isinstance(value, (list, tuple)):
        mark.update(f"{type(value).__name__}{len(value)}(".encode())
        for item in value:
            _add(mark, item)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, slice, Ref)):
        mark.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, (np.ndarray, np.generic, tf.Tensor)):
        try:
            array = np.asarray(value)
        except (NotImplementedError, TypeError, ValueError) as error:  # a symbolic tensor, a ragged one
            raise _UntoldError from error
        mark.update(f"array {array.dtype.str}{array.shape}:".encode())
        if array.dtype.kind == "O":
            _add(mark, array.tolist())
        else:
            mark.update(np.ascontiguousarray(array).tobytes())
    else:
        raise _UntoldError
