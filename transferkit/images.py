"""Folders of pictures: one folder for each class, read when they are asked for, in a fixed order.

Decoding is TensorFlow's own, and the pixels are those of `keras.utils.image_dataset_from_directory`, but for photographs that
say which way is up (Exif): those are turned. Every file's header is looked at before the first is decoded, and what can't be a
picture is named then.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transferkit._keras import tf
from transferkit.errors import DataError, shorten
from transferkit.image_headers import Header, NoPictureError, orientation_of, read_header

__all__ = ["BadImage", "ImageFiles", "find_images", "read_images"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
_NOT_READ = (".webp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg")
_SHOWN = 20


@dataclass(frozen=True)
class BadImage:
    """A file that was to be a picture and isn't.

    Args:
        path: The file.
        reason: What it is instead.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ImageFiles:
    """The pictures of a folder.

    Args:
        paths: The files, class by class, each class's by name.
        labels: The number of each file's class.
        class_names: The classes' folders, by name.
        bad: What was left out.
        notes: What else is worth knowing, in words.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    bad: tuple[BadImage, ...] = ()
    notes: tuple[str, ...] = ()


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def find_images(
    folder: str | os.PathLike[str], *, max_bad: float = 0, max_pixels: int = 100_000_000, decode: bool = False
) -> ImageFiles:
    """Lists the pictures in a folder with one folder for each class, and looks at each one's header.

    Args:
        folder: The folder. Hidden files and folders are passed over.
        max_bad: How many files may be left out because they are no pictures: a number, or a share below 1.
        max_pixels: How many pixels a picture may have.
        decode: Decodes every picture too, which finds damage that the header doesn't show.

    Raises:
        DataError: when there is no such folder, no class in it, a class without a picture, or more bad files than allowed.
    """
    root = Path(folder)
    asked = f"Reading pictures from {str(root)!r}."
    if not root.is_dir():
        raise DataError(asked, found="no such folder", fix="give the folder that holds one folder for each class")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(
            asked,
            found="no folder in it",
            cause="pictures are told apart by the folder they lie in",
            fix="one folder for each class",
        )
    paths: list[str] = []
    labels: list[int] = []
    passed_over: Counter[str] = Counter()
    for number, name in enumerate(classes):
        found = sorted(_files(root / name, passed_over))
        paths += found
        labels += [number] * len(found)
    _refuse_splits(asked, root, classes)
    headers, bad = _looked_at(paths, max_pixels, decode)
    _refuse_bad(asked, bad, len(paths), max_bad)
    kept = [index for index, header in enumerate(headers) if header is not None]
    counts = Counter(labels[index] for index in kept)
    empty = [name for number, name in enumerate(classes) if not counts[number]]
    if empty:
        raise DataError(
            asked,
            found=[f"no picture in {shorten(empty)}", *(f"left out: {one}" for one in bad[:_SHOWN])],
            cause=f"pictures end in {', '.join(_SUFFIXES)}",
            fix="take the folder away, or put pictures into it",
        )
    if bad:
        warnings.warn(f"Left out {len(bad)} of {len(paths)} pictures: {'; '.join(map(str, bad[:_SHOWN]))}", stacklevel=3)
    files = [(paths[index], header) for index, header in enumerate(headers) if header is not None]
    return ImageFiles(
        tuple(path for path, _ in files),
        tuple(labels[index] for index in kept),
        tuple(classes),
        tuple(bad),
        tuple(_notes(files, [labels[index] for index in kept], passed_over)),
    )


def _refuse_splits(asked: str, root: Path, classes: Sequence[str]) -> None:
    """Raises a DataError where every folder holds the same folders and no file: parts of a data set, and no classes."""
    inside = [[entry for entry in (root / name).iterdir() if not entry.name.startswith(".")] for name in classes]
    common = set.intersection(*({entry.name for entry in entries} for entries in inside))
    if len(classes) < 2 or len(common) < 2 or any(entry.is_file() for entries in inside for entry in entries):
        return
    raise DataError(
        asked,
        found=f"{shorten(classes)}, each with the same folders in it: {shorten(sorted(common))}",
        cause="these are parts of a data set, for training and testing say, and the classes lie one level below",
        fix=f"give one of the parts: {str(root / classes[-1])!r}",
    )


def _files(folder: Path, passed_over: Counter[str]) -> Iterable[str]:
    """Every path in a folder that is named like a picture, links to nothing and pipes among them."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):  # ._x.jpg is what macOS writes beside x.jpg on foreign disks
                continue
            if suffix in _SUFFIXES:
                yield os.path.join(place, name)
            elif suffix in _NOT_READ:
                passed_over[suffix] += 1


def _looked_at(paths: Sequence[str], max_pixels: int, decode: bool) -> tuple[list[Header | None], list[BadImage]]:
    """The header of each file, None for one that is bad; one whose header leaves a doubt is decoded."""

    def look(path: str) -> Header | BadImage:
        try:
            header = read_header(path, max_pixels=max_pixels)
            if header.doubtful or decode:
                _decoded(path, channels=3)
        except NoPictureError as error:
            return BadImage(path, str(error))
        except _UndecodableError as error:
            return BadImage(path, f"{error}; {header.doubtful}" if header.doubtful else str(error))
        return header

    with _threads() as threads:
        found = list(threads.map(look, paths))
    return [item if isinstance(item, Header) else None for item in found], [item for item in found if isinstance(item, BadImage)]


def _refuse_bad(asked: str, bad: Sequence[BadImage], files: int, max_bad: float) -> None:
    allowed = max_bad if max_bad >= 1 else math.floor(max_bad * files)
    if len(bad) <= allowed:
        return
    more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    raise DataError(
        asked,
        found=[*map(str, bad[:_SHOWN]), *more],
        cause=f"{len(bad)} of {files} files that are named like pictures can't be read as one",
        fix=f"replace them or take them out of the folder; or leave them out: max_bad={len(bad)}",
    )


def _notes(files: Sequence[tuple[str, Header]], labels: Sequence[int], passed_over: Counter[str]) -> Iterable[str]:
    for suffix, count in sorted(passed_over.items()):
        yield f"{count} files that end in {suffix} aren't read"
    misnamed = [path for path, header in files if header.misnamed]
    if misnamed:
        yield f"{len(misnamed)} files are named as another format than theirs, and read all the same: {shorten(misnamed)}"
    turned = [path for path, header in files if header.orientation != 1]
    if turned:
        yield f"{len(turned)} photographs are turned upright as their Exif data says: {shorten(turned)}"
    twins = list(_twins([path for path, _ in files], labels))
    same = [pair for pair, alike in twins if alike]
    other = [pair for pair, alike in twins if not alike]
    if same:
        yield f"{len(same)} pictures are there twice: {shorten(same)}"
    if other:
        yield f"{len(other)} pictures are there twice, in two classes: {shorten(other)}"


def _twins(paths: Sequence[str], labels: Sequence[int]) -> Iterable[tuple[str, bool]]:
    """Pairs of files with the same bytes, and whether they are of one class; only files of equal length are read."""
    lengths: dict[int, list[int]] = {}
    for index, path in enumerate(paths):
        lengths.setdefault(os.path.getsize(path), []).append(index)
    for group in lengths.values():
        first: dict[str, int] = {}
        for index in group if len(group) > 1 else ():
            digest = hashlib.sha256(Path(paths[index]).read_bytes()).hexdigest()
            if digest in first:
                before = first[digest]
                yield f"{paths[before]} = {paths[index]}", labels[before] == labels[index]
            else:
                first[digest] = index


class _UndecodableError(Exception):
    """What TensorFlow says of a file it can't decode, in one line."""


#: Exif's orientations as what is done to (height, width, channels) to be upright.
_UPRIGHT: dict[int, Callable[[Any], Any]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: tf.transpose(x, (1, 0, 2)),
    6: lambda x: tf.transpose(x, (1, 0, 2))[:, ::-1],
    7: lambda x: tf.transpose(x, (1, 0, 2))[::-1, ::-1],
    8: lambda x: tf.transpose(x, (1, 0, 2))[::-1],
}


def _decoded(path: str, *, channels: int) -> Any:
    try:
        # Read here and not by TensorFlow, which takes names such as gs://x for places elsewhere.
        with open(path, "rb") as file:
            raw = file.read()
        picture = tf.io.decode_image(raw, channels=channels, expand_animations=False)
        if picture.shape[0] < 1 or picture.shape[1] < 1:
            raise _UndecodableError(f"a picture of {picture.shape[1]} × {picture.shape[0]} pixels")
    except OSError as error:
        raise _UndecodableError(f"a file that can't be read ({error.strerror or error})") from error
    except (tf.errors.OpError, ValueError) as error:
        said = str(getattr(error, "message", None) or error).splitlines()[0]
        said = re.sub(r"\{\{.*?\}\}|\[Op:\w+\]", "", said).strip()
        raise _UndecodableError(f"damaged, or of a kind that isn't decoded ({said})") from error
    turn = _UPRIGHT.get(orientation_of(raw))
    return turn(picture) if turn else picture


def read_images(paths: Sequence[str], *, size: tuple[int, int], channels: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Decodes and resizes pictures.

    Args:
        paths: Files.
        size: Height and width in pixels; a picture of another shape is stretched, by bilinear interpolation.
        channels: 1 for grey, 3 for RGB, 4 with transparency.

    Returns:
        Pixels from 0 to 255, of shape (len(paths), height, width, channels).

    Raises:
        DataError: naming every file that can't be decoded.
    """
    out = np.empty((len(paths), *size, channels), np.float32)

    def read(index: int) -> BadImage | None:
        try:
            out[index] = tf.image.resize(_decoded(paths[index], channels=channels), size).numpy()
        except _UndecodableError as error:
            return BadImage(paths[index], str(error))
        return None

    with _threads() as threads:
        problems = [str(problem) for problem in threads.map(read, range(len(paths))) if problem]
    if problems:
        raise DataError(
            f"Decoding {len(paths)} pictures.",
            found=problems,
            cause="files that were damaged before, or changed since the folder was looked at",
            fix='replace them; Data.image_folder(…, check="pixels", max_bad=…) finds them beforehand and leaves them out',
        )
    return out
