"""Writes a whole Keras model to a file: whole and verified, or not at all. `open_model` is the way back."""

from __future__ import annotations

import json
import os
import zipfile
from typing import Any

from transferkit._keras import keras
from transferkit.class_names import names_among
from transferkit.errors import ModelError, StorageError
from transferkit.storage import atomic_path
from transferkit.weights.saving import add_digests, check_written, said_of
from transferkit.weights.variables import check_built, leaf_layers_of, slots_of
from transferkit.weights.writing import Written, read_back

__all__ = ["save_model"]

_FORMATS = {".keras": "keras", ".h5": "h5", ".hdf5": "h5"}


def save_model(model: Any, path: str | os.PathLike[str], *, include_optimizer: bool = True) -> Written:
    """Writes a model with its architecture, weights and optimizer; an old file there is replaced only by a verified new one.

    The file is of Keras's own format, and plain Keras opens it. Keras's own `model.save` writes over the old file, which is lost
    when the process dies on the way or the disk is full.

    Args:
        model: A built Keras model.
        path: The file; its ending chooses the format: `.keras`, or `.h5` for what older programs read.
        include_optimizer: Whether training can go on with the optimizer's state.

    Returns:
        What was written.

    Raises:
        ModelError: when the model isn't built, or has a layer that can't be written down.
        StorageError: when the ending names no format, the disk refuses, or what is read back isn't what was written.

    Example:
        >>> import keras
        >>> import transferkit as tk
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> print(tk.save_model(model, "small.keras"))
        small.keras: keras, 2 arrays, 32 bytes.
        >>> tk.open_model("small.keras").output_shape
        (None, 2)
    """
    path = os.path.expanduser(os.fspath(path))
    asked = f"Saving the model {getattr(model, 'name', model)!r} to {path!r}."
    kind = _FORMATS.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise StorageError(
            asked,
            found=f"no format of whole models known by the ending of {os.path.basename(path)!r}",
            fix="end it with .keras or .h5; for weights alone, save_weights(model, path)",
        )
    if model.variables or not model.built:
        check_built(model, asked=asked)
    slots = slots_of(model)
    if kind == "h5" and any(slot.dtype == "bfloat16" for slot in slots):
        raise StorageError(asked, found="weights of type bfloat16, which .h5 can't hold", fix="end the path with .keras")
    said = said_of(names_among(layer for _, layer in leaf_layers_of(model)))
    with atomic_path(path) as temporary:
        try:
            keras.saving.save_model(model, str(temporary), include_optimizer=include_optimizer)
        except OSError:
            raise  # the disk's, which says so better
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                asked,
                found=str(error).strip().splitlines()[0],
                cause="a layer whose settings Keras can't write down",
                fix="give your layers a get_config() that returns their arguments; or save_weights(model, path)",
            ) from error
        check_written(temporary, slots, asked)
        if kind == "h5":
            add_digests(temporary, said)
            read_back(temporary, asked)
        elif said:  # beside what Keras reads; the file has checksums of its own
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.writestr("transferkit.json", json.dumps(said))
    return Written(path, kind, len(slots), sum(slot.size * slot.dtype.itemsize for slot in slots))
