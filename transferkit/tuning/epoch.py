"""Whole epochs as one compiled computation, over rows that lie in memory or are mapped from disk.

A small head is bound by Python and callbacks, not by arithmetic: Keras's `fit` returns to Python for every batch. Here the
loop over the batches is part of the graph, and each turn gathers its rows by number and calls `model.train_step`, the public
method that `fit` calls too, so losses, metrics, weights, clipping, averages and loss scaling are Keras's own. Batches and
their order are `fit`'s with `shuffle=False`, and so are the results, to the bit. May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.tuning.epochs import Watch, run_epochs
from transferkit.tuning.features import Features
from transferkit.tuning.feeding import as_tensor
from transferkit.tuning.metrics_state import metrics_reset
from transferkit.tuning.replicated import own_steps

__all__ = ["Rows", "Steps", "batch_hooks", "class_weights", "rows_of_features", "same_kernels", "train"]

#: How long the graph runs before Python is given a turn, to draw the bar and to hear an interrupt.
_TURN_SECONDS = 0.5
#: How much of the rows is gathered at once, and for how many steps at most.
_BYTES_AT_ONCE, _MOST_AT_ONCE = 4 << 20, 32


@dataclass(frozen=True, eq=False)
class Rows:
    """What the steps draw their batches from.

    Args:
        x: What the inputs of the model are read from, one tensor or a tuple of them.
        y: The labels, or None.
        sample_weight: The weights, or None.
        count: How many rows an epoch has.
        index: Rows of an epoch, epoch → their places in `x`, where these aren't the rows themselves.
        read: `x`, places → the inputs there; the rows of the tensors where nothing is given.
        augment: Inputs, epoch, step → inputs to train on.
    """

    x: Any
    y: Any
    sample_weight: Any
    count: int
    index: Callable[[np.ndarray[Any, Any], int], np.ndarray[Any, Any]] | None = None
    read: Callable[[Any, Any], Any] | None = None
    augment: Callable[[Any, Any, Any], Any] | None = None


def rows_of_features(
    features: Features,
    *,
    class_weight: Mapping[int, float] | None = None,
    augment: Callable[[Any, Any, Any], Any] | None = None,
) -> Rows:
    """The features and labels as rows to train on; the features aren't copied."""
    weights = features.sample_weight
    if class_weight is not None:
        weights = class_weights(features.y, class_weight)
    tensors = features.tensors()
    plain = not features.encoded
    return Rows(
        x=tensors[0] if plain and len(tensors) == 1 else tensors,
        y=None if features.y is None else tf.nest.map_structure(as_tensor, features.y),
        sample_weight=None if weights is None else tf.nest.map_structure(as_tensor, weights),
        count=features.rows,
        index=lambda order, epoch: features.index(order, epoch=epoch),
        read=None if plain else features.read(),
        augment=augment,
    )


def class_weights(y: Any, class_weight: Mapping[int, float]) -> np.ndarray[Any, Any]:
    """The weight of each row by its class, as Keras's `fit` makes it of labels or one-hot rows; 1 for one that isn't named."""
    labels = np.asarray(y)
    if labels.ndim > 1:
        labels = labels.argmax(axis=-1) if labels.shape[-1] != 1 else labels[..., 0]
    labels = np.round(labels).astype("int32")
    found, place = np.unique(labels, return_inverse=True)
    weights = np.array([class_weight.get(int(label), 1.0) for label in found], dtype=keras.config.floatx())
    return weights[place.reshape(labels.shape)]


@dataclass(frozen=True)
class _Form:
    """What makes the graph of some steps another than that of others.

    Args:
        train: Whether they train.
        full: Whether every batch has as many rows.
        in_order: Whether they take the tensors' rows as they lie there, so that there is nothing to gather.
        read: Of the rows.
        augment: Of the rows, where they train.
    """

    train: bool
    full: bool
    in_order: bool
    read: Any
    augment: Any


class Steps:
    """Training and test steps of a compiled model over rows, many in one call.

    Args:
        model: Built and compiled; its `train_step` and `test_step` are what runs.
        batch_size: Rows in a batch; the last of an epoch may have fewer.
    """

    def __init__(self, model: Any, *, batch_size: int) -> None:
        self.model = model
        self.batch_size = batch_size
        # A step of the user's gives logs of its own, which only the step itself can tell.
        own = own_steps(model, ("train_step", "test_step"))
        self._alone = bool(own) or model.run_eagerly or getattr(model, "by_step", False)
        self._compiled_for: dict[Any, Any] = {}
        self._bound: dict[Any, Any] = {}
        self._reset: Callable[[], Any] | None = None

    def count(self, rows: int) -> int:
        """How many batches an epoch of so many rows has."""
        return -(-rows // self.batch_size)

    def prepare(self, rows: Rows) -> None:
        """Makes the variables of optimizer, loss and metrics, which a graph can't."""
        if self._reset is not None:
            return
        model = self.model
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        try:
            self._pass(rows, 1)
        except Exception:  # a layer of the user's may take whole batches only
            self._pass(rows, min(self.batch_size, rows.count))
        self._reset = metrics_reset(model)

    def reset_metrics(self) -> None:
        """Does what the model's own method does."""
        (self._reset or self.model.reset_metrics)()

    def _pass(self, rows: Rows, count: int) -> None:
        """Computes some rows, which metrics take for some of an epoch."""
        model, places = self.model, tf.range(count, dtype=tf.int64)
        x, y, weight = _batch(rows, (rows.x, rows.y, rows.sample_weight), places, places)
        y_pred = model(x, training=False)
        model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=weight)
        model.compute_metrics(x, y, y_pred, sample_weight=weight)

    def warm(self, rows: Rows, *, train: bool) -> None:
        """Compiles the steps for rows like these, whose values don't matter; takes none."""
        if not self._alone:
            self._run(train, rows, np.arange(rows.count), 0, 0, 0)

    def train(self, rows: Rows, order: np.ndarray[Any, Any], *, epoch: int = 0, start: int = 0, stop: int | None = None) -> Any:
        """Takes the steps `start` to `stop` of an epoch; changes the model, and adds to its metrics.

        Args:
            rows: The rows.
            order: The numbers of the rows in the order of the epoch.
            epoch: Its number; it says which view of each row is taken.
            start: The first step.
            stop: One past the last; None is the whole epoch.

        Returns:
            The logs after the last of the steps, by name, as tensors.
        """
        return self._run(True, rows, order, epoch, start, stop)

    def test(self, rows: Rows, *, start: int = 0, stop: int | None = None) -> Any:
        """Takes test steps over the rows in their own order, of the first view."""
        return self._run(False, rows, np.arange(rows.count), 0, start, stop)

    def _run(self, train: bool, rows: Rows, order: np.ndarray[Any, Any], epoch: int, start: int, stop: int | None) -> Any:
        self.prepare(rows)
        stop = self.count(len(order)) if stop is None else stop
        taken = order if rows.index is None else rows.index(order, epoch)
        labels = tf.constant(order, tf.int64)
        places = labels if taken is order else tf.constant(taken, tf.int64)
        given = ((rows.x, rows.y, rows.sample_weight), labels, places, tf.constant(epoch))
        form = _Form(
            train,
            # As with `fit` on arrays, the size of the batches is known beforehand only where it is that of all.
            full=len(order) % self.batch_size == 0 and not tf.distribute.has_strategy(),
            in_order=rows.read is None and not train and _is_in_order(order) and _is_in_order(taken),
            read=rows.read,
            augment=rows.augment if train else None,
        )
        function = self._function(form, rows)
        if not self._alone:
            steps = (tf.constant(start), tf.constant(stop))
            key = (form, rows, len(order))
            if key not in self._bound:  # which spares each call to find out which of its graphs fits the arguments
                self._bound[key] = function.get_concrete_function(*given, *steps)
            return self._bound[key](*given, *steps)
        logs: Any = {}
        for step in range(start, stop):
            logs = function(*given, tf.constant(step))
        return logs

    def _function(self, form: _Form, rows: Rows) -> Any:
        if form not in self._compiled_for:
            self._compiled_for[form] = self._compiled(form, rows)
        return self._compiled_for[form]

    def _compiled(self, form: _Form, rows: Rows) -> Any:
        size, model, augment = self.batch_size, self.model, form.augment
        step = model.train_step if form.train else model.test_step
        # AutoGraph stays off, as in fit: the user's step runs as it was written.
        one = tf.function(step, jit_compile=True, autograph=False) if model.jit_compile else step

        def take(x: Any, y: Any, weight: Any, epoch: Any, index: Any) -> Any:
            if augment is not None:
                x = augment(x, epoch, index)
            return one(keras.utils.pack_x_y_sample_weight(x, y, weight))

        def sized(batch: Any) -> Any:
            for leaf in _leaves(batch) if form.full else ():
                leaf.set_shape((size, *leaf.shape[1:]))
            return batch

        def turn(parts: Any, labels: Any, places: Any, epoch: Any, index: Any) -> Any:
            cut = slice(index * size, tf.minimum((index + 1) * size, tf.size(labels)))  # the tensors may go on after the rows
            if form.in_order:
                batch = _packed(parts, [leaf[cut] for leaf in _leaves(parts)])
            else:
                batch = _batch(rows, parts, labels[cut], places[cut])
            x, y, weight = sized(batch)
            return take(x, y, weight, epoch, index)

        def run_in_order(parts: Any, labels: Any, places: Any, epoch: Any, start: Any, stop: Any) -> Any:
            def body(index: Any) -> Any:
                turn(parts, labels, places, epoch, index)
                return (index + 1,)

            tf.while_loop(lambda index: index < stop, body, (start,), parallel_iterations=1)
            return model.get_metrics_result()

        at_once = _steps_at_once(rows, size)

        def run(parts: Any, labels: Any, places: Any, epoch: Any, start: Any, stop: Any) -> Any:
            def gathered(first: Any) -> Any:
                cut = slice(first * size, tf.minimum(first + at_once, stop) * size)
                return _batch(rows, parts, labels[cut], places[cut])

            def walk(first: Any, last: Any, held: Sequence[Any]) -> None:
                def body(index: Any) -> Any:
                    place = (index - first) * size
                    x, y, weight = sized(_packed(layout, [leaf[place : place + size] for leaf in held]))
                    take(x, y, weight, epoch, index)
                    return (index + 1,)

                tf.while_loop(lambda index: index < last, body, (first,), parallel_iterations=1)

            # Rows are gathered for some steps together and then cut, which copies nothing: to gather a batch two threads meet,
            # and that takes longer than what they do. While steps are taken the rows for the next are gathered, by one thread, so
            # that the steps don't wait for the other.
            def some(first: Any, *held: Any) -> Any:
                last = tf.minimum(first + at_once, stop)
                following = _in_one_thread(lambda: _leaves(gathered(last)))
                walk(first, last, held)
                return last, *following

            layout = gathered(start)
            leaves = _leaves(layout)
            if labels.shape[0] is not None and labels.shape[0] <= at_once * size:
                # A loop within a loop takes half as long again to compile, and there is one round of the outer.
                walk(start, stop, leaves)
                return model.get_metrics_result()
            shapes = [tf.TensorShape((None, *leaf.shape[1:])) for leaf in leaves]
            tf.while_loop(
                lambda first, *_: first < stop,
                some,
                (start, *leaves),
                shape_invariants=(start.shape, *shapes),
                parallel_iterations=1,
            )
            return model.get_metrics_result()

        chosen = turn if self._alone else run_in_order if form.in_order else run
        return chosen if model.run_eagerly else tf.function(chosen, autograph=False)


def _steps_at_once(rows: Rows, size: int) -> int:
    """For how many steps rows are gathered together: what the processor's caches hold."""
    leaves = [tf.convert_to_tensor(leaf) for leaf in _leaves((rows.x, rows.y, rows.sample_weight))]
    nbytes: int = sum(math.prod(leaf.shape[1:]) * np.dtype(leaf.dtype.as_numpy_dtype).itemsize for leaf in leaves)
    return max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // max(1, size * nbytes)))


def _in_one_thread(function: Callable[[], list[Any]]) -> list[Any]:
    """What the function gives, in a graph, by kernels that don't share their work among the processor's threads."""
    if tf.config.list_physical_devices("GPU") or tf.distribute.has_strategy():
        return function()
    # A map over one element has that setting, which the kernels alone don't.
    element = tf.TensorSpec((), tf.bool, name="element")
    mapped = tf.function(lambda _: function(), autograph=False).get_concrete_function(element)
    found = tf.raw_ops.MapDefun(
        arguments=[tf.constant([True])],
        captured_inputs=mapped.captured_inputs,
        output_types=[leaf.dtype for leaf in mapped.outputs],
        output_shapes=[leaf.shape for leaf in mapped.outputs],
        f=mapped,
        max_intra_op_parallelism=1,
    )
    return [leaf[0] for leaf in found]


def _is_in_order(places: np.ndarray[Any, Any]) -> bool:
    return bool(np.array_equal(places, np.arange(len(places))))


def _leaves(structure: Any) -> list[Any]:
    return [leaf for leaf in tf.nest.flatten(structure) if leaf is not None]


def _packed(structure: Any, leaves: Sequence[Any]) -> Any:
    """The leaves in the places of those that `_leaves` gave."""
    given = iter(leaves)
    return tf.nest.map_structure(lambda leaf: None if leaf is None else next(given), structure)


def _batch(rows: Rows, parts: Any, labels: Any, places: Any) -> tuple[Any, Any, Any]:
    def gather(part: Any, index: Any) -> Any:
        return None if part is None else tf.nest.map_structure(lambda tensor: tf.gather(tensor, index), part)

    x, y, weight = parts
    return (rows.read or gather)(x, places), gather(y, labels), gather(weight, labels)


_BATCH_HOOKS = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")


def batch_hooks(callbacks: Any) -> list[str]:
    """The names of the callbacks that want to be told of every batch, for which each step returns to Python.

    Keras's own savers count as such only where they are set to save between epochs, its TensorBoard where it writes or profiles
    batches. One with an attribute `joins_batches` that is true is told of many batches as of one.
    """
    return [type(callback).__name__ for callback in callbacks if _wants_batches(callback)]


def _wants_batches(callback: Any) -> bool:
    if isinstance(callback, (keras.callbacks.ProgbarLogger, keras.callbacks.History)) or getattr(
        callback, "joins_batches", False
    ):
        return False
    if type(callback) in (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore):
        return bool(callback.save_freq != "epoch")
    if type(callback) is keras.callbacks.TensorBoard:
        return bool(callback.update_freq != "epoch" or getattr(callback, "profile_batch", 0))
    base = keras.callbacks.Callback
    return any(getattr(getattr(callback, name), "__func__", None) is not getattr(base, name) for name in _BATCH_HOOKS)


def train(
    model: Any,
    rows: Rows,
    *,
    order: Callable[[int], np.ndarray[Any, Any]],
    epochs: int,
    batch_size: int,
    initial_epoch: int = 0,
    callbacks: Any = None,
    shown: Any = None,
    validation: Rows | None = None,
    evaluate: Callable[[], Mapping[str, Any]] | None = None,
    watch: Watch | None = None,
    steps: Steps | None = None,
) -> None:
    """Trains a compiled model on rows, as `fit` does with its callbacks; changes the model.

    Args:
        model: Built and compiled.
        rows: To train on.
        order: Epoch → the numbers of its rows in the order they are taken.
        epochs: One past the last epoch.
        batch_size: Rows in a batch.
        initial_epoch: The first epoch.
        callbacks: A `CallbackList`, set up for `shown`.
        shown: The model that callbacks know and stop (`stop_training`), where it isn't the one that is trained.
        validation: Rows to test on after each epoch, in batches of the same size.
        evaluate: Tests in another way instead, and gives the logs.
        watch: What is told of the run.
        steps: Those of the model in batches of that size, where they were compiled before.
    """
    shown = model if shown is None else shown
    callbacks = keras.callbacks.CallbackList([], model=shown) if callbacks is None else callbacks
    steps = steps or Steps(model, batch_size=batch_size)
    single_test = any(_wants_test_batches(callback) for callback in callbacks.callbacks)
    run_epochs(
        model,
        _CompiledSteps(steps, rows, order, single=bool(batch_hooks(callbacks.callbacks))),
        epochs=epochs,
        initial_epoch=initial_epoch,
        callbacks=callbacks,
        shown=shown,
        evaluate=evaluate if validation is None else lambda: _tested(steps, validation, callbacks, single=single_test),
        watch=watch,
    )


class _CompiledSteps:
    """The steps of epochs over rows: one by one where a callback wants each, else as many as fit in a turn."""

    def __init__(self, steps: Steps, rows: Rows, order: Callable[[int], np.ndarray[Any, Any]], *, single: bool) -> None:
        self._steps, self._rows, self._order, self._single = steps, rows, order, single
        #: How many steps a turn has, as far as their pace is known.
        self._turn = 16

    def reset_metrics(self) -> None:
        self._steps.reset_metrics()

    def warm(self, epoch: int, first: int) -> None:
        self._steps.train(self._rows, self._order(epoch), epoch=epoch, start=first - 1, stop=first)

    def epoch(self, epoch: int, first: int, callbacks: Any, shown: Any, watch: Watch) -> Any:
        order = self._order(epoch)
        count = self._steps.count(len(order))
        logs: Any = {}
        if self._single:
            for step in range(first, count):
                callbacks.on_train_batch_begin(step)
                logs = self._steps.train(self._rows, order, epoch=epoch, start=step, stop=step + 1)
                callbacks.on_train_batch_end(step, logs)
                watch.stepped(epoch, step + 1, logs)
                if shown.stop_training:
                    break
            return logs
        bars = [callback for callback in callbacks.callbacks if isinstance(callback, keras.callbacks.ProgbarLogger)]
        joined = [callback for callback in callbacks.callbacks if getattr(callback, "joins_batches", False)]
        step = first
        while step < count:
            stop = min(step + min(self._turn, watch.most_steps or self._turn), count)
            for callback in joined:
                callback.on_train_batch_begin(step)
            begun = time.perf_counter()
            logs = self._steps.train(self._rows, order, epoch=epoch, start=step, stop=stop)
            seconds = time.perf_counter() - begun
            for callback in (*bars, *joined):
                callback.on_train_batch_end(stop - 1, {name: np.asarray(value)[()] for name, value in logs.items()})
            # The first turn may hold the tracing, so the pace is only ever raised by what later ones show.
            self._turn = max(self._turn, int((stop - step) * _TURN_SECONDS / max(seconds, 1e-9)))
            step = stop
            watch.stepped(epoch, step, logs)
        return logs


def _tested(steps: Steps, rows: Rows, callbacks: Any, *, single: bool) -> dict[str, Any]:
    steps.reset_metrics()
    callbacks.on_test_begin()
    if single:
        logs: Any = {}
        for step in range(steps.count(rows.count)):
            callbacks.on_test_batch_begin(step)
            logs = steps.test(rows, start=step, stop=step + 1)
            callbacks.on_test_batch_end(step, logs)
    else:
        logs = steps.test(rows)
    callbacks.on_test_end(logs)
    return dict(logs)


def _wants_test_batches(callback: Any) -> bool:
    if isinstance(callback, (keras.callbacks.ProgbarLogger, keras.callbacks.TensorBoard)):
        return False
    base = keras.callbacks.Callback
    return any(
        getattr(getattr(callback, name), "__func__", None) is not getattr(base, name)
        for name in ("on_test_batch_begin", "on_test_batch_end")
    )


@contextlib.contextmanager
def same_kernels() -> Iterator[None]:
    """Keeps TensorFlow from rewriting graphs, so that a model in parts computes with the very kernels of the model as a whole.

    The rewriter fuses what it finds side by side, which differs between the two; without it they are equal to the bit, at 0.99–
    1.02 times the speed (measured on ResNet50 at four cuts). The setting is of the process, and is put back at the end.

    Example:
        >>> import transferkit as tk
        >>> with tk.same_kernels():
        ...     pass  # run = plan.fit(model, data)
    """
    before = tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer", False)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": before})
