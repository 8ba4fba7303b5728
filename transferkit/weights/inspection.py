"""What a weights file holds, as a value to print: its layers, arrays, sizes, and what it says of itself.

Imports the readers only, so that it answers before TensorFlow could even be imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._table import Table, Tabular
from transferkit.errors import shorten
from transferkit.weights.readers.archive import Archive, ArrayInfo, Limits
from transferkit.weights.readers.reading import open_archive

__all__ = ["FileContents", "inspect_weights"]


@dataclass(frozen=True)
class FileContents(Tabular):
    """What a weights file holds.

    Args:
        path: The file.
        format: `legacy_h5`, `weights_h5`, `keras`, `safetensors`, `npz`, `torch`, `tf_checkpoint` or `tfjs`.
        framework: What wrote it, as far as it says.
        version: That framework's version.
        arrays: Its weights in its order.
        classes: The Keras class of each layer that is known, by the layer's name.
        class_names: The names of the classes it was trained on, where the file says them.
        optimizer: How many arrays of optimizer state it holds.
        has_config: Whether it holds the model's configuration.
        said: Whatever else the file says of itself.
        not_finite: By array, how many elements are NaN or infinite; None where the content wasn't read.
    """

    path: str
    format: str
    framework: str
    version: str
    arrays: tuple[ArrayInfo, ...]
    classes: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    optimizer: int
    has_config: bool
    said: tuple[tuple[str, str], ...]
    not_finite: tuple[tuple[str, int], ...] | None = None

    @property
    def parameters(self) -> int:
        """The number of weights in all arrays together."""
        return sum(info.size for info in self.arrays)

    def table(self) -> Table:
        """The arrays by layer."""
        classes = dict(self.classes)
        bad = dict(self.not_finite or ())
        rows, last = [], None
        for info in self.arrays:
            repeated = info.layer == last and info.layer != ""
            last = info.layer
            rows.append(
                (
                    "" if repeated else info.layer,
                    "" if repeated else classes.get(info.layer, ""),
                    info.variable or info.name,
                    " × ".join(map(str, info.shape)) or "scalar",
                    info.dtype.name + (f", {bad[info.name]} not finite" if info.name in bad else ""),
                    f"{info.size:,}",
                )
            )
        wrote = " ".join(part for part in (self.framework, self.version) if part)
        title = f"{os.path.basename(self.path.rstrip('/'))}: {self.format}" + (f", written by {wrote}" if wrote else "")
        nbytes = sum(info.nbytes for info in self.arrays)
        notes = [f"{len(self.arrays)} arrays, {self.parameters:,} parameters, {_bytes(nbytes)}"]
        if self.optimizer:
            notes.append(f"optimizer state: {self.optimizer} arrays")
        notes.append("the model's configuration is in the file" if self.has_config else "no configuration of a model in the file")
        if self.class_names:
            notes.append(f"{len(self.class_names)} classes: {shorten(self.class_names)}")
        notes += [f"{key}: {value if len(value) <= 200 else value[:200] + '…'}" for key, value in self.said]
        if self.not_finite is not None:
            notes.append(
                "every array was read" + (f"; {len(bad)} of them hold NaN or infinity" if bad else ", every number is finite")
            )
        columns = ("layer", "class", "variable", "shape", "dtype", ">parameters")
        return Table(columns, rows, title=title, notes=notes)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that fit into JSON."""
        classes = dict(self.classes)
        return {
            "path": self.path,
            "format": self.format,
            "framework": self.framework,
            "version": self.version,
            "parameters": self.parameters,
            "arrays": [
                {
                    "name": info.name,
                    "layer": info.layer,
                    "class": classes.get(info.layer, ""),
                    "variable": info.variable,
                    "shape": list(info.shape),
                    "dtype": info.dtype.name,
                }
                for info in self.arrays
            ],
            "class_names": list(self.class_names),
            "optimizer_arrays": self.optimizer,
            "has_config": self.has_config,
            "said": dict(self.said),
            "not_finite": None if self.not_finite is None else dict(self.not_finite),
        }


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _not_finite(archive: Archive) -> tuple[tuple[str, int], ...]:
    found = []
    for name in archive.arrays:
        array = archive.read(name)
        count = array.size - int(np.count_nonzero(np.isfinite(array)))
        if count:
            found.append((name, count))
    return tuple(found)


def inspect_weights(
    path: str | os.PathLike[str],
    *,
    check: bool = False,
    limits: Limits | None = None,
    trusted: bool = False,
    sha256: str | None = None,
) -> FileContents:
    """What a weights file of any known format holds; nothing in it is executed.

    Args:
        path: The file; or the directory of a checkpoint or SavedModel.
        check: Whether to read every array too, which finds damage and numbers that aren't finite.
        limits: What the file may ask for; by default `Limits()`.
        trusted: Skips the separate process in which unusual HDF5 structures are read.
        sha256: The expected SHA-256 of the file named (of a set of files, its index), 64 hexadecimal digits.

    Returns:
        The `FileContents`, readable when printed.

    Raises:
        WeightsNotFoundError: when there is no such file.
        WeightsFileError: when it is damaged, or no weights file.
        UnsafeFileError: when it asks for what a weights file must not.

    Example:
        >>> import numpy as np
        >>> np.savez("small.npz", kernel=np.ones((3, 2), np.float32))
        >>> print(inspect_weights("small.npz"))
        small.npz: npz
        layer  class  variable  shape  dtype    parameters
        ─────  ─────  ────────  ─────  ───────  ──────────
                      kernel    3 × 2  float32           6
        1 arrays, 6 parameters, 24 B
        no configuration of a model in the file
    """
    with open_archive(path, limits=limits, trusted=trusted, sha256=sha256) as archive:
        return FileContents(
            path=archive.path,
            format=archive.format,
            framework=archive.framework,
            version=archive.version,
            arrays=tuple(archive.arrays.values()),
            classes=tuple((layer.name, layer.class_name) for layer in archive.layers if layer.class_name),
            class_names=archive.class_names,
            optimizer=len(archive.optimizer_arrays),
            has_config=archive.config is not None,
            said=tuple(sorted(archive.metadata.items())),
            not_finite=_not_finite(archive) if check else None,
        )
