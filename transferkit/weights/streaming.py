"""Goes through arrays of a file block by block, each looked at while it is still in the core's cache, several arrays at a time.

An array so checked never stands in memory whole, and one so loaded stands only where it is to stay.
Imports the readers and NumPy only.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit.weights.digest import BLOCK, Digest, digest_of
from transferkit.weights.readers.archive import Stretch
from transferkit.weights.readers.checks import another_digest, tensor_hash, verified
from transferkit.weights.values import surely_finite

__all__ = ["Looked", "fill", "gather", "in_shares", "look_over"]

THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Looked:
    """What a look at an array's values found.

    Args:
        finite: Whether every value is finite for sure; where not, somebody should look again.
        digest: The digest of the values.
        content: The values, where they were kept.
    """

    finite: bool
    digest: str
    content: np.ndarray[Any, Any] | None = None


def gather(stretches: Sequence[Stretch]) -> list[Looked]:
    """Reads small arrays and keeps them: those of a dtype side by side in memory, where they are looked at together.

    Args:
        stretches: Where the arrays lie.

    Raises:
        WeightsFileError: when one can't be read, or doesn't match the SHA-256 its file keeps of it.
    """
    by_dtype: dict[np.dtype[Any], list[int]] = defaultdict(list)
    for i, stretch in enumerate(stretches):
        by_dtype[stretch.dtype].append(i)
    found: dict[int, Looked] = {}
    for dtype, members in by_dtype.items():
        ends = list(itertools.accumulate((stretches[i].nbytes for i in members), initial=0))
        raw = np.empty(ends[-1], np.uint8)
        room = raw.data
        for i, start, end in zip(members, ends, ends[1:], strict=False):
            stretches[i].read_into(room[start:end])
        finite = surely_finite(raw.view(dtype))
        for i, start, end in zip(members, ends, ends[1:], strict=False):
            values = raw[start:end].view(dtype).reshape(stretches[i].shape)
            stretch = stretches[i]
            if stretch.sha256:
                verified(stretch.piece.path, stretch.name, values, stretch.sha256)
            found[i] = Looked(finite or surely_finite(values.reshape(-1)), digest_of(values), values)
    return [found[i] for i in range(len(stretches))]


def in_shares(sizes: Sequence[int], work: Callable[[list[int]], None]) -> None:
    """Does work on items, by their numbers, in several threads: in shares of about equal size.

    A share for each thread, and few steps in each: a thread that waits for Python's lock loses more than it gains.

    Args:
        sizes: How much work each item is.
        work: Takes the numbers of a share.
    """
    shares: list[list[int]] = [[] for _ in range(THREADS)]
    loads = [0] * THREADS
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # the largest first, each to whom has least
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    shares = [sorted(share) for share in shares if share]
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, share) for share in shares]:
            done.result()


def look_over(stretches: Sequence[Stretch]) -> list[Looked]:
    """Reads arrays through: whether their values are finite, and as their file's own SHA-256 says.

    Args:
        stretches: Where the arrays lie.

    Raises:
        WeightsFileError: when one can't be read, or doesn't match the SHA-256 its file keeps of it.
    """
    found: dict[int, Looked] = {}
    sizes = [stretch.nbytes for stretch in stretches]

    def take(share: list[int]) -> None:
        buffer = np.empty(min(BLOCK, max(sizes)), np.uint8)
        for i in share:
            found[i] = _looked(stretches[i], buffer)

    in_shares(sizes, take)
    return [found[i] for i in range(len(stretches))]


def _looked(stretch: Stretch, buffer: np.ndarray[Any, Any]) -> Looked:
    digest = Digest(stretch.dtype, stretch.shape)
    checksum = tensor_hash(stretch.name, stretch.dtype, stretch.shape) if stretch.sha256 else None
    finite = True
    for block in _blocks(stretch, buffer):
        finite = finite and surely_finite(block.view(stretch.dtype))
        digest.update(block)
        if checksum is not None:
            checksum.update(block.data)
    if checksum is not None and checksum.hexdigest() != stretch.sha256:
        raise another_digest(stretch.piece.path, stretch.name)
    return Looked(finite, digest.hexdigest())


def _blocks(stretch: Stretch, buffer: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, stretch.nbytes, BLOCK):
        block = buffer[: min(BLOCK, stretch.nbytes - start)]
        stretch.read_into(block.data, start)
        yield block


def fill(memory: np.ndarray[Any, Any], stretch: Stretch) -> str:
    """Reads an array into memory of its size; gives the digest of what then stands there."""
    digest = Digest(stretch.dtype, stretch.shape)
    for start in range(0, stretch.nbytes, BLOCK):
        block = memory[start : start + BLOCK]
        stretch.read_into(block.data, start)
        digest.update(block)
    return digest.hexdigest()
