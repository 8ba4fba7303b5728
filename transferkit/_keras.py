"""The one place that imports TensorFlow and Keras, after checking that they are the ones the package works with.

Everything else says `from transferkit._keras import keras, tf`. The package `keras` comes with TensorFlow, and its classes are
those of `tf.keras`; `tf.keras` itself leaves out some public parts (`keras.saving` in Keras 3.15).
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from transferkit.errors import ModelError

__all__ = ["is_kerass_own", "keras", "tf"]

if tf.keras.Model is not keras.Model:
    raise ModelError(
        "Importing transferkit's parts that work on models.",
        found=f"tf.keras is version {tf.keras.__version__}, the legacy one, and not Keras 3",
        cause="TF_USE_LEGACY_KERAS is set, or TensorFlow is older than 2.16",
        fix='unset TF_USE_LEGACY_KERAS, or pip install "tensorflow>=2.16"',
    )
if keras.backend.backend() != "tensorflow":
    raise ModelError(
        "Importing transferkit's parts that work on models.",
        found=f"Keras runs on the backend {keras.backend.backend()!r}; transferkit works on TensorFlow",
        cause="KERAS_BACKEND or ~/.keras/keras.json names another backend",
        fix='set KERAS_BACKEND="tensorflow" before the first import of Keras',
    )


def is_kerass_own(thing: Any) -> bool:
    """Whether the object's class is one of Keras's, and not the user's."""
    return type(thing).__module__.split(".")[0] == "keras"
