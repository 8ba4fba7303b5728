"""Augmentation in feature space: Gaussian noise on features (DeVries & Taylor, "Dataset Augmentation in Feature Space", 2017).

The noise follows from the seed, the epoch and the step alone, so a resumed run draws what one draws that was never stopped. May
import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transferkit._keras import tf
from transferkit.tuning.features import Features

__all__ = ["feature_noise"]

#: Rows from which the standard deviations are told.
_ROWS = 2048


def feature_noise(features: Features, *, amount: float, seed: int) -> Callable[[Any, Any, Any], Any]:
    """A function that adds noise to a batch of features.

    Args:
        features: Of the training rows.
        amount: The noise's standard deviation as a share of that of each channel of the last axis.
        seed: Of the run.

    Returns:
        Inputs, epoch, step → inputs.
    """
    places = tf.range(min(features.rows, _ROWS), dtype=tf.int64)
    if features.places is not None:
        places = tf.gather(tf.constant(features.places), places)
    some = tf.nest.flatten(features.read()(features.tensors(), places))
    spreads = [_spread(leaf) * amount if leaf.dtype.is_floating else None for leaf in some]

    def augment(x: Any, epoch: Any, step: Any) -> Any:
        pair = tf.constant([seed & 0x7FFFFFFF, seed >> 31], tf.int32)
        for number in (epoch, step):
            pair = tf.random.experimental.stateless_fold_in(pair, tf.cast(number, tf.int32))
        leaves = []
        for index, (leaf, spread) in enumerate(zip(tf.nest.flatten(x), spreads, strict=True)):
            if spread is None:  # a mask, or numbers of words
                leaves.append(leaf)
                continue
            noise = tf.random.stateless_normal(tf.shape(leaf), tf.random.experimental.stateless_fold_in(pair, index))
            leaves.append(leaf + tf.cast(spread * noise, leaf.dtype))
        return tf.nest.pack_sequence_as(x, leaves)

    return augment


def _spread(leaf: Any) -> Any:
    values = tf.cast(leaf, tf.float32)
    return tf.math.reduce_std(values, axis=list(range(max(len(values.shape) - 1, 1))))
