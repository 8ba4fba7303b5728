"""The loss and the metrics of a fine-tuning: those given, those the model was compiled with, or those that head and labels call
for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.heads import Head
from transferkit.errors import DataError, ModelError
from transferkit.tasks import Task, task_of

__all__ = ["Objective", "objective_of"]

_METRICS = {
    "binary": ["accuracy"],
    "multiclass-sparse": ["accuracy"],
    "multiclass-onehot": ["accuracy"],
    "multilabel": ["binary_accuracy"],
    "regression": ["mae"],
}


#: The name of losses chosen here: a model that an earlier fit compiled with one has no loss of its own, and other labels may call
#: for another.
_INFERRED = "inferred_from_labels"


@dataclass(frozen=True)
class Objective:
    """What a model is compiled with.

    Args:
        loss: A loss, or a list or dict of one for each output; None for a model that has its own `train_step`.
        loss_weights: The outputs' weights in the sum, or None.
        metrics: Metrics, in the structure of the losses.
        reason: Where the loss comes from, in words.
    """

    loss: Any
    loss_weights: Any
    metrics: Any
    reason: str


def objective_of(model: Any, heads: Sequence[Head], labels: Any, *, loss: Any, loss_weights: Any, metrics: Any) -> Objective:
    """Settles loss and metrics.

    Args:
        model: A built model.
        heads: Its heads.
        labels: The labels of all rows, or of the first batch, in the structure `fit` takes.
        loss: The loss of the plan, fresh; or None.
        loss_weights: The weights of the plan, or None.
        metrics: The metrics of the plan, fresh; or None.

    Raises:
        DataError: when labels and heads don't fit, or fit in more than one way.
    """
    if loss is not None:
        _check_value(loss, heads, labels)
        return Objective(loss, loss_weights, _given_or_default(metrics, labels), "given in the plan")
    if getattr(model, "compiled", False) and getattr(model, "loss", None) is not None and not _is_inferred(model.loss):
        weights = loss_weights if loss_weights is not None else getattr(model, "loss_weights", None)
        return Objective(model.loss, weights, metrics if metrics is not None else _compiled_metrics(model), "the model's own")
    if labels is None and type(model).train_step is not keras.Model.train_step:
        return Objective(None, None, metrics, "the model's own train_step")
    tasks = _tasks(heads, labels)
    losses = {name: getattr(keras.losses, task.loss)(**task.loss_arguments, name=_INFERRED) for name, task in tasks.items()}
    chosen = {name: _METRICS[task.kind] for name, task in tasks.items()}
    words = "; ".join(f"{name}: {task}" if len(tasks) > 1 else str(task) for name, task in tasks.items())
    return Objective(
        loss=_like(labels, losses),
        loss_weights=loss_weights,
        metrics=metrics if metrics is not None else _like(labels, chosen),
        reason=f"follows from head and labels ({words})",
    )


def _check_value(loss: Any, heads: Sequence[Head], labels: Any) -> None:
    """Asks a loss of Keras's for its value on some labels: one that doesn't fit is told before anything has changed."""
    of_keras = isinstance(loss, str) or type(loss).__module__.startswith("keras.")
    if not of_keras or len(heads) != 1 or not hasattr(labels, "shape") or not len(labels):
        return
    shape = [size for size in heads[0].shape if size is not None]
    if len(shape) < len(heads[0].shape):
        return
    rows = max(shape, default=0) + 1  # another number than any axis has, so that none is taken for it
    y = np.asarray(labels)[np.arange(rows) % len(labels)]
    try:
        keras.losses.get(loss)(y, np.full((rows, *shape), 0.5, keras.config.floatx()))
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        fitting = _tasks(heads, labels).values()
        raise DataError(
            f"Training with the loss {loss if isinstance(loss, str) else type(loss).__name__!r}.",
            found=f"labels of shape {('n', *y.shape[1:])} and outputs of shape {('n', *heads[0].shape)}, which it can't compare",
            fix="leave .loss() out of the plan for " + " or ".join(task.loss for task in fitting),
        ) from error


def _is_inferred(loss: Any) -> bool:
    return all(getattr(item, "name", None) == _INFERRED for item in keras.tree.flatten(loss))


def _given_or_default(metrics: Any, labels: Any) -> Any:
    """The metrics; for a loss of the user's on one output of classes, accuracy is a fair default, and otherwise none is."""
    if metrics is not None or isinstance(labels, (Mapping, list, tuple)) or labels is None:
        return metrics
    return ["accuracy"] if np.asarray(labels).dtype.kind in "biu" else None


def _compiled_metrics(model: Any) -> Any:
    try:
        config = model.get_compile_config() or {}
        return keras.saving.deserialize_keras_object(config.get("metrics"))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"Keeping the metrics that the model {model.name!r} was compiled with.",
            found=f"one that can't be made again from its configuration: {str(error).splitlines()[0]}",
            fix="give them to the plan: .metrics(MyMetric())",
        ) from error


def _tasks(heads: Sequence[Head], labels: Any) -> dict[str, Task]:
    if isinstance(labels, Mapping):
        given = {head.output: labels[head.output] for head in heads if head.output in labels}
    elif isinstance(labels, (list, tuple)):
        given = {head.output: part for head, part in zip(heads, labels, strict=False)}
    else:
        given = {heads[0].output: labels} if len(heads) == 1 else {}
    missing = [head.output for head in heads if head.output not in given]
    if missing:
        raise DataError(
            f"Matching labels to the {len(heads)} outputs of a model.",
            found=[f"no labels for the output {name!r}" for name in missing],
            fix="give a dict of labels by output name: {" + ", ".join(f"{head.output!r}: …" for head in heads) + "}",
        )
    return {
        head.output: task_of(
            given[head.output], output_shape=head.shape, activation=head.activation, output=head.output if len(heads) > 1 else ""
        )
        for head in heads
    }


def _like(labels: Any, by_output: dict[str, Any]) -> Any:
    """Values by output in the structure of the labels, as `compile` wants them."""
    if isinstance(labels, Mapping):
        return by_output
    if isinstance(labels, (list, tuple)):
        return list(by_output.values())
    (value,) = by_output.values()
    return value
