"""The frozen prefix, computed once for every row: streamed in bounded memory, kept in RAM or on disk, found again by content.

Rows stay in the order of the data, so that an epoch is an array of row numbers. May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from transferkit._keras import tf
from transferkit.building.graph_model import GraphModel
from transferkit.data import Batch, Data, is_arrays, row_count, rows_of
from transferkit.errors import DataError
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.encoding import Encoder, numpy_dtype, reader
from transferkit.tuning.extraction import Extraction
from transferkit.tuning.feature_store import Entry, FeatureStore
from transferkit.tuning.fingerprints import BLOCK, Repeats, Rows, block_mark, digest, fingerprint, fitting_block, joined_mark
from transferkit.tuning.identity import environment

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Features", "block_of", "compute", "memory_left"]


@dataclass(frozen=True)
class Features:
    """What a prefix gives for every row of a data set, in the data's order.

    Args:
        arrays: One for each output of the prefix, `(views × rows, …)`: all rows of the first view, then of the second; after
            them the scales of those in int8.
        y: The labels in the data's structure, or None.
        sample_weight: The sample weights, or None.
        rows: How many rows the data has.
        views: How many times each row was computed, with other random augmentation each time.
        places: Where in a view each row stands, for rows that are part of more; None where they stand one after another.
        where: `memory`, or the folder on disk.
        reused: Whether they were found rather than computed.
        seconds: What finding or computing them took.
        rounding: The largest change of a value by keeping it in a smaller dtype, against the largest value of its tensor.
    """

    arrays: tuple[Any, ...] = field(repr=False)
    y: Any = field(repr=False)
    sample_weight: Any = field(repr=False)
    rows: int
    views: int
    where: str
    reused: bool
    seconds: float
    rounding: float = 0.0
    inexact: float = 0.0
    scales: tuple[int | None, ...] = (None,)
    places: np.ndarray[Any, Any] | None = field(repr=False, default=None)
    _keeps: Any = field(repr=False, default=None)

    @property
    def nbytes(self) -> int:
        """Of all features together."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def encoded(self) -> bool:
        """Whether `tensors()` are more than the features themselves, so that only `read()` gives those."""
        return any(scale is not None for scale in self.scales)

    def tensors(self) -> tuple[Any, ...]:
        """The features as tensors that share the memory, or the mapping from disk, with `arrays`."""
        return tuple(_as_tensor(array) for array in self.arrays)

    def read(self) -> Callable[[Any, Any], Any]:
        """A function of `tensors()` and places that gives the prefix's outputs there; it may stand in a graph."""
        return reader(self.scales, rows=len(self.arrays[0]) // self.views, block=BLOCK)

    def take(self, rows: np.ndarray[Any, Any]) -> Features:
        """Those rows only, in that order, with their labels; the features stay where they are and aren't copied."""
        places = np.asarray(rows) if self.places is None else self.places[rows]
        y, weight = rows_of((self.y, self.sample_weight), rows)
        return replace(self, rows=len(places), places=places, y=y, sample_weight=weight)

    def index(self, order: np.ndarray[Any, Any], *, epoch: int) -> np.ndarray[Any, Any]:
        """The places in `arrays` of the rows `order` in an epoch; views take turns."""
        places = np.asarray(order) if self.places is None else self.places[order]
        return places + (epoch % self.views) * (len(self.arrays[0]) // self.views)

    def __str__(self) -> str:
        what = "found" if self.reused else "computed"
        views = f" × {self.views} views" if self.views > 1 else ""
        change = f", values rounded by up to {self.rounding:.1e} of the largest" if self.rounding else ""
        change += f", computed to within {self.inexact:.1e} of the largest" if self.inexact else ""
        return f"{self.rows:,} rows{views} {what} in {self.seconds:.2f} s, {self.nbytes / 1e6:,.1f} MB in {self.where}{change}"


def compute(
    prefix: GraphModel,
    data: Any,
    *,
    settings: CacheSettings | None = None,
    folder: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    note: str = "",
    traced: Callable[[], Any] | None = None,
    batches: Collection[int] = (),
) -> Features:
    """Runs the prefix over all rows once, or finds what it gave before.

    Args:
        prefix: The frozen part, from `frontier.split`.
        data: Whatever `fit` takes that ends and gives the same rows each time.
        settings: The dtype, the number of views and the way of computing; as the model computes where nothing is given.
        folder: Where to keep them for later runs and other processes; None keeps them for this run only.
        memory_limit: Bytes of memory they may take before they go to disk; None is half of what is free.
        seed: Of the augmentation that makes the views.
        note: Of what makes the rows what they are and isn't seen in them; part of the key.
        traced: Called once Python's part is done and what remains is computing.
        batches: The sizes of batches in which training would compute the rows, as far as they are known.

    Raises:
        RowsMixedError: when the prefix holds code of the user's that makes more of rows together than of each for itself.
        DataError: when the data has no rows, no end, or other rows each time, or its features don't fit the dtype.
        StorageError: when the folder can't be used.
    """
    started = time.perf_counter()
    settings = settings or CacheSettings()
    limit = memory_left() // 2 if memory_limit is None else memory_limit
    block = block_of(data, settings=settings, folder=folder)
    extraction = Extraction(prefix, how=settings.extraction, views=settings.views, seed=seed, block=block, batches=batches)
    job = _Job(extraction, data, settings, limit, traced, block=block)
    code = None if folder is None else prefix.digest()
    if folder is None or code is None:  # the user's code can't be told apart by content, so nothing is kept of it
        return job.run(None, "", "", started)
    store = FeatureStore(folder)
    how = (settings.dtype, settings.views, settings.extraction, seed if settings.views > 1 else 0)
    base = digest("features", code, environment(), how, BLOCK, note)[:32]
    with store.lock(base):
        mark = ""
        if store.holds(base) or is_arrays(data):
            mark, labels = fingerprint(data)
            entry = store.open(base + mark[:32])
            if entry is not None:
                return _found(entry, labels, started)
        return job.run(store, base, mark, started)


def block_of(data: Any, *, settings: CacheSettings, folder: Any) -> int:
    """How many rows are computed at once; a fixed number where what is kept, or drawn at random, depends on it."""
    if folder is not None or settings.views > 1 or settings.dtype == "int8":
        return BLOCK
    rows = _count(data)
    return BLOCK if rows is None else fitting_block(rows)


def _count(data: Any) -> int | None:
    """How many rows there are, where that is known."""
    return row_count(data) if is_arrays(data) or isinstance(data, Data) else None


def _found(entry: Entry, labels: Batch, started: float) -> Features:
    meta = entry.metadata
    arrays = tuple(
        raw.view(numpy_dtype(item["dtype"])).reshape(item["shape"]) for raw, item in zip(entry.files, meta["arrays"], strict=True)
    )
    return Features(
        arrays,
        labels.y,
        labels.sample_weight,
        rows=meta["rows"],
        views=meta["views"],
        where=str(entry.path.parent),
        reused=True,
        seconds=time.perf_counter() - started,
        rounding=meta["rounding"],
        inexact=meta["inexact"],
        scales=tuple(meta["scales"]),
    )


class _Job:
    def __init__(
        self, extraction: Extraction, data: Any, settings: CacheSettings, limit: int, traced: Any, *, block: int
    ) -> None:
        self._traced, self._block = traced, block
        self._data, self._limit, self._views = data, limit, settings.views
        self._extraction = extraction
        self._encoder = Encoder(settings.dtype)
        self._repeats = Repeats(data)
        self._labels = Batch(None, None, None)

    def run(self, store: FeatureStore | None, base: str, mark: str, started: float) -> Features:
        marking = store is not None and not mark
        marks: list[bytes] = []
        scaled: list[int] = []

        def finish(x: Any, values: list[Any]) -> tuple[bytes, list[Any]]:
            scaled[:] = self._encoder.scaled(values)
            return block_mark(x) if marking else b"", self._encoder.encode(values)

        results = self._extraction.run(self._blocks, finish, traced=self._traced)
        first = next(results, None)
        if first is None:
            raise DataError("Computing features.", found="data without a row")

        def pieces() -> Iterator[list[Any]]:
            yield first[1]
            marks.append(first[0])
            for one, kept in results:
                marks.append(one)
                yield kept

        plain = len(first[1]) - len(scaled)
        scales = tuple(plain + scaled.index(index) if index in scaled else None for index in range(plain))
        rows = _count(self._data)
        keeps: Any = None
        if store is None and (rows is None or self._size(first[1], plain, rows) > self._limit):
            # Not known to fit: to a folder of this run alone, made for this user only.
            keeps = _Scratch()
            store, base = FeatureStore(keeps.path, durable=False), "run"
        if store is None:
            assert rows is not None
            arrays = self._in_memory(pieces(), plain, rows)
            self._check_repeats()
            found = Features(arrays, None, None, rows, self._views, "memory", False, 0.0, self._encoder.rounding, scales=scales)
        else:
            with store.writer(len(first[1])) as writer:
                counts = [0] * len(first[1])
                for given in pieces():
                    writer.append(given)
                    counts = [count + len(piece) for count, piece in zip(counts, given, strict=True)]
                self._check_repeats()
                writer.metadata = {
                    "arrays": [
                        {"shape": [count, *piece.shape[1:]], "dtype": piece.dtype.name}
                        for count, piece in zip(counts, first[1], strict=True)
                    ],
                    "rows": counts[0] // self._views,
                    "views": self._views,
                    "rounding": self._encoder.rounding,
                    "inexact": self._extraction.error,
                    "scales": scales,
                }
                mark = joined_mark(marks[: len(marks) // self._views]) if marking else mark
                found = _found(store.keep(writer, base + mark[:32]), self._labels, started)
        return replace(
            found,
            y=self._labels.y,
            sample_weight=self._labels.sample_weight,
            where="a temporary folder" if keeps else found.where,
            reused=False,
            seconds=time.perf_counter() - started,
            inexact=self._extraction.error,
            _keeps=keeps,
        )

    def _blocks(self) -> Iterator[Any]:
        """The inputs, for one view; notes what passes by."""
        rows = Rows(self._data, block=self._block)
        for x in rows.blocks():
            self._repeats.see(x)
            yield x
        self._labels = rows.labels()

    def _size(self, piece: list[Any], plain: int, rows: int) -> int:
        """Bytes of the features of so many rows."""
        return int(self._views * rows * sum(array[:1].nbytes for array in piece[:plain]))

    def _in_memory(self, pieces: Iterator[list[Any]], plain: int, rows: int) -> tuple[Any, ...]:
        arrays: tuple[Any, ...] = ()
        places: list[int] = []
        for given in pieces:
            if not arrays:
                lengths = [rows if index < plain else -(-rows // BLOCK) for index in range(len(given))]
                arrays = tuple(
                    _aligned((self._views * length, *piece.shape[1:]), piece.dtype)
                    for length, piece in zip(lengths, given, strict=True)
                )
                places = [0] * len(given)
            for index, piece in enumerate(given):
                arrays[index][places[index] : places[index] + len(piece)] = piece
                places[index] += len(piece)
        return arrays

    def _check_repeats(self) -> None:
        why = self._repeats.why_not()
        if why:
            raise DataError(
                "Computing the frozen part of a model once for every row.",
                found=why,
                cause="the data is augmented or drawn at random while it is read, so one pass isn't what the other epochs see",
                fix=".cache(False), or put the augmentation into the model or the plan, where it isn't lost",
            )


class _Scratch:
    """A folder that goes when nothing needs it any more; `tempfile` would warn of that."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="transferkit-features-")
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _aligned(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array whose memory begins at a page: TensorFlow can use it as a tensor without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype, count=math.prod(shape)).reshape(shape)


class _Lent:
    """An array that may only be read, as one that may be written: TensorFlow takes no other, though it writes to no tensor."""

    def __init__(self, array: Any) -> None:
        self._array = array  # what it maps stays mapped
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _as_tensor(array: Any) -> Any:
    if array.dtype.kind in "fiu" and array.size and array.ctypes.data % 64 == 0:
        with contextlib.suppress(TypeError, BufferError, RuntimeError):
            lent = array if array.flags.writeable else np.asarray(_Lent(array))
            return tf.experimental.dlpack.from_dlpack(lent.__dlpack__())
    if array.dtype.name == "bfloat16" and array.size:
        return tf.bitcast(_as_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.convert_to_tensor(array)


def memory_left() -> int:
    """Bytes that can still be used, by this process's own limits, its control group and the machine."""
    left = 4 << 30
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        left = min(left, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    if resource is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            used = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
                limit, _ = resource.getrlimit(kind)
                if limit != resource.RLIM_INFINITY:
                    left = min(left, limit - (int(used[name].split()[0]) << 10))
    return max(left, 0)
