"""Goes through arrays of a file block by block, each looked at while it is still in the core's cache, several arrays at a time.

An array so checked never stands in memory whole, and one so loaded stands only where it is to stay.
Imports the readers and NumPy only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit.weights.digest import BLOCK, Digest
from transferkit.weights.readers.archive import Stretch
from transferkit.weights.readers.checks import another_digest, tensor_hash
from transferkit.weights.values import surely_finite

__all__ = ["THREADS", "Looked", "fill", "look_over"]

THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Looked:
    """What a look at an array's values found.

    Args:
        finite: Whether every value is finite for sure; where not, somebody should look again.
        digest: The digest of the values.
    """

    finite: bool
    digest: str


def look_over(stretches: Sequence[Stretch]) -> list[Looked]:
    """Reads arrays through: whether their values are finite, and as their file's own SHA-256 says.

    Args:
        stretches: Where the arrays lie.

    Raises:
        WeightsFileError: when one can't be read, or doesn't match the SHA-256 its file keeps of it.
    """
    # Shares of about equal size: the largest first, each to whom has least.
    shares: list[list[int]] = [[] for _ in range(THREADS)]
    loads = [0] * THREADS
    for i in sorted(range(len(stretches)), key=lambda i: -stretches[i].nbytes):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += stretches[i].nbytes
    found: dict[int, Looked] = {}

    def take(share: list[int]) -> None:
        buffer = np.empty(BLOCK, np.uint8)
        for i in share:
            found[i] = _looked(stretches[i], buffer)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(take, shares))
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
