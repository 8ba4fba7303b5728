"""What every object of an HDF5 file has, parsed: its header, its attributes, the trees that list its parts.

Every loop is counted against the limits, every offset checked against the buffer. The buffer holds only what `need` asked for:
whoever looks at bytes that no message around them covers asks first.
Source: the HDF Group's "HDF5 File Format Specification Version 3.0". Imports NumPy only.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from transferkit.weights.readers.hdf5_pages import Pages
from transferkit.weights.readers.hdf5_values import DamageError, HostileError, UnusualError, lookup3, number_type

__all__ = ["NEAR", "UNDEFINED", "Message", "Objects"]

UNDEFINED = 0xFFFFFFFFFFFFFFFF
NEAR = 640  # bytes asked for at an address at once: they hold most objects whole, and every node of the usual size
Message = tuple[int, int, int, int]  # kind, offset, length and flags
# The kinds of messages that are looked at: shape, links, type, other files, place, filters, attributes and symbol table.
_READ = frozenset({0x1, 0x2, 0x3, 0x6, 0x7, 0x8, 0xB, 0xC, 0x11, 0x15})

_Q = struct.Struct("<Q")
_QQ = struct.Struct("<QQ")
_MESSAGE_V1 = struct.Struct("<HHB")
_TREE = struct.Struct("<4sBBHQQ")


class Objects:
    """The objects of a file, with an account of what was parsed.

    Args:
        pages: The whole file.
        max_objects: How many groups, datasets, attributes and chunks it may hold.
        max_metadata: How many bytes of names and attributes.
    """

    def __init__(self, pages: Pages, max_objects: int, max_metadata: int) -> None:
        self.need = pages.need
        self.buffer = pages.buffer
        self.size = len(self.buffer)
        self.steps = 0
        self.most_steps = 8 * max_objects + 1000
        self.metadata = 0
        self.max_metadata = max_metadata
        self.types: dict[bytes, tuple[np.dtype[Any] | None, str, int]] = {}
        self.heaps: dict[int, dict[int, tuple[int, int]]] = {}
        self.extents: list[tuple[int, int, str]] = []

    # -- accounting ---------------------------------------------------------------------------------------------------------

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > self.most_steps:
            raise HostileError("more objects than the limit allows")

    def remember(self, nbytes: int) -> None:
        self.metadata += nbytes
        if self.metadata > self.max_metadata:
            raise HostileError(f"more than {self.max_metadata} bytes of names and attributes")

    def piece(self, offset: int, length: int) -> memoryview:
        if offset + length > self.size:
            raise DamageError(f"{length} bytes at {offset} reach past the end, {self.size} bytes")
        self.need(offset, length)
        return self.buffer[offset : offset + length]

    # -- object headers -----------------------------------------------------------------------------------------------------

    def header(self, address: int) -> list[Message]:
        """The messages of an object: kind, offset, length and flags of each."""
        buffer = self.buffer
        if address >= self.size:
            raise DamageError(f"an object at {address}, past the end")
        self.need(address, NEAR)
        found: list[Message] = []
        if buffer[address] == 1:
            size = struct.unpack_from("<I", buffer, address + 8)[0]
            blocks = [(address + 16, size)]
            visited = set()
            unpack = _MESSAGE_V1.unpack_from
            while blocks:
                at, length = blocks.pop(0)
                if at in visited:
                    raise DamageError("an object header that continues in itself")
                visited.add(at)
                end = at + length
                if end > self.size:
                    raise DamageError(f"an object header at {at} reaches past the end")
                self.remember(length)
                if end > address + NEAR or at < address:
                    self.need(at, length)
                before = at
                while at + 8 <= end:
                    kind, length, flags = unpack(buffer, at)
                    at += 8
                    if at + length > end:
                        raise DamageError(f"a message at {at} reaches past its header")
                    if kind == 0x10:
                        blocks.append(_QQ.unpack_from(buffer, at))
                    elif kind in _READ:
                        found.append((kind, at, length, flags))
                    at += length
                self.step(1 + (at - before) // 64)
                if len(found) > self.most_steps:
                    raise HostileError("more messages than the limit allows")
            return found
        if bytes(buffer[address : address + 4]) != b"OHDR":
            raise DamageError(f"no object header at {address}")
        return self.header_v2(address)

    def header_v2(self, address: int) -> list[Message]:
        buffer = self.buffer
        flags = buffer[address + 5]
        at = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        size = int.from_bytes(self.piece(at, width), "little")
        extra = 2 if flags & 4 else 0
        blocks = [(address, at + width, size)]
        visited = set()
        found = []
        while blocks:
            start, at, size = blocks.pop(0)
            if start in visited:
                raise DamageError("an object header that continues in itself")
            visited.add(start)
            end = at + size
            self.remember(size)
            self.piece(start, end - start)
            if struct.unpack("<I", self.piece(end, 4))[0] != lookup3(bytes(buffer[start:end])):
                raise DamageError(f"the checksum of the object header at {start} is wrong")
            while at + 4 + extra <= end:
                kind, length, message_flags = struct.unpack_from("<BHB", buffer, at)
                at += 4 + extra
                if at + length > end:
                    raise DamageError(f"a message at {at} reaches past its header")
                if kind == 0x10:
                    where, whole = _QQ.unpack_from(buffer, at)
                    if bytes(self.piece(where, 4)) != b"OCHK" or whole < 8:
                        raise DamageError(f"no continuation of an object header at {where}")
                    blocks.append((where, where + 4, whole - 8))
                elif kind in _READ:
                    found.append((kind, at, length, message_flags))
                at += length
                self.step()
        return found

    # -- trees ------------------------------------------------------------------------------------------------------------------

    def nodes(self, address: int, kind: int, key_size: int) -> list[tuple[int, int, int]]:
        """The nodes of a version 1 B-tree in order: level, where the keys begin, and how many children there are."""
        found = []
        visited = set()
        todo = [(address, -1)]
        while todo:
            where, expected = todo.pop()
            self.step()
            self.need(where, NEAR)
            mark, found_kind, level, count, _, _ = _TREE.unpack_from(self.buffer, where)
            if mark != b"TREE" or found_kind != kind or expected not in (-1, level) or where in visited:
                raise DamageError(f"no sound B-tree node at {where}")
            visited.add(where)
            keys = where + 24
            self.step(count)
            if (length := (key_size + 8) * count + key_size) > NEAR - 24:
                self.need(keys, length)
            found.append((level, keys, count))
            if level:
                stride = key_size + 8
                children = [_Q.unpack_from(self.buffer, keys + key_size + stride * i)[0] for i in range(count)]
                todo.extend((child, level - 1) for child in reversed(children))
        return found

    # -- attributes ---------------------------------------------------------------------------------------------------------

    def attributes(self, messages: list[Message]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, at, length, flags in messages:
            if kind == 0x15:
                more = self.buffer[at + 1]
                if _Q.unpack_from(self.buffer, at + 2 + (2 if more & 1 else 0))[0] != UNDEFINED:
                    raise UnusualError("densely stored attributes")
            elif kind == 0xC:
                if flags & 2:
                    raise UnusualError("shared attributes")
                self.remember(length)
                name, value = self.attribute(at, length)
                if name in found:
                    raise DamageError(f"the attribute {name!r} twice on one object")
                found[name] = value
        return found

    def attribute(self, at: int, length: int) -> tuple[str, Any]:
        buffer, end = self.buffer, at + length
        version, flags, name_size, type_size, space_size = struct.unpack_from("<BBHHH", buffer, at)
        at += 8 + (1 if version == 3 else 0)
        if version not in (1, 2, 3):
            raise DamageError(f"an attribute of version {version}")
        if version > 1 and flags & 3:
            raise UnusualError("an attribute of a committed type")
        padding = 8 if version == 1 else 1
        parts = []
        for size in (name_size, type_size, space_size):
            parts.append(bytes(buffer[at : at + size]))
            at += -(-size // padding) * padding
        if at > end:
            raise DamageError("an attribute reaches past its message")
        name = parts[0].split(b"\0")[0].decode("utf-8", "replace")
        shape = self.dataspace(parts[2])
        if shape is None:
            return name, None
        return name, self.values(parts[1], shape, at, end)

    def values(self, kind: bytes, shape: tuple[int, ...], at: int, end: int) -> Any:
        """The value of an attribute: text, a number, a list of either, or None where it is something else."""
        count = math.prod(shape)
        code, bits, size = kind[0] & 15, kind[1], struct.unpack_from("<I", kind, 4)[0]
        if not size or count * size > end - at:
            raise DamageError("an attribute's value reaches past its message")
        if code == 3:
            flat: list[Any] = [bytes(self.buffer[at + i * size : at + (i + 1) * size]) for i in range(count)]
            flat = [(raw.rstrip(b" ") if bits & 15 == 2 else raw.split(b"\0")[0]).decode("utf-8", "replace") for raw in flat]
        elif code == 9 and bits & 15 == 1:
            flat = [self.heap_text(at + 16 * i) for i in range(count)] if size == 16 else []
        else:
            dtype, problem, _ = self.datatype(kind)
            if dtype is None or problem or dtype.kind == "V":
                return None
            flat = np.frombuffer(self.buffer[at : at + count * size], dtype).tolist()
        self.step(count // 64)
        return flat if shape else flat[0]

    def heap_text(self, at: int) -> str:
        length, collection, index = struct.unpack_from("<IQI", self.buffer, at)
        if not length:
            return ""
        if collection not in self.heaps:
            self.heaps[collection] = self.collection(collection)
        where, size = self.heaps[collection].get(index, (0, -1))
        if length > size:
            raise DamageError(f"text {index} isn't in the global heap at {collection}")
        self.remember(length)
        return bytes(self.buffer[where : where + length]).split(b"\0")[0].decode("utf-8", "replace")

    def collection(self, address: int) -> dict[int, tuple[int, int]]:
        self.need(address, 16)
        mark, _, size = struct.unpack_from("<4sB3xQ", self.buffer, address)
        if mark != b"GCOL" or address + size > self.size:
            raise DamageError(f"no sound global heap at {address}")
        self.remember(size)
        self.need(address, size)
        found = {}
        at, end = address + 16, address + size
        while at + 16 <= end:
            self.step()
            index, length = struct.unpack_from("<H6xQ", self.buffer, at)
            if not index:
                break
            if at + 16 + length > end:
                raise DamageError(f"an object reaches past the global heap at {address}")
            found[index] = (at + 16, length)
            at += 16 + -(-length // 8) * 8
        return found

    # -- shapes and types -------------------------------------------------------------------------------------------------------

    def dataspace(self, raw: bytes) -> tuple[int, ...] | None:
        version, rank = raw[0], raw[1]
        if rank > 32:
            raise DamageError(f"{rank} dimensions")
        if version == 1:
            return struct.unpack_from(f"<{rank}Q", raw, 8)
        if version == 2:
            return None if raw[3] == 2 else struct.unpack_from(f"<{rank}Q", raw, 4)
        raise DamageError(f"a dataspace of version {version}")

    def datatype(self, raw: bytes) -> tuple[np.dtype[Any] | None, str, int]:
        """The dtype, why it is no number (else empty), and the bytes of an element."""
        known = self.types.get(raw)
        if known is None:
            known = self.types[raw] = number_type(raw)
        return known
