"""The one place that imports TensorFlow and Keras, after checking that they are the ones the package works with.

Everything else says `from transferkit._keras import keras, tf`.
"""

from __future__ import annotations

import tensorflow as tf
from tensorflow import keras

from transferkit.errors import ModelError

__all__ = ["keras", "tf"]

if not hasattr(keras, "ops"):
    raise ModelError(
        "Importing transferkit's parts that train.",
        found=f"tf.keras is Keras {getattr(keras, '__version__', '2')}, the legacy one; transferkit works with Keras 3",
        cause="TF_USE_LEGACY_KERAS is set, or TensorFlow is older than 2.16",
        fix='unset TF_USE_LEGACY_KERAS, or pip install "tensorflow>=2.16"',
    )
if keras.backend.backend() != "tensorflow":
    raise ModelError(
        "Importing transferkit's parts that train.",
        found=f"Keras runs on the backend {keras.backend.backend()!r}; transferkit works on TensorFlow",
        cause="KERAS_BACKEND or ~/.keras/keras.json names another backend",
        fix='set KERAS_BACKEND="tensorflow" before the first import of Keras',
    )
