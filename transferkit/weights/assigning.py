"""Puts arrays into variables, as one step: every value is checked before the first variable changes.

A value that is at hand stands in memory of its own, which TensorFlow takes over. What is too large to be kept is read a second
time, straight into the memory in which its variable's values stand: no copy is made on the way, no memory is asked for, and so
the peak is the model itself. Where that memory can't be had (a GPU, several replicas) it is read into memory of its own.
What is read a second time must come to the digest of the first reading, whose values were checked.
May import TensorFlow.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from transferkit._keras import keras, tf
from transferkit.errors import WeightsFileError
from transferkit.weights.digest import digest_of
from transferkit.weights.readers.archive import Stretch
from transferkit.weights.streaming import fill, in_shares, side_by_side

__all__ = ["Assignment", "assign_all"]

_LARGE = 1 << 18  # bytes from which it pays to ask for a variable's own memory
_BY_DLPACK = frozenset(map(np.dtype, ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")))


@dataclass(frozen=True)
class Assignment:
    """A variable and where its new value comes from.

    Args:
        name: The variable's path in the model.
        variable: The Keras variable.
        dtype: Its dtype.
        nbytes: The bytes of its value.
        value: Gives the new value.
        digest: What the digest of the new value was when it was checked, or of its rows where they are read again; empty where
            `value` gives what was checked itself.
        stretch: Where the new value lies in the file, when it needs no more than being read.
        own: Whether what `value` gives is in aligned memory that nobody else knows, so that the variable may keep it.
    """

    name: str
    variable: Any
    dtype: np.dtype[Any]
    nbytes: int
    value: Callable[[], np.ndarray[Any, Any]]
    digest: str = ""
    stretch: Stretch | None = None
    own: bool = False

    @property
    def at_hand(self) -> bool:
        """Whether `value` gives what was checked itself, in the variable's shape and dtype."""
        return self.stretch is None and not self.digest


def assign_all(items: Sequence[Assignment]) -> None:
    """Assigns every value. Where all are at hand, variables that were changed get their old values back on an error.

    Where some must be read once more, an error can come from nothing but a lack of memory, or a file that is written or a disk
    that fails between two readings: values are checked before, and what can't be read the second time is tried once more.

    Raises:
        WeightsFileError: when a value can't be read again, or is another than the one that was checked.
    """
    at_hand = all(item.at_hand for item in items)
    old: list[tuple[Assignment, Any]] = []
    put: list[str] = []
    scratch = _Scratch()
    try:
        with _uninterrupted():
            read: list[tuple[Assignment, np.ndarray[Any, Any]]] = []
            for item in items:
                if item.at_hand:
                    if at_hand:
                        old.append((item, _present(item.variable)))
                    put.append(item.name)
                    _assign(item, item.value() if item.own else _copied(item))
                    continue
                memory = scratch.own_memory(item) if item.stretch is not None and item.nbytes >= _LARGE else None
                if memory is not None:
                    read.append((item, memory))
                else:
                    put.append(item.name)
                    _put_twice(item, None)

            def fill_share(share: Iterator[int]) -> None:
                for i in share:
                    put.append(read[i][0].name)
                    _put_twice(*read[i])

            in_shares([item.nbytes for item, _ in read], fill_share)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            for item, value in old:
                item.variable.assign(value)
        if isinstance(error, WeightsFileError) and not at_hand:
            raise WeightsFileError(
                error.asked,
                found=[*error.found, f"up to {len(put)} of {len(items)} variables hold the file's values already"],
                cause="the file was written, or the disk failed, after the first reading of every byte went well",
                fix="load again when the file can be read, or build the model anew",
            ) from error
        raise


def _present(variable: Any) -> Any:
    """The values a variable holds, for giving them back: a tensor keeps them when the variable gets other ones."""
    plain = _plain_resource(variable)
    if plain is None:
        return np.array(keras.ops.convert_to_numpy(variable))
    return tf.raw_ops.ReadVariableOp(resource=plain.handle, dtype=plain.dtype)


def _put_twice(item: Assignment, own: np.ndarray[Any, Any] | None) -> None:
    """Puts a value in its place; tries once more, because a connection may have come back."""
    try:
        _put(item, own)
    except WeightsFileError:
        _put(item, own)


def _put(item: Assignment, own: np.ndarray[Any, Any] | None) -> None:
    """Reads a value once more: into a variable's memory, or into memory of its own that the variable takes over."""
    raw = _room(item.nbytes) if own is None else own
    value = raw.view(item.dtype).reshape(tuple(item.variable.shape))
    if item.stretch is None:
        np.copyto(value, item.value(), casting="unsafe")
        _check(item, digest_of(value))
    else:
        _check(item, fill(raw, item.stretch))
    if own is None:
        _assign(item, value)


def _copied(item: Assignment) -> np.ndarray[Any, Any]:
    """A value that is at hand, in memory that nobody else knows."""
    value = item.value()
    copy = _room(item.nbytes).view(item.dtype).reshape(value.shape)
    np.copyto(copy, value)
    return copy


def _assign(item: Assignment, value: np.ndarray[Any, Any]) -> None:
    """Gives a variable a value in memory that it may keep."""
    plain = _plain_resource(item.variable)
    if plain is None:
        item.variable.assign(value)
    else:
        tf.raw_ops.AssignVariableOp(resource=plain.handle, value=_shared(value))


def _check(item: Assignment, digest: str) -> None:
    """Raises `WeightsFileError` unless a value is the one that was checked."""
    if item.digest != digest:
        raise WeightsFileError(
            f"Loading {item.name!r}.",
            found="its values in the file changed after they were checked",
            cause="another process is writing the file",
            fix="wait until the file is complete, and load it again",
        )


def _room(nbytes: int) -> np.ndarray[Any, Any]:
    """Aligned memory for a value."""
    return side_by_side([nbytes])[1][0]


def _plain_resource(variable: Any) -> Any:
    """The TensorFlow variable behind a Keras one where it is a plain one on the CPU; else None."""
    value: Any = getattr(variable, "value", None)
    if type(value).__name__ != "ResourceVariable":  # a distributed one, say
        return None
    return value if "CPU" in (value.device or "CPU").upper() else None


def _shared(value: np.ndarray[Any, Any]) -> Any:
    """The memory as a tensor without a copy.

    By DLPack, because TensorFlow gives a NumPy array it took over free only at some later call of its own.
    """
    if value.dtype in _BY_DLPACK and value.size:
        return tf.experimental.dlpack.from_dlpack(value.__dlpack__())
    return value


@final
class _Scratch:
    """Gets at the memory in which variables' values stand, with the constants that takes."""

    def __init__(self) -> None:
        self._none = tf.zeros((0,), tf.int32)
        self._zeros: dict[Any, Any] = {}

    def own_memory(self, item: Assignment) -> np.ndarray[Any, Any] | None:
        """The bytes of a variable's value, to be written to; None where they can't be had.

        A tensor read from a variable shares its memory, so that memory mustn't change while somebody may hold such a tensor.
        An update of no rows makes TensorFlow copy it if somebody does, and from then on copy at every reading;
        `DisableCopyOnRead` ends that. What is read then, here, is shared with nobody else.
        """
        plain = _plain_resource(item.variable)
        if plain is None or not plain.shape or not hasattr(tf.raw_ops, "DisableCopyOnRead"):
            return None
        handle, dtype = plain.handle, plain.dtype
        if dtype not in self._zeros:
            self._zeros[dtype] = tf.zeros((), dtype)
        try:
            tf.raw_ops.ResourceScatterUpdate(resource=handle, indices=self._none, updates=self._zeros[dtype])
            tf.raw_ops.DisableCopyOnRead(resource=handle)
            seen = [_Memory(tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype)) for _ in range(2)]
        except (tf.errors.OpError, TypeError, ValueError, BufferError, RuntimeError):
            return None
        # Two readings at one place: nothing is copied on the way. (A type unknown to DLPack raised above.)
        if seen[0].place != seen[1].place or seen[0].nbytes != item.nbytes:
            return None
        return np.asarray(seen[0])


@final
class _Memory:
    """A tensor's memory as NumPy's array interface shows it, open for writing; keeps the tensor alive."""

    def __init__(self, tensor: Any) -> None:
        view = np.from_dlpack(_Capsule(tf.experimental.dlpack.to_dlpack(tensor)))
        self._view = view
        self.place, self.nbytes = view.ctypes.data, view.nbytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "data": (self.place, False), "shape": (self.nbytes,), "typestr": "|u1"}


@final
class _Capsule:
    """A DLPack capsule as NumPy takes it."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts an interrupt from the keyboard off until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python raises it in the main thread only
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
