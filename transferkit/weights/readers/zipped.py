"""Zip archives behind guards: members found once, sized before they are unpacked, checked against their checksums.

Refused are two members of one name, members that share bytes or leave their directory, links, encryption, methods other than
stored and deflate, and sizes no deflate stream could hold. Stored members are read where they lie, without a copy.
Standard library only.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass

from transferkit.errors import UnsafeFileError, WeightsFileError, did_you_mean
from transferkit.weights.readers.archive import Limits
from transferkit.weights.readers.source import Memory, Part, Piece, Source, asked_of, check_range

__all__ = ["Member", "Zip"]

_LOCAL = struct.Struct("<4s22xHH")
_MOST_INFLATION = 1032


@dataclass(frozen=True)
class Member:
    """One member of an archive.

    Args:
        name: Its path in the archive.
        offset: Where its bytes begin in the file.
        stored: How many bytes it takes in the file.
        size: How many bytes it has once unpacked.
        deflated: Whether it must be unpacked.
        crc: Its CRC-32 once unpacked.
    """

    name: str
    offset: int
    stored: int
    size: int
    deflated: bool
    crc: int


class Zip:
    """The members of a zip archive.

    Args:
        source: The open file.
        limits: What it may ask for.

    Raises:
        WeightsFileError: when the archive is damaged.
        UnsafeFileError: when it holds what an archive of weights must not.
    """

    def __init__(self, source: Source, *, limits: Limits) -> None:
        self.source, self.limits = source, limits
        self._checked: set[str] = set()
        try:
            with os.fdopen(os.dup(source.descriptor), "rb") as file, zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError, UnicodeError, IndexError) as error:
            raise WeightsFileError(
                asked_of(source.path),
                found=f"a damaged zip archive: {error}",
                cause="the file was cut off",
                fix="get the file again",
            ) from error
        if len(listed) > limits.max_arrays:
            raise self._unsafe(f"{len(listed)} members; the limit is {limits.max_arrays}")
        self.members: dict[str, Member] = {}
        for info in listed:
            if not info.filename:
                raise self._damaged("a member without a name")
            if not info.is_dir():
                self._add(info)
        places = sorted((m.offset, m.offset + m.stored, m.name) for m in self.members.values())
        for i in range(1, len(places)):
            if places[i - 1][1] > places[i][0]:
                raise self._unsafe(f"the members {places[i - 1][2]!r} and {places[i][2]!r} share bytes")

    def _unsafe(self, found: str) -> UnsafeFileError:
        return UnsafeFileError(
            asked_of(self.source.path),
            found=found,
            cause="the archive was made to mislead its reader, or is larger than the limits",
            fix="get the file from a source you trust, or save the model again",
        )

    def _damaged(self, found: str) -> WeightsFileError:
        return WeightsFileError(
            asked_of(self.source.path), found=found, cause="the file was cut off or changed", fix="get the file again"
        )

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = info.filename
        if name in self.members:
            raise self._unsafe(f"two members named {name!r}")
        parts = name.replace("\\", "/").split("/")
        if name.startswith("/") or ".." in parts or "\0" in name or ":" in parts[0]:
            raise self._unsafe(f"a member named {name!r}, which leaves the archive's directory")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise self._unsafe(f"the member {name!r} is a link")
        if info.flag_bits & 1:
            raise self._unsafe(f"the member {name!r} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._unsafe(f"the member {name!r} is packed by method {info.compress_type}; stored and deflate are known")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        if info.file_size > (info.compress_size * _MOST_INFLATION if deflated else info.compress_size):
            raise self._unsafe(f"the member {name!r} says it has {info.file_size} bytes, from {info.compress_size}")
        mark, name_size, extra_size = _LOCAL.unpack(self.source.bytes(info.header_offset, 30, f"the head of {name!r}"))
        if mark != b"PK\3\4":
            raise self._damaged(f"no member begins at byte {info.header_offset}, where {name!r} should")
        raw = self.source.bytes(info.header_offset + 30, name_size, f"the name of {name!r}")
        if raw.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") != info.orig_filename:
            raise self._unsafe(f"the member listed as {name!r} calls itself {raw!r}")
        offset = info.header_offset + 30 + name_size + extra_size
        check_range(self.source, offset, info.compress_size, f"the member {name!r}")
        self.members[name] = Member(name, offset, info.compress_size, info.file_size, deflated, info.CRC)

    def piece(self, name: str, *, most: int) -> Piece:
        """The content of a member. A stored one is checked against its checksum by `verify`, an unpacked one at once.

        Args:
            name: The member.
            most: How many bytes it may have.
        """
        member = self.members.get(name)
        if member is None:
            raise self._damaged(f"no member {name!r}{did_you_mean(name, self.members)}")
        if member.size > most:
            raise self._unsafe(f"the member {name!r} has {member.size} bytes; the limit is {most}")
        if not member.deflated:
            if member.size != member.stored:
                raise self._damaged(f"the member {name!r} has two sizes")
            return Part(self.source, member.offset, member.size)
        engine = zlib.decompressobj(-15)
        try:
            content = engine.decompress(self.source.view(member.offset, member.stored), member.size + 1)
        except zlib.error as error:
            raise self._damaged(f"the member {name!r} can't be unpacked: {error}") from error
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise self._damaged(f"the member {name!r} doesn't match its checksum")
        self._checked.add(name)
        return Memory(self.source.path, content)

    def head(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a member at most, without unpacking the rest."""
        member = self.members[name]
        # Deflate never adds more than a few bytes to what it packs.
        raw = self.source.bytes(member.offset, min(member.stored, count + count // 1000 + 64))
        if not member.deflated:
            return raw[:count]
        try:
            return zlib.decompressobj(-15).decompress(raw, count)
        except zlib.error as error:
            raise self._damaged(f"the member {name!r} can't be unpacked: {error}") from error

    def verify(self, name: str) -> None:
        """Raises `WeightsFileError` unless the stored member matches its CRC-32; the second time it costs nothing."""
        if name in self._checked:
            return
        member = self.members[name]
        crc = 0
        for start in range(0, member.stored, 1 << 20):
            crc = zlib.crc32(self.source.view(member.offset + start, min(1 << 20, member.stored - start)), crc)
        if crc != member.crc:
            raise self._damaged(f"the member {name!r} doesn't match its checksum")
        self._checked.add(name)

    def content(self, name: str) -> bytes:
        """The whole content of a small member, such as a configuration, checked."""
        piece = self.piece(name, most=self.limits.max_metadata_bytes)
        self.verify(name)
        return piece.bytes(0, piece.size)
