"""The index of a sharded set of weights: which file beside it holds what. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from transferkit.errors import UnsafeFileError, WeightsFileError
from transferkit.weights.readers.archive import Limits
from transferkit.weights.readers.source import asked_of

__all__ = ["shard_names"]


def _weight_map(path: str, index: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    mapped = index.get("weight_map")
    if not isinstance(mapped, Mapping):
        raise WeightsFileError(asked_of(path), found="the index has no 'weight_map'", fix="save the weights again")
    for where, files in mapped.items():
        for file in files if isinstance(files, list) else [files]:
            if not isinstance(file, str) or not file or os.path.basename(file) != file or "\\" in file or file in (".", ".."):
                raise UnsafeFileError(
                    asked_of(path),
                    found=f"the index names the shard {file!r}, which isn't a file beside it",
                    cause="the index was made to open another file",
                    fix="get the files from a source you trust",
                )
            yield where, file


def shard_names(path: str, index: Mapping[str, Any], limits: Limits) -> dict[str, set[str]]:
    """The entries of each shard an index names, in its order.

    Raises:
        UnsafeFileError: when it names a file that isn't beside it, or too many.
    """
    found: dict[str, set[str]] = {}
    for where, file in _weight_map(path, index):
        found.setdefault(file, set()).add(where)
        if len(found) > limits.max_arrays:
            raise UnsafeFileError(asked_of(path), found="too many shards", fix="raise Limits.max_arrays")
    return found
