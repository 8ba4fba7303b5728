"""Memory as large as a file, of which only the pages that were asked for are read; the rest is never touched and costs nothing.

So the structure of a file of any size is parsed as if it were in memory, at the price of the few pages that hold it.
Standard library only.
"""

from __future__ import annotations

import mmap

from transferkit.weights.readers.source import Memory, Piece

__all__ = ["Pages"]


class Pages:
    """The bytes of a file, there once `need` asked for them.

    Args:
        piece: The file.
        page: How many bytes are read at least.
    """

    def __init__(self, piece: Piece, *, page: int = 8192) -> None:
        self._piece, self._page = piece, page
        if isinstance(piece, Memory):
            self.buffer, self._there = piece.view(0, piece.size), bytearray(b"\1") * (piece.size // page + 1)
        else:
            self.buffer, self._there = memoryview(mmap.mmap(-1, piece.size)), bytearray(piece.size // page + 1)

    def need(self, offset: int, length: int) -> None:
        """Reads these bytes, as far as the file has them; what lies past its end is for the caller to notice."""
        page, there = self._page, self._there
        first, last = offset // page, (offset + length - 1) // page
        if length > 0 and first >= 0 and last < len(there) and last - first < 2 and there[first] and there[last]:
            return
        if offset < 0 or length <= 0 or offset >= len(self.buffer):
            return
        for number in range(first, min(last, (len(self.buffer) - 1) // page) + 1):
            if not there[number]:
                start = number * page
                self._piece.read_into(self.buffer[start : start + page], start, "the structure")
                there[number] = 1
