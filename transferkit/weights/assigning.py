"""Puts arrays into variables, as one step: every value is at hand and checked before the first variable changes.

A value is copied once, out of the (mapped) file into memory of its own, which TensorFlow then takes over as the variable's
buffer without another copy (AssignVariableOp shares a tensor it gets from aligned memory). Old values are given free one by one,
so the peak is the model and the largest tensor.
May import TensorFlow.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf

__all__ = ["THREADS", "Assignment", "assign_all"]

_ALIGNMENT = 64  # of Eigen's vectors; TensorFlow copies what is aligned to less
_KEPT = 64 << 20
_BY_DLPACK = tuple(np.dtype(name) for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8"))
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Assignment:
    """A Keras variable and the function that gives its new value."""

    variable: Any
    value: Callable[[], np.ndarray[Any, Any]]
    dtype: np.dtype[Any]
    nbytes: int


def _room(item: Assignment) -> np.ndarray[Any, Any]:
    """Aligned memory for a value, of the variable's shape and dtype."""
    raw = np.empty(item.nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    room: np.ndarray[Any, Any] = raw[start : start + item.nbytes].view(item.dtype).reshape(tuple(item.variable.shape))
    return room


def _plain_resource(variable: Any) -> Any:
    """The TensorFlow variable behind a Keras one where it is a plain one on the CPU; else None."""
    value = getattr(variable, "value", None)
    if not isinstance(value, tf.Variable) or not hasattr(value, "handle") or "Distributed" in type(value).__name__:
        return None
    if type(value).__name__ != "ResourceVariable" or "CPU" not in (value.device or "CPU").upper():
        return None
    return value


def _put(item: Assignment, room: np.ndarray[Any, Any]) -> None:
    np.copyto(room, item.value(), casting="unsafe")
    plain = _plain_resource(item.variable)
    if plain is None:
        item.variable.assign(room)
    else:
        tf.raw_ops.AssignVariableOp(resource=plain.handle, value=_shared(room))


def _shared(room: np.ndarray[Any, Any]) -> Any:
    """The memory as a tensor without a copy.

    By DLPack, because TensorFlow gives a NumPy array it took over free only at some later call of its own.
    """
    if room.dtype in _BY_DLPACK and room.size:
        return tf.experimental.dlpack.from_dlpack(room.__dlpack__())
    return room


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


def assign_all(items: Sequence[Assignment]) -> None:
    """Assigns every value; on an error the variables changed so far get their old values back.

    The old values are kept for that only up to 64 MB together, lest the peak doubles; beyond it an error can come from nothing
    but a lack of memory, because values are checked before.
    """
    total = sum(item.nbytes for item in items)
    old = [(item, np.array(keras.ops.convert_to_numpy(item.variable))) for item in items] if total <= _KEPT else []
    begun: deque[Future[None]] = deque()
    try:
        with _uninterrupted(), ThreadPoolExecutor(THREADS) as pool:
            for item in items:
                if len(begun) > THREADS:
                    begun.popleft().result()
                # Memory is asked for here and not in the threads, whose heaps wouldn't take up what old values give back.
                begun.append(pool.submit(_put, item, _room(item)))
            for done in begun:
                done.result()
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            for item, value in old:
                item.variable.assign(value)
        raise
