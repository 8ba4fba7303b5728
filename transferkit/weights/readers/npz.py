"""`.npz` archives of NumPy arrays; an array of pickled objects is refused.

Shapes come from each member's header, and nothing else is unpacked until it is asked for.
Source: NumPy's "NEP 1, a simple file format for NumPy arrays". Imports NumPy only.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError, did_you_mean
from transferkit.weights.readers.archive import Archive, ArrayInfo, Limits
from transferkit.weights.readers.checks import DIGESTS, check_sizes, json_object, said_class_names, verified
from transferkit.weights.readers.source import Source, asked_of
from transferkit.weights.readers.zipped import Zip

__all__ = ["read_npz"]

_HEADER = re.compile(
    r"\{'descr': '(?P<descr>[^']{1,20})', 'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[\dL, ]*)\),? *\}\s*"
)
_DESCR = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c(8|16))")
_MOST_HEADER = 12_000
_ABOUT = "transferkit.json"  # what our own files say of themselves: text by key


def _header(path: str, name: str, raw: bytes) -> tuple[tuple[int, ...], np.dtype[Any], bool, int]:
    """Shape, dtype, whether in Fortran order, and where the content begins."""
    if raw[:6] != b"\x93NUMPY" or len(raw) < 12 or raw[6] not in (1, 2, 3):
        raise WeightsFileError(asked_of(path), found=f"the member {name!r} is no NumPy array", fix="save it with numpy.savez")
    width = 2 if raw[6] == 1 else 4
    length = int.from_bytes(raw[8 : 8 + width], "little")
    begin = 8 + width + length
    found = _HEADER.fullmatch(raw[8 + width : begin].decode("latin1"))
    if begin > len(raw) or found is None:
        text = raw[8 + width : 8 + width + 200].decode("latin1")
        kind = UnsafeFileError if "O" in text else WeightsFileError
        raise kind(asked_of(path), found=f"the member {name!r} has the header {text!r}", fix="save plain arrays with numpy.savez")
    if "O" in found["descr"]:
        raise UnsafeFileError(
            asked_of(path),
            found=f"the member {name!r} holds pickled objects, which can run code",
            fix="save plain arrays with numpy.savez, each under a name of its own",
        )
    if not _DESCR.fullmatch(found["descr"]):
        raise WeightsFileError(
            asked_of(path),
            found=f"the member {name!r} is of dtype {found['descr']!r}, which isn't a number",
            fix="save it as float32, or bfloat16 in a .safetensors file",
        )
    words = [word.strip(" L") for word in found["shape"].split(",")]
    shape = tuple(int(word) for word in words if word)
    if len(shape) > 32 or any(extent >= 1 << 62 for extent in shape):
        raise UnsafeFileError(asked_of(path), found=f"the member {name!r} has the shape {shape}", fix="get the file again")
    return shape, np.dtype(found["descr"]), found["fortran"] == "True", begin


def read_npz(source: Source, archive: Zip, *, limits: Limits) -> Archive:
    """The `Archive` of an `.npz` file.

    Raises:
        WeightsFileError: when a member is damaged or no array.
        UnsafeFileError: when it holds pickled objects, or less than it says.
    """
    path = source.path
    arrays: dict[str, ArrayInfo] = {}
    places: dict[str, tuple[str, np.dtype[Any], bool, int]] = {}
    about: dict[str, Any] = {}
    for member, listed in archive.members.items():
        if member == _ABOUT:
            about = json_object(path, f"the member {member!r}", archive.content(member), limits) or {}
            continue
        name = member.removesuffix(".npy")
        shape, dtype, fortran, begin = _header(path, member, archive.head(member, _MOST_HEADER))
        info = ArrayInfo(name, shape, dtype.newbyteorder("="))
        size = 1
        for extent in shape:
            size *= extent
        if begin + size * dtype.itemsize != listed.size:
            raise UnsafeFileError(
                asked_of(path),
                found=f"{name!r} of shape {shape} needs {size * dtype.itemsize} bytes, the member holds {listed.size - begin}",
                fix="get the file from a source you trust",
            )
        if name in arrays:
            raise UnsafeFileError(asked_of(path), found=f"two members for {name!r}", fix="get the file from a source you trust")
        arrays[name], places[name] = info, (member, dtype, fortran, begin)
    check_sizes(path, list(arrays.values()), limits)
    digests = json_object(path, "the digests", about.pop(DIGESTS, None), limits) or {}
    said = {key: value for key, value in about.items() if isinstance(value, str)}

    def read(name: str) -> np.ndarray[Any, Any]:
        if name not in places:
            raise WeightsFileError(
                asked_of(path), found=f"no array {name!r}{did_you_mean(name, places)}", fix="see `arrays` for the names"
            )
        member, dtype, fortran, begin = places[name]
        info = arrays[name]
        piece = archive.piece(member, most=begin + info.nbytes)
        archive.verify(member)
        raw = piece.view(begin, info.nbytes, repr(name))
        array = np.frombuffer(raw, np.uint8 if dtype == np.dtype(bool) else dtype)
        if dtype == np.dtype(bool):
            if array.size and int(array.max()) > 1:
                raise WeightsFileError(
                    asked_of(path), found=f"{name!r}: truth values other than 0 and 1", fix="get the file again"
                )
            array = array.view(bool)
        array = array.reshape(info.shape, order="F" if fortran else "C")
        return verified(path, name, array if array.dtype.isnative else array.astype(info.dtype), digests.get(name))

    return Archive(
        path=path,
        format="npz",
        arrays=arrays,
        read=read,
        metadata=said,
        class_names=said_class_names(said),
    )
