"""What a layer holds in its attributes, however deep. May import Keras and the floors below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transferkit._keras import keras

__all__ = ["held_by", "parts_of"]


def held_by(layer: Any) -> Iterator[Any]:
    """The layer and what it and the layers it holds have in their attributes, lists and dicts; each once."""
    seen: set[int] = set()
    waiting = [layer]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, keras.layers.Layer):
            waiting.extend(vars(item).values())
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)


def parts_of(layer: Any) -> Iterator[Any]:
    """The layer and those it holds (a wrapper's, a block of the user's)."""
    return (item for item in held_by(layer) if isinstance(item, keras.layers.Layer))
