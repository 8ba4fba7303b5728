"""What stops a run that has gone wrong, and what is said of one that looks wrong.

Weights are looked at, not the loss alone: on a CPU a NaN in the weights can hide behind kernels that make it 0 (ReLU) or very
small (MaxPool), and the loss stays finite. One sum over all that trains tells: it isn't finite when one of them isn't. Then, and
only then, each is looked at. May import Keras and the floors below.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.errors import TrainingError, shorten
from transferkit.tuning.snapshots import Reader, as_array, copies_of
from transferkit.weights.values import is_finite

__all__ = ["Guard", "check_start", "loss_spikes", "out_of_memory"]

#: The share of the time of training that looking at the weights may take.
_SHARE = 0.004
#: So many variables are summed one by one as fast as by a graph, about.
_FEW = 8


def _is_float(variable: Any) -> bool:
    return "float" in keras.backend.standardize_dtype(variable.dtype)


def _broken(variables: Sequence[Any]) -> list[str]:
    """The paths of those that aren't finite."""
    values = zip(variables, Reader(variables)(), strict=True)
    return [item.path for item, parts in values if not all(is_finite(as_array(part)) for part in parts)]


def check_start(model: Any) -> None:
    """Raises a TrainingError for weights that aren't finite before a step is taken."""
    broken = _broken([item for item in model.weights if _is_float(item)])
    if broken:
        raise TrainingError(
            f"Training the model {model.name!r}.",
            found=f"weights that are NaN or infinite before the first step: {shorten(broken)}",
            cause="they were loaded from a file of a run that went wrong, or a layer was initialised with them",
            fix="load other weights; WeightLoader(path).load(model) refuses such files",
        )


class Guard:
    """Watches over one phase.

    Args:
        phase: Its name.
        variables: What the phase changes: trained weights, statistics that adapt.
        everything: All variables of the model, to go back to.
    """

    def __init__(self, phase: str, variables: Sequence[Any], everything: Sequence[Any]) -> None:
        self._phase = phase
        self._watched = [item for item in variables if _is_float(item)]
        self._reader = Reader(everything)
        self._good: tuple[str, list[list[Any]]] = ("the beginning of the phase", self._reader())
        self._first = {id(item): value for item, value in zip(everything, self._good[1], strict=True)}
        self._every, self._since = 1, 0
        self._any = False
        self._told = time.perf_counter()
        self._step_seconds = math.inf
        self._next_good = 0.0
        self._done = 0

        def total(loss: Any) -> Any:
            sums = [tf.reduce_sum(tf.cast(keras.ops.convert_to_tensor(item), tf.float32)) for item in self._watched]
            return tf.math.is_finite(tf.add_n([loss, *sums]))

        self._finite: Callable[[Any], Any] = total
        if len(self._watched) > _FEW:  # for fewer a graph takes longer to make than it saves
            self._finite = tf.function(total, autograph=False).get_concrete_function(tf.TensorSpec((), tf.float32))

    def stepped(self, steps: int, place: Callable[[], str], logs: Any) -> None:
        """Looks at the weights and the loss, as often as its share of the time allows.

        Args:
            steps: How many steps were taken since the last call.
            place: Gives words for where the run is.
            logs: The figures of the last step.

        Raises:
            TrainingError: when one isn't finite; the model has the weights of the last good state again.
        """
        now = time.perf_counter()
        self._step_seconds = min(self._step_seconds, (now - self._told) / max(steps, 1))
        self._since += steps
        self._any = self._any or steps > 0
        if self._since >= self._every:
            self.look(place, logs)
        self._told = time.perf_counter()

    def look(self, place: Callable[[], str], logs: Any) -> None:
        """Looks at them now."""
        loss = logs.get("loss") if isinstance(logs, Mapping) else None
        begun = time.perf_counter()
        if not bool(self._finite(tf.cast(0.0 if loss is None else loss, tf.float32))):
            self._examine(place(), loss)
        seconds = time.perf_counter() - begun
        self._done += 1
        if self._done > 2:  # the first holds the tracing
            self._every = max(1, math.ceil(seconds / (_SHARE * max(self._step_seconds, 1e-6))))
        if begun >= self._next_good:
            self._good = (place(), self._reader())
            taken = time.perf_counter() - begun - seconds
            # Its price is paid by the next step, which has to write every variable anew.
            self._next_good = begun + (3 * taken + 1e-9 * sum(_bytes(item) for item in self._watched)) / _SHARE
        self._since = 0

    def _examine(self, place: str, loss: Any) -> None:
        broken = _broken(self._watched)
        figure = math.nan if loss is None else float(loss)
        if not broken and (loss is None or math.isfinite(figure)):
            return  # a sum that overflowed
        found = []
        if broken:
            found.append(f"weights that are NaN or infinite in {len(broken)} of {len(self._watched)}, first {broken[0]!r}")
        if loss is not None and not math.isfinite(figure):
            found.append(f"a loss of {figure}")
        last = f" or in one of the {self._since - 1} steps before" if self._since > 1 else ""
        self.go_back()
        raise TrainingError(
            f"Training the phase {self._phase!r}: {place}{last}.",
            found=found,
            cause="a learning rate that is too high, inputs or labels that are NaN, or a loss that isn't defined for them",
            fix=f"train again with a lower learning_rate; the model has the weights of {self._good[0]} again",
        )

    def go_back(self) -> None:
        """Gives the model what it had in the last good state."""
        self._reader.write(self._good[1])

    def unchanged(self) -> str | None:
        """A note when the steps that were taken changed nothing of what they should have; else None."""
        if not self._any:  # a run that was stopped after its last step, and goes on
            return None
        still = []
        for item in self._watched:
            if not item.trainable:
                continue
            before = as_array(self._first[id(item)][0])
            now = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(item))
            if np.array_equal(before, now):
                still.append(item.path)
        trained = sum(bool(item.trainable) for item in self._watched)
        if not still or not trained:
            return None
        if len(still) == trained:
            return (
                f"Phase {self._phase!r} changed no weight. Its learning rate is 0, or no gradient reaches what trains: units "
                "that are always off (ReLU), or a loss that doesn't depend on it."
            )
        return f"Phase {self._phase!r} never changed {shorten(still, most=3)}: no gradient reaches them."


def _bytes(variable: Any) -> int:
    return 4 * int(math.prod(variable.shape))


def loss_spikes(history: Mapping[str, Sequence[float]], *, first: int, count: int, phase: str) -> list[str]:
    """A note for each epoch whose loss is over twice that of the epoch before, and above the phase's first; two at most."""
    losses = list(history.get("loss", ()))[first : first + count]
    found = [
        f"Phase {phase!r}: the loss rose from {before:.4g} to {now:.4g} in its epoch {number}. A lower learning rate or a "
        "warm-up helps."
        for number, (before, now) in enumerate(itertools.pairwise(losses), 2)
        if before > 0 and now > 2 * before and now > losses[0]
    ]
    return found[:2]


def out_of_memory(model: Any, rows: Callable[[int], Any] | None, batch_size: int, phase: str, error: Exception) -> TrainingError:
    """The error for a step that didn't fit into the memory, with the largest batch that does, found by trying halves.

    Args:
        model: The model.
        rows: Gives inputs of so many rows, or None where batches are the user's.
        batch_size: Of the step that failed.
        phase: The phase's name.
        error: TensorFlow's.
    """
    fits = 0
    if rows is not None:
        size = batch_size // 2
        while size and not fits:
            fits, size = (size, size) if _fits(model, rows(size)) else (0, size // 2)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return TrainingError(
        f"Training the phase {phase!r} with batches of {batch_size} rows." if rows else f"Training the phase {phase!r}.",
        found=f"not enough memory for a step: {lines[0].strip() if lines else error}",
        cause="what a step keeps for its gradients grows with the rows of a batch",
        fix=f"fit(…, batch_size={fits}) fits" if fits else "give smaller batches, smaller inputs, or freeze more layers",
    )


def _fits(model: Any, x: Any) -> bool:
    def attempt(inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            total = tf.add_n([tf.reduce_sum(tf.cast(leaf, tf.float32)) for leaf in tf.nest.flatten(model(inputs, training=True))])
        gradients = tape.gradient(total, [copies_of(item)[0] for item in model.trainable_variables])
        return [tf.reduce_sum(item) for item in gradients if item is not None]

    try:
        tf.function(attempt, autograph=False)(x)
    except tf.errors.ResourceExhaustedError:
        return False
    return True
