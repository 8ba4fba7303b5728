"""Features shared by several runs over parts of one data set: the folds of a cross-validation, the candidates of a sweep.

Runs within a `shared_features` block that freeze the same weights compute the whole data set once, and each takes the rows of
its own part. What is frozen is told by content, so a fold that learned something of its own gets features of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from transferkit.building.graph_model import GraphModel
from transferkit.building.replicas import gathered_rows, own_places
from transferkit.data import Data, is_arrays, row_count, rows_of
from transferkit.placement import worker_number
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.features import Features, compute, memory_left
from transferkit.tuning.fingerprints import BLOCK
from transferkit.tuning.identity import environment

__all__ = ["Pool", "features_of", "in_use", "is_shared", "shared_features"]

#: A part smaller than this share of the whole is no reason to compute the whole.
_LEAST_SHARE = 0.5

_in_use: contextvars.ContextVar[Pool | None] = contextvars.ContextVar("transferkit_features", default=None)


class Pool:
    """Features of whole data sets, by what computed them and how."""

    def __init__(self) -> None:
        # The data is held, so that no other gets its id.
        self._held: dict[tuple[str, int], tuple[Data, Features]] = {}

    def take(self, data: Any, key: str, compute: Callable[[Data], Features]) -> Features | None:
        """The features of rows that are part of a whole, or None where computing the whole for them is no gain.

        Args:
            data: The rows.
            key: Of the prefix and all settings; content, never a name.
            compute: Computes the features of the whole, where they aren't there yet.
        """
        if not isinstance(data, Data):
            return None
        whole, rows = data.whole
        begun = time.perf_counter()
        found = self._held.pop((key, id(whole)), None)
        if found is None:
            if len(rows) < _LEAST_SHARE * len(whole):
                return None
            features = compute(whole)
            while self._held and sum(item.nbytes for _, item in self._held.values()) > memory_left() // 2:
                self._held.pop(next(iter(self._held)))
        else:
            features = replace(found[1], reused=True, seconds=time.perf_counter() - begun)
        self._held[key, id(whole)] = (whole, features)  # the last used stands last
        return features.take(rows)

    def holds(self, data: Any, key: str) -> bool:
        """Whether the features of these rows are there already."""
        return isinstance(data, Data) and (key, id(data.whole[0])) in self._held


@contextlib.contextmanager
def shared_features() -> Iterator[None]:
    """Lets the runs within the block share the features of data that was taken from one whole by `take` or `split`.

    The data must not change within the block. Blocks may be nested; the outer one is used. Layers with code of the user's share
    nothing, because it can't be told by content whether they are the same.

    Example:
        >>> import keras, numpy as np, transferkit as tk
        >>> data = tk.Data.arrays(np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 2)
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
        >>> plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2).cache(True)
        >>> with tk.shared_features():
        ...     for rows in (np.arange(30), np.arange(10, 40)):
        ...         run = plan.fit(model, data.take(rows), seed=0, verbose=0)
        >>> "30 rows found in" in run.phases[0].frozen
        True
    """
    if _in_use.get() is not None:
        yield
        return
    token = _in_use.set(Pool())
    try:
        yield
    finally:
        _in_use.reset(token)


def in_use() -> bool:
    """Whether a block is running."""
    return _in_use.get() is not None


def is_shared(prefix: GraphModel, data: Any, *, settings: CacheSettings, seed: int = 0) -> bool:
    """Whether what the prefix gives for the rows was computed by another run of the block, so that taking it costs nothing."""
    pool, key = _in_use.get(), _key(prefix, settings, seed)
    return pool is not None and key is not None and pool.holds(data, key)


def features_of(
    prefix: GraphModel,
    data: Any,
    *,
    settings: CacheSettings | None = None,
    folder: str | None = None,
    seed: int = 0,
    traced: Callable[[], Any] | None = None,
    batches: Collection[int] = (),
    strategy: Any = None,
) -> Features:
    """What the prefix gives for the rows: from what several runs share, where this is one of them, else computed or found.

    Args:
        prefix: The frozen part, from `frontier.split`.
        data: As for `compute`.
        settings: As for `compute`.
        folder: As for `compute`.
        seed: As for `compute`.
        traced: As for `compute`.
        batches: As for `compute`.
        strategy: Whose workers compute a share of the rows each, where the features are kept in memory.
    """
    settings = settings or CacheSettings()

    def computed(rows: Any) -> Features:
        in_memory = folder is None and settings.views == 1 and settings.dtype != "int8"
        if in_memory and own_places(strategy) is not None and (is_arrays(rows) or isinstance(rows, Data)):
            return _by_workers(prefix, rows, settings, batches, strategy)
        return compute(prefix, rows, settings=settings, folder=folder, seed=seed, traced=traced, batches=batches)

    pool, key = _in_use.get(), _key(prefix, settings, seed)
    shared = pool.take(data, key, computed) if pool is not None and key is not None else None
    return computed(data) if shared is None else shared


def _by_workers(prefix: GraphModel, data: Any, settings: CacheSettings, batches: Collection[int], strategy: Any) -> Features:
    """The features of all rows, of which each worker computes a share: whole blocks, so that they come out as those of one do."""
    begun = time.perf_counter()
    rows = row_count(data)
    workers, index = strategy.num_replicas_in_sync, worker_number(strategy)
    blocks = -(-rows // BLOCK)
    cuts = [min(rows, BLOCK * (blocks * worker // workers)) for worker in range(workers)] + [rows]
    mine = np.arange(cuts[index], cuts[index + 1])
    # A worker for which no block is left computes the first row, whose features are dropped.
    part = np.arange(1) if not len(mine) else mine
    taken = data.take(part) if isinstance(data, Data) else rows_of(data, part)
    own = compute(prefix, taken, settings=settings, batches=batches)
    arrays = tuple(gathered_rows(strategy, array[: len(mine)]).numpy() for array in own.arrays)
    y, weight = (data.labels, None) if isinstance(data, Data) else (*data[1:], None, None)[:2]
    if isinstance(data, Data) and own.sample_weight is not None:
        weight = data.rows(np.arange(rows)).sample_weight
    seconds = time.perf_counter() - begun
    return replace(own, arrays=arrays, y=y, sample_weight=weight, rows=rows, seconds=seconds, where="memory", _keeps=None)


def _key(prefix: GraphModel, settings: CacheSettings, seed: int) -> str | None:
    """What decides the features of a row; None where it can't be told, or nobody asks."""
    code = prefix.digest() if in_use() else None
    views = (settings.views, seed) if settings.views > 1 else 1
    return None if code is None else f"{code} {settings.dtype} {settings.extraction} {views} {environment()}"
