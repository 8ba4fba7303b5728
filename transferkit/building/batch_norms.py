"""BatchNorm in inference mode as what it is, a factor and an offset for each channel, worked out once instead of in every batch.

Keras works them out from four variables each time, some ten small operations for each layer: more than half of the graph of a
convolutional backbone, in tracing and in running. The bits are the same, because the operations are; whether Keras still takes
these is tried out once in a process. May import Keras and the floors below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from transferkit._keras import is_kerass_own, keras, tf
from transferkit.building.graph import Call, Spec, makes_mask
from transferkit.building.rewriting import apart

__all__ = ["Norms", "Shape", "apply_norm", "is_kerass", "norm_constants", "simple_norms", "spread"]

Shape: TypeAlias = tuple[int | None, ...]

#: Values in a row of the input from which on its last two axes are taken for one: TensorFlow spreads a few channels slowly, but
#: each such layer takes a millisecond more to trace.
_LARGE = 1 << 14
#: A multiple of what a processor takes at once of a vector.
_AT_ONCE = 16


def simple_norms(
    calls: Iterable[Call], specs: dict[int, Spec], *, loud: frozenset[int], summed: bool = False
) -> dict[int, Shape]:
    """The calls of float32 BatchNorm in inference mode whose output isn't summed, by index, with the shape of their input.

    None where a mask may be about, which only Keras's own call hands on.

    Args:
        calls: Of the graph.
        specs: Of all tensors.
        loud: Indices of calls in training mode.
        summed: Whether those are wanted too whose output goes into a sum, which have other bits when they are simplified.
    """
    calls = tuple(calls)
    if not all(is_kerass(call) for call in calls):
        return {}
    found = {}
    free = (frozenset(range(len(calls))) if summed else apart(calls)) - loud
    for index, call in enumerate(calls):
        layer = call.operation
        if type(layer) is not keras.layers.BatchNormalization or index not in free or layer.compute_dtype != "float32":
            continue
        (number,) = call.inputs
        if specs[number].dtype == "float32" and layer.activity_regularizer is None:
            found[index] = specs[number].shape
    return found if found and _formula_holds() else {}


def is_kerass(call: Call) -> bool:
    """Whether the call runs no code of the user's, and no mask comes of it."""
    operation = call.operation
    if isinstance(operation, keras.layers.Lambda) or makes_mask(operation):
        return False
    return is_kerass_own(operation)


class Norms:
    """BatchNorms whose factors and offsets are handed to a graph as two vectors: a graph is traced and called faster with few
    arguments.

    Args:
        layers: The layers.
        shapes: Of their inputs.
        single: The places of those whose constants are wanted one for each channel, as a fused kernel takes them.
    """

    def __init__(self, layers: Sequence[Any], shapes: Sequence[Shape], *, single: Collection[int] = ()) -> None:
        self._layers, self._shapes, self._single = tuple(layers), tuple(shapes), frozenset(single)
        self._sizes = [math.prod(layer.moving_variance.shape) for layer in layers]
        self._axes = [spread(layer, shape) for layer, shape in zip(layers, shapes, strict=True)]
        # One operation on many layers has the bits of one on each where none of these ends within what a processor takes at
        # once. A layer without a scale or an offset has a formula of its own.
        self._together = [
            place
            for place, (layer, size) in enumerate(zip(layers, self._sizes, strict=True))
            if layer.scale and layer.center and not size % _AT_ONCE
        ]

    def constants(self) -> tuple[Any, Any]:
        """All factors, and all offsets, one after the other, by Keras's own operations on what the layers hold now."""
        found: list[tuple[Any, Any]] = [(None, None)] * len(self._layers)
        together = [self._layers[place] for place in self._together]
        if together:
            sizes = [self._sizes[place] for place in self._together]
            epsilon = np.repeat(np.array([layer.epsilon for layer in together], "float32"), sizes)
            gamma, beta, mean, variance = (
                tf.concat([_value(getattr(layer, name)) for layer in together], axis=0)
                for name in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            factor = tf.math.rsqrt(variance + epsilon) * gamma
            pairs = zip(tf.split(factor, sizes), tf.split(beta - mean * factor, sizes), strict=True)
            for place, pair in zip(self._together, pairs, strict=True):
                found[place] = pair
        for place, layer in enumerate(self._layers):
            factor, offset = found[place]
            if factor is None:
                factor, offset = norm_constants(layer)
            times = self._times(place)
            found[place] = (factor, offset) if times == 1 else (tf.tile(factor, [times]), tf.tile(offset, [times]))
        factors, offsets = zip(*found, strict=True)
        return tf.concat(factors, axis=0), tf.concat(offsets, axis=0)

    def taken_apart(self, factors: Any, offsets: Any) -> list[tuple[Any, Any]]:
        """Factor and offset of each, in a shape that spreads over its input."""
        sizes = [size * self._times(place) for place, size in enumerate(self._sizes)]
        pairs = zip(tf.split(factors, sizes), tf.split(offsets, sizes), strict=True)
        return [
            pair if axis is None else (tf.reshape(pair[0], axis), tf.reshape(pair[1], axis))
            for pair, axis in zip(pairs, self._axes, strict=True)
        ]

    def _times(self, place: int) -> int:
        """How many times the channels come in the axis that is joined of two; 1 where none is."""
        shape = self._shapes[place]
        large = len(shape) > 2 and None not in shape[1:] and math.prod(length or 1 for length in shape[1:]) >= _LARGE
        return int(shape[-2] or 1) if large and self._axes[place] is None and place not in self._single else 1


def spread(layer: Any, shape: Shape) -> list[int] | None:
    """The shape in which the channels spread over an input whose last axis isn't theirs; None where it is."""
    (axis,) = layer.axis if isinstance(layer.axis, (list, tuple)) else (layer.axis,)
    if axis in (-1, len(shape) - 1):
        return None
    spread = [1] * len(shape)
    spread[axis] = -1
    return spread


def norm_constants(layer: Any) -> tuple[Any, Any]:
    """The factor and the offset of each channel, as Keras works them out."""
    factor = tf.math.rsqrt(_value(layer.moving_variance) + layer.epsilon)
    if layer.scale:
        factor = factor * _value(layer.gamma)
    offset = -_value(layer.moving_mean) * factor
    if layer.center:
        offset = _value(layer.beta) - _value(layer.moving_mean) * factor
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
    x = random.normal(size=(3, 4, 5, 32)).astype("float32")
    made = []
    for settings in ({"axis": -1}, {"axis": 1, "scale": False}, {"center": False}, {"epsilon": 1e-5}, {"axis": 2}):
        layer = keras.layers.BatchNormalization(**{"epsilon": 1.1e-3, "dtype": "float32", **settings})
        layer.build(x.shape)
        for variable in layer.weights:
            variable.assign(random.uniform(0.1, 2.0, variable.shape).astype("float32"))
        made.append(layer)
    norms = Norms(made, [x.shape] * len(made))

    pairs = zip(norms.taken_apart(*norms.constants()), made, strict=True)
    return all(np.array_equal(apply_norm(tf.constant(x), one), layer(x, training=False)) for one, layer in pairs)
