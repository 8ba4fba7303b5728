"""Whatever `Model.fit` takes as data, brought to one form: batches in a fixed order, each input beside its own label.

Accepted everywhere the library takes data: `(x, y)` or `(x, y, sample_weight)` of arrays (nested dicts and tuples too), a batched
`tf.data.Dataset`, a `keras.utils.PyDataset`, any iterable or generator of batches, and `Data`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from transferkit._keras import keras, tf
from transferkit.errors import DataError

__all__ = ["Batch", "as_batch", "batches", "is_arrays", "row_count", "rows_of"]


class Batch(NamedTuple):
    """Rows that belong together; each part a NumPy array or a nested structure of them, or None where the data has none."""

    x: Any
    y: Any
    sample_weight: Any


def is_arrays(data: Any) -> bool:
    """Whether `data` is `(x,)`, `(x, y)` or `(x, y, sample_weight)` in memory rather than something that gives batches."""
    return isinstance(data, (tuple, list)) and 1 <= len(data) <= 3 and all(_in_memory(part) for part in data)


def _in_memory(part: Any) -> bool:
    if part is None:
        return True
    leaves = tf.nest.flatten(part)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)


def as_batch(item: Any) -> Batch:
    """One element of a data set, as Keras reads it: `x`, `(x, y)` or `(x, y, sample_weight)`, tensors as arrays."""
    parts = item if isinstance(item, tuple) else (item,)
    if not 1 <= len(parts) <= 3:
        raise DataError(
            "Reading a batch.",
            found=f"a tuple of {len(parts)} parts; Keras takes (x,), (x, y) or (x, y, sample_weight)",
            fix="put several inputs into one tuple or dict: ((a, b), y)",
        )
    arrays = [None if part is None else tf.nest.map_structure(np.asarray, part) for part in parts]
    return Batch(*arrays, *[None] * (3 - len(arrays)))


def rows_of(parts: Any, index: Any) -> tuple[Any, ...]:
    """The rows of in-memory data that a slice or an array of indices picks."""

    def pick(array: Any) -> Any:
        return array[index] if isinstance(index, slice) else np.asarray(array)[index]

    return tuple(None if part is None else tf.nest.map_structure(pick, part) for part in parts)


def batches(data: Any, *, batch_size: int = 32) -> Iterator[Batch]:
    """Goes over `data` once, in its own order.

    Args:
        data: Anything the library takes as data.
        batch_size: Rows in a batch where `data` is arrays; data that comes in batches keeps its own.

    Yields:
        `Batch`es of NumPy arrays; the last may be smaller.

    Raises:
        DataError: when the parts differ in length, or `data` is nothing that can be read.
    """
    if is_arrays(data):
        rows = row_count(data)
        for start in range(0, rows, batch_size):
            yield as_batch(rows_of(data, slice(start, start + batch_size)))
    elif isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise DataError(
                "Going over a PyDataset once.", found="one without an end (`num_batches` is None)", fix="give it a `__len__`"
            )
        for index in range(data.num_batches):
            yield as_batch(data[index])
    elif hasattr(data, "__iter__") and not isinstance(data, (str, bytes, dict)) and not hasattr(data, "shape"):
        for item in data:
            yield as_batch(item)
    else:
        raise DataError(
            "Reading data.",
            found=f"a {type(data).__name__}",
            cause="data comes as (x, y) of arrays, a tf.data.Dataset, a PyDataset or an iterable of batches",
            fix="for arrays, put features and labels into one tuple: (x, y)",
        )


def row_count(parts: Any) -> int:
    """The number of rows that all arrays of in-memory data share.

    Raises:
        DataError: when they don't.
    """
    counts = {
        int(leaf.shape[0]) if len(leaf.shape) else -1 for part in parts if part is not None for leaf in tf.nest.flatten(part)
    }
    if len(counts) != 1 or -1 in counts:
        shapes = [tuple(leaf.shape) for part in parts if part is not None for leaf in tf.nest.flatten(part)]
        raise DataError(
            "Reading arrays as data.",
            found=f"first dimensions that differ: {', '.join(map(str, shapes))}",
            cause="inputs, labels and sample weights must have one row for each example",
        )
    return counts.pop()
