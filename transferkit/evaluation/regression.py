"""The metrics of quantities, each made from rows as a function of how often every row counts.

Several columns are averaged, as scikit-learn does. Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from transferkit.errors import EvaluationError
from transferkit.evaluation.means import mean_statistic, weighted
from transferkit.evaluation.ranking import Statistic
from transferkit.evaluation.rows import FloatArray, Rows

__all__ = ["error_mean", "max_error", "relative", "rmse", "share_explained", "squared_log"]


def error_mean(rows: Rows, *, of: Callable[[FloatArray, FloatArray], FloatArray]) -> Statistic:
    return mean_statistic(of(rows.labels.astype(np.float64), rows.predictions).mean(axis=1), rows)


def rmse(rows: Rows) -> Statistic:
    """Root of the mean squared error; of each column by itself, then their mean, where there are several."""
    squares = (rows.labels.astype(np.float64) - rows.predictions) ** 2

    def statistic(weights: FloatArray) -> FloatArray:
        return np.asarray(np.sqrt(weights @ squares / weights.sum(axis=1, keepdims=True)).mean(axis=1))

    return weighted(rows, statistic)


def share_explained(rows: Rows, *, centred: bool) -> Statistic:
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

    return weighted(rows, statistic)


def max_error(rows: Rows) -> Statistic:
    worst = np.abs(rows.labels.astype(np.float64) - rows.predictions).max(axis=1)
    order = np.argsort(-worst, kind="stable")
    ordered = worst[order]
    # The largest error among the rows that count at all; sample weights don't change a maximum.
    return lambda weights: ordered[(weights[:, order] > 0).argmax(axis=1)]


def relative(y: FloatArray, p: FloatArray) -> FloatArray:
    return np.asarray(np.abs(y - p) / np.maximum(np.abs(y), np.finfo(np.float64).eps))


def squared_log(y: FloatArray, p: FloatArray) -> FloatArray:
    if (y <= -1).any() or (p <= -1).any():
        raise EvaluationError(
            "Computing msle.", found="targets or predictions of -1 or less, which have no logarithm of 1 + x", fix="use 'mse'"
        )
    return np.asarray((np.log1p(y) - np.log1p(p)) ** 2)
