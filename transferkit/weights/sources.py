"""An archive's arrays as matching sees them: each with its layer, its name within the layer, and the layer's class.

Imports the archive's face only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transferkit.weights.matching import FileArray
from transferkit.weights.names import kind_of
from transferkit.weights.readers.archive import Archive

__all__ = ["configured_layers", "file_arrays"]

# What Keras files of the model itself, outside its layers.
_TOP_LEVEL = "top_level_model_weights"
_WRAPPERS = frozenset({"timedistributed", "bidirectional", "functional", "model", "sequential", "spectralnormalization"})


def configured_layers(config: Mapping[str, Any] | None) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Class and configuration of each layer a model's configuration tells of, by the path of its names, in its order."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        own = node.get("config") if isinstance(node, Mapping) else None
        # Keras 1 and 2 kept a Sequential's configuration as a bare list.
        listed = own.get("layers") if isinstance(own, Mapping) else own
        for layer in listed if isinstance(listed, Sequence) and not isinstance(listed, str) else ():
            inner = layer.get("config") if isinstance(layer, Mapping) else None
            name = (inner.get("name") if isinstance(inner, Mapping) else None) or (
                layer.get("name") if isinstance(layer, Mapping) else None
            )
            if isinstance(name, str) and isinstance(layer.get("class_name"), str):
                yield f"{prefix}{name}", layer["class_name"], inner if isinstance(inner, Mapping) else {}
                yield from walk(layer, f"{prefix}{name}/")

    try:
        return {path: (kind, own) for path, kind, own in walk(config, "")}
    except RecursionError:  # a hostile nesting; the configuration is only evidence here
        return {}


def file_arrays(archive: Archive) -> list[FileArray]:
    """The arrays of an archive in its order, each with its layer's path and class."""
    kinds = {path: kind for path, (kind, _) in configured_layers(archive.config).items()}
    kinds |= {layer.name: layer.class_name for layer in archive.layers if layer.class_name}
    found = []
    for name, info in archive.arrays.items():
        inner, _, variable = info.variable.rpartition("/")
        path = "/".join(part for part in (info.layer if info.layer != _TOP_LEVEL else "", inner) if part)
        if not info.variable:
            path, _, variable = name.rpartition("/")
        kind = kinds.get(path, "")
        found.append(FileArray(name, info.shape, path, variable, "" if kind_of(kind) in _WRAPPERS else kind))
    return found
