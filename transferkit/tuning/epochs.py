"""The loop over epochs as Keras's `fit` has it: the same calls to callbacks with the same figures in the same order.

It is a loop of its own because `fit` can begin neither within an epoch nor with the state of a run that was stopped. How the
steps of an epoch are taken is given to it, and what is told of each step. May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from transferkit._keras import keras

__all__ = ["EpochSteps", "Place", "Watch", "run_epochs"]


@dataclass(frozen=True)
class Place:
    """Where a run stands.

    Args:
        epoch: Number of the epoch.
        batch: How many of its batches are done.
        logs: The figures after the last of them; at the beginning of an epoch, those of the epoch before.
    """

    epoch: int
    batch: int
    logs: Mapping[str, Any] = field(default_factory=dict)


class Watch:
    """What is told of a run while it goes on; this one does nothing."""

    #: How many steps may go by at most before it is told.
    most_steps: int | None = None

    def place(self) -> Place | None:
        """Where the run goes on, if it was stopped before."""
        return None

    def restore(self) -> None:
        """Brings everything to the state it had at `place`; called once callbacks have begun."""

    def epoch_begun(self) -> None:
        """Told before the steps of an epoch."""

    def stepped(self, epoch: int, batch: int, logs: Any) -> None:
        """Told after steps, when callbacks know of them: `batch` batches of the epoch are done. May raise, to end the run."""

    def epoch_ended(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Told after an epoch's end, when callbacks know of it."""


class EpochSteps(Protocol):
    """How the steps of an epoch are taken."""

    def reset_metrics(self) -> None:
        """Brings the model's metrics to where an epoch begins."""

    def warm(self, epoch: int, first: int) -> None:
        """Takes the step before `first`, so that all state exists that only a step makes; its effect is undone."""

    def epoch(self, epoch: int, first: int, callbacks: Any, shown: Any, watch: Watch) -> Any:
        """Takes the steps of an epoch from `first` on, telling callbacks and watch of each; gives the last one's figures."""


def run_epochs(
    model: Any,
    steps: EpochSteps,
    *,
    epochs: int,
    initial_epoch: int,
    callbacks: Any,
    shown: Any = None,
    evaluate: Callable[[], Mapping[str, Any]] | None = None,
    watch: Watch | None = None,
) -> None:
    """Trains a compiled model, as `fit` does; changes the model.

    Args:
        model: Built and compiled.
        steps: How it steps.
        epochs: One past the last epoch.
        initial_epoch: The first epoch, for a run that wasn't stopped.
        callbacks: A `CallbackList`, set up for `shown`.
        shown: The model that callbacks know and stop (`stop_training`), where it isn't the one that is trained.
        evaluate: Tests after each epoch, and gives the logs.
        watch: What is told of the run.
    """
    shown = model if shown is None else shown
    watch = Watch() if watch is None else watch
    shown.stop_training = False
    callbacks.on_train_begin()
    ended: Any = None
    epoch, place = initial_epoch, watch.place()
    if place is not None:
        epoch = place.epoch
        if not place.batch:
            ended = place.logs
            watch.restore()
    while epoch < epochs and not (ended is not None and shown.stop_training):
        steps.reset_metrics()
        callbacks.on_epoch_begin(epoch)
        first, logs = 0, {}
        if place is not None and place.batch:
            first, logs = place.batch, dict(place.logs)
            steps.warm(epoch, first)
            watch.restore()
        place = None
        if not (first and shown.stop_training):
            watch.epoch_begun()
            logs = _values(steps.epoch(epoch, first, callbacks, shown, watch) or logs)
        if evaluate is not None:
            logs.update({f"val_{name}": value for name, value in evaluate().items()})
        callbacks.on_epoch_end(epoch, logs)
        ended = logs
        watch.epoch_ended(epoch, logs)
        epoch += 1
    if isinstance(model.optimizer, keras.optimizers.Optimizer) and epochs > 0:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    callbacks.on_train_end(logs=ended)


def _values(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The figures as they are now: a metric may give its own variable, which the test of the epoch goes on with."""
    return {name: value.numpy() if isinstance(value, keras.Variable) else value for name, value in logs.items()}
