"""Features shared by several runs over parts of one data set: the folds of a cross-validation, the candidates of a sweep.

Runs within a `shared_features` block that freeze the same weights compute the whole data set once, and each takes the rows of
its own part. What is frozen is told by content, so a fold that learned something of its own gets features of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from transferkit.data import Data
from transferkit.tuning.features import Features, compute, memory_left

__all__ = ["Pool", "features_of", "is_shared", "shared_features"]

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

    The data must not change within the block. Blocks may be nested; the outer one is used.
    """
    if _in_use.get() is not None:
        yield
        return
    token = _in_use.set(Pool())
    try:
        yield
    finally:
        _in_use.reset(token)


def is_shared(prefix: Any, data: Any) -> bool:
    """Whether what the prefix gives for the rows was computed by another run of the block, so that taking it costs nothing."""
    pool = _in_use.get()
    code = prefix.digest() if pool is not None else None
    return pool is not None and code is not None and pool.holds(data, code)


def features_of(prefix: Any, data: Any, *, folder: str | None = None) -> Features:
    """What the prefix gives for the rows: from what several runs share, where this is one of them, else computed or found.

    Args:
        prefix: The frozen part, from `frontier.split`.
        data: As for `compute`.
        folder: As for `compute`.
    """
    pool = _in_use.get()
    code = prefix.digest() if pool is not None else None
    if pool is not None and code is not None:
        shared = pool.take(data, code, lambda whole: compute(prefix, whole, folder=folder))
        if shared is not None:
            return shared
    return compute(prefix, data, folder=folder)
