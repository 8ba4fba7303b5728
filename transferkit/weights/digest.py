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
from typing import Any

import numpy as np

__all__ = ["BLOCK", "Digest", "digest_of", "name_of"]

_SMALL = 1 << 16
_COLUMNS = 1016
BLOCK = 512 * 8 * _COLUMNS  # bytes at a time: few enough to be in the cache still when they are summed


@functools.lru_cache(64)
def name_of(dtype: np.dtype[Any]) -> str:
    """The name of a dtype, which NumPy puts together anew at every call."""
    return str(dtype.name)


class Digest:
    """The digest of an array whose bytes come block by block.

    Args:
        dtype: The array's dtype.
        shape: Its shape.
    """

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._digest = hashlib.blake2b(f"{name_of(dtype)}{shape}".encode(), digest_size=16)
        self._small = math.prod(shape) * dtype.itemsize <= _SMALL
        self._rows: list[np.ndarray[Any, Any]] = []
        self._columns: np.ndarray[Any, Any] | int = 0
        self._rest = b""

    def update(self, block: np.ndarray[Any, Any]) -> None:
        """Takes the next bytes; every block but the last is of `BLOCK` bytes."""
        if self._small:
            self._digest.update(block.data)
            return
        whole = block.size // (8 * _COLUMNS) * (8 * _COLUMNS)
        words = block[:whole].view(np.uint64).reshape(-1, _COLUMNS)
        self._rows.append(np.add.reduce(words, axis=1))
        self._columns = self._columns + np.add.reduce(words, axis=0)
        self._rest = block[whole:].tobytes()

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        if not self._small:
            self._digest.update(np.concatenate(self._rows).data)
            self._digest.update(np.asarray(self._columns, np.uint64).data)
            self._digest.update(self._rest)
        return self._digest.hexdigest()


def digest_of(array: np.ndarray[Any, Any]) -> str:
    """32 hexadecimal digits that depend on dtype, shape and every byte of the array.

    Example:
        >>> digest_of(np.zeros(3, "float32")) == digest_of(np.zeros(3, "float32"))
        True
    """
    if array.nbytes <= _SMALL:
        begin = f"{name_of(array.dtype)}{array.shape}".encode()
        return hashlib.blake2b(begin + array.tobytes(), digest_size=16).hexdigest()
    digest = Digest(array.dtype, array.shape)
    array = np.ascontiguousarray(array)
    raw = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
    for start in range(0, raw.size, BLOCK):
        digest.update(raw[start : start + BLOCK])
    return digest.hexdigest()
