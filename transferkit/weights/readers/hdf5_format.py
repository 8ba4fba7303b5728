"""The structure of an HDF5 file, parsed here in Python, so that no file can crash, hang or lead astray the HDF5 library.

Known is what h5py and HDF5 write by default and all that Keras ever wrote: superblocks 0–3, both object headers, symbol tables,
compact links and attributes, contiguous, compact and chunked data (version 1 B-trees), numbers and text. What is rarer (dense
groups and attributes, committed types, newer chunk indices) raises `UnusualError`, and goes to a process of its own.
Here is the tree of groups, in which every object is visited once; `hdf5_objects` and `hdf5_datasets` have what is in each.
Source: the HDF Group's "HDF5 File Format Specification Version 3.0". Imports NumPy only.
"""

from __future__ import annotations

import itertools
import struct

from transferkit.weights.readers.hdf5_datasets import Datasets
from transferkit.weights.readers.hdf5_objects import NEAR, UNDEFINED, Message
from transferkit.weights.readers.hdf5_pages import Pages
from transferkit.weights.readers.hdf5_values import DamageError, HostileError, Parsed, UnusualError, lookup3

__all__ = ["parse"]

_Q = struct.Struct("<Q")
_QQ = struct.Struct("<QQ")
_SYMBOL = struct.Struct("<QQI4x16s")
_HEAP = struct.Struct("<4sB3xQQQ")


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


class _Parser(Datasets):
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
            if driver != UNDEFINED:
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

    # -- groups -------------------------------------------------------------------------------------------------------------

    def links(self, path: str, messages: list[Message]) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        for kind, at, length, _ in messages:
            if kind == 0x11:
                tree, heap = _QQ.unpack_from(self.buffer, at)
                found.extend(self.symbols(path, tree, heap))
            elif kind == 0x6:
                found.append(self.link(path, at, length))
            elif kind == 0x2:
                flags = self.buffer[at + 1]
                if _Q.unpack_from(self.buffer, at + 2 + (8 if flags & 1 else 0))[0] != UNDEFINED:
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
            self.need(leaf, NEAR)
            if bytes(buffer[leaf : leaf + 4]) != b"SNOD":
                raise DamageError(f"no symbol table at {leaf}")
            at = leaf + 8
            count = struct.unpack_from("<H", buffer, leaf + 6)[0]
            if 40 * count > NEAR - 8:
                self.need(at, 40 * count)
            for _ in range(count):
                start, address, cache, _ = _SYMBOL.unpack_from(buffer, at)
                at += 40
                end = names.find(b"\0", start)
                if end < 0 or start >= segment_size:
                    raise DamageError(f"a name at {start} of the local heap at {heap}, past its end")
                name = self.name(names[start:end])
                if cache == 2 or address == UNDEFINED:
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
