"""What an HDF5 file holds, as plain values, and the parts of the format that need no file: number types and checksums.

Source: the HDF Group's "HDF5 File Format Specification Version 3.0". Imports NumPy only.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "MOST_INFLATION",
    "SIGNATURE",
    "DamageError",
    "H5Dataset",
    "HostileError",
    "Parsed",
    "UnusualError",
    "lookup3",
    "number_type",
]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What zlib can make of one byte at most; a shape that needs more is a lie.
MOST_INFLATION = 1032
KINDS = {
    2: "a time",
    3: "text",
    4: "a bit field",
    5: "opaque",
    6: "compound",
    7: "a reference",
    9: "of variable length",
    10: "an array",
}
# Sign, offset, precision, exponent place and size, mantissa place and size, bias: IEEE half, single and double.
FLOATS = {
    2: (15, 0, 16, 10, 5, 0, 10, 15),
    4: (31, 0, 32, 23, 8, 0, 23, 127),
    8: (63, 0, 64, 52, 11, 0, 52, 1023),
}


class DamageError(Exception):
    """The file breaks HDF5's rules."""


class HostileError(Exception):
    """The file asks for something a weights file must not."""


class UnusualError(Exception):
    """The file uses a part of HDF5 this parser leaves to the library."""


@functools.lru_cache(64)
def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("=")


@dataclass(frozen=True, slots=True)
class H5Dataset:
    """A dataset without its content.

    Args:
        path: From the root, parts joined by `/`.
        shape: Its shape.
        stored: Its dtype with the byte order of the file.
        offset: Where its bytes begin in the file, when they lie in one plain piece; else None.
        problem: Why it can't be read as numbers; empty when it can.
        unsafe: Whether the problem is one of trust and not of damage.
        chunks: The chunks' shape, empty when it isn't chunked.
        pieces: Of each chunk: its corner, offset, stored bytes and the mask of filters that were skipped.
        filters: The filters in the order in which they were applied, each with its parameters.
        attributes: Its attributes.
    """

    path: str
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    offset: int | None = None
    problem: str = ""
    unsafe: bool = False
    chunks: tuple[int, ...] = ()
    pieces: tuple[tuple[tuple[int, ...], int, int, int], ...] = field(default=(), repr=False)
    filters: tuple[tuple[int, tuple[int, ...]], ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype in the machine's byte order."""
        return _native(self.stored)

    @property
    def nbytes(self) -> int:
        """The bytes of its content."""
        return math.prod(self.shape) * self.stored.itemsize


@dataclass
class Parsed:
    """What a file holds: the attributes of the groups, the names in each, the datasets, and where each object begins, by path."""

    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    children: dict[str, tuple[str, ...]] = field(default_factory=dict)
    datasets: dict[str, H5Dataset] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)


def number_type(raw: bytes) -> tuple[np.dtype[Any] | None, str, int]:
    """The dtype a datatype message describes, why it is no number (else empty), and the bytes of an element."""
    code, bits, size = raw[0] & 15, raw[1], struct.unpack_from("<I", raw, 4)[0]
    order = ">" if bits & 1 else "<"
    if code == 0 and size in (1, 2, 4, 8):
        shift, precision = struct.unpack_from("<HH", raw, 8)
        if (shift, precision) == (0, 8 * size):
            return np.dtype(f"{order}{'i' if bits & 8 else 'u'}{size}"), "", size
    if code == 1:
        layout = (raw[2], *struct.unpack_from("<HHBBBBI", raw, 8))
        for width, expected in FLOATS.items():
            if (size, layout) == (width, expected) and bits & 0x70 == 0x20:
                return np.dtype(f"{order}f{width}"), "", size
    if code == 8 and size == 1 and bits == 2 and (b"FALSE\0\0\0TRUE\0\0\0\0\0\1" in raw or b"FALSE\0TRUE\0\0\1" in raw):
        return np.dtype(bool), "", size  # how h5py writes truth values
    if code == 5 and size == 2:
        return np.dtype("V2"), "", size  # Keras's bfloat16, which an attribute names
    return None, f"its type is {KINDS.get(code, 'an unusual number')}, which isn't read as weights", size


def lookup3(raw: bytes) -> int:
    """Bob Jenkins's lookup3 hash (2006), which HDF5 uses as the checksum of its metadata."""
    mask = 0xFFFFFFFF

    def rotated(value: int, by: int) -> int:
        return (value << by | value >> (32 - by)) & mask

    a = b = c = (0xDEADBEEF + len(raw)) & mask
    padded = raw + bytes(-len(raw) % 12 if raw else 0)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    for i in range(0, len(words) - 3, 3):
        a, b, c = a + words[i] & mask, b + words[i + 1] & mask, c + words[i + 2] & mask
        a = a - c & mask ^ rotated(c, 4)
        c = c + b & mask
        b = b - a & mask ^ rotated(a, 6)
        a = a + c & mask
        c = c - b & mask ^ rotated(b, 8)
        b = b + a & mask
        a = a - c & mask ^ rotated(c, 16)
        c = c + b & mask
        b = b - a & mask ^ rotated(a, 19)
        a = a + c & mask
        c = c - b & mask ^ rotated(b, 4)
        b = b + a & mask
    if not raw:
        return c
    a, b, c = a + words[-3] & mask, b + words[-2] & mask, c + words[-1] & mask
    c = (c ^ b) - rotated(b, 14) & mask
    a = (a ^ c) - rotated(c, 11) & mask
    b = (b ^ a) - rotated(a, 25) & mask
    c = (c ^ b) - rotated(b, 16) & mask
    a = (a ^ c) - rotated(c, 4) & mask
    b = (b ^ a) - rotated(a, 14) & mask
    result: int = (c ^ b) - rotated(b, 24) & mask
    return result
