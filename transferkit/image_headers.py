"""What a picture's first bytes say of it: the format, the size, which way is up. Standard library only; decodes nothing.

PNG: W3C Portable Network Graphics (3rd edition), sections 5 and 11. JPEG: ITU-T T.81, annex B; the orientation is tag 0x0112 of
Exif 2.3. GIF: GIF89a. BMP: the headers of Windows, BITMAPCOREHEADER and later.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["Header", "NoPictureError", "orientation_of", "read_header"]

#: How files begin that are pictures, but none that TensorFlow decodes.
_OTHERS = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"\0\0\1\0", "icon"),
    (b"\x97JB2", "JBIG2"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
)
_SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "GIF": (".gif",), "BMP": (".bmp",)}


class NoPictureError(ValueError):
    """A file that can't be a picture; its text says why."""


@dataclass(frozen=True)
class Header:
    """What a picture's header says.

    Args:
        format: `JPEG`, `PNG`, `GIF` or `BMP`.
        width: In pixels, as stored.
        height: The same.
        orientation: 1 to 8 as Exif counts them, 1 for upright.
        doubtful: Why the picture may not be decodable although its header is one, or "".
        misnamed: Whether the name ends as another format's does.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    doubtful: str = ""
    misnamed: bool = False


def read_header(path: str | os.PathLike[str], *, max_pixels: int) -> Header:
    """Reads the header of a picture, and its last bytes.

    Args:
        path: The file.
        max_pixels: How many pixels it may have.

    Raises:
        NoPictureError: when it can't be a picture, or is larger.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise NoPictureError("no file, but a device, pipe or socket")
        if status.st_size == 0:
            raise NoPictureError("an empty file")
        with open(path, "rb") as file:
            header = _header(file, status.st_size)
    except FileNotFoundError:
        raise NoPictureError("a link to a file that isn't there" if os.path.islink(path) else "no such file") from None
    except OSError as error:
        raise NoPictureError(f"a file that can't be read ({error.strerror or error})") from None
    except struct.error:
        raise NoPictureError("a file that ends within its header") from None
    if header.width < 1 or header.height < 1:
        raise NoPictureError(f"a {header.format} of {header.width} × {header.height} pixels")
    if header.width * header.height > max_pixels:
        raise NoPictureError(
            f"a {header.format} of {header.width:,} × {header.height:,} pixels, above the limit of {max_pixels:,}"
        )
    misnamed = not os.fspath(path).lower().endswith(_SUFFIXES[header.format])
    return Header(header.format, header.width, header.height, header.orientation, header.doubtful, misnamed)


def _header(file: BinaryIO, size: int) -> Header:
    start = file.read(32)
    if start.startswith(b"\xff\xd8"):
        return _jpeg(file, size)
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        if start[12:16] != b"IHDR":
            raise NoPictureError("a PNG without its header")
        width, height = struct.unpack(">II", start[16:24])
        return Header("PNG", width, height, doubtful="" if b"IEND" in _tail(file, size, 64) else "it doesn't end as a PNG does")
    if start[:6] in (b"GIF87a", b"GIF89a"):
        width, height = struct.unpack("<HH", start[6:10])
        return Header("GIF", width, height, doubtful="" if b"\x3b" in _tail(file, size, 16) else "it doesn't end as a GIF does")
    if start.startswith(b"BM"):
        return _bmp(file, start, size)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        other = "WebP"
    elif start[4:8] == b"ftyp":
        other = "AVIF" if start[8:12].startswith(b"avi") else "HEIC"
    else:
        other = next((name for magic, name in _OTHERS if start.startswith(magic)), "")
    if other:
        raise NoPictureError(f"a {other} file, which TensorFlow doesn't decode")
    raise NoPictureError(f"no picture: it begins with {start[:12]!r}")


def _tail(file: BinaryIO, size: int, count: int) -> bytes:
    file.seek(max(size - count, 0))
    return file.read(count)


def _bmp(file: BinaryIO, start: bytes, size: int) -> Header:
    (length,) = struct.unpack("<I", start[14:18])
    if length == 12:
        width, height, _, bits = struct.unpack("<HHHH", start[18:26])
        compression = 0
    else:
        width, height, _, bits = struct.unpack("<iiHH", start[18:30])
        compression = start[30]
    if bits == 8:
        file.seek(14 + length)
        each = 3 if length == 12 else 4
        palette = file.read(256 * each)
        if any(len(set(palette[at : at + 3])) > 1 or palette[at] != at // each for at in range(0, len(palette), each)):
            raise NoPictureError("a BMP with a palette, whose numbers TensorFlow takes for shades of grey")
    height = abs(height)  # negative: the rows run from the top
    doubtful = "" if bits == 24 and not compression and 3 * width * height <= size else f"a BMP of {bits} bits a pixel"
    return Header("BMP", width, height, doubtful=doubtful)


def _jpeg(file: BinaryIO, size: int) -> Header:
    orientation = 1
    file.seek(2)
    while True:
        (mark, kind) = struct.unpack(">BB", file.read(2))
        if mark != 0xFF:
            raise NoPictureError("a JPEG whose header is damaged")
        while kind == 0xFF:  # filling
            (kind,) = struct.unpack(">B", file.read(1))
        if kind == 0x01 or 0xD0 <= kind <= 0xD8:
            continue
        (length,) = struct.unpack(">H", file.read(2))
        if kind == 0xE1:
            orientation = _orientation(file.read(length - 2)) or orientation
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            bits, height, width = struct.unpack(">BHH", file.read(5))
            doubtful = "" if _tail(file, size, 2) == b"\xff\xd9" else "it doesn't end as a JPEG does"
            if kind > 0xC2 or bits != 8:
                doubtful = "a JPEG of a rare kind"
            return Header("JPEG", width, height, orientation, doubtful)
        elif kind in (0xD9, 0xDA):
            raise NoPictureError("a JPEG without its size")
        else:
            file.seek(length - 2, os.SEEK_CUR)


def _orientation(segment: bytes) -> int:
    """The orientation in an Exif segment; 0 where there is none."""
    if not segment.startswith(b"Exif\0\0"):
        return 0
    tiff = segment[6:]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 0
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * min(count, 1000), 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 0x0112:
                return int(value) if 1 <= value <= 8 else 0
    except struct.error:
        return 0
    return 0


def orientation_of(raw: bytes) -> int:
    """Which way is up in a JPEG that is in memory: 1 to 8, 1 for upright and for what is no JPEG."""
    at = 2
    if not raw.startswith(b"\xff\xd8"):
        return 1
    while raw[at : at + 1] == b"\xff" and at + 4 <= len(raw):
        kind, length = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
        if kind == 0xE1 and (found := _orientation(raw[at + 4 : at + 2 + length])):
            return found
        if kind in (0xD9, 0xDA):
            break
        at += 2 + length
    return 1
