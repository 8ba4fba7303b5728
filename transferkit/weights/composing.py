"""Arrays that a file keeps in other pieces than Keras 3 does: each made from some of the file's, under a name of its own.

What is made, and from what, is decided by `old_layouts` and `torch_layouts`; here such arrays take the place of their pieces.
Imports the archive's face only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from transferkit.weights.mapping import FileArray
from transferkit.weights.readers.archive import Archive, ArrayInfo, Stretch

__all__ = ["Arranged", "Composed", "arranged"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Composed:
    """An array made from arrays of a file.

    Args:
        source: What matching sees of it; its name is another than those of arrays that stay.
        pieces: The arrays of the file it is made from.
        make: From their values to its own.
        text: What is done, for the report.
    """

    source: FileArray
    pieces: tuple[str, ...]
    make: Callable[[Sequence[Array]], Array]
    text: str


@dataclass(frozen=True)
class Arranged:
    """A file as matching and loading see it.

    Args:
        archive: The file's arrays, those that are made in the place of their pieces.
        sources: The same as matching sees them.
        texts: What was done, by the name of each array that is made.
        problems: What has to be known before anything can be matched, as sentences.
        rules: The calls that would say it.
        flattened_first: Whether the rows of a Dense layer behind a Flatten are in channels-first order.
    """

    archive: Archive
    sources: tuple[FileArray, ...]
    texts: dict[str, str]
    problems: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    flattened_first: bool = False


def arranged(archive: Archive, sources: Sequence[FileArray], made: Sequence[Composed]) -> Arranged:
    """The file with the arrays in `made` in the place of the pieces they are made from.

    Args:
        archive: The file.
        sources: Its arrays as matching sees them.
        made: What is made of them; an array may be a piece of several.
    """
    if not made:
        return Arranged(archive, tuple(sources), {})
    first: dict[str, list[Composed]] = {}
    for one in made:
        first.setdefault(one.pieces[0], []).append(one)
    gone = {piece for one in made for piece in one.pieces}
    listed: list[FileArray] = []
    arrays: dict[str, ArrayInfo] = {}
    for source in sources:
        info = archive.arrays[source.name]
        if source.name not in gone:
            listed.append(source)
            arrays[source.name] = info
        for one in first.get(source.name, ()):
            new = one.source
            listed.append(new)
            arrays[new.name] = replace(info, name=new.name, shape=new.shape, layer=new.path, variable=new.variable)
    by_name = {one.source.name: one for one in made}

    def read(name: str) -> Array:
        one = by_name.get(name)
        return archive.read(name) if one is None else one.make([archive.read(piece) for piece in one.pieces])

    def stretch(name: str) -> Stretch | None:
        return None if name in by_name else archive.stretch(name)

    texts = {one.source.name: one.text for one in made}
    return Arranged(replace(archive, arrays=arrays, read=read, stretch=stretch), tuple(listed), texts)
