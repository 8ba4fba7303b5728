"""BatchNorm in inference mode as what it is, a factor and an offset for each channel, worked out once instead of in every batch.

Keras works them out from four variables each time, some ten small operations for each layer: more than half of the graph of a
convolutional backbone, in tracing and in running. The bits are the same, because the operations are; whether Keras still takes
these is tried out once in a process. May import Keras and the floors below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.graph import Call, Spec, makes_mask

__all__ = ["Norm", "apply_norm", "is_kerass", "norm_constants", "simple_norms"]

Shape: TypeAlias = tuple[int | None, ...]

#: Values in a row of the input from which on its last two axes are taken for one: TensorFlow spreads a few channels slowly, but
#: each such layer takes a millisecond more to trace.
_LARGE = 1 << 15
#: Layers that TensorFlow sums nothing in. The order of a sum of several is its own choice ((x * a + b) + y isn't taken as it
#: stands), which it makes only where all of it is of one shape.
_SUMLESS = tuple(
    getattr(keras.layers, name)
    for name in (
        *("ReLU", "LeakyReLU", "Activation", "Conv1D", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense", "Flatten"),
        *("ZeroPadding2D", "Cropping2D", "AveragePooling2D", "MaxPooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D"),
    )
)


class Norm(NamedTuple):
    """A BatchNorm that can be taken for a factor and an offset.

    Args:
        shape: Of its input.
        joined: Whether the last two axes are taken for one.
    """

    shape: Shape
    joined: bool


def simple_norms(calls: Iterable[Call], specs: dict[int, Spec], *, loud: frozenset[int]) -> dict[int, Norm]:
    """The calls of float32 BatchNorm in inference mode, by index.

    None where a mask may be about, which only Keras's own call hands on.
    """
    calls = tuple(calls)
    if not all(is_kerass(call) for call in calls):
        return {}
    found = {}
    summed = {number for call in calls if type(call.operation) not in _SUMLESS for number in call.inputs}
    for index, call in enumerate(calls):
        layer = call.operation
        if type(layer) is not keras.layers.BatchNormalization or index in loud or layer.compute_dtype != "float32":
            continue
        (number,) = call.inputs
        if specs[number].dtype == "float32" and layer.activity_regularizer is None:
            found[index] = Norm(specs[number].shape, joined=not summed.intersection(call.outputs))
    return found if found and _formula_holds() else {}


def is_kerass(call: Call) -> bool:
    """Whether the call runs no code of the user's, and no mask comes of it."""
    operation = call.operation
    if isinstance(operation, keras.layers.Lambda) or makes_mask(operation):
        return False
    return type(operation).__module__.split(".")[0] == "keras"


def norm_constants(layer: Any, norm: Norm) -> tuple[Any, Any]:
    """The factor and the offset of a BatchNorm, by Keras's own operations."""
    shape = norm.shape
    factor = tf.math.rsqrt(_value(layer.moving_variance) + layer.epsilon)
    if layer.scale:
        factor = factor * _value(layer.gamma)
    offset = -_value(layer.moving_mean) * factor
    if layer.center:
        offset = _value(layer.beta) - _value(layer.moving_mean) * factor
    (axis,) = layer.axis if isinstance(layer.axis, (list, tuple)) else (layer.axis,)
    last = len(shape) - 1
    if axis not in (-1, last):
        spread = [1] * len(shape)
        spread[axis] = -1
        return tf.reshape(factor, spread), tf.reshape(offset, spread)
    if norm.joined and last > 1 and None not in shape[1:] and math.prod(length or 1 for length in shape[1:]) >= _LARGE:
        return tf.tile(factor, shape[-2:-1]), tf.tile(offset, shape[-2:-1])
    return factor, offset


def _value(variable: Any) -> Any:
    return tf.convert_to_tensor(variable.value)


def apply_norm(x: Any, constants: tuple[Any, Any]) -> Any:
    """What the BatchNorm gives for `x`."""
    factor, offset = constants
    if factor.shape.rank == 1 and factor.shape[0] != x.shape[-1]:
        return tf.reshape(tf.reshape(x, (-1, factor.shape[0])) * factor + offset, (-1, *x.shape[1:]))
    return x * factor + offset


@functools.cache
def _formula_holds() -> bool:
    """Whether this Keras's BatchNorm gives what `apply_norm` gives, to the bit."""
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 4, 5, 6)).astype("float32")
    made = []
    for settings in ({"axis": -1}, {"axis": 1, "scale": False}, {"center": False}):
        layer = keras.layers.BatchNormalization(epsilon=1.1e-3, dtype="float32", **settings)
        layer.build(x.shape)
        for variable in layer.weights:
            variable.assign(random.uniform(0.1, 2.0, variable.shape).astype("float32"))
        made.append(layer)
    constants = [norm_constants(layer, Norm(x.shape, joined=True)) for layer in made]

    def both(tensor: Any, given: Any) -> Any:
        pairs = zip(given, made, strict=True)
        return [(apply_norm(tensor, one), layer(tensor, training=False)) for one, layer in pairs]

    found = tf.function(both, autograph=False)(tf.constant(x), constants)
    return all(np.array_equal(ours, wanted) for ours, wanted in found)
