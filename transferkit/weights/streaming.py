"""Goes through arrays of a file block by block, each looked at while it is still in the core's cache, several arrays at a time.

An array so checked never stands in memory whole, and one so loaded stands only where it is to stay.
Imports the readers and NumPy only.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit.weights.digest import Digest, blocks, digest_of
from transferkit.weights.readers.archive import Stretch
from transferkit.weights.readers.checks import another_digest, tensor_hash, verified
from transferkit.weights.readers.source import Piece
from transferkit.weights.values import surely_finite

__all__ = ["ALIGNMENT", "Looked", "fill", "gather", "in_shares", "look_over", "side_by_side"]

ALIGNMENT = 64  # of Eigen's vectors; TensorFlow copies what is aligned to less
_GAP, _RUN = 4096, 1 << 20  # bytes that may lie between small arrays which are read at once, and bytes of all of them
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Looked:
    """What a look at an array's values found.

    Args:
        finite: Whether every value is finite for sure; where not, somebody should look again.
        digest: The digest of the values.
        rows: The digest of their rows, to which a second reading must come.
        content: The values, where they were kept.
    """

    finite: bool
    digest: str
    rows: str = ""
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
        raw, slots = side_by_side([stretches[i].nbytes for i in members])
        raw[:] = 0  # what is between the arrays is looked at with them
        _read_together([stretches[i] for i in members], slots)
        finite = surely_finite(raw.view(dtype))
        for i, slot in zip(members, slots, strict=True):
            stretch = stretches[i]
            values = slot.view(dtype).reshape(stretch.shape)
            if stretch.sha256:
                verified(stretch.piece.path, stretch.name, values, stretch.sha256)
            found[i] = Looked(finite or surely_finite(values.reshape(-1)), digest_of(values), content=values)
    return [found[i] for i in range(len(stretches))]


def _read_together(stretches: Sequence[Stretch], slots: Sequence[np.ndarray[Any, Any]]) -> None:
    """Reads small arrays, those that lie close together in the file at once: asking for each costs more than its bytes."""
    runs: list[list[int]] = []
    begin = end = 0
    last: Piece | None = None
    for i in sorted(range(len(stretches)), key=lambda i: (id(stretches[i].piece), stretches[i].offset)):
        stretch = stretches[i]
        if stretch.piece is not last or stretch.offset > end + _GAP or stretch.offset - begin > _RUN:
            runs.append([])
            begin = end = stretch.offset
            last = stretch.piece
        runs[-1].append(i)
        end = max(end, stretch.offset + stretch.nbytes)
    for run in runs:
        first = stretches[run[0]]
        if len(run) == 1:
            first.read_into(slots[run[0]].data)
            continue
        length = max(stretches[i].offset + stretches[i].nbytes for i in run) - first.offset
        together = first.piece.view(first.offset, length, f"{first.name!r} and what follows it")
        for i in run:
            offset = stretches[i].offset - first.offset
            slots[i].data[:] = together[offset : offset + slots[i].size]


def side_by_side(sizes: Sequence[int]) -> tuple[np.ndarray[Any, Any], list[np.ndarray[Any, Any]]]:
    """Memory for several arrays in one piece, and each one's part of it, aligned so that TensorFlow takes it as it is.

    Args:
        sizes: The bytes of each.
    """
    ends = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    whole = np.empty(ends[-1] + ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    raw = whole[start : start + ends[-1]]
    return raw, [raw[begin : begin + size] for begin, size in zip(ends, sizes, strict=False)]


def in_shares(sizes: Sequence[int], work: Callable[[Iterator[int]], None]) -> None:
    """Does work on items, by their numbers, in several threads, until none is left.

    Half of the threads begin with the largest items, the others with the smallest: a thread on small ones asks for Python's lock
    often, and waits for it long where another one does so, too.

    Args:
        sizes: How much work each item is.
        work: Takes the numbers that fall to a thread, one after the other.
    """
    todo = deque(sorted(range(len(sizes)), key=lambda i: -sizes[i]))

    def taken(large: bool) -> Iterator[int]:
        while True:
            try:
                item = todo.popleft() if large else todo.pop()
            except IndexError:
                return
            yield item

    threads = min(THREADS, len(sizes))
    if threads < 2:
        work(taken(True))
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, taken(number % 2 == 0)) for number in range(threads)]:
            done.result()


def look_over(stretches: Sequence[Stretch], keep: Sequence[bool] = ()) -> list[Looked]:
    """Reads arrays through: whether their values are finite, and as their file's own SHA-256 says.

    Args:
        stretches: Where the arrays lie.
        keep: Whether to keep each one's values; by default none's.

    Raises:
        WeightsFileError: when one can't be read, or doesn't match the SHA-256 its file keeps of it.
    """
    sizes = [stretch.nbytes for stretch in stretches]
    kept = [i for i, wanted in enumerate(keep) if wanted]
    rooms = dict(zip(kept, side_by_side([sizes[i] for i in kept])[1], strict=True))
    found: dict[int, Looked] = {}

    def take(share: Iterator[int]) -> None:
        buffer = np.empty(0, np.uint8)
        for i in share:
            room = rooms.get(i)
            if room is None and buffer.size < (needed := max((end - start for start, end in blocks(sizes[i])), default=0)):
                buffer = np.empty(needed, np.uint8)
            found[i] = _looked(stretches[i], buffer, room)

    in_shares(sizes, take)
    return [found[i] for i in range(len(stretches))]


def _looked(stretch: Stretch, buffer: np.ndarray[Any, Any], room: np.ndarray[Any, Any] | None) -> Looked:
    """Looks at an array in its room, or block by block in a buffer."""
    digest = Digest(stretch.dtype, stretch.shape)
    checksum = tensor_hash(stretch.name, stretch.dtype, stretch.shape) if stretch.sha256 else None
    finite = True
    for start, end in blocks(stretch.nbytes):
        block = buffer[: end - start] if room is None else room[start:end]
        stretch.read_into(block.data, start)
        finite = finite and surely_finite(block.view(stretch.dtype))
        digest.update(block)
        if checksum is not None:
            checksum.update(block.data)
    if checksum is not None and checksum.hexdigest() != stretch.sha256:
        raise another_digest(stretch.piece.path, stretch.name)
    content = None if room is None else room.view(stretch.dtype).reshape(stretch.shape)
    rows, whole = digest.hexdigests()
    return Looked(finite, whole, rows, content)


def fill(memory: np.ndarray[Any, Any], stretch: Stretch) -> str:
    """Reads an array into memory of its size; gives the digest of the rows that then stand there."""
    digest = Digest(stretch.dtype, stretch.shape, columns=False)
    for start, end in blocks(stretch.nbytes):
        block = memory[start:end]
        stretch.read_into(block.data, start)
        digest.update(block)
    return digest.hexdigests()[0]
