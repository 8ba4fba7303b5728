"""Compiled graphs that take the weights they run with, kept for every model of the same structure.

Tracing a backbone takes longer than running it on a few hundred rows. A process that builds the same network again, for another
fold, seed, candidate or run of a cell, need not do so again: what differs is in the weights alone. May import Keras and the
floors below.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any

from transferkit._keras import keras, tf
from transferkit.building.content import keras_settings

__all__ = ["Program"]

#: So many are kept, those used last; a graph of a large network takes a few MB.
_KEPT = 8
_kept: collections.OrderedDict[tuple[Any, ...], Any] = collections.OrderedDict()
_lock = threading.Lock()


class Program:
    """A computation over inputs, as one graph for each shape of these.

    Args:
        run: Inputs and `constants` → outputs; it reads no variable but `weights`.
        weights: The variables it reads.
        constants: Worked out from weights outside the graph, anew for each `ready`.
        structure: What tells it from every other computation, the values of weights and constants apart; None for one that is
            run as its variables are at each call, and isn't kept for others.
        told: The tensors whose values are part of `structure`.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        weights: Sequence[Any],
        constants: Callable[[], Sequence[Any]],
        *,
        structure: str | None,
        told: Sequence[Any] = (),
    ) -> None:
        self._run, self._weights, self._constants, self._structure = run, tuple(weights), constants, structure
        self._told = {id(tensor) for tensor in told}
        self._own = tf.function(run, autograph=False)

    def ready(self, like: Any = None) -> Callable[[Any], Any]:
        """The computation with the weights of now.

        Args:
            like: Inputs to trace it for at once.
        """
        constants = self._constants()
        alone = self._structure is None or tf.distribute.has_strategy() or tf.config.functions_run_eagerly()
        values = [] if alone else [tf.convert_to_tensor(weight.value) for weight in self._weights]
        # A graph holds the devices it was traced for.
        where = (self._structure, tf.identity(0.0).device, repr(keras_settings()))

        def ready(x: Any) -> Any:
            made = None if alone else self._shared(where, x, values, constants)
            return self._own(x, *constants) if made is None else made(x, values, *constants)

        if like is not None and (alone or self._shared(where, like, values, constants) is None):
            self._own.get_concrete_function(like, *constants)
        return ready

    def _shared(self, where: tuple[Any, ...], x: Any, values: Sequence[Any], constants: Sequence[Any]) -> Any:
        """The graph for inputs like these, or None where it is of these variables alone."""
        key = (*where, repr([tf.TensorSpec.from_tensor(leaf) for leaf in (*x, *constants)]))
        with _lock:
            if key not in _kept:

                def run(x: Any, values: Any, *constants: Any) -> Any:
                    with keras.StatelessScope(state_mapping=list(zip(self._weights, values, strict=True))):
                        return self._run(x, *constants)

                made = tf.function(run, autograph=False).get_concrete_function(x, values, *constants)
                # What else it reads is this model's alone: a table of words, a variable that isn't one of the weights.
                _kept[key] = made if self._told.issuperset(map(id, made.captured_inputs)) else None
                if len(_kept) > _KEPT:
                    _kept.popitem(last=False)
            _kept.move_to_end(key)
            return _kept[key]
