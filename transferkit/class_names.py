"""The names of the classes that a layer's units stand for. A Dense layer has no place for them, so they are kept beside it.

May import Keras and the floors below.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["class_names_of", "name_classes", "names_among"]

#: They are known as long as the layer lives in this process; files that the library writes hold them too.
_names: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def name_classes(layer: Any, names: Sequence[str]) -> None:
    """Says what the units of a layer stand for; nothing is said of it any more where there are no names."""
    _names[layer] = tuple(names)


def class_names_of(layer: Any) -> tuple[str, ...]:
    """The names of the classes by unit; () where none are known."""
    return _names.get(layer, ())


def names_among(layers: Iterable[Any]) -> tuple[str, ...]:
    """The names that the one layer has for which there are any; () where there is none, or are several."""
    found = list({id(layer): class_names_of(layer) for layer in layers if class_names_of(layer)}.values())
    return found[0] if len(found) == 1 else ()
