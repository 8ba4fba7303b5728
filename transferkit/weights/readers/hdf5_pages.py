"""Memory as large as a file, of which only the pages that were asked for are read; the rest is never touched and costs nothing.

So the structure of a file of any size is parsed as if it were in memory, at the price of the few pages that hold it.
Standard library only.
"""

from __future__ import annotations

import mmap
import sys

from transferkit.weights.readers.source import Memory, Piece

__all__ = ["Pages"]


def _untouched(size: int) -> mmap.mmap:
    """Memory that costs nothing until it is written to; private, for a page of shared memory takes longer to come."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Pages:
    """The bytes of a file, there once `need` asked for them.

    Args:
        piece: The file.
        page: The power of two that is the number of bytes read at least.
    """

    def __init__(self, piece: Piece, *, page: int = 13) -> None:
        self._piece, self._page = piece, page
        count = (piece.size >> page) + 1
        if isinstance(piece, Memory):
            self.buffer, self._there = piece.view(0, piece.size), bytearray(b"\1") * count
        else:
            self.buffer, self._there = memoryview(_untouched(piece.size)), bytearray(count)

    def need(self, offset: int, length: int) -> None:
        """Reads these bytes, as far as the file has them; what lies past its end is for the caller to notice."""
        there, page = self._there, self._page
        first, last = offset >> page, (offset + length - 1) >> page
        if 0 <= first <= last < first + 2 and last < len(there) and there[first] and there[last]:
            return
        if offset < 0 or length <= 0 or offset >= len(self.buffer):
            return
        size = 1 << page
        for number in range(first, min(last, (len(self.buffer) - 1) >> page) + 1):
            if not there[number]:
                start = number << page
                self._piece.read_into(self.buffer[start : start + size], start, "the structure")
                there[number] = 1
