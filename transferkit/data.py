"""Whatever `Model.fit` takes as data, brought to one form: batches in a fixed order, each input beside its own label.

Accepted everywhere the library takes data: `(x, y)` or `(x, y, sample_weight)` of arrays (nested dicts and tuples too), a batched
`tf.data.Dataset`, a `keras.utils.PyDataset`, any iterable or generator of batches, and `Data`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from transferkit._keras import keras, tf
from transferkit.errors import DataError
from transferkit.images import find_images, read_images

__all__ = ["Batch", "Data", "as_batch", "batches", "is_arrays", "row_count", "rows_of", "split"]

Array = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """Rows that belong together; each part a NumPy array or a nested structure of them, or None where the data has none."""

    x: Any
    y: Any
    sample_weight: Any


def is_arrays(data: Any) -> bool:
    """Whether `data` is `(x,)`, `(x, y)` or `(x, y, sample_weight)` in memory rather than something that gives batches."""
    if isinstance(data, list) and any(isinstance(part, (tuple, dict)) for part in data):
        return False  # a list of batches
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
    if isinstance(data, Data):
        for start in range(0, len(data), batch_size):
            yield data.rows(np.arange(start, min(start + batch_size, len(data))))
    elif is_arrays(data):
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


@final
class Data:
    """Rows in a fixed order, with the names of their classes; in memory or read when asked for.

    Made by `arrays` or `image_folder`. Nothing here changes the order of the rows: `split` and `take` say which rows they give.

    Example:
        >>> import numpy as np
        >>> import transferkit as tk
        >>> data = tk.Data.arrays(np.zeros((10, 4)), np.arange(10) % 2, class_names=["no", "yes"])
        >>> rest, part = data.split(0.2, seed=0)
        >>> len(rest), len(part)
        (8, 2)
    """

    def __init__(
        self,
        *,
        read: Callable[[Array], Batch],
        labels: Any,
        size: int,
        class_names: Sequence[str],
        source: str,
        whole: tuple[Data, Array] | None = None,
    ) -> None:
        self._read = read
        self._size = size
        self._source = source
        self._whole = whole
        #: The labels of all rows, or None.
        self.labels = labels
        #: The names of the classes 0, 1, 2 …, or ().
        self.class_names = tuple(class_names)

    @classmethod
    def arrays(cls, x: Any, y: Any = None, *, sample_weight: Any = None, class_names: Sequence[str] = ()) -> Data:
        """Rows in memory.

        Args:
            x: An array whose first axis is the rows, or a dict or tuple of them.
            y: Labels, the same.
            sample_weight: A weight for each row.
            class_names: The names of the classes 0, 1, 2 …

        Raises:
            DataError: when the arrays differ in length.
        """
        parts = tuple(as_batch((x, y, sample_weight)))
        return cls(
            read=lambda index: Batch(*rows_of(parts, index)),
            labels=parts[1],
            size=row_count(parts),
            class_names=class_names,
            source="arrays",
        )

    @classmethod
    def image_folder(cls, folder: str | os.PathLike[str], *, size: tuple[int, int], channels: int = 3) -> Data:
        """The pictures of a folder that holds one folder for each class; decoded when they are asked for.

        Args:
            folder: The folder.
            size: Height and width in pixels to which every picture is brought.
            channels: 1 for grey, 3 for RGB.

        Raises:
            DataError: when there is no such folder, no class in it, or a class without a picture.
        """
        files = find_images(folder)
        labels = np.array(files.labels)

        def read(index: Array) -> Batch:
            return Batch(read_images([files.paths[i] for i in index], size=size, channels=channels), labels[index], None)

        return cls(
            read=read,
            labels=labels,
            size=len(labels),
            class_names=files.class_names,
            source=f"image_folder({str(Path(folder))!r})",
        )

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"<Data.{self._source}: {self._size} rows{classes}>"

    def rows(self, index: Array) -> Batch:
        """The rows with those numbers, in that order, as NumPy arrays."""
        return self._read(np.asarray(index))

    def take(self, index: Array) -> Data:
        """The data that has those rows only, in that order."""
        chosen = np.arange(self._size)[np.asarray(index)]
        labels = None if self.labels is None else tf.nest.map_structure(lambda part: np.asarray(part)[chosen], self.labels)
        whole, numbers = self.whole
        return Data(
            read=lambda inner: self._read(chosen[inner]),
            labels=labels,
            size=len(chosen),
            class_names=self.class_names,
            source=self._source,
            whole=(whole, numbers[chosen]),
        )

    @property
    def whole(self) -> tuple[Data, Array]:
        """The data that `take` and `split` took these rows from, and their numbers there; itself where nothing was taken."""
        return self._whole or (self, np.arange(self._size))

    def split(self, fraction: float, *, seed: int) -> tuple[Data, Data]:
        """The rest and a random share of the rows, each class in its proportion; see `split`."""
        rest, part = split_rows(self._size, self.labels, fraction, seed=seed)
        return self.take(rest), self.take(part)

    def fingerprint(self, *, batch_size: int = 256) -> str:
        """The SHA-256 of all rows' shapes, dtypes and bytes in their order, 64 hexadecimal digits. Reads everything."""
        digest = hashlib.sha256()
        for batch in batches(self, batch_size=batch_size):
            for part in batch:
                for array in [] if part is None else tf.nest.flatten(part):
                    digest.update(f"{array.dtype.str}{array.shape[1:]}".encode())
                    digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def split_rows(rows: int, labels: Any, fraction: float, *, seed: int) -> tuple[Array, Array]:
    """The numbers of the rest of the rows and of a random share, both rising; by class where the labels are whole numbers.

    Args:
        rows: How many there are.
        labels: One for each row, or None.
        fraction: The share, above 0 and under 1.
        seed: Fixes the choice.

    Raises:
        DataError: for a share that leaves either side empty.
    """
    if not 0 < fraction < 1 or not 0 < round(fraction * rows) < rows:
        raise DataError(
            f"Setting {fraction!r} of the data apart.",
            found=f"{rows} rows; one side would be empty",
            fix="give a fraction such as 0.1, and more rows",
        )
    random = np.random.Generator(np.random.Philox(key=[seed, 2**63]))
    known = np.asarray(labels) if hasattr(labels, "shape") else None
    if known is not None and known.size == rows and known.dtype.kind in "iub":
        groups = [np.flatnonzero(known.reshape(-1) == label) for label in np.unique(known)]
    else:
        groups = [np.arange(rows)]
    # Largest remainders, so that the sizes of the shares add up to what was asked.
    wanted = np.array([len(group) * fraction for group in groups])
    counts = np.floor(wanted).astype(int)
    short = round(fraction * rows) - counts.sum()
    for index in np.argsort(counts - wanted, kind="stable")[:short]:
        counts[index] += 1
    chosen = np.concatenate([random.permutation(group)[:count] for group, count in zip(groups, counts, strict=True)])
    mask = np.zeros(rows, bool)
    mask[chosen] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def split(data: Any, fraction: float, *, seed: int) -> tuple[Any, Any]:
    """Sets a random share of the rows apart, each class in its proportion where the labels are whole numbers.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, or a `Data`.
        fraction: The share set apart, above 0 and under 1.
        seed: Fixes the choice.

    Returns:
        The rest and the share, in the form of `data`, both in the rows' original order.

    Raises:
        DataError: for data whose rows can't be told apart, or a share that leaves either side empty.
    """
    if isinstance(data, Data):
        return data.split(fraction, seed=seed)
    if not is_arrays(data):
        raise DataError(
            f"Setting {fraction!r} of the data apart.",
            found=f"data of type {type(data).__name__}, whose rows can't be told apart without reading it all",
            fix="give validation_data=(x, y) or a data set of its own",
        )
    labels = data[1] if len(data) > 1 else None
    rest, part = split_rows(row_count(data), labels, fraction, seed=seed)
    return rows_of(data, rest), rows_of(data, part)
