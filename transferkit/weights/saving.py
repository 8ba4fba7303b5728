"""Writes the weights of a Keras model to a file: whole and verified, or not at all. May import Keras."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from transferkit._keras import keras
from transferkit.storage import atomic_path
from transferkit.weights.readers.checks import tensor_digest
from transferkit.weights.variables import check_built, slots_of, values_of
from transferkit.weights.writing import Written, format_of, read_back, write_flat, write_legacy

__all__ = ["save_weights"]


def save_weights(model: Any, path: str | os.PathLike[str], *, class_names: Sequence[str] = ()) -> Written:
    """Writes a model's weights, and not its optimizer; an old file at the path is replaced only by a whole, verified new one.

    Args:
        model: A built Keras model.
        path: The file; its ending chooses the format: `.weights.h5`, `.h5` (legacy), `.safetensors` or `.npz`.
        class_names: The names of the classes in the order of the head's units, kept in the file for `WeightLoader.classes`.

    Returns:
        What was written.

    Raises:
        ModelError: when the model isn't built or has no variables.
        StorageError: when the ending names no format, the format can't hold a dtype, or the disk refuses.

    Example:
        >>> import keras
        >>> import transferkit as tk
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> print(tk.save_weights(model, "small.safetensors"))
        small.safetensors: safetensors, 2 arrays, 32 bytes.
    """
    path = os.path.expanduser(os.fspath(path))
    asked = f"Writing weights to {path!r}."
    kind = format_of(path, asked)
    check_built(model, asked=asked)
    slots = slots_of(model)
    said = {"class_names": json.dumps(list(class_names))} if class_names else {}
    arrays = {slot.name: _value(slot.variable) for slot in slots}
    with atomic_path(path) as temporary:
        if kind == "weights_h5":
            model.save_weights(temporary, overwrite=True)
            _add_digests(temporary, said)
        elif kind == "legacy_h5":
            write_legacy(temporary, _legacy_layers(model, slots), arrays, said, version=str(keras.__version__))
        else:
            write_flat(kind, temporary, arrays, {"format": "keras", **said}, asked)
        nbytes = read_back(temporary, asked)
    return Written(path, kind, len(arrays), nbytes)


def _value(variable: Any) -> Callable[[], np.ndarray[Any, Any]]:
    return lambda: values_of(variable)


def _add_digests(path: Path, said: Mapping[str, str]) -> None:
    with h5py.File(path, "r+") as file:

        def add(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                node.attrs["sha256"] = tensor_digest(name, np.asarray(node[()]))

        file.visititems(add)
        for key, value in said.items():
            file.attrs[key] = value


def _legacy_layers(model: Any, slots: Sequence[Any]) -> dict[str, list[str]]:
    """The names of the weights of each top-level layer in the order in which plain Keras reads them back."""
    names = {id(slot.variable): slot.name for slot in slots}
    found: dict[str, list[str]] = {}
    taken: set[int] = set()
    for layer in model.layers:
        own = [*layer.trainable_weights, *layer.non_trainable_weights]
        found[layer.name] = [names[id(v)] for v in own]
        taken.update(id(v) for v in own)
    rest = [names[id(v)] for v in [*model.trainable_weights, *model.non_trainable_weights] if id(v) not in taken]
    found["top_level_model_weights"] = rest
    return found
