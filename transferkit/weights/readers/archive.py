"""The common face of every weights file: named arrays, their shapes and dtypes first, their bytes only when asked for.

A reader opens one format and gives an `Archive`. Nothing here or in a reader knows Keras or TensorFlow; NumPy only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit.weights.readers.source import Piece

__all__ = ["Archive", "ArrayInfo", "LayerInfo", "Limits", "Stretch", "never_plain"]


@dataclass(frozen=True)
class Limits:
    """What a file may ask for before it is refused.

    Args:
        max_bytes: Of all arrays together, once in memory.
        max_arrays: How many arrays, layers or members.
        max_metadata_bytes: Of configuration, headers and names.

    Example:
        >>> Limits(max_bytes=1 << 30).max_arrays
        100000
    """

    max_bytes: int = 64 << 30
    max_arrays: int = 100_000
    max_metadata_bytes: int = 64 << 20


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a file, without its content.

    Args:
        name: Unique in the file, as the file's own words give it, parts joined by `/` (`.` for PyTorch): `dense/kernel`.
        shape: Its shape as stored.
        dtype: Its dtype as stored; one of ml_dtypes for bfloat16 and float8.
        layer: The layer it belongs to, in the file's order of layers; empty where the format knows no layers.
        variable: Its name within the layer (`kernel`); empty where that isn't known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layer: str = ""
    variable: str = ""

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes once in memory."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Stretch:
    """Where an array's bytes lie as they will be in memory: in one piece, in C order, of the machine's byte order.

    Args:
        piece: What they are a stretch of.
        offset: Where they begin.
        name: The array's name, as its file's own SHA-256 is made of it.
        dtype: Its dtype.
        shape: Its shape.
        sha256: The SHA-256 the file keeps of it, to be checked by whoever reads it; empty where there is none.
    """

    piece: Piece
    offset: int
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    sha256: str = ""

    @property
    def nbytes(self) -> int:
        """How many bytes they are."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, buffer: memoryview, start: int = 0) -> None:
        """Fills `buffer` with the array's bytes from `start` on."""
        self.piece.read_into(buffer, self.offset + start, repr(self.name))


def never_plain(name: str) -> Stretch | None:
    """Of a reader whose arrays must be worked out."""
    del name
    return None


@dataclass(frozen=True)
class LayerInfo:
    """A layer as the file lists it.

    Args:
        name: The layer's name in the file.
        class_name: Its Keras class, where the file says it; else empty.
        arrays: The names of its arrays in the order in which they were written.
    """

    name: str
    class_name: str = ""
    arrays: tuple[str, ...] = ()


@dataclass(frozen=True)
class Archive:
    """The named arrays of one file and what the file says of itself.

    Args:
        path: The file.
        format: `legacy_h5`, `weights_h5`, `keras`, `safetensors`, `npz`, `torch`, `tf_checkpoint` or `tfjs`.
        arrays: Every array that is a weight, in the file's order. Optimizer state is kept apart in `optimizer_arrays`.
        layers: The layers in the file's order, where the format knows layers.
        framework: What wrote the file, as far as it says: `keras`, `tf_keras`, `tensorflow`, `torch`, or empty.
        version: That framework's version, or empty.
        config: The model's configuration (a dict from JSON, unchecked), where the file holds one.
        training_config: Loss, metrics and optimizer as the file words them, or None.
        metadata: Whatever else the file says of itself, as text.
        class_names: The names of the classes in the order of the head's units, where the file says them.
        optimizer_arrays: The optimizer's slots.
        read: Gives one array by name. It checks what it reads against `arrays`.
        stretch: Says where an array lies whose bytes need no more than being copied; None where `read` does more than that.
        close: Releases the file.
    """

    path: str
    format: str
    arrays: Mapping[str, ArrayInfo]
    read: Callable[[str], np.ndarray[Any, Any]] = field(repr=False)
    layers: tuple[LayerInfo, ...] = ()
    framework: str = ""
    version: str = ""
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    training_config: Mapping[str, Any] | None = field(default=None, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    class_names: tuple[str, ...] = ()
    optimizer_arrays: Mapping[str, ArrayInfo] = field(default_factory=dict, repr=False)
    stretch: Callable[[str], Stretch | None] = field(default=never_plain, repr=False)
    close: Callable[[], None] = field(default=lambda: None, repr=False)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @functools.cached_property
    def configured(self) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
        """Class and configuration of each layer the configuration tells of, by the path of its names, in its order."""
        try:
            return {path: (kind, own) for path, kind, own in _configured(self.config, "")}
        except RecursionError:  # a hostile nesting; the configuration is only evidence here
            return {}

    @property
    def nbytes(self) -> int:
        """The bytes of all weights once in memory."""
        return sum(info.nbytes for info in self.arrays.values())


def _configured(node: Any, prefix: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    own = node.get("config") if isinstance(node, (dict, Mapping)) else None  # a dict is told much sooner than a Mapping
    # Keras 1 and 2 kept a Sequential's configuration as a bare list.
    listed = own.get("layers") if isinstance(own, (dict, Mapping)) else own
    for layer in listed if isinstance(listed, (list, Sequence)) and not isinstance(listed, str) else ():
        if not isinstance(layer, (dict, Mapping)):
            continue
        said = layer.get("config")
        inner: Mapping[str, Any] = said if isinstance(said, (dict, Mapping)) else {}
        name = inner.get("name") or layer.get("name")
        if isinstance(name, str) and isinstance(layer.get("class_name"), str):
            yield f"{prefix}{name}", layer["class_name"], inner
            yield from _configured(layer, f"{prefix}{name}/")
