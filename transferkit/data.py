"""Whatever `Model.fit` takes as data, brought to one form: batches in a fixed order, each input beside its own label.

Accepted everywhere the library takes data: `(x, y)` or `(x, y, sample_weight)` of arrays (nested dicts and tuples too), a batched
`tf.data.Dataset`, a `keras.utils.PyDataset`, any iterable or generator of batches, and `Data`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from transferkit._keras import keras, tf
from transferkit.errors import DataError, PlanError, shorten
from transferkit.images import BadImage, find_images, read_images

__all__ = ["Batch", "Data", "as_batch", "batches", "is_arrays", "row_count", "rows_of", "split"]

Array = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """Rows that belong together; each part a NumPy array or a nested structure of them, or None where the data has none."""

    x: Any
    y: Any
    sample_weight: Any


def is_arrays(data: Any) -> bool:
    """Whether `data` is `(x,)`, `(x, y)` or `(x, y, sample_weight)` in memory rather than something that gives batches.

    Raises:
        DataError: for a tuple of parts that hold the numbers in another form: lists, tables.
    """
    if isinstance(data, list) and any(isinstance(part, (tuple, dict)) for part in data):
        return False  # a list of batches
    if not isinstance(data, (tuple, list)) or not 1 <= len(data) <= 3:
        return False
    if isinstance(data, tuple):
        _refuse_other_forms(data)
    return all(_in_memory(part) for part in data)


def _refuse_other_forms(parts: tuple[Any, ...]) -> None:
    found, fixes = [], []
    for name, part in zip(("x", "y", "sample_weight"), parts, strict=False):
        for leaf in [] if part is None else tf.nest.flatten(part):
            if hasattr(leaf, "to_numpy") and not hasattr(leaf, "dtype"):
                found.append(f"{name} as a {type(leaf).__name__}")
                fixes.append(f'{name}.to_numpy("float32")' if name != "y" else "y.to_numpy()")
                break
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "O" and not _holds_text(leaf):
                found.append(f"{name} as an array of objects, not of numbers of one type")
                fixes.append(f'{name}.astype("float32")')
                break
            if isinstance(leaf, (int, float, str)):
                found.append(f"{name} as a {type(part).__name__} of {type(leaf).__name__}")
                fixes.append(f"np.asarray({name})")
                break
    if found:
        raise DataError("Reading data.", found=found, cause="arrays and tensors are taken", fix="; ".join(fixes))


def _holds_text(array: Array) -> bool:
    """Whether an array of objects is one of texts, which Keras takes."""
    return all(isinstance(item, (str, bytes)) for item in array.reshape(-1)[:100])


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
    """The number of rows of a `Data`, or that all arrays of in-memory data share.

    Raises:
        DataError: when they don't.
    """
    if isinstance(parts, Data):
        return len(parts)
    counts = {
        int(leaf.shape[0]) if len(leaf.shape) else -1 for part in parts if part is not None for leaf in tf.nest.flatten(part)
    }
    if len(counts) != 1 or -1 in counts:
        shapes = [tuple(leaf.shape) for part in parts if part is not None for leaf in tf.nest.flatten(part)]
        raise DataError(
            "Reading arrays as data.",
            found=f"first dimensions that differ: {', '.join(map(str, shapes))}",
            cause="one row by itself, which has no axis for the batch"
            if -1 in counts
            else "inputs, labels and sample weights must have one row for each example",
            fix="put it into a batch of one: x[None], y[None]" if -1 in counts else "give as many of each",
        )
    return counts.pop()


@final
class Data:
    """Rows in a fixed order, with the names of their classes; in memory or read when asked for.

    Made by `arrays` or `image_folder`, and from others by `concat`, `take`, `split`, `balanced` and `map`. Nothing here changes
    the order of the rows unasked.

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
        in_memory: bool = False,
        bad: Sequence[BadImage] = (),
        notes: Sequence[str] = (),
        files: Sequence[str] = (),
    ) -> None:
        self._read = read
        self._size = size
        self._source = source
        self._whole = whole
        #: Whether reading rows costs no more than copying them.
        self.in_memory = in_memory
        #: The files that were left out because they are no pictures, each with `path` and `reason`.
        self.bad = tuple(bad)
        #: What else is worth knowing of the data, in words: files named as another format, photographs that were turned, twins.
        self.notes = tuple(notes)
        #: The file that each row is read from, or ().
        self.files = tuple(files)
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
            DataError: when the arrays differ in length, or are something else.
        """
        _refuse_other_forms((x, y, sample_weight))
        parts = tuple(as_batch((x, y, sample_weight)))
        rows = row_count(parts)
        _check_classes(parts[1], class_names, rows)
        return cls(
            read=lambda index: Batch(*rows_of(parts, index)),
            labels=parts[1],
            size=rows,
            class_names=class_names,
            source="arrays",
            in_memory=True,
        )

    @classmethod
    def image_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        size: tuple[int, int],
        channels: int = 3,
        max_bad: float = 0,
        max_pixels: int = 100_000_000,
        check: str = "headers",
    ) -> Data:
        """The pictures of a folder that holds one folder for each class; decoded when they are asked for.

        Reads JPEG, PNG, GIF (the first picture) and BMP, whatever their names end in. Hidden files are passed over. Photographs
        are turned upright where their Exif data says how; transparency is dropped unless `channels` is 4.

        Args:
            folder: The folder.
            size: Height and width in pixels to which every picture is brought.
            channels: 1 for grey, 3 for RGB, 4 with transparency.
            max_bad: How many files may be left out because they can't be read as pictures, a number or a share below 1; a
                warning names them. By default none may.
            max_pixels: How many pixels a picture may have.
            check: `headers` looks at each file's beginning and end, and decodes what looks doubtful. `pixels` decodes all, which
                also finds damage in the middle before training does.

        Raises:
            DataError: when there is no such folder, no class in it, a class without a picture, or more bad files than allowed;
                each is named.
        """
        if check not in ("headers", "pixels"):
            raise PlanError("Reading a folder of pictures.", found=f"check={check!r}", fix='"headers" or "pixels"')
        files = find_images(folder, max_bad=max_bad, max_pixels=max_pixels, decode=check == "pixels")
        labels = np.array(files.labels)

        def read(index: Array) -> Batch:
            return Batch(read_images([files.paths[i] for i in index], size=size, channels=channels), labels[index], None)

        return cls(
            read=read,
            labels=labels,
            size=len(labels),
            class_names=files.class_names,
            source=f"image_folder({str(Path(folder))!r})",
            bad=files.bad,
            notes=files.notes,
            files=files.paths,
        )

    @classmethod
    def concat(cls, first: Data, *more: Data) -> Data:
        """The rows of several data sets one after the other; classes are brought together by their names.

        Args:
            first: Rows that come first; its classes keep their numbers.
            more: Rows that follow, of the same shapes. A class of another name gets the next number.

        Raises:
            DataError: when only some have class names, or labels and weights.

        Example:
            >>> import numpy as np
            >>> import transferkit as tk
            >>> mine = tk.Data.arrays(np.zeros((2, 4)), np.array([0, 1]), class_names=["cat", "dog"])
            >>> theirs = tk.Data.arrays(np.ones((3, 4)), np.array([0, 1, 1]), class_names=["dog", "fox"])
            >>> both = tk.Data.concat(mine, theirs)
            >>> both.class_names, both.labels.tolist()
            (('cat', 'dog', 'fox'), [0, 1, 1, 2, 2])
        """
        parts = (first, *more)
        examples = [part.rows(np.arange(min(1, len(part)))) for part in parts]
        problems = []
        if len({bool(part.class_names) for part in parts}) > 1:
            problems.append("class names on some and not on others")
        for name in ("y", "sample_weight"):
            if len({getattr(example, name) is None for example in examples}) > 1:
                problems.append(f"{'labels' if name == 'y' else 'sample weights'} on some and not on others")
        shapes = [[leaf.shape[1:] for leaf in tf.nest.flatten(example.x)] for example in examples]
        if any(shape != shapes[0] for shape in shapes):
            problems.append(f"rows of different shapes: {', '.join(str(shape) for shape in shapes)}")
        if problems:
            raise DataError("Putting data sets together.", found=problems, fix="bring them to one form first")
        names = tuple(dict.fromkeys(name for part in parts for name in part.class_names))
        numbers = [np.array([names.index(name) for name in part.class_names], int) for part in parts]
        starts = np.cumsum([0, *(len(part) for part in parts)])

        def renumbered(labels: Any, which: int) -> Any:
            return numbers[which][np.asarray(labels)] if names and labels is not None else labels

        def read(index: Array) -> Batch:
            owner = np.searchsorted(starts, index, side="right") - 1
            found = []
            for which in np.unique(owner):
                rows = parts[which].rows(index[owner == which] - starts[which])
                found.append(tuple(rows._replace(y=renumbered(rows.y, which))))
            back = np.argsort(np.argsort(owner, kind="stable"), kind="stable")
            return Batch(*(_joined([piece[i] for piece in found], back) for i in range(3)))

        return cls(
            read=read,
            labels=_joined([renumbered(part.labels, which) for which, part in enumerate(parts)], slice(None)),
            size=int(starts[-1]),
            class_names=names,
            source=" + ".join(dict.fromkeys(part._source for part in parts)),
            in_memory=all(part.in_memory for part in parts),
            bad=[one for part in parts for one in part.bad],
            notes=[note for part in parts for note in part.notes],
            files=[name for part in parts for name in part.files] if all(part.files for part in parts) else (),
        )

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"<Data.{self._source}: {self._size} rows{classes}>"

    def rows(self, index: Array) -> Batch:
        """The rows with those numbers, in that order, as NumPy arrays."""
        return self._read(np.asarray(index))

    def _with(
        self,
        *,
        read: Callable[[Array], Batch],
        labels: Any,
        size: int,
        files: Sequence[str],
        whole: tuple[Data, Array] | None = None,
    ) -> Data:
        return Data(
            read=read,
            labels=labels,
            size=size,
            class_names=self.class_names,
            source=self._source,
            whole=whole,
            in_memory=self.in_memory,
            bad=self.bad,
            notes=self.notes,
            files=files,
        )

    def take(self, index: Array) -> Data:
        """The data that has those rows only, in that order; a row may come more than once."""
        chosen = np.arange(self._size)[np.asarray(index)]
        labels = None if self.labels is None else tf.nest.map_structure(lambda part: np.asarray(part)[chosen], self.labels)
        whole, numbers = self.whole
        return self._with(
            read=lambda inner: self._read(chosen[inner]),
            labels=labels,
            size=len(chosen),
            files=[self.files[row] for row in chosen] if self.files else (),
            whole=(whole, numbers[chosen]),
        )

    @property
    def whole(self) -> tuple[Data, Array]:
        """The data that `take` and `split` took these rows from, and their numbers there; itself where nothing was taken."""
        return self._whole or (self, np.arange(self._size))

    def map(self, function: Callable[[Any], Any]) -> Data:
        """The data whose inputs go through a function, a batch at a time, whenever they are read.

        What new pictures will have to go through as well belongs into the model: `ModelBuilder().layer(…)`, `.backbone(…)`.

        Args:
            function: Takes the inputs of some rows as NumPy arrays and gives as many; the same for the same rows, each time.
        """

        def read(index: Array) -> Batch:
            rows = self._read(index)
            return rows._replace(x=tf.nest.map_structure(np.asarray, function(rows.x)))

        return self._with(read=read, labels=self.labels, size=self._size, files=self.files)

    def balanced(self, *, seed: int, each: int | None = None) -> Data:
        """As many rows of each class: the rarer ones come more than once. For training data only, and after `split`.

        Args:
            seed: Fixes which rows come once more than others.
            each: Rows for each class; as many as the largest has where nothing is said. With fewer, rows are left out.

        Raises:
            DataError: when the rows have no class each.

        Example:
            >>> import numpy as np
            >>> import transferkit as tk
            >>> data = tk.Data.arrays(np.arange(5), np.array([0, 0, 0, 0, 1]))
            >>> np.bincount(data.balanced(seed=0).labels).tolist()
            [4, 4]
        """
        groups = self._groups("Balancing the classes.")
        wanted = max(map(len, groups)) if each is None else each
        if isinstance(wanted, bool) or not isinstance(wanted, (int, np.integer)) or wanted < 1:
            raise PlanError("Balancing the classes.", found=f"each={each!r}; it must be a whole number above 0")
        random = np.random.Generator(np.random.Philox(key=[seed, 2**61]))
        chosen = []
        for rows in groups:
            whole, rest = divmod(int(wanted), len(rows))
            chosen += [*([rows] * whole), random.permutation(rows)[:rest]]
        return self.take(np.sort(np.concatenate(chosen)))

    def class_weights(self) -> dict[int, float]:
        """A weight for each class, so that each counts alike: rows / (classes × rows of the class); for `fit(class_weight=…)`.

        Raises:
            DataError: when the rows have no class each.

        Example:
            >>> import numpy as np
            >>> import transferkit as tk
            >>> tk.Data.arrays(np.zeros((4, 2)), np.array([0, 0, 0, 1])).class_weights()
            {0: 0.6666666666666666, 1: 2.0}
        """
        groups = self._groups("Weighting the classes.")
        number = [int(np.asarray(self.labels).reshape(-1)[rows[0]]) for rows in groups]
        return {label: self._size / (len(groups) * len(rows)) for label, rows in zip(number, groups, strict=True)}

    def _groups(self, asked: str) -> list[Array]:
        """The rows of each class."""
        known = np.asarray(self.labels) if hasattr(self.labels, "shape") else None
        if known is None or known.size != self._size or known.dtype.kind not in "iub":
            raise DataError(asked, found="rows without one class each", fix="give labels as whole numbers, one for each row")
        return [np.flatnonzero(known.reshape(-1) == label) for label in np.unique(known)]

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


def _joined(pieces: Sequence[Any], order: Any) -> Any:
    """Parts of several data sets one after the other, then in that order."""
    if pieces[0] is None:
        return None
    return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays)[order], *pieces)


def _check_classes(labels: Any, class_names: Sequence[str], rows: int) -> None:
    """Raises a DataError where names and numbers of classes don't fit, or a class that has a name has no row."""
    known = np.asarray(labels) if hasattr(labels, "shape") else None
    if not class_names or known is None or known.size != rows or known.dtype.kind not in "iub":
        return
    asked = f"Naming {len(class_names)} classes."
    flat = known.reshape(-1)
    wrong = np.flatnonzero((flat < 0) | (flat >= len(class_names)))
    if len(wrong):
        raise DataError(
            asked,
            found=f"{len(wrong)} labels outside 0 to {len(class_names) - 1}, the first {flat[wrong[0]]} in row {wrong[0]}",
            fix="give a name for each class, and labels from 0 on",
        )
    empty = [name for number, name in enumerate(class_names) if number not in set(np.unique(known).tolist())]
    if empty:
        warnings.warn(f"No row is of the class {shorten(empty)}: a model can't learn it from these", stacklevel=3)


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
