"""The state of callbacks and of random number generators, as plain values and arrays, and back.

A callback with `state_dict()` and `load_state_dict(state)` says itself what it keeps. Of any other, the attributes that hold
plain values or arrays are kept, which is all the state that Keras's own have. May import Keras and the floors below.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.tuning.checkpoint import Array, pack, unpack

__all__ = ["CallbackStates", "load_random_state", "random_state", "random_variables"]

#: What every callback has, and what Keras's `CSVLogger` finds out anew from its file.
_NOT_STATE = {"model", "_model", "params", "validation_data", "append", "append_header"}


def _has_protocol(callback: Any) -> bool:
    return callable(getattr(callback, "state_dict", None)) and callable(getattr(callback, "load_state_dict", None))


def _plain(value: Any) -> Any:
    """The value with tensors as arrays."""
    if tf.is_tensor(value) and hasattr(value, "numpy"):
        return value.numpy()
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _packs(value: Any) -> bool:
    try:
        pack(_plain(value), {}, "")
    except (TypeError, ValueError):
        return False
    return True


class CallbackStates:
    """What the callbacks of a phase keep.

    Args:
        callbacks: The callbacks, before training.
    """

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._callbacks = list(callbacks)
        # Arrays that a callback was made with come with it again; they may be a whole data set.
        self._given = {id(value): value for item in self._callbacks for value in vars(item).values() if _is_array(value)}

    def unkept(self) -> list[str]:
        """For each callback of the user's that holds what can't be kept, words for it."""
        found = []
        for item in self._callbacks:
            if _has_protocol(item) or type(item).__module__.split(".")[0] in ("keras", "transferkit"):
                continue
            names = [
                name
                for name, value in vars(item).items()
                if name not in _NOT_STATE
                and not callable(value)
                and not isinstance(value, (Path, keras.Layer, keras.Variable, tf.Variable))
                and not _packs(value)
            ]
            if names:
                found.append(
                    f"{type(item).__name__} holds {', '.join(f'{name} ({type(vars(item)[name]).__name__})' for name in names)}"
                )
        return found

    def pack(self, arrays: dict[str, Array]) -> list[Any]:
        """The state of all, as JSON takes it, its arrays in `arrays`."""
        return [[type(item).__name__, self._one(item, arrays, f"callback/{at}")] for at, item in enumerate(self._callbacks)]

    def _one(self, item: Any, arrays: dict[str, Array], name: str) -> Any:
        if _has_protocol(item):
            return pack(_plain(item.state_dict()), arrays, name)
        state: dict[str, Any] = {}
        for key, value in vars(item).items():
            if key in _NOT_STATE or callable(value) or id(value) in self._given:
                continue
            try:
                state[key] = pack(_plain(value), arrays, f"{name}.{key}")
            except (TypeError, ValueError):
                continue
        file = getattr(item, "csv_file", None)
        if isinstance(item, keras.callbacks.CSVLogger) and file is not None and not file.closed:
            file.flush()
            state["csv_file"] = file.tell()
        return state

    def prepare(self, saved: list[Any]) -> None:
        """Before they begin: has a `CSVLogger` go on in its file, from where it was."""
        for item, state in self._matched(saved):
            path = Path(getattr(item, "filename", ""))
            if isinstance(item, keras.callbacks.CSVLogger) and "csv_file" in state and path.is_file():
                with open(path, "r+b") as file:
                    file.truncate(state["csv_file"])
                item.append = True

    def load(self, saved: list[Any], arrays: Mapping[str, Array]) -> None:
        """Gives them the state that `pack` took, once they have begun."""
        for item, state in self._matched(saved):
            if _has_protocol(item):
                item.load_state_dict(unpack(state, arrays))
                continue
            for key, value in state.items():
                if key != "csv_file":
                    setattr(item, key, unpack(value, arrays))

    def _matched(self, saved: list[Any]) -> list[tuple[Any, Any]]:
        """Each callback with its state: the first of a class with the first of that name, and so on."""
        left = list(saved)
        found = []
        for item in self._callbacks:
            at = next((at for at, (name, _) in enumerate(left) if name == type(item).__name__), None)
            if at is not None:
                found.append((item, left.pop(at)[1]))
        return found


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or tf.is_tensor(value)


def random_variables() -> list[Any]:
    """The variables behind Keras's and TensorFlow's global generators."""
    held = random.getstate()  # Keras draws the first seed of its generator from here
    made = tf.function(lambda: keras.random.uniform(()), autograph=False).get_concrete_function()
    random.setstate(held)
    return [*made.variables, tf.random.get_global_generator().state]


def random_state(arrays: dict[str, Array]) -> Any:
    """Python's and NumPy's global generators, as JSON takes it."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return pack([version, np.array(numbers, "uint64"), gauss, str(kind), np.asarray(keys), *rest], arrays, "random")


def load_random_state(state: Any, arrays: Mapping[str, Array]) -> None:
    """Goes back to what `random_state` took."""
    version, numbers, gauss, kind, keys, *rest = unpack(state, arrays)
    random.setstate((version, tuple(map(int, numbers)), gauss))
    np.random.set_state((kind, keys, *rest))
