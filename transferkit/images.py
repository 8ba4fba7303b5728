"""Folders of pictures: one folder for each class, read when they are asked for, in a fixed order.

Decoding is TensorFlow's own, and the pixels are those of `keras.utils.image_dataset_from_directory`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transferkit._keras import tf
from transferkit.errors import DataError, shorten

__all__ = ["ImageFiles", "find_images", "read_images"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")


@dataclass(frozen=True)
class ImageFiles:
    """The pictures of a folder.

    Args:
        paths: The files, class by class, each class's by name.
        labels: The number of each file's class.
        class_names: The classes' folders, by name.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]


def find_images(folder: str | os.PathLike[str]) -> ImageFiles:
    """Lists the pictures in a folder with one folder for each class. Reads none.

    Raises:
        DataError: when there is no such folder, no class in it, or a class without a picture.
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
    empty = []
    for number, name in enumerate(classes):
        found = sorted(str(path) for path in (root / name).rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not found:
            empty.append(name)
        paths += found
        labels += [number] * len(found)
    if empty:
        raise DataError(
            asked,
            found=f"no picture in {shorten(empty)}",
            cause=f"pictures end in {', '.join(_SUFFIXES)}",
            fix="take the folder away, or put pictures into it",
        )
    return ImageFiles(tuple(paths), tuple(labels), tuple(classes))


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
    problems: list[str] = []

    def read(index: int) -> str | None:
        try:
            picture = tf.io.decode_image(tf.io.read_file(paths[index]), channels=channels, expand_animations=False)
            out[index] = tf.image.resize(picture, size).numpy()
        except tf.errors.OpError as error:
            return f"{paths[index]}: {str(error.message).splitlines()[0]}"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        problems = [problem for problem in threads.map(read, range(len(paths))) if problem]
    if problems:
        raise DataError(
            f"Decoding {len(paths)} pictures.",
            found=problems,
            cause="files that are damaged, empty, or no pictures whatever their names say",
            fix="replace them or take them out of the folder",
        )
    return out
