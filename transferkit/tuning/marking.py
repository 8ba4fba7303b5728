"""Marks of the batches that a `tf.data.Dataset` gave, by which a later pass over it is known for the same or for another.

A data set that shuffles anew in each pass gives an order that follows from its seed and from how often it was gone over before,
by whomever. So a run that goes on looks for the pass by what it gives. May import Keras and the floors below.
"""

from __future__ import annotations

from typing import Any

from transferkit._keras import tf

__all__ = ["Marks"]

#: How many of the last marks are kept; more than are ever read ahead.
_KEPT = 4096
#: How many values of a batch's each array a mark is of, evenly spread.
_VALUES = 256
_FIRST = -1


class Marks:
    """The marks of a pass: a number for each batch, of what it and all batches before it in the pass hold."""

    def __init__(self) -> None:
        self._table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, default_value=-1)

    def marked(self, dataset: Any) -> Any:
        """The data set, which leaves its marks when it is gone over."""

        def passing(state: Any, item: Any) -> Any:
            number, before = state
            mark = _mark(before, item)
            place = number % _KEPT
            keys = tf.stack([place, tf.where(number == 0, tf.constant(_FIRST, tf.int64), place)])
            with tf.control_dependencies([self._table.insert(keys, tf.stack([mark, mark]))]):
                return (number + 1, mark), tf.nest.map_structure(tf.identity, item, expand_composites=True)

        zero = tf.constant(0, tf.int64)
        return dataset.scan((zero, zero), passing)

    def at(self, number: int) -> int:
        """The mark of a batch of the pass that was begun last; -1 where there is none."""
        return int(self._table.lookup(tf.constant(number % _KEPT, tf.int64)))

    def first(self) -> int:
        """The mark of its first batch; -1 where there is none."""
        return int(self._table.lookup(tf.constant(_FIRST, tf.int64)))


def _mark(before: Any, item: Any) -> Any:
    parts = [tf.strings.as_string(before)]
    for leaf in tf.nest.flatten(item, expand_composites=True):
        flat = tf.reshape(leaf, [-1])
        spread = flat[:: tf.maximum(1, tf.size(flat) // _VALUES)]
        parts += [tf.io.serialize_tensor(tf.shape(leaf)), tf.io.serialize_tensor(spread)]
    return tf.strings.to_hash_bucket_fast(tf.strings.join(parts), 2**62)
