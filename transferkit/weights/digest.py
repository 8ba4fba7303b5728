"""A digest of an array that costs little more than reading it, to tell whether values are still the same.

Small arrays are hashed as they are. A large one is cut into rows of 8,128 bytes, 127 lines of the cache, so that pages that
change places don't meet the same columns; the sums of the rows and of the columns of its 64-bit words are hashed. A change of
one place changes both; it tells damage and exchange, and is no protection against forgery.
Pure: NumPy and the standard library only.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["SMALL", "Digest", "blocks", "digest_of", "name_of"]

SMALL = 1 << 16  # bytes up to which an array is hashed as it is
_COLUMNS = 1016
_ROW = 8 * _COLUMNS
_STEP = 4 * _ROW  # a multiple of the 64 bytes to which memory is aligned
_BLOCK = 512 * _ROW  # bytes at a time: few enough to be in the cache still when they are summed


@functools.lru_cache(64)
def name_of(dtype: np.dtype[Any]) -> str:
    """The name of a dtype, which NumPy puts together anew at every call."""
    return str(dtype.name)


@functools.lru_cache(256)
def _begin(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    return f"{name_of(dtype)}{shape}".encode()


def blocks(nbytes: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of an array begin and end: whole rows, and of about equal size."""
    count = max(1, round(nbytes / _BLOCK))
    step = -(-nbytes // (count * _STEP)) * _STEP
    for start in range(0, nbytes, step or 1):
        yield start, min(start + step, nbytes)


class Digest:
    """The digest of an array whose bytes come block by block, as `blocks` says.

    Args:
        dtype: The array's dtype.
        shape: Its shape.
        columns: Whether the columns are summed, too; else there is only a digest of the rows.
    """

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], *, columns: bool = True) -> None:
        self._begin = _begin(dtype, shape)
        self._small = math.prod(shape) * dtype.itemsize <= SMALL
        self._rows: list[np.ndarray[Any, Any]] = []
        self._columns: list[np.ndarray[Any, Any]] = []
        self._sums_columns = columns
        self._rest = b""

    def update(self, block: np.ndarray[Any, Any]) -> None:
        """Takes the next bytes."""
        whole = 0 if self._small else block.size // _ROW * _ROW
        if whole:
            words = block[:whole].view(np.uint64).reshape(-1, _COLUMNS)
            self._rows.append(np.add.reduce(words, axis=1))
            if self._sums_columns:
                self._columns.append(np.add.reduce(words, axis=0))
        if whole < block.size:
            self._rest += block[whole:].tobytes()

    def hexdigests(self) -> tuple[str, str]:
        """The digest of the rows, which depends on every byte and tells two readings apart, and that of rows and columns."""
        digest = hashlib.blake2b(self._begin, digest_size=16)
        for rows in self._rows:
            digest.update(rows.data)
        digest.update(self._rest)
        of_rows = digest.hexdigest()
        if self._columns:
            digest.update(np.asarray(sum(self._columns[1:], start=self._columns[0])).data)
        return of_rows, digest.hexdigest()


def digest_of(array: np.ndarray[Any, Any]) -> str:
    """32 hexadecimal digits that depend on dtype, shape and every byte of the array.

    Example:
        >>> digest_of(np.zeros(3, "float32")) == digest_of(np.zeros(3, "float32"))
        True
    """
    if array.nbytes <= SMALL:
        return hashlib.blake2b(_begin(array.dtype, array.shape) + array.tobytes(), digest_size=16).hexdigest()
    digest = Digest(array.dtype, array.shape)
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start, end in blocks(raw.size):
        digest.update(raw[start:end])
    return digest.hexdigests()[1]
