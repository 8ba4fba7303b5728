"""The metrics of classes and labels, each made from rows as a function of how often every row counts.

Definitions, zero divisions and averages are those `metrics` names. Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transferkit.errors import EvaluationError
from transferkit.evaluation.calibration import expected_calibration_error_statistic
from transferkit.evaluation.means import mean_statistic, weighted
from transferkit.evaluation.ranking import Statistic, auc_statistic
from transferkit.evaluation.rows import FloatArray, Rows

__all__ = [
    "accuracy",
    "area",
    "balanced_accuracy",
    "brier",
    "calibration_error",
    "f_like",
    "kappa",
    "log_loss",
    "mcc",
    "one_against_one",
    "plain_f_like",
    "subset_accuracy",
    "top_k_accuracy",
]


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


def accuracy(rows: Rows) -> Statistic:
    hits = rows.decisions == rows.labels
    return mean_statistic(hits.astype(np.float64) if hits.ndim == 1 else hits.mean(axis=1), rows)


def subset_accuracy(rows: Rows) -> Statistic:
    return mean_statistic((rows.decisions == rows.labels).all(axis=1).astype(np.float64), rows)


def top_k_accuracy(rows: Rows, *, k: int) -> Statistic:
    if k >= rows.width:
        raise EvaluationError(
            f"Computing top_{k}_accuracy.",
            found=f"a head of {rows.width} classes, of which the top {k} are always right",
            fix="take a smaller k",
        )
    # Among equal scores the later class stands higher, as in scikit-learn.
    best = np.argsort(rows.predictions, axis=1, kind="stable")[:, -k:]
    return mean_statistic((best == rows.labels[:, None]).any(axis=1).astype(np.float64), rows)


def balanced_accuracy(rows: Rows) -> Statistic:
    count = _counter(rows)

    def statistic(weights: FloatArray) -> FloatArray:
        counts = count(weights)
        present = counts.actual > 0
        return np.asarray(_ratio(counts.right, counts.actual).sum(axis=1) / present.sum(axis=1))

    return weighted(rows, statistic)


def log_loss(rows: Rows) -> Statistic:
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


def brier(rows: Rows) -> Statistic:
    if rows.kind == "multilabel":
        return mean_statistic(((rows.predictions - rows.labels.astype(np.float64)) ** 2).mean(axis=1), rows)
    if rows.kind == "binary":
        return mean_statistic((rows.predictions - rows.labels.astype(np.float64)) ** 2, rows)
    wanted = rows.soft_labels if rows.soft_labels is not None else np.eye(rows.width)[rows.labels.astype(np.intp)]
    return mean_statistic(((rows.predictions - wanted) ** 2).sum(axis=1), rows)


def f_like(rows: Rows, *, part: str, average: str) -> Statistic:
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

    return weighted(rows, statistic)


def plain_f_like(rows: Rows, *, part: str) -> Statistic:
    return f_like(rows, part=part, average="positive" if rows.kind == "binary" else "macro")


def _one_against_rest(rows: Rows) -> list[tuple[NDArray[np.bool_], FloatArray]]:
    if rows.kind == "binary":
        return [(rows.labels == 1, rows.predictions)]
    if rows.kind == "multilabel":
        return [(rows.labels[:, c] == 1, rows.predictions[:, c]) for c in range(rows.width)]
    return [(rows.labels == c, rows.predictions[:, c]) for c in range(rows.width)]


def area(rows: Rows, *, average: str, make: Callable[[NDArray[np.bool_], FloatArray], Statistic], name: str) -> Statistic:
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
        return weighted(rows, areas[0])
    shares = np.stack([up for up, _ in defined], axis=1).astype(np.float64)

    def statistic(weights: FloatArray) -> FloatArray:
        each = np.stack([area(weights) for area in areas], axis=1)
        if average == "weighted":
            prevalence = weights @ shares
            return np.asarray((each * prevalence).sum(axis=1) / prevalence.sum(axis=1))
        return np.asarray(each.mean(axis=1))

    return weighted(rows, statistic)


def one_against_one(rows: Rows, *, average: str) -> Statistic:
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

    return weighted(rows, statistic)


def kappa(rows: Rows, *, power: int = 0) -> Statistic:
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

    return weighted(rows, statistic)


def mcc(rows: Rows) -> Statistic:
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

    return weighted(rows, statistic)


def calibration_error(rows: Rows, *, equal_mass: bool) -> Statistic:
    if rows.kind == "multilabel":
        confidence, right = rows.predictions.ravel(), (rows.labels == 1).ravel()
        repeated = expected_calibration_error_statistic(confidence, right, equal_mass=equal_mass)
        return weighted(rows, lambda weights: repeated(np.repeat(weights, rows.width, axis=1)))
    return weighted(
        rows, expected_calibration_error_statistic(rows.confidence, rows.decisions == rows.labels, equal_mass=equal_mass)
    )
