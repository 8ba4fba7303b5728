"""Many variables as they are now, read at once and written back: what a phase keeps to go back to, digests and checkpoints.

May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from transferkit._keras import keras, tf

__all__ = ["Reader", "Snapshot", "as_array", "copies_of"]


def copies_of(variable: Any) -> tuple[Any, ...]:
    """TensorFlow's variables behind one, which a strategy over several devices has for each of them."""
    held = variable.value if isinstance(variable, keras.Variable) else variable
    if not tf.distribute.has_strategy():
        return (held,)
    copies: tuple[Any, ...] = tf.distribute.get_strategy().experimental_local_results(held)
    return copies


class Reader:
    """Reads variables as they are now.

    What it gives is a snapshot that costs nothing until the next step writes the variables: TensorFlow then writes to memory of
    its own. Variables with a copy on each device give all copies. One operation for each is as fast as a graph of them all, which
    takes 100 times as long to trace.

    Args:
        variables: Keras's or TensorFlow's.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self.variables = list(variables)
        self._parts = [copies_of(item) for item in variables]

    def __call__(self) -> list[list[Any]]:
        """The values, a tensor for each copy of each variable."""
        read = tf.raw_ops.ReadVariableOp
        return [[read(resource=part.handle, dtype=part.dtype) for part in parts] for parts in self._parts]

    def arrays(self) -> list[np.ndarray[Any, Any]]:
        """The values as arrays, of the first copy of each variable."""
        return [as_array(parts[0]) for parts in self()]

    def write(self, values: Sequence[Sequence[Any]]) -> None:
        """Gives the variables values that were read."""
        for parts, given in zip(self._parts, values, strict=True):
            for part, value in zip(parts, given, strict=True):
                tf.raw_ops.AssignVariableOp(resource=part.handle, value=value)


class Snapshot:
    """Variables' values as they were when it was made.

    Args:
        variables: Keras's or TensorFlow's.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._reader = Reader(variables)
        self._before = self._reader.arrays()

    def changed(self) -> list[Any]:
        """The variables that have another value now, to the bit."""
        now = zip(self._reader.variables, self._before, self._reader.arrays(), strict=True)
        return [variable for variable, before, after in now if not _same_bits(before, after)]


def _same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    # What nobody wrote to lies where it lay: as long as it is held here, TensorFlow writes new values to memory of its own.
    return one.ctypes.data == other.ctypes.data or one.tobytes() == other.tobytes()


def as_array(tensor: Any) -> np.ndarray[Any, Any]:
    """The tensor's values, without a copy where NumPy knows the type."""
    try:
        return np.asarray(memoryview(tensor))
    except (TypeError, ValueError, BufferError):
        return np.asarray(tensor.numpy())
