"""Features in fewer bytes: float16, bfloat16, or int8 with a scale for each channel of each block of rows.

What it costs is measured while it is done: the largest change of a value, against the largest value of its tensor. Blocks are
scaled by themselves so that one pass over the data is enough. May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transferkit._keras import tf
from transferkit.errors import DataError

__all__ = ["Encoder", "numpy_dtype", "reader"]

Array = np.ndarray[Any, Any]


def numpy_dtype(name: str) -> Any:
    """NumPy's dtype of that name, bfloat16 too."""
    return np.dtype(tf.as_dtype(name).as_numpy_dtype)


class Encoder:
    """Turns what a prefix gives for a block of rows into what is kept of it.

    Args:
        dtype: What floating-point values are kept in; float32 keeps them as they are.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._changes = [0.0]  # appended to by several threads

    @property
    def rounding(self) -> float:
        """The largest change so far, against the largest value of the same tensor in the same block."""
        return max(self._changes)

    def scaled(self, values: Sequence[Array]) -> list[int]:
        """Which of the tensors get scales; their scales are kept after all tensors, in this order."""
        return [index for index, array in enumerate(values) if self.dtype == "int8" and array.dtype.kind in "fV"]

    def encode(self, values: Sequence[Array]) -> list[Array]:
        """The tensors as they are kept, then the scales, one row for the whole block."""
        scaled = self.scaled(values)
        kept, scales = [], []
        for index, array in enumerate(values):
            if index in scaled:
                scale = _scale(array)
                whole = np.rint(array.astype("float32") / np.where(scale > 0, scale, 1)).astype("int8")
                kept.append(whole)
                scales.append(scale.reshape(1, -1))
                self._note(array, whole * scale)
            elif self.dtype in ("float16", "bfloat16") and array.dtype.kind in "fV" and array.dtype.itemsize > 2:
                with np.errstate(over="ignore"):
                    small = array.astype(numpy_dtype(self.dtype))
                kept.append(small)
                self._note(array, small.astype(array.dtype))
            else:
                kept.append(array)
        return [*kept, *scales]

    def _note(self, exact: Array, kept: Array) -> None:
        largest = float(np.max(np.abs(exact.astype("float32")), initial=0.0))
        change = float(np.max(np.abs(kept - exact), initial=0.0))
        if not np.isfinite(change):
            raise DataError(
                f"Keeping features as {self.dtype}.",
                found=f"values that it can't hold, up to {largest:.3g}",
                fix='.cache(True, dtype="bfloat16"), which has the range of float32, or no dtype at all',
            )
        self._changes.append(change / largest if largest else 0.0)


def _scale(array: Array) -> Array:
    """A 127th of the largest size of each channel of the last axis."""
    axes = tuple(range(max(array.ndim - 1, 1)))
    largest: Array = np.max(np.abs(array.astype("float32")), axis=axes, initial=0.0)
    return np.asarray(largest / 127, "float32")


def _read_plain(kept: Any, places: Any) -> Any:
    found = tuple(tf.gather(values, places) for values in kept)
    return found[0] if len(found) == 1 else found


def reader(scales: Sequence[int | None], *, rows: int, block: int) -> Callable[[Any, Any], Any]:
    """Gives the features at some places, from tensors of what is kept.

    Args:
        scales: For each tensor the number of the one with its scales, or None.
        rows: In a view.
        block: Rows that share their scales.
    """
    if all(scale is None for scale in scales):
        return _read_plain
    blocks = -(-rows // block)

    def read(kept: Any, places: Any) -> Any:
        found = []
        for values, scale in zip(kept, scales, strict=False):  # the scales stand after the tensors
            picked = tf.gather(values, places)
            if scale is not None:
                rank = len(picked.shape)
                factor = tf.gather(kept[scale], places // rows * blocks + places % rows // block)
                shape = [-1, *[1] * (rank - 2), factor.shape[-1]] if rank > 1 else [-1]
                picked = tf.cast(picked, tf.float32) * tf.reshape(factor, shape)
            found.append(picked)
        return found[0] if len(found) == 1 else tuple(found)

    return read
