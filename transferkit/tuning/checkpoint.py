"""Checkpoints of a run: a folder of files, each whole, each telling by checksums whether it still is what was written.

A checkpoint is one `.safetensors` file: arrays by name, and a tensor of bytes with the rest as JSON. Nothing in it is code.
Imports NumPy and the floors below, and knows nothing of Keras.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from transferkit.errors import StorageError, WeightsError
from transferkit.storage import atomic_path
from transferkit.weights.readers import open_archive
from transferkit.weights.writing import write_flat

__all__ = ["Checkpoint", "CheckpointFolder", "pack", "unpack"]

Array = np.ndarray[Any, Any]
Make = Callable[[], tuple[Mapping[str, Any], Mapping[str, Array]] | None]
_STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds.

    Args:
        number: Rises from one to the next.
        state: Plain values.
        arrays: Arrays by name.
    """

    number: int
    state: Mapping[str, Any]
    arrays: Mapping[str, Array] = field(repr=False)


class CheckpointFolder:
    """The checkpoints of one run, written by a thread of their own.

    Args:
        path: The folder, which is there.
        keep: How many of the last are kept.
    """

    def __init__(self, path: Path, *, keep: int) -> None:
        self.path, self._keep = path, keep
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: Future[None] | None = None
        self._number = max(self._numbers(), default=0)
        self._said = ""
        #: Of processor time that the last one took to write.
        self.seconds = 0.0

    def _numbers(self) -> list[int]:
        found = (_NAME.fullmatch(item.name) for item in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _file(self, number: int) -> Path:
        return self.path / f"checkpoint-{number:08}.safetensors"

    def newest(self) -> Checkpoint | None:
        """The newest that is whole; None where there is none at all. Says which damaged ones it passes over.

        Raises:
            StorageError: when there are some, and none is whole.
        """
        numbers = self._numbers()
        problems = []
        for number in reversed(numbers):
            try:
                found = _read(self._file(number), number)
            except (WeightsError, OSError, ValueError, KeyError) as error:
                problems.append(f"{self._file(number).name}: {getattr(error, 'found', (error,))[0]}")
                continue
            for problem in problems:
                warnings.warn(f"A damaged checkpoint was passed over for the one before. {problem}", stacklevel=3)
            return found
        if problems:
            raise StorageError(
                f"Going on with the run in {str(self.path)!r}.",
                found=problems,
                cause="the disk lost or changed what was written",
                fix="start anew in another folder, or empty this one",
            )
        return None

    @property
    def busy(self) -> bool:
        """Whether one is still being written."""
        return self._waiting is not None and not self._waiting.done()

    def write(self, make: Make) -> None:
        """Has the thread make and write the next one, nothing where None is made. Waits for the one before."""
        self.settle()
        self._number += 1
        self._pool = self._pool or ThreadPoolExecutor(1, "transferkit-checkpoint")
        self._waiting = self._pool.submit(self._write, self._number, make)

    def _write(self, number: int, make: Make) -> None:
        begun = time.thread_time()
        made = make()
        if made is None:
            return
        state, arrays = made
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        target = self._file(number)
        named = {name: _given(array) for name, array in {**arrays, _STATE: text}.items()}
        with atomic_path(target) as temporary:
            write_flat("safetensors", temporary, named, {"format": "transferkit"}, f"Writing {str(target)!r}.")
        for old in self._numbers()[: -self._keep]:
            with contextlib.suppress(OSError):  # one that can't be removed does no harm, and is tried again with the next
                self._file(old).unlink()
        self.seconds = time.thread_time() - begun

    def settle(self, *, strict: bool = False) -> None:
        """Waits until the last is written. A failure is said once and the run goes on, unless it is `strict`.

        Raises:
            StorageError: when it couldn't be written and it must.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        try:
            waiting.result()
        except StorageError as error:
            if strict:
                raise
            if str(error.found) != self._said:
                self._said = str(error.found)
                warnings.warn(
                    f"A checkpoint couldn't be written, and training goes on without it. {error.found[0]}", stacklevel=3
                )

    def close(self) -> None:
        """Lets the thread finish and go."""
        self.settle()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _given(array: Array) -> Callable[[], Array]:
    return lambda: array


def _read(path: Path, number: int) -> Checkpoint:
    with open_archive(path, trusted=True) as archive:
        arrays = {name: np.array(archive.read(name)) for name in archive.arrays}
    state = json.loads(arrays.pop(_STATE).tobytes())
    return Checkpoint(number, state, arrays)


# Plain values and arrays as JSON beside a table of arrays


def pack(value: Any, arrays: dict[str, Array], name: str) -> Any:
    """The value as JSON takes it, its arrays put into `arrays` under names that begin with `name`.

    Args:
        value: None, numbers, text, bytes, arrays, and lists, tuples, sets and dicts of these.
        arrays: Where arrays go.
        name: Of the value.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if array.dtype.kind in "OUSMm":
            raise TypeError(f"an array of {array.dtype}")
        arrays[name] = array
        return {"array": name, "scalar": isinstance(value, np.generic)}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if type(value) in (list, tuple, set):
        items = [pack(item, arrays, f"{name}.{index}") for index, item in enumerate(value)]
        return items if type(value) is list else {type(value).__name__: items}
    if isinstance(value, dict):
        return {
            "dict": [
                [pack(key, arrays, f"{name}.{index}k"), pack(item, arrays, f"{name}.{index}")]
                for index, (key, item) in enumerate(value.items())
            ]
        }
    raise TypeError(f"a {type(value).__name__}")


def unpack(value: Any, arrays: Mapping[str, Array]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        array = arrays[value["array"]]
        return array[()] if value["scalar"] else array
    if "bytes" in value:
        return bytes.fromhex(value["bytes"])
    if "dict" in value:
        return {unpack(key, arrays): unpack(item, arrays) for key, item in value["dict"]}
    ((kind, items),) = value.items()
    return {"tuple": tuple, "set": set}[kind](unpack(item, arrays) for item in items)
