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
from transferkit.class_names import names_among
from transferkit.errors import ModelError, WeightsError, shorten
from transferkit.storage import atomic_path
from transferkit.weights.digest import digest_of
from transferkit.weights.readers import open_archive
from transferkit.weights.readers.checks import tensor_digest
from transferkit.weights.variables import Slot, check_built, leaf_layers_of, slots_of, values_of
from transferkit.weights.writing import Written, format_of, not_as_written, read_back, write_flat, write_legacy

__all__ = ["add_digests", "check_written", "said_of", "save_weights"]


def save_weights(model: Any, path: str | os.PathLike[str], *, class_names: Sequence[str] = ()) -> Written:
    """Writes a model's weights, and not its optimizer; an old file at the path is replaced only by a whole, verified new one.

    Args:
        model: A built Keras model.
        path: The file; its ending chooses the format: `.weights.h5`, `.h5` (legacy), `.safetensors` or `.npz`.
        class_names: The names of the classes in the order of the head's units, kept in the file for `WeightLoader.classes`; those
            that the builder was given, where nothing is said.

    Returns:
        What was written.

    Raises:
        ModelError: when the model isn't built, has no variables, or has other classes.
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
    known = names_among(layer for _, layer in leaf_layers_of(model))
    if class_names and known and tuple(class_names) != known:
        raise ModelError(
            asked,
            found=f"class_names={list(class_names)!r}, where the model's units stand for {list(known)!r}",
            fix="leave class_names out",
        )
    said = said_of(tuple(class_names) or known)
    arrays = {slot.name: _value(slot.variable) for slot in slots}
    with atomic_path(path) as temporary:
        if kind == "weights_h5":
            model.save_weights(temporary, overwrite=True)
            check_written(temporary, slots, asked)
            add_digests(temporary, said)
        elif kind == "legacy_h5":
            write_legacy(temporary, _legacy_layers(model, slots), arrays, said, version=str(keras.__version__))
        else:
            write_flat(kind, temporary, arrays, {"format": "keras", **said}, asked)
        nbytes = read_back(temporary, asked)
    return Written(path, kind, len(arrays), nbytes)


def said_of(class_names: Sequence[str]) -> dict[str, str]:
    """What a file says of the classes, as its readers look for it; nothing where there are no names."""
    return {"class_names": json.dumps(list(class_names))} if class_names else {}


def _value(variable: Any) -> Callable[[], np.ndarray[Any, Any]]:
    return lambda: values_of(variable)


def check_written(path: Path, slots: Sequence[Slot], asked: str) -> None:
    """Reads a file that Keras wrote, and finds every value of the model in it.

    The HDF5 library puts writing off until objects go, and what fails then is printed and forgotten (h5py's `__dealloc__`).

    Raises:
        StorageError: when values are missing.
    """
    try:
        with open_archive(path, trusted=True) as archive:
            found = {digest_of(archive.read(name)) for name in archive.arrays}
    except WeightsError as error:
        raise not_as_written(asked, error.found[0]) from error
    lost = [
        slot.name for slot in slots if not _has_a_way_of_its_own(slot.owner) and digest_of(values_of(slot.variable)) not in found
    ]
    if lost:
        raise not_as_written(asked, f"without the values of {shorten(lost)}")


def _has_a_way_of_its_own(layer: Any) -> bool:
    """Whether the layer's class decides itself what of its variables goes into a file, and in which form."""
    own = type(layer).save_own_variables is not keras.layers.Layer.save_own_variables
    return own and (not type(layer).__module__.startswith("keras.") or getattr(layer, "lora_enabled", False))


def add_digests(path: Path, said: Mapping[str, str]) -> None:
    """Puts each array's SHA-256 into an HDF5 file of Keras's, and `said` at its root."""
    with h5py.File(path, "r+") as file:

        def add(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                value = np.asarray(node[()])
                if node.attrs.get("dtype") == "bfloat16":  # HDF5 has no such type; Keras keeps it as bytes and says so
                    value = value.view(np.dtype(str(node.attrs["dtype"])))
                node.attrs["sha256"] = tensor_digest(name, value)

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
