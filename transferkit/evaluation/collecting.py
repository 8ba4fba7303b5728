"""One pass over the data: predictions, labels, sample weights and losses of the same batch, kept together.

Nothing is paired up afterwards, so a data set that comes in another order each time can't put labels beside the wrong
predictions. Inputs aren't kept: memory holds one batch of them, and a prediction and a label for each row.

The loss is computed inside the compiled step, as Keras computes it when it evaluates, so that both agree to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferkit._keras import keras, tf
from transferkit.building.heads import check_class_names, heads_of
from transferkit.building.replicas import Replicas
from transferkit.building.scaling import unscaled
from transferkit.data import Batch, batches, is_arrays
from transferkit.errors import DataError, EvaluationError
from transferkit.evaluation.rows import FloatArray
from transferkit.tasks import Task, task_of

__all__ = ["Collected", "collect"]


@dataclass(frozen=True)
class Judged:
    """The output that is judged.

    Args:
        name: Its name; empty for a model's only one.
        index: Its place among the outputs.
        count: How many outputs the model has.
        shape: Its shape without the batch; an axis that isn't fixed is None.
        activation: The name of the activation it went through.
    """

    name: str
    index: int
    count: int
    shape: tuple[int | None, ...]
    activation: str
    class_names: tuple[str, ...]


def _judged(model: Any, output: str | None, data: Any, asked: str) -> Judged:
    """The output to be judged.

    Raises:
        EvaluationError: when there are several and none is named, or none of that name.
        DataError: when the data numbers classes otherwise than the model does.
    """
    heads = heads_of(model)
    names = [head.output for head in heads]
    if output is None and len(names) > 1:
        raise EvaluationError(
            f"Evaluating a model of {len(names)} outputs.",
            found="no word about which one",
            fix=f"run(..., output=name), with one of {', '.join(map(repr, names))}",
        )
    if output is not None and output not in names:
        raise EvaluationError(
            f"Evaluating the output {output!r}.",
            found=f"the model's outputs are {', '.join(map(repr, names))}",
            fix="name one of them",
        )
    index = 0 if output is None else names.index(output)
    head = heads[index]
    class_names = getattr(data, "class_names", ())
    check_class_names(head, class_names, asked=asked)
    class_names = class_names or head.class_names
    return Judged(head.output if len(names) > 1 else "", index, len(names), head.shape, head.activation, class_names)


def _part(structure: Any, head: Judged, *, what: str) -> Any:
    """The part of labels, weights, losses or predictions that belongs to the head."""
    if isinstance(structure, dict):
        if head.name in structure:
            return structure[head.name]
        if len(structure) == 1 and not head.name:
            return next(iter(structure.values()))
        raise DataError(
            f"Reading the {what} of {'output ' + repr(head.name) if head.name else 'the model'}.",
            found=f"{what} under the names {', '.join(map(repr, structure))}",
            fix="name them as the model names its outputs",
        )
    if isinstance(structure, (list, tuple)) and head.count > 1:
        if len(structure) != head.count:
            raise DataError(
                f"Reading the {what} of output {head.name!r}.",
                found=f"{len(structure)} of them for {head.count} outputs",
                fix="give one each",
            )
        return structure[head.index]
    if isinstance(structure, (list, tuple)) and len(structure) == 1:
        return structure[0]
    return structure


def _loss_per_row(loss: Any) -> Any:
    """A Keras loss that gives one value a row instead of their mean; None for what can't be taken apart.

    Args:
        loss: What `compile` takes: a name, a function or a `keras.losses.Loss`.
    """
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        name = getattr(loss, "__name__", "")
        camel = "".join(word.capitalize() for word in name.split("_"))
        if getattr(keras.losses, name, None) is loss and isinstance(getattr(keras.losses, camel, None), type):
            loss = getattr(keras.losses, camel)()
        elif callable(loss):
            return _ByRow(_with_last_axis(loss), name="function_loss", dtype=None)
        else:
            return None
    return _ByRow(loss.call, name=loss.name, dtype=loss.dtype)


class _ByRow(keras.losses.Loss):
    """A loss without its last step, the mean. It calls the user's: a copy would need a class that Keras can find by name."""

    def __init__(self, call: Callable[[Any, Any], Any], *, name: str, dtype: Any) -> None:
        super().__init__(name=name, reduction="none", dtype=dtype)
        self._call = call

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._call(y_true, y_pred)


def _with_last_axis(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The function, given labels with the last axis of 1 that the predictions have, as Keras gives them."""

    def call(y_true: Any, y_pred: Any) -> Any:
        if len(y_true.shape) == len(y_pred.shape) - 1 and y_pred.shape[-1] == 1:
            y_true = keras.ops.expand_dims(y_true, -1)
        return function(y_true, y_pred)

    return call


#: How a compiled loss reads labels; a name in either spelling.
_READS: dict[str, tuple[str, ...]] = {
    "classes": ("sparsecategoricalcrossentropy",),
    "one-hot": ("categoricalcrossentropy", "categoricalfocalcrossentropy", "categoricalhinge", "kldivergence"),
    "zero-one": ("binarycrossentropy", "binaryfocalcrossentropy"),
    "quantities": (
        "meansquarederror", "mse", "meanabsoluteerror", "mae", "huber", "logcosh", "meansquaredlogarithmicerror", "msle",
        "meanabsolutepercentageerror", "mape", "poisson", "cosinesimilarity", "tversky",
    ),
}  # fmt: skip


def _task_of_loss(loss: Any, units: int, head: Judged) -> Task | None:
    """The task that a compiled loss states; None for a loss that doesn't tell."""
    if isinstance(loss, str):
        name = loss
    elif isinstance(loss, keras.losses.Loss):
        name = type(loss).__name__
    else:
        name = getattr(loss, "__name__", "")
    plain = name.replace("_", "").lower()
    config: dict[str, Any] = loss.get_config() if isinstance(loss, keras.losses.Loss) else {}
    logits = bool(config.get("from_logits", False))
    # Keras, too, takes the head's word where a softmax meets from_logits=True.
    logits = logits and head.activation not in ("softmax", "sigmoid")
    if plain in _READS["classes"]:
        return Task("multiclass-sparse", units, logits)
    if plain in _READS["one-hot"]:
        return Task("multiclass-onehot", units, logits)
    if plain in _READS["zero-one"]:
        return Task("binary" if units == 1 else "multilabel", units, logits)
    if plain in _READS["quantities"] and plain not in ("tversky", "cosinesimilarity", "poisson"):
        return Task("regression", units)
    return None


@dataclass(frozen=True)
class Collected:
    """What one pass gave; `n` rows, or positions of them for an output with several a row.

    Args:
        outputs: The head's outputs (n, units), as the model gave them.
        labels: (n,) or (n, units).
        weight: Sample weights (n,), or None.
        losses: The loss of each row (n,), or None where the loss can't be taken apart.
        penalty: Mean of what the model adds to the loss: regularisers and `add_loss`.
        loss_name: The loss's name.
        task: The task.
        positions: Positions in a row: 1, or the product of the output's inner axes.
        keras_metrics: Values of the Keras metrics that ran beside, by name.
        class_names: The names of the classes that the data, or else the model, has.
        losses_by_row: Whether rows have losses of their own, rather than their batch's mean.
        doubts: What looked wrong with the inputs, and was warned of.
        loss_error: What the loss raised; then there are no losses.
    """

    outputs: NDArray[np.generic]
    labels: NDArray[np.generic]
    weight: FloatArray | None
    losses: FloatArray | None
    penalty: float
    loss_name: str
    task: Task
    positions: int
    keras_metrics: dict[str, float]
    class_names: tuple[str, ...] = ()
    losses_by_row: bool = True
    doubts: tuple[str, ...] = ()
    loss_error: Exception | None = None


def collect(
    model: Any,
    data: Any,
    *,
    output: str | None = None,
    batch_size: int = 32,
    metrics: Sequence[Any] = (),
    want_loss: bool = True,
    strategy: Any = None,
    asked: str = "Evaluating a model.",
) -> Collected:
    """Runs the model over the data once.

    Args:
        model: A built Keras model; nothing about it changes.
        data: Whatever `fit` takes, with labels.
        output: Name of the output, for a model of several.
        batch_size: Rows at a time where `data` is arrays.
        metrics: Keras metrics, which are reset, then see every batch.
        want_loss: Whether the loss is asked for.
        strategy: Whose replicas share the rows of each batch; None on one device.
        asked: What the caller wanted, for messages.

    Raises:
        EvaluationError: when predictions and labels don't fit together.
        DataError: when the data is empty, has no labels, or inputs that aren't finite.
    """
    head = _judged(model, output, data, asked)
    compiled = _part(getattr(model, "loss", None), head, what="losses")
    state = _Pass(model, head, compiled, want_loss, asked)
    state.replicas = None if strategy is None else Replicas(model, strategy)
    for metric in metrics:
        metric.reset_state()
    if is_arrays(data) and len(data) > 1 and data[1] is not None:
        # All labels are known beforehand, so the loss can be chosen on all of them.
        state.choose_loss(_label_array(_part(data[1], head, what="labels"), asked))
    for batch in batches(data, batch_size=batch_size):
        state.add(batch, metrics)
    return state.result(metrics)


def _covers(spec: tuple[tuple[int | None, ...], Any], found: tuple[tuple[int, ...], Any]) -> bool:
    """Whether a traced signature takes a tensor of this shape and type."""
    return (
        spec[1] == found[1]
        and len(spec[0]) == len(found[0])
        and all(a in (None, b) for a, b in zip(spec[0], found[0], strict=True))
    )


def _label_array(labels: Any, asked: str) -> NDArray[np.generic]:
    if isinstance(labels, (list, tuple, dict)):
        raise DataError(
            asked,
            found=f"labels in {len(labels)} parts for one output",
            cause="labels of a model with several outputs",
            fix="give one array of labels",
        )
    return np.asarray(labels)


class _Pass:
    """The state of a pass: what was collected so far, and the compiled step."""

    def __init__(self, model: Any, head: Judged, compiled: Any, want_loss: bool, asked: str) -> None:
        self.model, self.head, self.compiled, self.want_loss, self.asked = model, head, compiled, want_loss, asked
        self.loss: Any = _loss_per_row(compiled) if compiled is not None else None
        self.chosen: Task | None = None
        self.outputs: list[NDArray[np.generic]] = []
        self.labels: list[NDArray[np.generic]] = []
        self.weights: list[FloatArray | None] = []
        self.losses: list[FloatArray] = []
        self.penalties: list[tuple[float, int]] = []
        self.rows = 0
        self.signature: tuple[Any, ...] = ()
        self.step: Any = None
        self.by_row = True
        self.replicas: Replicas | None = None
        self.doubts: tuple[str, ...] = ()
        self.loss_error: Exception | None = None

    def _predict(self, x: Any, y: Any) -> tuple[Any, Any]:
        if self.replicas is None:
            outputs, added = self.model(x, training=False), self.model.losses
        else:
            done = self.replicas.forward(x, beside=y)
            outputs, added = done.outputs(), [*([] if done.added is None else [done.added]), *self.replicas.penalties()]
        penalty = tf.add_n([tf.cast(tf.reduce_sum(v), "float32") for v in added]) if added else tf.constant(0.0)
        return _part(outputs, self.head, what="outputs"), penalty

    def _step(self, x: Any, y: Any) -> tuple[Any, Any, Any]:
        prediction, penalty = self._predict(x, y)
        if self.loss is None or not self.want_loss:
            return prediction, penalty, tf.zeros((0,))
        values = self.loss(y, prediction)
        inner = list(range(1, len(values.shape)))
        return prediction, penalty, tf.reduce_mean(values, axis=inner) if inner and len(prediction.shape) <= 2 else values

    def _run(self, x: Any, y: NDArray[np.generic]) -> tuple[Any, Any, Any]:
        """The compiled step: one trace for all batch sizes, and a wider one if inner lengths turn out to vary."""
        arguments = tf.nest.map_structure(tf.convert_to_tensor, (x, y))
        found = tuple((tuple(leaf.shape), leaf.dtype) for leaf in tf.nest.flatten(arguments))
        if self.step is None or not all(_covers(spec, one) for spec, one in zip(self.signature, found, strict=True)):
            varies = self.step is not None
            self.signature = tuple(((None,) * len(s) if varies else (None, *s[1:]), d) for s, d in found)
            specs = tf.nest.pack_sequence_as(arguments, [tf.TensorSpec(shape, dtype) for shape, dtype in self.signature])
            self.step = tf.function(self._step).get_concrete_function(*specs)
        result: tuple[Any, Any, Any] = self.step(*arguments)
        return result

    def choose_loss(self, labels: NDArray[np.generic]) -> None:
        """For a model that wasn't compiled: the loss that follows from head and labels, if it does."""
        if self.compiled is not None:
            return
        try:
            self.chosen = task_of(labels, output_shape=self.head.shape, activation=self.head.activation, output=self.head.name)
        except DataError:
            return  # said at the end, when all labels are known
        self.loss = _loss_per_row(getattr(keras.losses, self.chosen.loss)(**self.chosen.loss_arguments))

    def _check_shapes(self, x: Any) -> None:
        """Raises a DataError where the rows' shape isn't the model's, which Keras would say in terms of its layers."""
        wanted = [tuple(tensor.shape[1:]) for tensor in getattr(self.model, "inputs", None) or []]
        shapes = [np.shape(array) for array in tf.nest.flatten(x)]
        if len(wanted) != len(shapes):
            return
        for given, shape in zip(shapes, wanted, strict=True):
            if _fits(given, shape) and not _fits(given[1:], shape):
                raise DataError(
                    self.asked,
                    found=f"one row of shape {given} at a time, without an axis for the batch",
                    fix="put rows into batches: dataset.batch(32)",
                )
            if len(given) == len(shape) + 1 and not _fits(given[1:], shape):
                raise DataError(
                    self.asked,
                    found=f"rows of shape {given[1:]}, where the model takes {shape}",
                    fix="bring the inputs to the model's shape",
                )

    def add(self, batch: Batch, metrics: Sequence[Any]) -> None:
        if batch.y is None:
            raise DataError(self.asked, found="data without labels", fix="give (x, y), or a data set of (x, y) batches")
        y = _label_array(_part(batch.y, self.head, what="labels"), self.asked)
        if not self.outputs:
            self._check_shapes(batch.x)
            if flat := unscaled(self.model, batch.x):
                self.doubts = (flat,)
                warnings.warn(flat, stacklevel=4)
        _finite_inputs(batch.x, self.rows, self.asked)
        if not self.outputs and self.loss is None:
            self.choose_loss(y)
        try:
            prediction, penalty, losses = self._run(batch.x, y)
        except (tf.errors.OpError, TypeError, ValueError) as error:
            if not self.want_loss or self.loss is None:
                raise
            # Labels that are wrong fail in the loss first, in TensorFlow's words; they are looked at when all are known.
            self.loss_error, self.want_loss, self.step, self.losses = error, False, None, []
            prediction, penalty, losses = self._run(batch.x, y)
        p = np.asarray(prediction)
        if not np.isfinite(p.astype(np.float32)).all():
            bad = ~np.isfinite(p.astype(np.float32)).reshape(len(p), -1).all(axis=1)
            raise EvaluationError(
                self.asked,
                found=f"predictions that aren't finite in {int(bad.sum())} of {len(p)} rows of a batch, "
                f"the first in row {self.rows + int(bad.argmax())}",
                cause="weights that aren't finite, since the inputs are"
                if bad.all()
                else "inputs so large that the model overflows",
                fix="look for NaN in model.get_weights(), or load weights from before the training diverged",
            )
        weight = None if batch.sample_weight is None else _part(batch.sample_weight, self.head, what="sample weights")
        for metric in metrics:
            metric.update_state(y, prediction, sample_weight=weight)
        self.outputs.append(p)
        self.labels.append(y)
        self.weights.append(None if weight is None else np.asarray(weight, dtype=np.float64))
        found = np.asarray(losses, dtype=np.float64)
        if found.ndim == 0 and self.want_loss and self.loss is not None:
            # A loss function that takes the mean itself: every row of the batch stands for it, which gives Keras's mean.
            self.by_row = False
            found = np.full(p.shape[:-1] or (len(p),), float(found))
        self.losses.append(found)
        self.penalties.append((float(penalty), len(p)))
        self.rows += len(p)

    def result(self, metrics: Sequence[Any]) -> Collected:
        if self.rows == 0:
            raise DataError(self.asked, found="no rows", cause="an empty data set, or a generator used up by an earlier pass")
        p = np.concatenate(self.outputs)
        y = np.concatenate(self.labels)
        given = [w for w in self.weights if w is not None]
        if given and len(given) != len(self.weights):
            raise DataError(self.asked, found="sample weights in some batches and none in others", fix="give them in all or none")
        shape = p.shape[1:] or (1,)
        task = self._task(y, shape)
        losses = self._losses(p, y, task)
        positions = int(np.prod(shape[:-1]))
        weight = np.concatenate(given) if given else None
        if weight is not None:
            weight = weight.reshape(len(p), -1)
            weight = np.repeat(weight, positions, axis=1).ravel() if weight.shape[1] == 1 else weight.ravel()
        flat_y = y.reshape(len(p) * positions, -1)
        return Collected(
            outputs=p.reshape(-1, shape[-1]),
            labels=flat_y[:, 0] if flat_y.shape[1] == 1 else flat_y,
            weight=weight,
            losses=losses,
            penalty=sum(value * n for value, n in self.penalties) / self.rows,
            loss_name=getattr(self.loss, "name", "loss") if self.loss is not None else "",
            task=task,
            positions=positions,
            keras_metrics={metric.name: float(np.asarray(metric.result())) for metric in metrics},
            class_names=self.head.class_names,
            losses_by_row=self.by_row,
            doubts=self.doubts,
            loss_error=self.loss_error,
        )

    def _task(self, y: NDArray[np.generic], shape: tuple[int, ...]) -> Task:
        stated = _task_of_loss(self.compiled, shape[-1], self.head) if self.compiled is not None else None
        if stated is not None:
            return stated
        return task_of(y, output_shape=shape, activation=self.head.activation, output=self.head.name)

    def _losses(self, p: NDArray[np.generic], y: NDArray[np.generic], task: Task) -> FloatArray | None:
        if not self.want_loss:
            return None
        if self.compiled is None and self.chosen != task:
            # The first batch looked like another task than all labels together.
            self.loss = _loss_per_row(getattr(keras.losses, task.loss)(**task.loss_arguments))
            values = np.concatenate([np.asarray(self.loss(y[i : i + 4096], p[i : i + 4096])) for i in range(0, len(p), 4096)])
            return _by_position(values.astype(np.float64), p)
        if self.loss is None:
            return None
        return _by_position(np.concatenate(self.losses), p)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def _by_position(values: FloatArray, p: NDArray[np.generic]) -> FloatArray:
    """Losses (n, …) as one for each row of the flattened output."""
    if p.ndim <= 2:
        return np.asarray(values.reshape(len(p), -1).mean(axis=1))
    return values.reshape(-1)


def _finite_inputs(x: Any, before: int, asked: str) -> None:
    for leaf in tf.nest.flatten(x):
        array = np.asarray(leaf)
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        raise DataError(
            asked,
            found=f"inputs that aren't finite in {int(bad.sum())} of {len(array)} rows of a batch, "
            f"the first in row {before + int(bad.argmax())}",
            cause="missing values, or a division by zero in the preprocessing",
            fix="fill or drop these rows: layers such as ReLU and max pooling hide NaN and give wrong predictions in silence",
        )
