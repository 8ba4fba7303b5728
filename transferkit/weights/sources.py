"""An archive's arrays as matching sees them: each with its layer, its name within the layer, and the layer's class.

Imports the archive's face only.
"""

from __future__ import annotations

import dataclasses
import re

from transferkit.weights.mapping import FileArray
from transferkit.weights.names import kind_of
from transferkit.weights.readers.archive import Archive
from transferkit.weights.torch_layouts import is_torch_variable

__all__ = ["file_arrays", "looks_like_torch"]

# What Keras files of the model itself, outside its layers.
_TOP_LEVEL = "top_level_model_weights"
# Keras 1's names within a wrapper, `forward_lstm_1_W_i`, and with TensorFlow's count behind it, `W_1`.
_OLD_NAME = re.compile(r"(?:(?P<layer>\w+?)_)?(?P<variable>[WUb](?:_[icfozrh])?)(?:_\d+)?")
_WRAPPERS = frozenset({"timedistributed", "bidirectional", "functional", "model", "sequential", "spectralnormalization"})


def looks_like_torch(archive: Archive) -> bool:
    """Whether the file is PyTorch's by what it says or by the names in it."""
    if archive.framework == "torch" or archive.format == "torch":
        return True
    return archive.format in ("safetensors", "npz") and any(
        "." in name and is_torch_variable(name.rpartition(".")[2]) for name in archive.arrays
    )


def file_arrays(archive: Archive) -> list[FileArray]:
    """The arrays of an archive in its order, each with its layer's path and class."""
    kinds = {path: kind for path, (kind, _) in archive.configured.items()}
    kinds |= {layer.name: layer.class_name for layer in archive.layers if layer.class_name}
    dotted = archive.format in ("torch", "safetensors", "npz")
    found = []
    for name, info in archive.arrays.items():
        layer = "" if info.layer == _TOP_LEVEL else info.layer
        plain = info.variable.removeprefix(f"{layer}_") if layer else info.variable
        variable = info.variable if "/" in plain else plain  # Keras 1 named a variable `dense_1_W`
        inner, _, variable = variable.rpartition("/")
        if not inner and (old := _OLD_NAME.fullmatch(variable)) is not None:
            inner, variable = old["layer"] or "", old["variable"]
        path = "/".join(part for part in (layer, inner) if part)
        kind = kinds.get(path, "")
        if not info.variable:
            path, _, variable = (name.replace(".", "/") if dotted else name).rpartition("/")
        elif dotted:
            path = path.replace(".", "/")
        found.append(FileArray(name, info.shape, path, variable, "" if kind_of(kind) in _WRAPPERS else kind))
    return _unnamed_by_position(found)


def _unnamed_by_position(arrays: list[FileArray]) -> list[FileArray]:
    """The arrays with a number for a name where a layer's names say nothing (`uniform1`), as Theano made them up."""
    nameless = {array.path for array in arrays if re.fullmatch(r"(uniform|normal|glorot_\w+|param_?)\d+", array.variable)}
    counts: dict[str, int] = {}
    found = []
    for array in arrays:
        if array.path in nameless:
            place = counts.get(array.path, 0)
            counts[array.path] = place + 1
            array = dataclasses.replace(array, variable=str(place))
        found.append(array)
    return found
