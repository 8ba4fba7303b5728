"""Whether pixels are those that a model's own rescaling is made for. May import Keras and the floors below."""

from __future__ import annotations

from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.heads import leaf_layers

__all__ = ["unscaled"]

#: The share of its range below which what a rescaling gives is nearly one value.
_FLAT = 0.02


def unscaled(model: Any, x: Any) -> str:
    """Words for inputs that a model's own rescaling makes nearly one value of: pixels from 0 to 1 where 0 to 255 are meant.

    Args:
        model: The model.
        x: Some rows of its inputs.
    """
    leaves = tf.nest.flatten(x)
    if len(leaves) != 1 or not hasattr(leaves[0], "shape") or getattr(leaves[0], "dtype", None) is None:
        return ""
    pixels = np.asarray(leaves[0])
    if pixels.ndim != 4 or pixels.dtype.kind not in "uif" or not pixels.size:
        return ""
    for path, layer in leaf_layers(model):
        if layer.weights:
            break
        if isinstance(layer, keras.layers.Rescaling):
            low, high = float(pixels.min()), float(pixels.max())
            spread = (high - low) * float(np.max(np.abs(layer.scale)))
            if 0 < spread < _FLAT * max(1.0, float(np.max(np.abs(layer.offset)))):
                return (
                    f"The pixels go from {low:g} to {high:g}, which the model's layer {path!r} makes nearly one grey of: it "
                    "takes pixels from 0 to 255. Leave out a division by 255 that comes before it."
                )
    return ""
