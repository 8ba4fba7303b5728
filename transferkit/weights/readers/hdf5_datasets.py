"""Where the bytes of an HDF5 dataset lie: contiguous, in its header, or in chunks; never in another file.

Source: the HDF Group's "HDF5 File Format Specification Version 3.0". Imports NumPy only.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from transferkit.weights.readers.hdf5_objects import UNDEFINED, Message, Objects
from transferkit.weights.readers.hdf5_values import MOST_INFLATION, DamageError, H5Dataset, UnusualError

__all__ = ["Datasets"]

_Q = struct.Struct("<Q")
_QQ = struct.Struct("<QQ")
_CHUNK_HEAD = struct.Struct("<II")


class Datasets(Objects):
    """The objects of a file, datasets among them."""

    def dataset(self, path: str, messages: list[Message], attributes: dict[str, Any]) -> H5Dataset:
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
        shape = self.dataspace(self.message(*raw[0x1]))
        dtype, problem, _ = self.datatype(self.message(*raw[0x3]))
        if shape is None or dtype is None:
            return H5Dataset(
                path, shape or (), np.dtype("u1"), problem=problem or "it is empty (no shape)", attributes=attributes
            )
        return self.layout(path, shape, dtype, attributes, *raw[0x8], raw.get(0xB))

    def message(self, at: int, length: int) -> bytes:
        """A copy of a message, whose bytes were asked for with its header."""
        return bytes(self.buffer[at : at + length])

    def layout(
        self,
        path: str,
        shape: tuple[int, ...],
        stored_as: np.dtype[Any],
        attributes: dict[str, Any],
        at: int,
        length: int,
        filters: tuple[int, int] | None,
    ) -> H5Dataset:
        """A dataset with the place of its bytes, or with the problem that it has none."""
        buffer, nbytes = self.buffer, math.prod(shape) * stored_as.itemsize

        def with_problem(problem: str, unsafe: bool = False) -> H5Dataset:
            return H5Dataset(path, shape, stored_as, problem=problem, unsafe=unsafe, attributes=attributes)

        version, kind = buffer[at], buffer[at + 1]
        address = where = 0
        if version in (1, 2):
            rank, kind = buffer[at + 1], buffer[at + 2]
            at += 8
            address = UNDEFINED if kind == 0 else _Q.unpack_from(buffer, at)[0]
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
            return self.chunked(H5Dataset(path, shape, stored_as, attributes=attributes), address, extents, filters)
        if kind not in (0, 1):
            raise DamageError(f"{path!r} has a layout of class {kind}")
        if kind == 0:
            address = where
            if where + stored > at + length + 8:
                raise DamageError(f"{path!r} reaches past its header")
        if address == UNDEFINED:
            if nbytes:
                return with_problem("its bytes were never written")
            address = 0
        if stored != nbytes:
            return with_problem(f"its shape {shape} needs {nbytes} bytes, the file holds {stored} for it", nbytes > stored)
        if address + nbytes > self.size:
            return with_problem(f"its {nbytes} bytes at {address} reach past the end of the file, {self.size} bytes")
        if nbytes:
            self.extents.append((address, address + nbytes, path))
        return H5Dataset(path, shape, stored_as, offset=address, attributes=attributes)

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
        if address == UNDEFINED:
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
