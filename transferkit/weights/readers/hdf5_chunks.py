"""The content of chunked HDF5 datasets: the filters deflate, shuffle and Fletcher32 undone, each chunk put in its place.

Source: the HDF Group's "HDF5 File Format Specification Version 3.0", and its library for the checksum. Imports NumPy only.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import numpy as np

from transferkit.weights.readers.hdf5_values import DamageError, H5Dataset
from transferkit.weights.readers.source import Piece

__all__ = ["read_chunks"]


def read_chunks(piece: Piece, dataset: H5Dataset) -> np.ndarray[Any, Any]:
    """The content of a chunked dataset of known filters.

    Raises:
        DamageError: when a chunk doesn't hold what it should.
    """
    content = np.empty(dataset.shape, dataset.stored)
    whole = math.prod(dataset.chunks) * dataset.stored.itemsize
    for corner, where, size, mask in dataset.pieces:
        raw: bytes | memoryview = piece.view(where, size, repr(dataset.path))
        for i in reversed(range(len(dataset.filters))):
            if not mask >> i & 1:
                raw = _undo(*dataset.filters[i], raw, whole)
        if len(raw) != whole:
            raise DamageError(f"a chunk of {len(raw)} bytes in place of {whole}")
        chunk = np.frombuffer(raw, dataset.stored).reshape(dataset.chunks)
        place = tuple(slice(c, min(c + n, e)) for c, n, e in zip(corner, dataset.chunks, dataset.shape, strict=True))
        content[place] = chunk[tuple(slice(0, p.stop - p.start) for p in place)]
    return content


def _undo(code: int, parameters: tuple[int, ...], raw: bytes | memoryview, whole: int) -> bytes | memoryview:
    if code == 1:
        engine = zlib.decompressobj()
        try:
            unpacked = engine.decompress(raw, whole + 8)
        except zlib.error as error:
            raise DamageError(f"a compressed chunk is damaged ({error})") from error
        if not engine.eof:
            raise DamageError("a compressed chunk is cut off, or holds more than it should")
        return unpacked
    if code == 2:
        width = parameters[0] if parameters else 1
        if width < 2 or len(raw) < width:
            return raw
        count = len(raw) // width
        body: bytes = np.frombuffer(raw, np.uint8, count * width).reshape(width, count).T.tobytes()
        return body + bytes(raw[count * width :])
    if len(raw) < 4:
        raise DamageError("a chunk without its checksum")
    content, check = raw[:-4], struct.unpack("<I", raw[-4:])[0]
    if fletcher32(bytes(content)) != check:
        raise DamageError("a chunk's checksum is wrong")
    return content


def fletcher32(raw: bytes) -> int:
    """HDF5's Fletcher checksum of 16-bit big-endian words."""
    words = np.frombuffer(raw[: len(raw) // 2 * 2], ">u2").astype(np.uint64)
    low = high = 0
    for start in range(0, len(words), 360):
        block = words[start : start + 360]
        high += low * len(block) + int((block * np.arange(len(block), 0, -1, dtype=np.uint64)).sum())
        low += int(block.sum())
        low, high = _folded(low), _folded(high)
    if len(raw) % 2:
        low = _folded(low + (raw[-1] << 8))
        high = _folded(high + low)
    return _folded(high) << 16 | _folded(low)


def _folded(value: int) -> int:
    # One's complement addition: HDF5 keeps 65535 as it is and never makes it 0.
    return value if value < 65536 else (value - 1) % 65535 + 1
