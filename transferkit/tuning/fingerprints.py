"""What data is, as digests: the inputs by content, whatever batches they come in; and whether they stay the same.

Rows are cut into blocks of one size, and each block is hashed by itself, so that blocks can be hashed side by side. May import
Keras and the floors below.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.data import Batch, Data, batches, is_arrays

__all__ = ["BLOCK", "Repeats", "Rows", "block_mark", "digest", "fingerprint", "fitting_block", "joined_mark", "repeats"]

#: Rows in a block, which is also the batch of the extraction. Larger gains nothing on a CPU (measured 32–256).
BLOCK = 64
#: Sizes for few rows, of which filling up the last block is a part: to 832 where there are 800.
_SIZES, _FEW = (BLOCK, 80, 96), 50 * BLOCK


def fitting_block(rows: int) -> int:
    """The size of blocks with which fewest rows are computed for nothing."""
    return min(_SIZES, key=lambda size: -rows % size) if rows < _FEW else BLOCK


class Rows:
    """Inputs cut into blocks, the last of fewer rows; labels and weights are kept as they pass by.

    Args:
        data: Whatever `fit` takes that ends.
        block: Rows in a block.
    """

    def __init__(self, data: Any, *, block: int = BLOCK) -> None:
        self._data, self._block = data, block
        self._y: list[Any] = []
        self._weights: list[Any] = []

    def blocks(self) -> Iterator[Any]:
        """The inputs, block by block."""
        waiting: list[Any] = []
        count = 0
        block = self._block
        for batch in batches(self._data, batch_size=block):
            if not is_arrays(self._data):
                self._y.append(batch.y)
                self._weights.append(batch.sample_weight)
            waiting.append(batch.x)
            count += _length(batch.x)
            while count >= block:
                rows = _joined(waiting)
                yield tf.nest.map_structure(lambda array: array[:block], rows)
                count -= block
                waiting = [tf.nest.map_structure(lambda array: array[block:], rows)] if count else []
        if count:
            yield _joined(waiting)

    def labels(self) -> Batch:
        """The labels and weights of all rows, once `blocks` has come to its end."""
        if is_arrays(self._data):
            parts = (*self._data, None, None)
            return Batch(None, parts[1], parts[2])
        return Batch(None, _joined(self._y), _joined(self._weights))


def _length(x: Any) -> int:
    return len(tf.nest.flatten(x)[0])


def _joined(parts: list[Any]) -> Any:
    if not parts or parts[0] is None:
        return None
    return parts[0] if len(parts) == 1 else tf.nest.map_structure(lambda *pieces: np.concatenate(pieces), *parts)


def block_mark(x: Any) -> bytes:
    """The digest of one block of inputs."""
    mark = hashlib.sha256()
    for leaf in tf.nest.flatten(x):
        array = np.ascontiguousarray(leaf)
        mark.update(f"{array.dtype.str}{array.shape}".encode())
        mark.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.view(np.uint8).reshape(-1).data)
    return mark.digest()


def joined_mark(marks: Sequence[bytes]) -> str:
    """The digest of all rows from those of their blocks."""
    return hashlib.sha256(b"".join(marks)).hexdigest()


def fingerprint(data: Any) -> tuple[str, Batch]:
    """A digest of all inputs in their order, and the labels and weights met on the way.

    Args:
        data: Whatever `fit` takes that ends.
    """
    rows = Rows(data)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "transferkit-marks") as pool:
        marks = list(_in_order(pool, rows.blocks()))
    return joined_mark(marks), rows.labels()


def _in_order(pool: ThreadPoolExecutor, blocks: Iterator[Any]) -> Iterator[bytes]:
    """The digests, with a few blocks in memory at most."""
    while some := list(itertools.islice(blocks, 16)):
        yield from pool.map(block_mark, some)


def repeats(data: Any) -> str:
    """Why the data may not give the same rows each time it is gone over; empty when nothing speaks against it."""
    if is_arrays(data) or isinstance(data, Data):
        return ""
    if isinstance(data, keras.utils.PyDataset):
        return "" if data.num_batches is not None else "a PyDataset without an end"
    if not hasattr(data, "__iter__") or iter(data) is data:
        return "a generator, which can be gone over only once"
    cardinality = getattr(data, "cardinality", None)
    if cardinality is not None and int(cardinality()) == tf.data.INFINITE_CARDINALITY:
        return "a data set without an end"
    return ""


class Repeats:
    """Whether data gives the same rows again, whatever their order: told from marks of the rows that passed by."""

    #: Of a `Data`, whose order is fixed, the first rows are enough.
    _FIRST = 16

    def __init__(self, data: Any) -> None:
        self._data = data
        self._seen: set[bytes] = set()
        self._done = is_arrays(data)

    def see(self, x: Any) -> None:
        """Notes the rows of a block."""
        if not self._done:
            self._seen.update(_row_marks(x))
            self._done = isinstance(self._data, Data)

    def why_not(self) -> str:
        """Words for what differs, empty where nothing does."""
        if is_arrays(self._data):
            return ""
        some = self._FIRST if isinstance(self._data, Data) else BLOCK
        for batch in itertools.islice(batches(self._data, batch_size=some), 1 if isinstance(self._data, Data) else 4):
            if not self._seen.issuperset(_row_marks(batch.x)):
                return "rows that are different when the data is gone over a second time"
        return ""


def _row_marks(x: Any) -> list[bytes]:
    flat = [np.ascontiguousarray(leaf) for leaf in tf.nest.flatten(x)]
    return [
        hashlib.blake2b(b"".join(array[row].tobytes() for array in flat), digest_size=12).digest() for row in range(len(flat[0]))
    ]


def digest(*parts: Any) -> str:
    """The digest of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
