"""The structure of an HDF5 file, parsed here in Python, so that no file can crash, hang or lead astray the HDF5 library.

Known is what h5py and HDF5 write by default and all that Keras ever wrote: superblocks 0–3, both object headers, symbol tables,
compact links and attributes, contiguous, compact and chunked data (version 1 B-trees), numbers and text. What is rarer (dense
groups and attributes, committed types, newer chunk indices) raises `UnusualError`, and goes to a process of its own.
Every loop is counted against the limits, every offset checked against the buffer, every object visited once. The buffer holds
only what `need` asked for: whoever looks at bytes that no message around them covers asks first.
Source: the HDF Group's "HDF5 File Format Specification Version 3.0". Imports NumPy only.
"""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any

import numpy as np

from transferkit.weights.readers.hdf5_pages import Pages
from transferkit.weights.readers.hdf5_values import (
    MOST_INFLATION,
    DamageError,
    H5Dataset,
    HostileError,
    Parsed,
    UnusualError,
    lookup3,
    number_type,
)

__all__ = ["parse"]

_UNDEFINED = 0xFFFFFFFFFFFFFFFF

_Q = struct.Struct("<Q")
_QQ = struct.Struct("<QQ")
_MESSAGE_V1 = struct.Struct("<HHB")
_SYMBOL = struct.Struct("<QQI4x16s")
_TREE = struct.Struct("<4sBBHQQ")
_HEAP = struct.Struct("<4sB3xQQQ")
_CHUNK_HEAD = struct.Struct("<II")


def parse(pages: Pages, *, max_objects: int, max_metadata: int) -> Parsed:
    """What an HDF5 file holds.

    Args:
        pages: The whole file.
        max_objects: How many groups, datasets, attributes and chunks it may hold.
        max_metadata: How many bytes of names and attributes.

    Raises:
        DamageError: when it breaks the format's rules.
        HostileError: when it holds links, lies about sizes, or passes the limits.
        UnusualError: when it uses a rarer part of the format.
    """
    try:
        return _Parser(pages, max_objects, max_metadata).run()
    except (struct.error, IndexError, UnicodeError, OverflowError) as error:
        raise DamageError(f"a structure reaches past its end ({error})") from error


class _Parser:
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

    # -- the file -----------------------------------------------------------------------------------------------------------

    def run(self) -> Parsed:
        buffer = self.buffer
        self.need(0, 96)
        version = buffer[8]
        if version in (0, 1):
            widths = (buffer[13], buffer[14])
            at = 24 if version == 0 else 28
            base, _, end, driver = struct.unpack_from("<QQQQ", buffer, at)
            root = _Q.unpack_from(buffer, at + 40)[0]
            if driver != _UNDEFINED:
                raise UnusualError("a driver of its own")
        elif version in (2, 3):
            widths = (buffer[9], buffer[10])
            base, _, end, root = struct.unpack_from("<QQQQ", buffer, 12)
            if struct.unpack_from("<I", buffer, 44)[0] != lookup3(bytes(buffer[:44])):
                raise DamageError("the superblock's checksum is wrong")
        else:
            raise DamageError(f"a superblock of version {version}")
        if widths != (8, 8):
            raise UnusualError("addresses of another width than 8 bytes")
        if base:
            raise UnusualError("a base address")
        if end > self.size:
            raise DamageError(f"the file says it is {end} bytes long, and has {self.size}")
        if end < self.size:
            raise DamageError(f"{self.size - end} bytes after the end of the HDF5 content")
        return self.tree(root)

    def tree(self, root: int) -> Parsed:
        parsed = Parsed()
        seen: dict[int, str] = {}
        todo = [("", root)]
        while todo:
            path, address = todo.pop()
            if address in seen:
                raise HostileError(f"{path!r} and {seen[address] or '/'!r} are two names for one object")
            seen[address] = path
            parsed.addresses[path] = address
            self.step()
            self.remember(len(path))
            messages = self.header(address)
            kinds = {kind for kind, _, _, _ in messages}
            attributes = self.attributes(messages)
            if 0x8 in kinds or 0x7 in kinds:
                parsed.datasets[path] = self.dataset(path, messages, attributes)
                continue
            parsed.groups[path] = attributes
            if not kinds & {0x2, 0x6, 0x11}:
                if 0x3 in kinds:
                    raise UnusualError("a committed type")
                raise DamageError(f"{path!r} is neither a group nor a dataset")
            links = self.links(path, messages)
            parsed.children[path] = tuple(name for name, _ in links)
            if len(set(parsed.children[path])) != len(links):
                raise DamageError(f"two members of {path or '/'!r} have the same name")
            prefix = f"{path}/" if path else ""
            todo.extend((prefix + name, where) for name, where in reversed(links))
        self.extents.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(self.extents):
            if start < end:
                raise HostileError(f"{first!r} and {second!r} share bytes")
        return parsed

    # -- object headers -----------------------------------------------------------------------------------------------------

    def header(self, address: int) -> list[tuple[int, int, int, int]]:
        """The messages of an object: kind, offset, length and flags of each."""
        buffer = self.buffer
        if address >= self.size:
            raise DamageError(f"an object at {address}, past the end")
        self.need(address, 32)
        found: list[tuple[int, int, int, int]] = []
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
                self.need(at, length)
                before = at
                while at + 8 <= end:
                    kind, length, flags = unpack(buffer, at)
                    at += 8
                    if at + length > end:
                        raise DamageError(f"a message at {at} reaches past its header")
                    if kind == 0x10:
                        blocks.append(_QQ.unpack_from(buffer, at))
                    elif kind:
                        found.append((kind, at, length, flags))
                    at += length
                self.step(1 + (at - before) // 64)
                if len(found) > self.most_steps:
                    raise HostileError("more messages than the limit allows")
            return found
        if bytes(buffer[address : address + 4]) != b"OHDR":
            raise DamageError(f"no object header at {address}")
        return self.header_v2(address)

    def header_v2(self, address: int) -> list[tuple[int, int, int, int]]:
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
                elif kind:
                    found.append((kind, at, length, message_flags))
                at += length
                self.step()
        return found

    # -- groups -------------------------------------------------------------------------------------------------------------

    def links(self, path: str, messages: list[tuple[int, int, int, int]]) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        for kind, at, length, _ in messages:
            if kind == 0x11:
                tree, heap = _QQ.unpack_from(self.buffer, at)
                found.extend(self.symbols(path, tree, heap))
            elif kind == 0x6:
                found.append(self.link(path, at, length))
            elif kind == 0x2:
                flags = self.buffer[at + 1]
                if _Q.unpack_from(self.buffer, at + 2 + (8 if flags & 1 else 0))[0] != _UNDEFINED:
                    raise UnusualError("a densely stored group")
        return found

    def link(self, path: str, at: int, length: int) -> tuple[str, int]:
        buffer, end = self.buffer, at + length
        flags = buffer[at + 1]
        at += 2
        kind = 0
        if flags & 8:
            kind = buffer[at]
            at += 1
        at += (8 if flags & 4 else 0) + (1 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        count = int.from_bytes(self.piece(at, width), "little")
        at += width
        if at + count > end:
            raise DamageError("a link's name reaches past its message")
        name = self.name(bytes(buffer[at : at + count]))
        if kind != 0:
            raise HostileError(f"{path + '/' if path else ''}{name} is a {'soft' if kind == 1 else 'external'} link")
        return name, _Q.unpack_from(buffer, at + count)[0]

    def name(self, raw: bytes) -> str:
        self.remember(len(raw))
        name = raw.decode("utf-8")
        if not name or "/" in name or name in (".", ".."):
            raise DamageError(f"a member named {name!r}")
        return name

    def symbols(self, path: str, tree: int, heap: int) -> list[tuple[str, int]]:
        buffer = self.buffer
        self.need(heap, _HEAP.size)
        mark, _, segment_size, _, segment = _HEAP.unpack_from(buffer, heap)
        if mark != b"HEAP":
            raise DamageError(f"no local heap at {heap}")
        if segment + segment_size > self.size:
            raise DamageError(f"the local heap at {heap} reaches past the end")
        self.remember(segment_size)
        names = bytes(self.piece(segment, segment_size))
        found = []
        for leaf in self.leaves(tree):
            self.step()
            self.need(leaf, 8)
            if bytes(buffer[leaf : leaf + 4]) != b"SNOD":
                raise DamageError(f"no symbol table at {leaf}")
            at = leaf + 8
            count = struct.unpack_from("<H", buffer, leaf + 6)[0]
            self.need(at, 40 * count)
            for _ in range(count):
                start, address, cache, _ = _SYMBOL.unpack_from(buffer, at)
                at += 40
                end = names.find(b"\0", start)
                if end < 0 or start >= segment_size:
                    raise DamageError(f"a name at {start} of the local heap at {heap}, past its end")
                name = self.name(names[start:end])
                if cache == 2 or address == _UNDEFINED:
                    raise HostileError(f"{path + '/' if path else ''}{name} is a soft link")
                found.append((name, address))
        return found

    def leaves(self, address: int) -> list[int]:
        """The symbol tables of a group's version 1 B-tree, in the order of their names."""
        found: list[int] = []
        for level, at, count in self.nodes(address, 0, 8):
            if level == 0:
                found.extend(_Q.unpack_from(self.buffer, at + 8 + 16 * i)[0] for i in range(count))
        return found

    def nodes(self, address: int, kind: int, key_size: int) -> list[tuple[int, int, int]]:
        """The nodes of a version 1 B-tree in order: level, where the keys begin, and how many children there are."""
        found = []
        visited = set()
        todo = [(address, -1)]
        while todo:
            where, expected = todo.pop()
            self.step()
            self.need(where, _TREE.size)
            mark, found_kind, level, count, _, _ = _TREE.unpack_from(self.buffer, where)
            if mark != b"TREE" or found_kind != kind or expected not in (-1, level) or where in visited:
                raise DamageError(f"no sound B-tree node at {where}")
            visited.add(where)
            keys = where + 24
            self.step(count)
            self.need(keys, (key_size + 8) * count + key_size)
            found.append((level, keys, count))
            if level:
                stride = key_size + 8
                children = [_Q.unpack_from(self.buffer, keys + key_size + stride * i)[0] for i in range(count)]
                todo.extend((child, level - 1) for child in reversed(children))
        return found

    # -- attributes ---------------------------------------------------------------------------------------------------------

    def attributes(self, messages: list[tuple[int, int, int, int]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, at, length, flags in messages:
            if kind == 0x15:
                more = self.buffer[at + 1]
                if _Q.unpack_from(self.buffer, at + 2 + (2 if more & 1 else 0))[0] != _UNDEFINED:
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

    # -- datasets -----------------------------------------------------------------------------------------------------------

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

    def dataset(self, path: str, messages: list[tuple[int, int, int, int]], attributes: dict[str, Any]) -> H5Dataset:
        raw: dict[int, tuple[int, int]] = {}
        for kind, at, length, flags in messages:
            if kind in (0x1, 0x3, 0x8, 0xB, 0x7):
                if flags & 2:
                    raise UnusualError("a shared message")
                if kind in raw:
                    raise DamageError(f"{path!r} says its shape, type or place twice")
                raw[kind] = (at, length)
        if 0x7 in raw:
            return H5Dataset(path, (), np.dtype("u1"), problem="its bytes lie in another file", unsafe=True)
        if not {0x1, 0x3, 0x8} <= set(raw):
            raise DamageError(f"{path!r} lacks a shape, a type or a place")
        shape = self.dataspace(bytes(self.piece(*raw[0x1])))
        dtype, problem, _ = self.datatype(bytes(self.piece(*raw[0x3])))
        if shape is None or dtype is None:
            return H5Dataset(
                path, shape or (), np.dtype("u1"), problem=problem or "it is empty (no shape)", attributes=attributes
            )
        return self.layout(H5Dataset(path, shape, dtype, attributes=attributes), *raw[0x8], raw.get(0xB))

    def layout(self, dataset: H5Dataset, at: int, length: int, filters: tuple[int, int] | None) -> H5Dataset:
        buffer, path, shape, nbytes = self.buffer, dataset.path, dataset.shape, dataset.nbytes

        def with_problem(problem: str, unsafe: bool = False) -> H5Dataset:
            return H5Dataset(path, shape, dataset.stored, problem=problem, unsafe=unsafe, attributes=dataset.attributes)

        version, kind = buffer[at], buffer[at + 1]
        address = where = 0
        if version in (1, 2):
            rank, kind = buffer[at + 1], buffer[at + 2]
            at += 8
            address = _UNDEFINED if kind == 0 else _Q.unpack_from(buffer, at)[0]
            at += 0 if kind == 0 else 8
            extents = struct.unpack_from(f"<{rank}I", buffer, at)
            at += 4 * rank
            stored = struct.unpack_from("<I", buffer, at)[0] if kind == 0 else nbytes
            where = at + 4
        elif version in (3, 4):
            if kind == 3:
                return with_problem("it is a virtual dataset, which reads other files", True)
            if kind == 0:
                stored, where = struct.unpack_from("<H", buffer, at + 2)[0], at + 4
            elif kind == 1:
                address, stored = _QQ.unpack_from(buffer, at + 2)
            elif kind == 2 and version == 3:
                rank = buffer[at + 2]
                address = _Q.unpack_from(buffer, at + 3)[0]
                extents = struct.unpack_from(f"<{rank}I", buffer, at + 11)
            elif kind == 2:
                raise UnusualError("a newer index of chunks")
        else:
            raise DamageError(f"{path!r} has a layout of version {version}")
        if kind == 2:
            return self.chunked(dataset, address, extents, filters)
        if kind not in (0, 1):
            raise DamageError(f"{path!r} has a layout of class {kind}")
        if kind == 0:
            address = where
            if where + stored > at + length + 8:
                raise DamageError(f"{path!r} reaches past its header")
        if address == _UNDEFINED:
            if nbytes:
                return with_problem("its bytes were never written")
            address = 0
        if stored != nbytes:
            return with_problem(f"its shape {shape} needs {nbytes} bytes, the file holds {stored} for it", nbytes > stored)
        if address + nbytes > self.size:
            return with_problem(f"its {nbytes} bytes at {address} reach past the end of the file, {self.size} bytes")
        if nbytes:
            self.extents.append((address, address + nbytes, path))
        return H5Dataset(path, shape, dataset.stored, offset=address, attributes=dataset.attributes)

    def chunked(self, dataset: H5Dataset, address: int, extents: tuple[int, ...], filters: tuple[int, int] | None) -> H5Dataset:
        path, shape, itemsize = dataset.path, dataset.shape, dataset.stored.itemsize
        rank = len(shape)

        def finished(problem: str = "", unsafe: bool = False, **more: Any) -> H5Dataset:
            return H5Dataset(path, shape, dataset.stored, problem=problem, unsafe=unsafe, attributes=dataset.attributes, **more)

        if len(extents) != rank + 1 or not all(extents) or not rank or extents[-1] != itemsize:
            raise DamageError(f"{path!r} has chunks of shape {extents} for the shape {shape}")
        chunks = extents[:-1]
        pipeline = self.filters(*filters) if filters else ()
        if unknown := [f for f, _ in pipeline if f not in (1, 2, 3)]:
            if unknown[0] == 32000:
                raise UnusualError("the LZF filter")
            return finished(f"it is compressed with HDF5 filter {unknown[0]}, which isn't known here")
        expected = math.prod(tuple(-(-extent // chunk) for extent, chunk in zip(shape, chunks, strict=True)))
        if address == _UNDEFINED:
            return finished("its bytes were never written" if expected else "", chunks=chunks)
        key = 8 + 8 * (rank + 1)
        pieces = []
        corners = set()
        total = 0
        for level, keys, count in self.nodes(address, 1, key):
            if level:
                continue
            for i in range(count):
                at = keys + (key + 8) * i
                size, mask = _CHUNK_HEAD.unpack_from(self.buffer, at)
                corner = struct.unpack_from(f"<{rank}Q", self.buffer, at + 8)
                where = _Q.unpack_from(self.buffer, at + key)[0]
                if where + size > self.size:
                    return finished(f"a chunk at {where} reaches past the end of the file, {self.size} bytes")
                if corner in corners or any(c % n or c >= e for c, n, e in zip(corner, chunks, shape, strict=True)):
                    raise DamageError(f"{path!r} has a chunk at {corner}, out of place")
                corners.add(corner)
                total += size
                pieces.append((corner, where, size, mask))
                self.extents.append((where, where + size, path))
        if len(pieces) != expected:
            return finished(f"{expected - len(pieces)} of its {expected} chunks were never written")
        whole = math.prod(chunks) * itemsize
        if any(whole > (size * MOST_INFLATION if pipeline else size) for _, _, size, _ in pieces):
            return finished(f"its shape {shape} needs {dataset.nbytes} bytes, the file holds {total} for it", True)
        return finished(chunks=chunks, pieces=tuple(pieces), filters=pipeline)

    def filters(self, at: int, length: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        buffer, end = self.buffer, at + length
        version, count = buffer[at], buffer[at + 1]
        if version not in (1, 2) or count > 32:
            raise DamageError(f"a filter list of version {version} with {count} filters")
        at += 8 if version == 1 else 2
        found = []
        for _ in range(count):
            code = struct.unpack_from("<H", buffer, at)[0]
            named = version == 1 or code >= 256
            name_size = struct.unpack_from("<H", buffer, at + 2)[0] if named else 0
            at += 4 if named else 2
            _, values = struct.unpack_from("<HH", buffer, at)
            at += 4 + (-(-name_size // 8) * 8 if version == 1 else name_size)
            if at + 4 * values > end:
                raise DamageError("a filter's parameters reach past their message")
            found.append((code, struct.unpack_from(f"<{values}I", buffer, at)))
            at += 4 * values + (4 if version == 1 and values % 2 else 0)
        return tuple(found)
