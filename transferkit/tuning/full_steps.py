"""The steps of a phase that is computed in full, by the model's own train function. May import Keras and the floors below."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

from transferkit._keras import tf
from transferkit.errors import DataError
from transferkit.tuning.stream import Stream

__all__ = ["FullSteps"]


class FullSteps:
    """Steps by the model's own train function, the one that `fit` calls, over a stream.

    An epoch is one pass over the data, or `steps_per_epoch` batches, which go on where the epoch before left the data.

    Args:
        model: Built and compiled.
        stream: The batches.
        each: How many steps are taken before callbacks are told.
        epochs: One past the last epoch.
    """

    def __init__(self, model: Any, stream: Stream, *, each: int = 1, epochs: int) -> None:
        self._model, self._stream = model, stream
        stream.may_go_on(model.steps_per_execution, epochs)
        self._each = each
        self._known = stream.steps
        #: Whether an epoch goes on in the pass of the one before.
        self._continues = stream.steps != stream.batches
        #: Whether only the data itself knows where it ends. Keras's function finds that out within a step, which the optimizer
        #: counts, and decays weights in, though there is no batch (Keras 3.15); so batches are taken from the data before.
        self._looks_ahead = stream.batches is None and not tf.distribute.has_strategy()
        if tf.distribute.has_strategy():
            # Variables of metrics and optimizer can't be made within a replica's step; a test makes them outside of it.
            if not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
            model.evaluate(stream.open(stream.number).take(1), verbose=0)
        model.make_train_function()

    def begin(self) -> None:
        """Begins a phase at the beginning of a pass; not called where a run goes on."""
        self._stream.end_epoch()  # as `fit` has it, which tells the data so once before it begins
        if self._continues and self._stream.endless:
            return
        self._stream.iterator = None
        if self._stream.seen:
            self._stream.number, self._stream.seen = self._stream.number + 1, 0

    def state(self) -> dict[str, int]:
        """Where in the data it is."""
        return self._stream.state()

    def _open(self, number: int, first: int, *, warm: bool = False) -> None:
        """Begins a pass at a batch of it; where it is to be `warm`, a step is taken there."""
        stream = self._stream
        while True:
            stream.iterator = None  # before the next is begun, so that nothing of it is read any more
            dataset = stream.open(number, first)
            if tf.distribute.has_strategy():
                dataset = self._model.distribute_strategy.experimental_distribute_dataset(dataset)
            iterator = stream.iterator = iter(dataset)
            reads = [next] * stream.dropped(first) + ([self._take] if warm else [])
            with stream.failing():
                if reads:
                    reads[0](iterator)
                    if not stream.found():
                        del iterator
                        continue
                for read in reads[1:]:
                    read(iterator)
            if reads:
                stream.check_place()
            return

    def reset_metrics(self) -> None:
        """Brings the model's metrics to where an epoch begins."""
        self._model.reset_metrics()

    def warm(self, epoch: int, first: int) -> None:
        stream = self._stream
        if not self._continues:
            stream.number, stream.seen = epoch, first
        self._open(stream.number, stream.seen - min(first, self._each), warm=True)

    def epoch(self, epoch: int, first: int, callbacks: Any, shown: Any, watch: Any) -> Any:
        model, stream = self._model, self._stream
        stream.begin_epoch()
        if stream.iterator is None:
            if not self._continues:
                stream.number, stream.seen = epoch, first
            self._open(stream.number, stream.seen)
        logs = self._steps(epoch, first, callbacks, shown, watch)
        if not self._continues or (stream.batches is not None and stream.seen >= stream.batches):
            self._end_pass()
        stream.end_epoch()
        figures = model.get_metrics_result()
        return figures if isinstance(logs, dict) and set(figures) == set(logs) else logs

    def _end_pass(self) -> None:
        stream = self._stream
        if not stream.goes_on():
            stream.iterator = None
        stream.number, stream.seen = stream.number + 1, 0

    def _take(self, iterator: Any, most: int | None = None) -> Any:
        """Takes the steps that callbacks hear of as one, `most` at most; gives the last one's figures."""
        logs = self._step(iterator)
        together = self._model.steps_per_execution
        for _ in range(together, self._each if most is None else min(self._each, most), together):
            try:
                logs = self._step(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                break
        return logs

    def _step(self, iterator: Any) -> Any:
        """One call of the train function."""
        if not self._looks_ahead:
            return self._model.train_function(iterator)
        batches = list(itertools.islice(iterator, self._model.steps_per_execution))
        if not batches:
            raise StopIteration
        return self._model.train_function(batches)

    def _steps(self, epoch: int, first: int, callbacks: Any, shown: Any, watch: Any) -> Any:
        stream, each = self._stream, self._each
        step, logs = first, {}
        while self._known is None or step < self._known:
            if self._continues and stream.batches is not None and stream.seen >= stream.batches:
                _warn_short(step, epoch)
                break
            callbacks.on_train_batch_begin(step)
            try:
                with stream.failing():
                    logs = self._take(stream.iterator, None if self._known is None else self._known - step)
            except (StopIteration, tf.errors.OutOfRangeError):
                if self._known is None:
                    self._known = step
                elif stream.once:
                    raise DataError(
                        f"Training on {self._known} batches in each epoch.",
                        found=f"a generator that ended after {step} batches of epoch {epoch + 1}",
                        fix="give one without an end, or fewer epochs or steps_per_epoch",
                    ) from None
                else:
                    _warn_short(step, epoch)
                    self._end_pass()
                break
            taken = each if self._continues or self._known is None else min(each, self._known - step)
            step, stream.seen = step + taken, stream.seen + taken
            callbacks.on_train_batch_end(step - 1, logs)
            watch.stepped(epoch, step, logs)
            if shown.stop_training:
                break
        return logs


def _warn_short(step: int, epoch: int) -> None:
    warnings.warn(
        f"The training data ended after {step} batches of epoch {epoch}, before the epoch did. Give it as many batches as a "
        "whole number of epochs takes, or make it repeat itself: dataset.repeat().",
        stacklevel=5,
    )
