"""Checks that several readers share: JSON within limits, sizes, checksums of tensors, the names of classes.

Imports NumPy only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transferkit.errors import UnsafeFileError, WeightsFileError
from transferkit.weights.readers.archive import ArrayInfo, Limits
from transferkit.weights.readers.source import asked_of

__all__ = [
    "DIGESTS",
    "another_digest",
    "check_sizes",
    "json_object",
    "natural",
    "said_class_names",
    "tensor_digest",
    "tensor_hash",
    "verified",
]

# The key under which a file of ours keeps its digests, as JSON from a tensor's name to 64 hexadecimal digits.
DIGESTS = "transferkit.sha256"
# JSON becomes up to a hundred times as large in memory: the limit on its bytes alone would let gigabytes through.
_MOST_VALUES = 2_000_000


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def json_object(path: str, what: str, text: str | bytes | None, limits: Limits) -> dict[str, Any] | None:
    """The JSON object in `text`, or None where there is no text.

    Raises:
        WeightsFileError: when it isn't a JSON object, or is nested too deeply.
        UnsafeFileError: when it is longer than the limit.
    """
    if text is None or not text:
        return None
    if len(text) > limits.max_metadata_bytes:
        raise UnsafeFileError(
            asked_of(path), found=f"{what} of {len(text)} bytes", fix="raise Limits.max_metadata_bytes if you trust the file"
        )
    raw = text.encode() if isinstance(text, str) else text
    values = raw.count(b"{") + raw.count(b"[") + raw.count(b",")
    if values > _MOST_VALUES:
        raise UnsafeFileError(asked_of(path), found=f"{what} of {values} values", fix="get the file from a source you trust")
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(
            asked_of(path), found=f"{what} is no JSON: {error}", cause="the file is damaged", fix="get the file again"
        ) from error
    if not isinstance(value, dict):
        raise WeightsFileError(
            asked_of(path), found=f"{what} is a JSON {type(value).__name__}, not an object", fix="get the file again"
        )
    return value


def said_class_names(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes where a file says them, as a list or as JSON."""
    for key in ("class_names", "classes", "labels"):
        value = attributes.get(key)
        if isinstance(value, str) and value.startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            return tuple(value)
    return ()


def check_sizes(path: str, arrays: Sequence[ArrayInfo], limits: Limits) -> None:
    """Raises `UnsafeFileError` when the arrays are too many or too large together."""
    total = sum(info.nbytes for info in arrays)
    if total > limits.max_bytes:
        largest = max(arrays, key=lambda info: info.nbytes)
        raise UnsafeFileError(
            asked_of(path),
            found=f"arrays of {total} bytes, the largest {largest.name!r} {largest.shape}; the limit is {limits.max_bytes}",
            fix="pass limits=Limits(max_bytes=…) if you trust the file",
        )
    if len(arrays) > limits.max_arrays:
        raise UnsafeFileError(
            asked_of(path), found=f"{len(arrays)} arrays; the limit is {limits.max_arrays}", fix="raise Limits.max_arrays"
        )


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts `dense_2` before `dense_10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def tensor_hash(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> hashlib._Hash:
    """The beginning of a SHA-256 over a tensor's name, dtype, shape and bytes (little-endian, C order): before the bytes."""
    return hashlib.sha256(f"{name}\0{dtype.name}\0{','.join(map(str, shape))}\0".encode())


def tensor_digest(name: str, array: np.ndarray[Any, Any]) -> str:
    """The SHA-256 over a tensor's name, dtype, shape and bytes, as 64 hexadecimal digits."""
    digest = tensor_hash(name, array.dtype, array.shape)
    plain = np.ascontiguousarray(array)
    digest.update(plain.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def verified(path: str, name: str, array: np.ndarray[Any, Any], expected: str | None) -> np.ndarray[Any, Any]:
    """The array, once its digest is the expected one; without an expectation, unchecked.

    Raises:
        WeightsFileError: when it is another.
    """
    if expected is not None and tensor_digest(name, array) != expected:
        raise another_digest(path, name)
    return array


def another_digest(path: str, name: str) -> WeightsFileError:
    """The error of a tensor that isn't what its file's SHA-256 says."""
    return WeightsFileError(
        asked_of(path),
        found=f"{name!r} doesn't match the SHA-256 the file keeps of it",
        cause="the file was damaged or changed after it was written",
        fix="get the file again",
    )
