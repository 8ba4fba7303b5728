"""Puts arrays into variables, as one step: every value is at hand and checked before the first variable changes.

A value is copied once, out of the (mapped) file into memory of its own, which TensorFlow then takes over as the variable's
buffer without another copy (AssignVariableOp shares a tensor it gets from aligned memory). Old values are given free one by one,
so the peak is the model and the largest tensor.
May import TensorFlow.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf

__all__ = ["THREADS", "Assignment", "assign_all"]

_ALIGNMENT = 64  # of Eigen's vectors; TensorFlow copies what is aligned to less
_KEPT = 64 << 20
_LARGE = 1 << 20
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Assignment:
    """A Keras variable and the function that gives its new value."""

    variable: Any
    value: Callable[[], np.ndarray[Any, Any]]
    dtype: np.dtype[Any]
    nbytes: int


def _owned(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A copy in aligned memory nobody else refers to."""
    nbytes = array.size * dtype.itemsize
    if nbytes >= _LARGE and hasattr(mmap, "MAP_ANONYMOUS"):
        # Pages of its own go back to the system when the variable gets other values; the heap would keep them.
        raw = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    else:
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    owned: np.ndarray[Any, Any] = raw[start : start + nbytes].view(dtype).reshape(array.shape)
    np.copyto(owned, array, casting="unsafe")
    return owned


def _plain_resource(variable: Any) -> Any:
    """The TensorFlow variable behind a Keras one where it is a plain one on the CPU; else None."""
    value = getattr(variable, "value", None)
    if not isinstance(value, tf.Variable) or not hasattr(value, "handle") or "Distributed" in type(value).__name__:
        return None
    if type(value).__name__ != "ResourceVariable" or "CPU" not in (value.device or "CPU").upper():
        return None
    return value


def _put(item: Assignment) -> None:
    owned = _owned(item.value(), item.dtype)
    plain = _plain_resource(item.variable)
    if plain is None:
        item.variable.assign(owned)
    else:
        tf.raw_ops.AssignVariableOp(resource=plain.handle, value=owned)


def assign_all(items: Sequence[Assignment]) -> None:
    """Assigns every value; on an error the variables changed so far get their old values back.

    The old values are kept for that only up to 64 MB together, lest the peak doubles; beyond it an error can come from nothing
    but a lack of memory, because values are checked before.
    """
    total = sum(item.nbytes for item in items)
    old = [(item, np.array(keras.ops.convert_to_numpy(item.variable))) for item in items] if total <= _KEPT else []
    try:
        # In threads of their own an interrupt from the keyboard doesn't stop the work half-way.
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(_put, item) for item in items]:
                done.result()
    except BaseException:
        for item, value in old:
            item.variable.assign(value)
        raise
