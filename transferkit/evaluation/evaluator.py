"""The `Evaluator`: which figures, with which intervals; and the verb that runs a model over data and judges it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from transferkit._plan import Plan, steps_named
from transferkit.errors import EvaluationError, PlanError
from transferkit.evaluation.collecting import Collected, collect
from transferkit.evaluation.estimating import Estimate, Scored, Uncertainty, estimates_of
from transferkit.evaluation.metrics import METRICS, metric_named
from transferkit.evaluation.report import Evaluation
from transferkit.evaluation.resampling import Method
from transferkit.evaluation.rows import FloatArray, Kind, Rows, probabilities_of
from transferkit.placement import Placement, running
from transferkit.tasks import Task

__all__ = ["Evaluator"]

_KINDS: dict[str, Kind] = {
    "binary": "binary",
    "multiclass-sparse": "multiclass",
    "multiclass-onehot": "multiclass",
    "multilabel": "multilabel",
    "regression": "regression",
}
_DEFAULTS: dict[Kind, tuple[str, ...]] = {
    "binary": ("loss", "accuracy", "auc"),
    "multiclass": ("loss", "accuracy", "auc"),
    "multilabel": ("loss", "accuracy", "auc"),
    "regression": ("loss", "mae", "rmse", "r2"),
}


class Evaluator(Plan):
    """Which metrics to compute, and how sure to be of them.

    Args:
        metrics: Names, such as `"accuracy"`, `"loss"`, `"auc"`; without any, the usual ones of the task. `loss` is what
            `model.evaluate` gives: the compiled loss, or the one that follows from head and labels, with its penalties.

    Raises:
        PlanError: for an unknown name, or one given twice.

    Example:
        >>> Evaluator("accuracy", "loss", "auc").bootstrap(5000)
        Evaluator('accuracy', 'loss', 'auc').bootstrap(5000)
    """

    __slots__ = ()
    STEPS = frozenset({"bootstrap", "level", "threshold"})

    def __init__(self, *metrics: str) -> None:
        problems = []
        for name in metrics:
            if not isinstance(name, str):
                problems.append(f"a {type(name).__name__} where a name must stand; Keras metrics go to `run(metrics=[…])`")
            elif name != "loss":
                try:
                    metric_named(name)
                except EvaluationError as error:
                    problems.append(f"{error.asked} {error.found[0]}")
        problems += [f"{name!r} twice" for name in dict.fromkeys(metrics) if metrics.count(name) > 1]
        if problems:
            raise PlanError(
                f"Evaluator({', '.join(map(repr, metrics))}).",
                found=problems,
                fix="choose among " + ", ".join(["loss", *METRICS]) + ", top_<k>_accuracy",
            )
        self._begin(metrics=metrics)

    def bootstrap(
        self,
        n: int = 2000,
        *,
        level: float = 0.95,
        method: Method = "percentile",
        stratified: bool = False,
        seed: int = 0,
    ) -> Self:
        """Intervals by resampling the rows, for every metric.

        Args:
            n: How many resamples.
            level: Share of such intervals that hold the truth, 0 – 1.
            method: `"percentile"`, or `"bca"`, corrected for bias and skewness, which costs a jackknife more.
            stratified: Draw as many rows of each class as the data has.
            seed: Of the draws.
        """
        problems = _level_problems(level)
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 100:
            problems.append(f"n={n!r}; an interval needs at least 100 resamples")
        if method not in ("percentile", "bca"):
            problems.append(f"method={method!r}; there are 'percentile' and 'bca'")
        if problems:
            raise PlanError("Evaluator.bootstrap.", found=problems, fix="bootstrap(2000, level=0.95)")
        return self._then("bootstrap", n=n, level=level, method=method, stratified=stratified, seed=seed)

    def level(self, level: float) -> Self:
        """The level of intervals by formula (Wilson, DeLong, normal), which are given where nothing is resampled.

        Args:
            level: Share of such intervals that hold the truth, 0 – 1.
        """
        problems = _level_problems(level)
        if problems:
            raise PlanError("Evaluator.level.", found=problems, fix="level(0.95)")
        return self._then("level", level=level)

    def threshold(self, probability: float) -> Self:
        """The probability above which class 1, or a label, is predicted.

        Args:
            probability: Between 0 and 1; 0.5 unless this is called.
        """
        if isinstance(probability, bool) or not 0 <= probability <= 1:
            raise PlanError("Evaluator.threshold.", found=f"{probability!r}, which isn't between 0 and 1", fix="threshold(0.5)")
        return self._then("threshold", probability=probability)

    def run(
        self,
        model: Any,
        data: Any,
        *,
        batch_size: int = 32,
        output: str | None = None,
        classes: Sequence[str] | None = None,
        groups: ArrayLike | None = None,
        metrics: Sequence[Any] = (),
        placement: Placement | None = None,
    ) -> Evaluation:
        """Runs the model over the data once and judges its predictions; the model stays as it is.

        Args:
            model: A built Keras model, compiled or not.
            data: Whatever `fit` takes, with labels: `(x, y)`, `(x, y, sample_weight)`, a `tf.data.Dataset`, a `PyDataset` …
            batch_size: Rows at a time where `data` is arrays.
            output: Which output, for a model of several.
            classes: A name for each class; those of the data, or else of the builder that made the head, where one is known.
            groups: One group a row (n,), such as the patient: rows of a group are resampled together.
            metrics: Keras metrics, custom ones too, that see every batch beside the plan's own; they have no interval.
            placement: Where the model was built, if its devices are to share the rows of each batch; every worker then has to
                call this. Without one, this process takes all rows through the model by itself.

        Returns:
            The `Evaluation`.

        Raises:
            DataError: when the data is empty, has no labels, or inputs that aren't finite; or labels don't fit the head.
            EvaluationError: when predictions aren't finite, aren't probabilities, or don't suit a metric.

        Example:
            >>> import keras, numpy as np
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
            >>> evaluation = Evaluator("accuracy").run(model, (np.eye(4), np.array([0, 1, 2, 0])))
            >>> 0 <= evaluation["accuracy"].low <= float(evaluation["accuracy"]) <= evaluation["accuracy"].high <= 1
            True
        """
        names = tuple(self._start.positional)
        asked = f"Computing {', '.join(names)} of the model {model.name!r}." if names else f"Evaluating the model {model.name!r}."
        with contextlib.nullcontext() if placement is None else running(placement, model) as strategy:
            collected = collect(
                model,
                data,
                output=output,
                batch_size=batch_size,
                metrics=metrics,
                want_loss=not names or "loss" in names,
                strategy=strategy,
                asked=asked,
            )
        known = classes if classes is not None else collected.class_names or None
        rows = self._rows(collected, known, groups, asked=asked)
        if collected.loss_error is not None:  # not by labels that `rows` would have refused
            raise collected.loss_error
        names = names or _defaults(rows)
        uncertainty = self._uncertainty()
        if "loss" in names and collected.losses is None:
            raise EvaluationError(
                "Computing loss.",
                found="several compiled losses for one output",
                fix="compile the model with one loss for each output",
            )
        scored = Scored(rows, collected.losses, collected.penalty)
        estimates = estimates_of(scored, names, uncertainty)
        if "loss" in estimates and not collected.losses_by_row:
            # Rows of a batch share its mean, so resampling them would tell of the batches and not of the rows.
            estimates["loss"] = replace(estimates["loss"], low=None, high=None, method="", undefined=0)
        for name, value in collected.keras_metrics.items():
            if name in estimates:
                raise EvaluationError(
                    f"Computing {name}.", found="a Keras metric of the same name as one of the plan", fix="give it another `name`"
                )
            estimates[name] = Estimate(name, value, level=uncertainty.level, method="", greater_is_better=None)
        return Evaluation(
            estimates=estimates,
            scored=scored,
            task=collected.task,
            evaluator=self,
            uncertainty=uncertainty,
            loss_name=collected.loss_name,
            output=output or "",
            positions=collected.positions,
            doubts=collected.doubts,
        )

    def _uncertainty(self) -> Uncertainty:
        level, resamples, stratified, seed = 0.95, 0, False, 0
        method: Method = "percentile"
        for link in steps_named(self, {"bootstrap", "level"}):
            if link.name == "level":
                level, resamples = link.positional[0], 0
            else:
                given = link.arguments
                resamples = link.positional[0] if link.positional else given.get("n", 2000)
                level, method = given.get("level", 0.95), given.get("method", "percentile")
                stratified, seed = given.get("stratified", False), given.get("seed", 0)
        return Uncertainty(level, resamples, method, stratified, seed)

    def _rows(self, collected: Collected, classes: Sequence[str] | None, groups: ArrayLike | None, *, asked: str) -> Rows:
        task = collected.task
        threshold = next((link.positional[0] for link in reversed(steps_named(self, {"threshold"}))), 0.5)
        if collected.positions > 1:
            # Positions of one row are no independent examples: they are resampled together.
            n = len(collected.outputs) // collected.positions
            of_row = np.arange(n) if groups is None else np.asarray(groups)
            groups = np.repeat(of_row, collected.positions) if len(of_row) == n and n > 1 else None
        kind = _KINDS[task.kind]
        return Rows.of(
            collected.labels,
            _as_predictions(collected.outputs, task, asked),
            kind=kind,
            sample_weight=collected.weight,
            groups=groups,
            threshold=threshold,
            classes=_fitting(classes, kind),
            asked=asked,
        )


def _fitting(classes: Sequence[str] | None, kind: Kind) -> Sequence[str] | None:
    return None if classes is None or kind == "regression" else [str(name) for name in classes]


def _level_problems(level: float) -> list[str]:
    if isinstance(level, bool) or not 0 < level < 1:
        return [f"level={level!r}; it lies between 0 and 1, such as 0.95"]
    return []


def _defaults(rows: Rows) -> tuple[str, ...]:
    """The usual metrics of the task, without AUC where the rows are of one class or have shares of several."""
    names = _DEFAULTS[rows.kind]
    if rows.kind == "regression":
        return names
    one_class = (rows.labels == rows.labels[:1]).all()
    return tuple(n for n in names if n != "auc" or not (one_class or rows.soft_labels is not None))


def _as_predictions(outputs: np.ndarray[Any, Any], task: Task, asked: str) -> FloatArray:
    """Probabilities from logits, in float64; probabilities are checked to be such."""
    values = outputs.astype(np.float64)
    if task.kind == "regression":
        return values
    exclusive = task.kind.startswith("multiclass")
    if not task.from_logits:
        values = probabilities_of(values, exclusive=exclusive, asked=asked)
        # float32 rows miss one by 1e-7; metrics that compare rows needn't see that.
        return np.asarray(values / values.sum(axis=1, keepdims=True)) if exclusive else values
    if exclusive:
        e = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(e / e.sum(axis=1, keepdims=True))
    # Both branches only take exponentials of what isn't positive, which can't overflow.
    e = np.exp(-np.abs(values))
    return np.asarray(np.where(values >= 0, 1 / (1 + e), e / (1 + e)))
