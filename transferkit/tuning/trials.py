"""Training steps on trial: what finders take to measure something, after which the model is exactly as it was.

May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from transferkit._keras import keras, tf
from transferkit.data import Batch
from transferkit.errors import PlanError

__all__ = ["TrialSteps", "left_alone", "measured_jit", "median_seconds", "phase_of"]


@contextlib.contextmanager
def left_alone(model: Any) -> Iterator[None]:
    """At the end of the block every variable, every `trainable` flag and what the model is compiled with are as before."""
    kept = [(variable, variable.numpy()) for variable in model.variables]
    flags = _flags(model)
    try:
        yield
    finally:
        for layer, trainable in flags:
            layer.trainable = trainable
        for variable, value in kept:
            variable.assign(value)


def _flags(model: Any) -> list[tuple[Any, bool]]:
    """Each model and layer with its flag, outermost first: setting one sets all within, so the inner ones are set again after."""
    found: list[tuple[Any, bool]] = []
    waiting, seen = [model], set()
    while waiting:
        layer = waiting.pop(0)
        if id(layer) not in seen:
            seen.add(id(layer))
            found.append((layer, bool(layer.trainable)))
            waiting.extend(getattr(layer, "layers", []))
    return found


class TrialSteps:
    """Training steps outside of `fit`, which leave what the model is compiled with untouched.

    Args:
        model: A built model.
        loss: As `compile` takes it, for each output.
        loss_weights: The same.
        optimizer: A fresh one.
        jit_compile: Whether XLA compiles them.
    """

    def __init__(self, model: Any, loss: Any, loss_weights: Any, optimizer: Any, *, jit_compile: bool = False) -> None:
        self._model, self.optimizer = model, optimizer
        self._losses = keras.tree.map_structure(_mean_of_rows, loss)
        self._weights = loss_weights
        optimizer.build(model.trainable_variables)
        self._run = tf.function(self._step, reduce_retracing=True, jit_compile=jit_compile)

    def _total(self, y: Any, predictions: Any, sample_weight: Any) -> Any:
        losses = self._losses
        if isinstance(losses, dict):
            names = list(losses)
            given = (
                predictions if isinstance(predictions, dict) else dict(zip(names, keras.tree.flatten(predictions), strict=True))
            )
            parts = {name: losses[name](y[name], given[name], sample_weight=sample_weight) for name in names}
            weights = self._weights if isinstance(self._weights, dict) else {}
            return sum(part * weights.get(name, 1.0) for name, part in parts.items())
        if isinstance(losses, (list, tuple)):
            factors = self._weights or [1.0] * len(losses)
            pairs = zip(losses, y, keras.tree.flatten(predictions), factors, strict=True)
            return sum(one(labels, given, sample_weight=sample_weight) * weight for one, labels, given, weight in pairs)
        return losses(y, predictions, sample_weight=sample_weight)

    def _step(self, x: Any, y: Any, sample_weight: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = self._total(y, self._model(x, training=True), sample_weight)
            loss = loss + sum(self._model.losses, start=tf.constant(0.0, loss.dtype))
            scaled = self.optimizer.scale_loss(loss)
        variables = self._model.trainable_variables
        self.optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    def __call__(self, batch: Batch) -> float:
        x, y, weight = (None if part is None else keras.tree.map_structure(tf.convert_to_tensor, part) for part in batch)
        return float(self._run(x, y, weight))


class MeanOfRows(keras.losses.Loss):
    """A loss that is a function, as `compile` takes it: the mean of what it gives for the rows."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred)


def _mean_of_rows(loss: Any) -> Any:
    found = keras.losses.get(loss)
    return found if found is None or isinstance(found, keras.losses.Loss) else MeanOfRows(found)


def phase_of(tuner: Any, model: Any, phase: str | None, *, default: int = 0) -> Any:
    """The resolved phase of a plan that has that name; the one at `default` where none is given."""
    plans = tuner.describe(model).phases
    names = [plan.phase.name for plan in plans]
    if phase is not None and phase not in names:
        raise PlanError(f"Looking for the phase {phase!r} of a plan.", found=f"the phases {', '.join(map(repr, names))}")
    return plans[default if phase is None else names.index(phase)]


def median_seconds(step: Callable[[], object], steps: int) -> float:
    """Seconds of a call, after two that trace and warm up."""
    taken = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return median(taken[2:])


def measured_jit(model: Any, batch: Batch, loss: Any, loss_weights: Any, make_optimizer: Callable[[], Any]) -> tuple[bool, str]:
    """Whether a training step is faster when XLA compiles it, and that in words. The model is left exactly as it was.

    Args:
        model: A built model, with the `trainable` flags of the phase.
        batch: Rows of as many as a batch has.
        loss: As `compile` takes it, for each output.
        loss_weights: The same.
        make_optimizer: Gives a fresh one.
    """
    with left_alone(model):
        plain = TrialSteps(model, loss, loss_weights, make_optimizer())
        without = median_seconds(lambda: plain(batch), 10)
        by_xla = TrialSteps(model, loss, loss_weights, make_optimizer(), jit_compile=True)
        try:
            compiled = median_seconds(lambda: by_xla(batch), 10)
        except (tf.errors.OpError, NotImplementedError, TypeError, ValueError) as error:
            return False, f"XLA off, which can't compile a step: {str(error).splitlines()[0][:120]}"
    faster = compiled < without
    return faster, f"XLA {'on' if faster else 'off'}: {compiled * 1000:.3g} ms a step with it, {without * 1000:.3g} ms without"
