"""The inputs of rows that were judged, fetched from the data once more. May import Keras and the floors below."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferkit._keras import tf
from transferkit.data import Data, batches
from transferkit.errors import DataError
from transferkit.evaluation.rows import Rows

__all__ = ["files_of", "inputs_of"]


def files_of(data: Any, index: NDArray[np.int64]) -> tuple[str, ...]:
    """The files that chosen rows were read from; () for data that comes from elsewhere."""
    files = data.files if isinstance(data, Data) else ()
    return tuple(files[row] for row in index) if files else ()


def inputs_of(data: Any, index: NDArray[np.int64], rows: Rows, *, output: str = "") -> Any:
    """The inputs of chosen rows, after checking that the data comes in the order in which it was evaluated.

    Args:
        data: What was evaluated.
        index: The rows wanted.
        rows: What was collected from it.
        output: The output that was judged.

    Returns:
        Inputs as the data has them, an array or a structure of arrays, in the order of `index`.

    Raises:
        DataError: when a label isn't the one that was evaluated in its place.
    """
    asked = "Fetching the inputs of rows."
    wanted = {int(row): place for place, row in enumerate(index)}
    found: list[Any] = [None] * len(index)
    at = 0
    for batch in batches(data, batch_size=256):
        if batch.y is None:
            raise DataError(asked, found="data without labels", fix="give the data that was evaluated, with its labels")
        y = batch.y[output] if output and isinstance(batch.y, dict) else batch.y
        labels = np.asarray(tf.nest.flatten(y)[0])
        n = len(labels)
        if labels.ndim == 2 and labels.shape[1] > 1 and rows.kind == "multiclass":
            labels = labels.argmax(axis=1)
        known = rows.labels[at : at + n].reshape(-1)
        if labels.size != known.size or not np.allclose(labels.reshape(-1), known):
            raise DataError(
                asked,
                found=f"other labels than were evaluated, within rows {at} to {at + n - 1}",
                cause="the data is shuffled anew each time it is gone over, or is other data",
                fix="turn shuffling off, or take the inputs from arrays",
            )
        for row in range(at, at + n):
            if row in wanted:
                found[wanted[row]] = tf.nest.map_structure(lambda array, i=row - at: np.asarray(array)[i], batch.x)
        at += n
    if at != len(rows):
        raise DataError(asked, found=f"{at} rows, where {len(rows)} were evaluated", fix="give the data that was evaluated")
    if not found:
        return None
    return tf.nest.map_structure(lambda *parts: np.stack(parts), *found)
