"""The metrics, each as a function of how often every row counts.

A metric is made once for its rows (sorting, comparing, taking logarithms) and is then a function from multiplicities (b, n) to
values (b,): all ones give the value itself, draws with replacement its bootstrap distribution, ones with a zero its
jackknife. So one definition serves them all, and sample weights are a factor on the way in.

The definitions, zero divisions and averages are scikit-learn's (user guide, "Metrics and scoring"), against which they are
tested, with two exceptions that are said in the result's notes: an average over classes leaves out those without a row where
the metric isn't defined for them, and several labels count each by itself in `accuracy`, as Keras does (`subset_accuracy` is
scikit-learn's).

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferkit.errors import EvaluationError, did_you_mean
from transferkit.evaluation.calibration import expected_calibration_error_statistic
from transferkit.evaluation.ranking import Statistic, auc_statistic, average_precision_statistic
from transferkit.evaluation.rows import FloatArray, Kind, Rows

__all__ = ["METRICS", "Mean", "Metric", "metric_named", "score", "statistic_of"]

ALL: tuple[Kind, ...] = ("binary", "multiclass", "multilabel", "regression")
CLASSES: tuple[Kind, ...] = ("binary", "multiclass", "multilabel")
EXCLUSIVE: tuple[Kind, ...] = ("binary", "multiclass")
SEVERAL: tuple[Kind, ...] = ("multiclass",)
QUANTITIES: tuple[Kind, ...] = ("regression",)


@dataclass(frozen=True)
class Metric:
    """One metric by name.

    Args:
        name: As it is written in a plan.
        kinds: The tasks it suits.
        make: From rows to the function of multiplicities.
        greater_is_better: The direction of improvement.
        meaning: One line for tables and pages.
        averages_classes: Whether classes without a row are left out of an average.
    """

    name: str
    kinds: tuple[Kind, ...]
    make: Callable[[Rows], Statistic]
    greater_is_better: bool
    meaning: str
    averages_classes: bool = False


# ── sums over rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _weighted(rows: Rows, statistic: Statistic) -> Statistic:
    """`statistic` of multiplicity times sample weight."""
    if rows.weight is None:
        return statistic
    weight = rows.weight
    return lambda multiplicities: statistic(multiplicities * weight)


@dataclass(frozen=True)
class Mean:
    """The weighted mean of a value per row (n,); kept as such because means have intervals by formula.

    Args:
        per_row: The values (n,).
        weight: Sample weights (n,), or None.
    """

    per_row: FloatArray
    weight: FloatArray | None

    def __call__(self, multiplicities: FloatArray) -> FloatArray:
        weights = multiplicities if self.weight is None else multiplicities * self.weight
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(weights @ self.per_row / weights.sum(axis=1))


def mean_statistic(per_row: FloatArray, rows: Rows) -> Statistic:
    return Mean(per_row, rows.weight)


def _sums_by(codes: NDArray[np.integer], count: int) -> Callable[[FloatArray], FloatArray]:
    """Sums of weights (b, n) by code, as (b, count)."""
    if count <= 64:
        indicator = np.zeros((len(codes), count))
        indicator[np.arange(len(codes)), codes] = 1.0
        return lambda weights: np.asarray(weights @ indicator)
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)

    def sums(weights: FloatArray) -> FloatArray:
        out = np.zeros((len(weights), count))
        out[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
        return out

    return sums


@dataclass(frozen=True)
class _Counts:
    """Weights by class, each (b, k): rows of the class, rows predicted as it, and rows where both hold."""

    actual: FloatArray
    predicted: FloatArray
    right: FloatArray


def _counter(rows: Rows) -> Callable[[FloatArray], _Counts]:
    if rows.kind == "multilabel":
        y, p = rows.labels.astype(np.float64), rows.decisions.astype(np.float64)
        both = y * p
        return lambda weights: _Counts(weights @ y, weights @ p, weights @ both)
    labels, decisions, k = rows.labels.astype(np.int64), rows.decisions.astype(np.int64), rows.width
    actual, predicted = _sums_by(labels, k), _sums_by(decisions, k)
    # Wrong rows go to a class of their own, which is cut off.
    right = _sums_by(np.where(labels == decisions, labels, k), k + 1)
    return lambda weights: _Counts(actual(weights), predicted(weights), right(weights)[:, :k])


def _ratio(above: FloatArray, below: FloatArray, *, otherwise: float = 0.0) -> FloatArray:
    """`above / below`, and `otherwise` where `below` is zero."""
    return np.asarray(np.divide(above, below, out=np.full(np.broadcast(above, below).shape, otherwise), where=below != 0))


# ── classification ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _accuracy(rows: Rows) -> Statistic:
    hits = rows.decisions == rows.labels
    return mean_statistic(hits.astype(np.float64) if hits.ndim == 1 else hits.mean(axis=1), rows)


def _subset_accuracy(rows: Rows) -> Statistic:
    return mean_statistic((rows.decisions == rows.labels).all(axis=1).astype(np.float64), rows)


def _top_k_accuracy(rows: Rows, *, k: int) -> Statistic:
    if k >= rows.width:
        raise EvaluationError(
            f"Computing top_{k}_accuracy.",
            found=f"a head of {rows.width} classes, of which the top {k} are always right",
            fix="take a smaller k",
        )
    # Among equal scores the later class stands higher, as in scikit-learn.
    best = np.argsort(rows.predictions, axis=1, kind="stable")[:, -k:]
    return mean_statistic((best == rows.labels[:, None]).any(axis=1).astype(np.float64), rows)


def _balanced_accuracy(rows: Rows) -> Statistic:
    count = _counter(rows)

    def statistic(weights: FloatArray) -> FloatArray:
        counts = count(weights)
        present = counts.actual > 0
        return np.asarray(_ratio(counts.right, counts.actual).sum(axis=1) / present.sum(axis=1))

    return _weighted(rows, statistic)


def _log_loss(rows: Rows) -> Statistic:
    tiny = np.finfo(np.float64).eps
    if rows.kind == "multilabel":
        p = np.clip(rows.predictions, tiny, 1 - tiny)
        per_row = -np.where(rows.labels == 1, np.log(p), np.log1p(-p)).mean(axis=1)
    else:
        p = np.clip(rows.class_probabilities, tiny, 1 - tiny)
        if rows.soft_labels is not None:
            per_row = -(rows.soft_labels * np.log(p)).sum(axis=1)
        else:
            per_row = -np.log(p[np.arange(len(rows)), rows.labels.astype(np.intp)])
    return mean_statistic(per_row, rows)


def _brier(rows: Rows) -> Statistic:
    if rows.kind == "multilabel":
        return mean_statistic(((rows.predictions - rows.labels.astype(np.float64)) ** 2).mean(axis=1), rows)
    if rows.kind == "binary":
        return mean_statistic((rows.predictions - rows.labels.astype(np.float64)) ** 2, rows)
    wanted = rows.soft_labels if rows.soft_labels is not None else np.eye(rows.width)[rows.labels.astype(np.intp)]
    return mean_statistic(((rows.predictions - wanted) ** 2).sum(axis=1), rows)


def _f_like(rows: Rows, *, part: str, average: str) -> Statistic:
    """Precision, recall or F1 under an average; `"positive"` is class 1 of two."""
    count = _counter(rows)

    def of(right: FloatArray, actual: FloatArray, predicted: FloatArray) -> FloatArray:
        if part == "precision":
            return _ratio(right, predicted)
        if part == "recall":
            return _ratio(right, actual)
        return _ratio(2 * right, actual + predicted)

    def statistic(weights: FloatArray) -> FloatArray:
        c = count(weights)
        if average == "micro":
            return of(c.right.sum(axis=1), c.actual.sum(axis=1), c.predicted.sum(axis=1))
        each = of(c.right, c.actual, c.predicted)
        if average == "positive":
            return each[:, 1]
        if average == "weighted":
            return np.asarray(_ratio((each * c.actual).sum(axis=1), c.actual.sum(axis=1)))
        if rows.kind == "multilabel":
            return np.asarray(each.mean(axis=1))
        seen = (c.actual + c.predicted) > 0
        return np.asarray((each * seen).sum(axis=1) / seen.sum(axis=1))

    return _weighted(rows, statistic)


def _plain_f_like(rows: Rows, *, part: str) -> Statistic:
    return _f_like(rows, part=part, average="positive" if rows.kind == "binary" else "macro")


def _one_against_rest(rows: Rows) -> list[tuple[NDArray[np.bool_], FloatArray]]:
    if rows.kind == "binary":
        return [(rows.labels == 1, rows.predictions)]
    if rows.kind == "multilabel":
        return [(rows.labels[:, c] == 1, rows.predictions[:, c]) for c in range(rows.width)]
    return [(rows.labels == c, rows.predictions[:, c]) for c in range(rows.width)]


def _area(rows: Rows, *, average: str, make: Callable[[NDArray[np.bool_], FloatArray], Statistic], name: str) -> Statistic:
    """A one-against-rest area, averaged over the classes for which it is defined."""
    if rows.soft_labels is not None:
        raise EvaluationError(
            f"Computing {name}.",
            found="labels that are class probabilities",
            cause="ranking needs rows that are of a class or aren't",
            fix="give the most probable class as label: y.argmax(axis=1)",
        )
    needs_both = make is auc_statistic
    defined = [(up, s) for up, s in _one_against_rest(rows) if up.any() and not (needs_both and up.all())]
    if not defined:
        only = sorted({rows.classes[c] for c in np.unique(rows.labels)}) if rows.kind != "multilabel" else []
        raise EvaluationError(
            f"Computing {name}.",
            found=f"one class only ({', '.join(map(repr, only))})" if only else "no label that some rows have and others don't",
            cause="a test set sorted by class and cut, or a slice of one class",
            fix="shuffle before splitting, or give rows of at least two classes",
        )
    areas = [make(up, s) for up, s in defined]
    if len(areas) == 1:
        return _weighted(rows, areas[0])
    shares = np.stack([up for up, _ in defined], axis=1).astype(np.float64)

    def statistic(weights: FloatArray) -> FloatArray:
        each = np.stack([area(weights) for area in areas], axis=1)
        if average == "weighted":
            prevalence = weights @ shares
            return np.asarray((each * prevalence).sum(axis=1) / prevalence.sum(axis=1))
        return np.asarray(each.mean(axis=1))

    return _weighted(rows, statistic)


def _one_against_one(rows: Rows, *, average: str) -> Statistic:
    """Hand and Till's mean over pairs of classes, each judged by both scores (Machine Learning 2001, equation 7)."""
    name = "auc_ovo" if average == "macro" else "auc_ovo_weighted"
    present = [c for c in range(rows.width) if (rows.labels == c).any()]
    if len(present) < 2:
        raise EvaluationError(
            f"Computing {name}.",
            found=f"one class only ({', '.join(repr(rows.classes[c]) for c in present)})",
            fix="give rows of at least two classes",
        )
    pairs: list[tuple[NDArray[np.intp], Statistic, Statistic]] = []
    for i, a in enumerate(present):
        for b in present[i + 1 :]:
            inside = np.flatnonzero((rows.labels == a) | (rows.labels == b))
            is_a = rows.labels[inside] == a
            pairs.append(
                (inside, auc_statistic(is_a, rows.predictions[inside, a]), auc_statistic(~is_a, rows.predictions[inside, b]))
            )

    def statistic(weights: FloatArray) -> FloatArray:
        total = np.zeros(len(weights))
        mass = np.zeros(len(weights))
        for inside, first, second in pairs:
            of_pair = weights[:, inside]
            factor = of_pair.sum(axis=1) if average == "weighted" else np.ones(len(weights))
            total += factor * (first(of_pair) + second(of_pair)) / 2
            mass += factor
        return np.asarray(total / mass)

    return _weighted(rows, statistic)


def _kappa(rows: Rows, *, power: int = 0) -> Statistic:
    """Cohen's kappa; disagreements count 1, or the distance of the classes to the power 1 or 2."""
    count = _counter(rows)
    k = rows.width
    distance = np.abs(np.subtract.outer(np.arange(k), np.arange(k))).astype(np.float64)
    cost = (distance > 0).astype(np.float64) if power == 0 else distance**power
    observed = cost[rows.labels.astype(np.intp), rows.decisions.astype(np.intp)]

    def statistic(weights: FloatArray) -> FloatArray:
        c = count(weights)
        expected = ((c.actual @ cost) * c.predicted).sum(axis=1) / weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(1 - (weights @ observed) / expected)

    return _weighted(rows, statistic)


def _mcc(rows: Rows) -> Statistic:
    """Matthews' correlation for any number of classes (Gorodkin, Computational Biology and Chemistry 2004); 0 where undefined."""
    count = _counter(rows)

    def statistic(weights: FloatArray) -> FloatArray:
        c = count(weights)
        n, right = weights.sum(axis=1), c.right.sum(axis=1)
        covariance = right * n - (c.actual * c.predicted).sum(axis=1)
        spread = (n**2 - (c.predicted**2).sum(axis=1)) * (n**2 - (c.actual**2).sum(axis=1))
        # Rounding leaves a spread of about 1e-16 n**4 where it is zero.
        spread = np.where(spread <= 1e-14 * n**4, 0.0, spread)
        return _ratio(covariance, np.sqrt(np.maximum(spread, 0)))

    return _weighted(rows, statistic)


def _calibration_error(rows: Rows, *, equal_mass: bool) -> Statistic:
    if rows.kind == "multilabel":
        confidence, right = rows.predictions.ravel(), (rows.labels == 1).ravel()
        repeated = expected_calibration_error_statistic(confidence, right, equal_mass=equal_mass)
        return _weighted(rows, lambda weights: repeated(np.repeat(weights, rows.width, axis=1)))
    return _weighted(
        rows, expected_calibration_error_statistic(rows.confidence, rows.decisions == rows.labels, equal_mass=equal_mass)
    )


# ── regression ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _error_mean(rows: Rows, *, of: Callable[[FloatArray, FloatArray], FloatArray]) -> Statistic:
    return mean_statistic(of(rows.labels.astype(np.float64), rows.predictions).mean(axis=1), rows)


def _rmse(rows: Rows) -> Statistic:
    """Root of the mean squared error; of each column by itself, then their mean, where there are several."""
    squares = (rows.labels.astype(np.float64) - rows.predictions) ** 2

    def statistic(weights: FloatArray) -> FloatArray:
        return np.asarray(np.sqrt(weights @ squares / weights.sum(axis=1, keepdims=True)).mean(axis=1))

    return _weighted(rows, statistic)


def _share_explained(rows: Rows, *, centred: bool) -> Statistic:
    """R², or explained variance, which forgives a constant error: the mean over columns; 1 or 0 for a constant target."""
    y = rows.labels.astype(np.float64)
    # Shifted to its mean, so that a large offset doesn't cancel the digits of the variance.
    shifted = y - y.mean(axis=0)
    error = y - rows.predictions
    error_shift = error.mean(axis=0)
    around = error - error_shift
    columns = np.concatenate([shifted, shifted**2, around, around**2, error**2], axis=1)
    d = y.shape[1]

    def statistic(weights: FloatArray) -> FloatArray:
        means = weights @ columns / weights.sum(axis=1, keepdims=True)
        m, m2, e, e2, raw2 = (means[:, i * d : (i + 1) * d] for i in range(5))
        variance = m2 - m**2
        left = e2 - e**2 if centred else raw2
        # Rounding leaves about 1e-16 of a square where a target is constant.
        constant = variance <= 1e-15 * np.maximum(m2, np.finfo(float).tiny)
        none_left = left <= 1e-15 * np.maximum(e2 if centred else raw2, np.finfo(float).tiny)
        each = 1 - np.divide(left, variance, out=np.zeros_like(left), where=~constant)
        each = np.where(constant, np.where(none_left, 1.0, 0.0), each)
        return np.asarray(each.mean(axis=1))

    return _weighted(rows, statistic)


def _max_error(rows: Rows) -> Statistic:
    worst = np.abs(rows.labels.astype(np.float64) - rows.predictions).max(axis=1)
    order = np.argsort(-worst, kind="stable")
    ordered = worst[order]
    # The largest error among the rows that count at all; sample weights don't change a maximum.
    return lambda weights: ordered[(weights[:, order] > 0).argmax(axis=1)]


def _relative(y: FloatArray, p: FloatArray) -> FloatArray:
    return np.asarray(np.abs(y - p) / np.maximum(np.abs(y), np.finfo(np.float64).eps))


def _squared_log(y: FloatArray, p: FloatArray) -> FloatArray:
    if (y <= -1).any() or (p <= -1).any():
        raise EvaluationError(
            "Computing msle.", found="targets or predictions of -1 or less, which have no logarithm of 1 + x", fix="use 'mse'"
        )
    return np.asarray((np.log1p(y) - np.log1p(p)) ** 2)


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _table() -> dict[str, Metric]:
    roc, pr = auc_statistic, average_precision_statistic
    metrics = [
        Metric("accuracy", CLASSES, _accuracy, True, "share of rows (or of labels) that are right"),
        Metric("subset_accuracy", ("multilabel",), _subset_accuracy, True, "share of rows with all labels right"),
        Metric("balanced_accuracy", EXCLUSIVE, _balanced_accuracy, True,
               "mean over classes of the share that is right", averages_classes=True),
        Metric("log_loss", CLASSES, _log_loss, False, "mean negative log-probability of the label, natural logarithm"),
        Metric("brier", CLASSES, _brier, False, "mean squared distance of the probabilities from the label"),
        Metric("auc", CLASSES, partial(_area, average="macro", make=roc, name="auc"), True,
               "area under the ROC curve; each class against the rest, then the mean", averages_classes=True),
        Metric("auc_weighted", CLASSES, partial(_area, average="weighted", make=roc, name="auc_weighted"), True,
               "the same, classes weighted by their rows", averages_classes=True),
        Metric("auc_ovo", SEVERAL, partial(_one_against_one, average="macro"), True,
               "area under the ROC curve, mean over pairs of classes", averages_classes=True),
        Metric("auc_ovo_weighted", SEVERAL, partial(_one_against_one, average="weighted"), True,
               "the same, pairs weighted by their rows", averages_classes=True),
        Metric("pr_auc", CLASSES, partial(_area, average="macro", make=pr, name="pr_auc"), True,
               "average precision; each class against the rest, then the mean", averages_classes=True),
        Metric("pr_auc_weighted", CLASSES, partial(_area, average="weighted", make=pr, name="pr_auc_weighted"), True,
               "the same, classes weighted by their rows", averages_classes=True),
        Metric("kappa", EXCLUSIVE, _kappa, True, "Cohen's kappa: agreement beyond chance"),
        Metric("kappa_linear", EXCLUSIVE, partial(_kappa, power=1), True, "Cohen's kappa, costs by distance of the classes"),
        Metric("kappa_quadratic", EXCLUSIVE, partial(_kappa, power=2), True, "Cohen's kappa, costs by squared distance"),
        Metric("mcc", EXCLUSIVE, _mcc, True, "Matthews' correlation of labels and predictions"),
        Metric("ece", CLASSES, partial(_calibration_error, equal_mass=False), False,
               "expected calibration error, 15 bins of equal width"),
        Metric("ece_mass", CLASSES, partial(_calibration_error, equal_mass=True), False,
               "expected calibration error, 15 bins of equally many rows"),
        Metric("mae", QUANTITIES, partial(_error_mean, of=lambda y, p: np.abs(y - p)), False, "mean absolute error"),
        Metric("mse", QUANTITIES, partial(_error_mean, of=lambda y, p: (y - p) ** 2), False, "mean squared error"),
        Metric("rmse", QUANTITIES, _rmse, False, "root of the mean squared error"),
        Metric("mape", QUANTITIES, partial(_error_mean, of=_relative), False, "mean absolute error, as a share of the target"),
        Metric("msle", QUANTITIES, partial(_error_mean, of=_squared_log), False, "mean squared error of log(1 + x)"),
        Metric("bias", QUANTITIES, partial(_error_mean, of=lambda y, p: p - y), False, "mean of prediction minus target"),
        Metric("r2", QUANTITIES, partial(_share_explained, centred=False), True, "share of the target's variance explained"),
        Metric("explained_variance", QUANTITIES, partial(_share_explained, centred=True), True,
               "the same, a constant error forgiven"),
        Metric("max_error", QUANTITIES, _max_error, False, "largest absolute error"),
    ]  # fmt: skip
    for part in ("precision", "recall", "f1"):
        metrics.append(
            Metric(part, CLASSES, partial(_plain_f_like, part=part), True, f"{part} of class 1, or the mean over several classes")
        )
        for average in ("macro", "micro", "weighted"):
            metrics.append(
                Metric(
                    f"{part}_{average}", CLASSES, partial(_f_like, part=part, average=average), True, f"{part}, {average} average"
                )
            )
    return {metric.name: metric for metric in metrics}


#: Every metric by name; `top_k_accuracy` is written with its k, as in `top_5_accuracy`.
METRICS: Mapping[str, Metric] = _table()

#: What others call the same.
SYNONYMS: Mapping[str, str] = {
    "acc": "accuracy", "roc_auc": "auc", "auroc": "auc", "auc_ovr": "auc", "average_precision": "pr_auc", "ap": "pr_auc",
    "cross_entropy": "log_loss", "brier_score": "brier", "cohen_kappa": "kappa", "matthews": "mcc", "f1_score": "f1",
    "mean_absolute_error": "mae", "mean_squared_error": "mse", "root_mean_squared_error": "rmse", "r2_score": "r2",
}  # fmt: skip


def metric_named(name: str) -> Metric:
    """The metric of that name.

    Raises:
        EvaluationError: when there is none, with near names.
    """
    if name in METRICS:
        return METRICS[name]
    top = re.fullmatch(r"top_([1-9]\d*)_accuracy", name)
    if top:
        k = int(top[1])
        return Metric(
            name,
            SEVERAL,
            partial(_top_k_accuracy, k=k),
            True,
            f"share of rows whose class is among the {k} most probable",
        )
    near = f" (the metric {SYNONYMS[name]!r} is what is meant)" if name in SYNONYMS else did_you_mean(name, [*METRICS, "loss"])
    raise EvaluationError(
        f"Computing {name}.",
        found=f"no metric of that name{near}",
        fix="choose among " + ", ".join(["loss", *METRICS]) + ", top_<k>_accuracy; or give a Keras metric to `run(metrics=[…])`",
    )


def statistic_of(name: str, rows: Rows) -> Statistic:
    """The metric on these rows as a function from multiplicities (b, n) to values (b,).

    Raises:
        EvaluationError: when the metric doesn't suit the task, or isn't defined on the rows.
    """
    metric = metric_named(name)
    if rows.kind not in metric.kinds:
        suits = [other.name for other in METRICS.values() if rows.kind in other.kinds]
        raise EvaluationError(
            f"Computing {name}.",
            found=f"a {rows.kind} task; {name} is for {' and '.join(metric.kinds)}",
            fix="choose among " + ", ".join(suits),
        )
    return metric.make(rows)


def score(
    name: str,
    labels: ArrayLike,
    predictions: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    kind: Kind | None = None,
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
) -> float:
    """Computes one metric from labels and predictions in memory.

    Args:
        name: The metric, such as `"auc"`; `METRICS` lists them.
        labels: Class indices (n,), one-hot rows or zeros and ones (n, k), or quantities (n,) or (n, d).
        predictions: Probabilities (n,) or (n, k), or quantities.
        sample_weight: One weight a row (n,).
        kind: The task, told from the values when left out.
        threshold: The probability above which class 1 or a label is predicted.
        classes: Class names, for messages.

    Returns:
        The value; NaN where it isn't defined for these rows.

    Raises:
        EvaluationError: when labels, predictions and metric don't fit together.

    Example:
        >>> score("auc", [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    rows = Rows.of(
        labels,
        predictions,
        kind=kind,
        sample_weight=sample_weight,
        threshold=threshold,
        classes=classes,
        asked=f"Computing {name}.",
    )
    return float(statistic_of(name, rows)(np.ones((1, len(rows))))[0])
