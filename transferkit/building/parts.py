"""What a layer holds in its attributes, however deep. May import Keras and the floors below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transferkit._keras import keras

__all__ = ["held_by", "parts_of"]


#: Layers of Keras's that hold no other and nothing but settings and weights, which needn't be looked through.
_PLAIN = frozenset(
    getattr(keras.layers, name)
    for name in (
        *("Conv1D", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense", "BatchNormalization", "ReLU", "Activation"),
        *("Add", "Multiply", "Concatenate", "Dropout", "ZeroPadding2D", "Cropping2D", "Flatten", "Reshape", "Rescaling"),
        *("AveragePooling2D", "MaxPooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D", "LayerNormalization"),
    )
)


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
        if type(item) in _PLAIN and not isinstance(getattr(item, "activation", None), keras.layers.Layer):
            continue
        if isinstance(item, keras.layers.Layer):
            waiting.extend(vars(item).values())
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)


def parts_of(layer: Any) -> Iterator[Any]:
    """The layer and those it holds (a wrapper's, a block of the user's)."""
    return (item for item in held_by(layer) if isinstance(item, keras.layers.Layer))
