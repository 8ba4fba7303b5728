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
from transferkit.tuning.features import Features, memory_left

__all__ = ["Pool", "pool_in_use", "shared_features"]

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


def pool_in_use() -> Pool | None:
    """The pool of the block that is running, if there is one."""
    return _in_use.get()
