"""What TensorFlow's checkpoints are made of: sorted string tables, protocol buffers, and CRC-32C checksums.

Sources: LevelDB's "table format", Google's "Protocol Buffers encoding", and RFC 3720 for the checksum (Castagnoli's polynomial).
Imports NumPy only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

__all__ = ["TABLE_MAGIC", "TableError", "crc32c", "masked_crc32c", "message", "table", "varint"]

TABLE_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_POLYNOMIAL = 0x82F63B78
_LANES = 4096


class TableError(Exception):
    """A table or message breaks the rules of its format."""


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The integer of variable length at an offset, and the offset after it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise TableError("an integer that doesn't end")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def message(data: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: number and value, an integer or the bytes."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, at = varint(data, at)
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            value, at = data[at : at + width], at + width
            if len(value) != width:
                raise TableError("a number that is cut off")
        elif kind == 2:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
            if len(value) != length:
                raise TableError("a field that is cut off")
        else:
            raise TableError(f"a field of wire type {kind}")
        yield tag >> 3, value


def _block(data: memoryview, offset: int, size: int, budget: list[int]) -> Iterator[tuple[bytes, memoryview]]:
    if offset + size + 5 > len(data):
        raise TableError(f"a block at {offset} of {size} bytes, past the end")
    kind = data[offset + size]
    if kind:
        raise TableError(f"a block packed by method {kind}, which TensorFlow doesn't use")
    stored = struct.unpack_from("<I", data, offset + size + 1)[0]
    if masked_crc32c(data[offset : offset + size + 1]) != stored:
        raise TableError(f"the checksum of the block at {offset} is wrong")
    if size < 4:
        raise TableError("an empty block")
    block = data[offset : offset + size]
    restarts = struct.unpack_from("<I", block, size - 4)[0]
    end = size - 4 - 4 * restarts
    if end < 0:
        raise TableError("a block of restarts alone")
    at, key = 0, b""
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise TableError("an entry that reaches past its block")
        key = key[:shared] + bytes(block[at : at + own])
        budget[0] -= 1
        budget[1] -= len(key)
        if min(budget) < 0:
            raise TableError("more entries than the limits allow")
        yield key, block[at + own : at + own + length]
        at += own + length


def table(data: memoryview, *, most_entries: int, most_bytes: int) -> Iterator[tuple[bytes, memoryview]]:
    """The keys and values of a sorted string table, in its order.

    Raises:
        TableError: when it is damaged, or has more entries or bytes of keys than allowed.
    """
    if len(data) < 48 or bytes(data[-8:]) != TABLE_MAGIC:
        raise TableError("no table: its last bytes are missing")
    footer = data[-48:]
    _, at = varint(footer, 0)
    _, at = varint(footer, at)
    offset, at = varint(footer, at)
    size, at = varint(footer, at)
    budget = [2 * most_entries, most_bytes]
    last = None
    for _, handle in _block(data, offset, size, budget):
        where, at = varint(handle, 0)
        length, at = varint(handle, at)
        for key, value in _block(data, where, length, budget):
            if last is not None and key <= last:
                raise TableError("keys out of order")
            last = key
            yield key, value


# -- CRC-32C --------------------------------------------------------------------------------------------------------------------


@cache
def _bytes_table() -> np.ndarray[Any, np.dtype[np.uint32]]:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, values >> 1 ^ np.uint32(_POLYNOMIAL), values >> 1)
    return values.astype(np.uint32)


def _times(rows: list[int], value: int) -> int:
    result = 0
    for row in rows:
        if value & 1:
            result ^= row
        value >>= 1
    return result


@cache
def _zeros(count: int) -> tuple[list[int], ...]:
    """The operator that appends `count` zero bytes to a checksum, as four tables of 256, for its four bytes."""
    bit = [_POLYNOMIAL, *(1 << i for i in range(31))]
    power = bit
    for _ in range(3):
        power = [_times(power, row) for row in power]  # eight zero bits
    result = [1 << i for i in range(32)]
    while count:
        if count & 1:
            result = [_times(power, row) for row in result]
        power = [_times(power, row) for row in power]
        count >>= 1
    return tuple([_times(result, value << 8 * i) for value in range(256)] for i in range(4))


def crc32c(data: memoryview) -> int:
    """The CRC-32C of some bytes: in 4,096 lanes at once where there are enough, joined by the operator of zero bytes."""
    table256 = _bytes_table()
    length = len(data) // _LANES
    crc = 0xFFFFFFFF
    if length:
        lanes = np.frombuffer(data, np.uint8, length * _LANES).reshape(_LANES, length).T
        states = np.zeros(_LANES, np.uint32)
        states[0] = crc
        for start in range(0, length, 256):
            for row in np.ascontiguousarray(lanes[start : start + 256]):
                states = table256[(states ^ row) & 255] ^ states >> 8
        operator = _zeros(length)
        crc = 0
        for state in states.tolist():
            crc = (
                operator[0][crc & 255]
                ^ operator[1][crc >> 8 & 255]
                ^ operator[2][crc >> 16 & 255]
                ^ operator[3][crc >> 24]
                ^ state
            )
    plain = table256.tolist()
    for byte in bytes(data[length * _LANES :]):
        crc = plain[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: memoryview) -> int:
    """The CRC-32C as LevelDB and TensorFlow store it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
