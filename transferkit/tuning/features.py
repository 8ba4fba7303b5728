"""The frozen prefix, computed once for every row: streamed in bounded memory, kept in RAM or on disk, found again by content.

Rows stay in the order of the data, so that an epoch is an array of row numbers. Batches are all of one size, the last one
filled up: kernels choose their way by the batch's size, and at a size of 1 the bits differ (measured on convolutions by up to
8e-6). Two Python threads run the same compiled function, because TensorFlow's own threads leave a small batch's cores idle.
May import Keras and the floors below.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.graph import GraphModel
from transferkit.data import Batch, batches, is_arrays, row_count, rows_of
from transferkit.errors import DataError, PlanError
from transferkit.tuning.feature_store import Entry, FeatureStore

__all__ = ["Features", "compute", "fingerprint", "memory_left", "repeats"]

#: Rows in a batch of the extraction. Larger gains nothing on a CPU (measured 32–256).
BATCH = 64
#: The fewest, by padding: below 16 some kernels take another way and give other bits.
_LEAST = 16
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Features:
    """What a prefix gives for every row of a data set, in the data's order.

    Args:
        arrays: One for each output of the prefix, `(views × rows, …)`: all rows of the first view, then of the second.
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
    rounding: float
    places: np.ndarray[Any, Any] | None = field(repr=False, default=None)
    _keeps: Any = field(repr=False, default=None)

    @property
    def nbytes(self) -> int:
        """Of all features together."""
        return sum(array.nbytes for array in self.arrays)

    def tensors(self) -> tuple[Any, ...]:
        """The features as tensors that share the memory, or the mapping from disk, with `arrays`."""
        return tuple(_as_tensor(array) for array in self.arrays)

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
        return f"{self.rows:,} rows{views} {what} in {self.seconds:.2f} s, {self.nbytes / 1e6:,.1f} MB in {self.where}{change}"


def compute(
    prefix: GraphModel,
    data: Any,
    *,
    batch_size: int = BATCH,
    dtype: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    views: int = 1,
    note: str = "",
    threads: int | None = None,
) -> Features:
    """Runs the prefix over all rows once, or finds what it gave before.

    Args:
        prefix: The frozen part, from `frontier.split`.
        data: Whatever `fit` takes that ends and gives the same rows each time.
        batch_size: Rows in a batch of the extraction.
        dtype: What floating-point features are kept in: `float32`, `float16` or `bfloat16`; None keeps what the prefix gives.
        folder: Where to keep them for later runs and other processes; None keeps them for this run only.
        memory_limit: Bytes of memory they may take before they go to disk; None is half of what is free.
        views: How many times each row is computed, for a prefix with random augmentation.
        note: Of what makes the rows what they are and isn't seen in them; part of the key.
        threads: How many Python threads run the prefix; None is two where there are two cores.

    Raises:
        DataError: when the data has no rows, no end, or other rows each time.
        StorageError: when the folder can't be used.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise PlanError("Computing features.", found=f"dtype={dtype!r}", fix="one of " + ", ".join(map(repr, _DTYPES)))
    started = time.perf_counter()
    job = _Job(prefix, data, batch_size, dtype, memory_limit, views, threads)
    if folder is None:
        return job.run(None, "", started)
    code = prefix.digest()
    if code is None:
        return job.run(None, "", started)  # the user's code can't be told apart by content, so nothing is kept of it
    store = FeatureStore(folder)
    base = _digest("features", code, _environment(), dtype, job.size, views, note)[:32]
    with store.lock(base):
        if store.holds(base) or is_arrays(data):
            mark, labels = fingerprint(data)
            entry = store.open(base + mark[:32])
            if entry is not None:
                return job.found(entry, labels, started)
        return job.run(store, base, started)


class _Job:
    def __init__(
        self, prefix: Any, data: Any, batch_size: int, dtype: str | None, limit: int | None, views: int, threads: int | None
    ) -> None:
        self.prefix, self.data, self.dtype, self.views = prefix, data, dtype, views
        self.limit = limit if limit is not None else memory_left() // 2
        self.size = max(batch_size, _LEAST)
        cores = os.cpu_count() or 1
        gpu = bool(tf.config.list_physical_devices("GPU"))
        # Random augmentation draws from one seed, and must draw in order.
        self.threads = 1 if views > 1 or gpu else threads or min(2, cores)

    def found(self, entry: Entry, labels: Batch, started: float) -> Features:
        meta = entry.metadata
        arrays = tuple(
            raw.view(_numpy_dtype(item["dtype"])).reshape(item["shape"])
            for raw, item in zip(entry.files, meta["arrays"], strict=True)
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
        )

    def run(self, store: FeatureStore | None, base: str, started: float) -> Features:
        chunks = self._chunks()
        first = next(chunks, None)
        if first is None:
            raise DataError("Computing features.", found="data without a row")
        pieces = self._results(first, chunks)
        head = next(pieces)
        rows = row_count(self.data) if is_arrays(self.data) else None
        nbytes = sum(piece[:1].nbytes for piece in head) * (rows or 0) * self.views
        keeps: Any = None
        if store is None and (rows is None or nbytes > self.limit):
            # Not known to fit: to a folder of this run alone, made for this user only.
            keeps = _Scratch()
            store, base = FeatureStore(keeps.path, durable=False), "run"
        if store is None:
            assert rows is not None
            arrays = tuple(_aligned((rows * self.views, *piece.shape[1:]), piece.dtype) for piece in head)
            done = 0
            for given in _chain(head, pieces):
                for array, piece in zip(arrays, given, strict=True):
                    array[done : done + len(piece)] = piece
                done += len(given[0])
            where = "memory"
        else:
            with store.writer(len(head)) as writer:
                done = 0
                for given in _chain(head, pieces):
                    writer.append(given)
                    done += len(given[0])
                meta = [{"shape": [done, *piece.shape[1:]], "dtype": piece.dtype.name} for piece in head]
                self._check_repeats()
                writer.metadata = {
                    "arrays": meta,
                    "rows": done // self.views,
                    "views": self.views,
                    "rounding": max(self._changes),
                }
                entry = store.keep(writer, base + self._mark.hexdigest()[:32])
            found = self.found(entry, self._labels(), started)
            arrays, where = found.arrays, "a temporary folder" if keeps else found.where
        self._check_repeats()
        labels = self._labels()
        return Features(
            arrays,
            labels.y,
            labels.sample_weight,
            rows=done // self.views,
            views=self.views,
            where=where,
            reused=False,
            seconds=time.perf_counter() - started,
            rounding=max(self._changes),
            _keeps=keeps,
        )

    # -- the rows on their way in

    def _chunks(self) -> Iterator[Any]:
        """The inputs in pieces of at most one batch; notes what passes by."""
        self._mark = _Mark()
        self._changes: list[float] = [0.0]
        self._seen: set[bytes] = set()
        self._y: list[Any] = []
        self._weights: list[Any] = []
        arrays = is_arrays(self.data)
        for view in range(self.views):
            for batch in batches(self.data, batch_size=self.size):
                if view == 0:
                    self._mark.update(batch.x)
                    if not arrays:
                        self._seen.update(_row_marks(batch.x))
                        self._y.append(batch.y)
                        self._weights.append(batch.sample_weight)
                flat = tf.nest.flatten(batch.x)
                for start in range(0, len(flat[0]), self.size):
                    yield tf.nest.map_structure(lambda array: array[start : start + self.size], batch.x)  # noqa: B023

    def _labels(self) -> Batch:
        if is_arrays(self.data):
            parts = (*self.data, None, None)
            return Batch(None, parts[1], parts[2])
        return Batch(None, _joined(self._y), _joined(self._weights))

    def _check_repeats(self) -> None:
        if is_arrays(self.data):
            return
        why = _differs(self.data, self._seen)
        if why:
            raise DataError(
                "Computing the frozen part of a model once for every row.",
                found=why,
                cause="the data is augmented or drawn at random while it is read, so one pass isn't what the other epochs see",
                fix=".cache(False), or put the augmentation into the model or the plan, where it isn't lost",
            )

    # -- the compiled prefix

    def _results(self, first: Any, rest: Iterator[Any]) -> Iterator[list[Any]]:
        """What the prefix gives, piece by piece in order, at most a few batches ahead."""
        function = self.prefix.as_function()

        def one(x: Any) -> list[Any]:
            count = len(tf.nest.flatten(x)[0])
            padded = tf.nest.map_structure(lambda array: tf.convert_to_tensor(_padded(array, self.size)), x)
            return [self._kept(value, count) for value in tf.nest.flatten(function(padded))]

        yield one(first)  # traced here, by one thread
        with ThreadPoolExecutor(self.threads, "transferkit-features") as pool:
            waiting: collections.deque[Future[list[Any]]] = collections.deque()
            try:
                for x in rest:
                    waiting.append(pool.submit(one, x))
                    if len(waiting) > 2 * self.threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _kept(self, value: Any, count: int) -> Any:
        array = value.numpy()[:count]
        if self.dtype is None or array.dtype.kind not in "fV" or array.dtype.name == self.dtype:
            return array
        kept = array.astype(_numpy_dtype(self.dtype))
        if kept.dtype.itemsize < array.dtype.itemsize:
            largest = float(np.max(np.abs(array), initial=0.0))
            change = float(np.max(np.abs(kept.astype(array.dtype) - array), initial=0.0))
            self._changes.append(change / largest if largest else 0.0)
        return kept


class _Scratch:
    """A folder that goes when nothing needs it any more; `tempfile` would warn of that."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="transferkit-features-")
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def fingerprint(data: Any) -> tuple[str, Batch]:
    """A digest of all inputs in their order, and the labels and weights met on the way.

    Args:
        data: Whatever `fit` takes that ends.
    """
    mark = _Mark()
    labels: list[Any] = []
    weights: list[Any] = []
    arrays = is_arrays(data)
    for batch in batches(data, batch_size=BATCH):
        mark.update(batch.x)
        if not arrays:
            labels.append(batch.y)
            weights.append(batch.sample_weight)
    if arrays:
        parts = (*data, None, None)
        return mark.hexdigest(), Batch(None, parts[1], parts[2])
    return mark.hexdigest(), Batch(None, _joined(labels), _joined(weights))


def repeats(data: Any) -> str:
    """Why the data may not give the same rows each time it is gone over; empty when nothing speaks against it."""
    if is_arrays(data):
        return ""
    if isinstance(data, keras.utils.PyDataset):
        return "" if data.num_batches is not None else "a PyDataset without an end"
    if not hasattr(data, "__iter__") or iter(data) is data:
        return "a generator, which can be gone over only once"
    cardinality = getattr(data, "cardinality", None)
    if cardinality is not None and int(cardinality()) == tf.data.INFINITE_CARDINALITY:
        return "a data set without an end"
    return ""


def _differs(data: Any, seen: set[bytes]) -> str:
    """Looks at some rows again; words for it when they are other rows than before, in whatever order."""
    for batch in itertools.islice(batches(data, batch_size=BATCH), 4):
        if not seen.issuperset(_row_marks(batch.x)):
            return "rows that are different when the data is gone over a second time"
    return ""


class _Mark:
    """A digest of rows that doesn't depend on the batches they come in: one for each input, joined at the end."""

    def __init__(self) -> None:
        self._digests: list[Any] = []

    def update(self, x: Any) -> None:
        for index, leaf in enumerate(tf.nest.flatten(x)):
            array = np.ascontiguousarray(leaf)
            if index == len(self._digests):
                self._digests.append(hashlib.sha256(f"{array.dtype.str}{array.shape[1:]}".encode()))
            raw = repr(array.tolist()).encode() if array.dtype.kind == "O" else array.view(np.uint8).reshape(-1)
            self._digests[index].update(raw)

    def hexdigest(self) -> str:
        return _digest([digest.hexdigest() for digest in self._digests])


def _row_marks(x: Any) -> list[bytes]:
    flat = [np.ascontiguousarray(leaf) for leaf in tf.nest.flatten(x)]
    return [
        hashlib.blake2b(b"".join(array[row].tobytes() for array in flat), digest_size=12).digest() for row in range(len(flat[0]))
    ]


def _joined(parts: list[Any]) -> Any:
    if not parts or parts[0] is None:
        return None
    return tf.nest.map_structure(lambda *pieces: np.concatenate(pieces), *parts)


def _chain(first: list[Any], rest: Iterator[list[Any]]) -> Iterator[list[Any]]:
    yield first
    yield from rest


def _padded(array: Any, size: int) -> Any:
    array = np.asarray(array)
    missing = size - len(array)
    return array if not missing else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])


def _aligned(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array whose memory begins at a page: TensorFlow can use it as a tensor without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype, count=math.prod(shape)).reshape(shape)


def _as_tensor(array: Any) -> Any:
    plain = array.dtype.kind in "fiu" and array.flags.writeable and array.size and array.ctypes.data % 64 == 0
    if plain:
        with contextlib.suppress(TypeError, BufferError, RuntimeError):
            return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    if array.dtype.name == "bfloat16" and array.size:
        return tf.bitcast(_as_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.convert_to_tensor(array)


def _numpy_dtype(name: str) -> Any:
    return np.dtype(tf.as_dtype(name).as_numpy_dtype)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _environment() -> list[str]:
    """What besides model and data decides the bits."""
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return [
        tf.__version__,
        keras.__version__,
        os.environ.get("TF_ENABLE_ONEDNN_OPTS", ""),
        platform.machine(),
        flags,
        str([device.device_type for device in tf.config.list_physical_devices()]),
        keras.config.floatx(),
        keras.config.image_data_format(),
    ]


def memory_left() -> int:
    """Bytes that can still be used, by this process's control group or the machine."""
    left = 4 << 30
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        left = min(left, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(left, 0)
