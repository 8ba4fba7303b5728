"""Which layers TensorFlow's graph rewriter leaves as they stand.

It puts a sum or product of several terms into an order of its own, by the shapes and the names of what it finds: of
(x * a + b) + y it may make x * a + (b + y). So what goes into such a sum must be written as Keras writes it, under the same
names, for the bits to be Keras's. Seen with TensorFlow 2.21 on additions after BatchNorm (MobileNetV2, NASNet) and on
`hard_swish` (MobileNetV3).

May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transferkit._keras import keras
from transferkit.building.graph import Call

__all__ = ["apart", "stands_apart"]

_LAYERS = tuple(
    getattr(keras.layers, name)
    for name in (
        *("Conv1D", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense", "ReLU", "Activation", "Flatten", "ZeroPadding2D"),
        *("Cropping2D", "AveragePooling2D", "MaxPooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D"),
    )
)
_ACTIVATIONS = tuple(getattr(keras.activations, name) for name in ("linear", "relu", "relu6", "sigmoid", "tanh", "softmax"))


def apart(calls: Iterable[Call]) -> frozenset[int]:
    """The calls, by index, whose outputs go only where the rewriter finds no sum or product to draw them into."""
    calls = tuple(calls)
    drawn = {number for call in calls if not stands_apart(call.operation) for number in call.inputs}
    return frozenset(index for index, call in enumerate(calls) if not drawn.intersection(call.outputs))


def stands_apart(operation: Any) -> bool:
    """Whether an operation is a layer of Keras's without a sum or product that another's could be drawn into."""
    if type(operation) not in _LAYERS:
        return False
    if type(operation) is keras.layers.ReLU:
        return not operation.negative_slope and not operation.threshold
    return getattr(operation, "activation", None) in (None, *_ACTIVATIONS)
