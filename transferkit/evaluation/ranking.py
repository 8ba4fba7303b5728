"""How well scores put one class before the other: ROC and precision-recall, as curves and as areas under many weightings at once.

The area under the ROC curve is the Mann–Whitney statistic (Hanley and McNeil, Radiology 1982): the share of pairs, one row of
each class, in which the positive row has the higher score, ties counting half. The area under the precision-recall curve is
the average precision, sum of (R_i - R_{i-1}) P_i, without interpolation. DeLong's variance (DeLong, DeLong and
Clarke-Pearson, Biometrics 1988) is computed from placement values by sorting (Sun and Xu, IEEE Signal Processing Letters
2014).

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transferkit.evaluation.rows import FloatArray

__all__ = ["Curve", "auc_statistic", "average_precision_statistic", "placements", "precision_recall_curve", "roc_curve"]

BoolArray = NDArray[np.bool_]
Statistic = Callable[[FloatArray], FloatArray]


def auc_statistic(positive: BoolArray, scores: FloatArray) -> Statistic:
    """The area under the ROC curve as a function of row weights.

    Args:
        positive: Whether each row is of the positive class (n,).
        scores: Higher means more likely positive (n,).

    Returns:
        A function from weights (b, n) to areas (b,); NaN where one class has no weight.
    """
    ups, downs = np.flatnonzero(positive), np.flatnonzero(~positive)
    ups = ups[np.argsort(scores[ups], kind="stable")]
    downs = downs[np.argsort(scores[downs], kind="stable")]
    below = np.searchsorted(scores[downs], scores[ups], side="left")
    upto = np.searchsorted(scores[downs], scores[ups], side="right")
    tied = bool((below != upto).any())

    def statistic(weights: FloatArray) -> FloatArray:
        beaten = np.zeros((len(weights), len(downs) + 1))
        np.cumsum(weights[:, downs], axis=1, out=beaten[:, 1:])
        won = beaten[:, below]
        if tied:
            won += beaten[:, upto]
            won *= 0.5
        of_positive = weights[:, ups]
        pairs = np.einsum("bi,bi->b", of_positive, won)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(pairs / (of_positive.sum(axis=1) * beaten[:, -1]))

    return statistic


def average_precision_statistic(positive: BoolArray, scores: FloatArray) -> Statistic:
    """The average precision as a function of row weights, as `auc_statistic` is for the ROC curve."""
    order = np.argsort(-scores, kind="stable")
    ends = _ends_of_ties(scores[order])
    ups = positive[order].astype(np.float64)

    def statistic(weights: FloatArray) -> FloatArray:
        sorted_weights = weights[:, order]
        taken = np.cumsum(sorted_weights, axis=1)[:, ends]
        hits = np.cumsum(sorted_weights * ups, axis=1)[:, ends]
        gained = np.diff(hits, axis=1, prepend=0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            # Where nothing was taken yet nothing was gained either.
            precision = np.where(taken > 0, hits / taken, 0.0)
            return np.asarray((gained * precision).sum(axis=1) / hits[:, -1])

    return statistic


def _ends_of_ties(sorted_scores: FloatArray) -> NDArray[np.intp]:
    """Index of the last row of each run of equal scores."""
    return np.append(np.flatnonzero(np.diff(sorted_scores)), len(sorted_scores) - 1)


@dataclass(frozen=True)
class Curve:
    """A curve over all thresholds, from the highest to the lowest.

    Args:
        x: False positive rate (ROC) or recall (precision-recall), rising from 0 to 1.
        y: True positive rate, or precision.
        thresholds: The score at and above which a row counts as positive; infinity at the first point.
    """

    x: FloatArray
    y: FloatArray
    thresholds: FloatArray


def roc_curve(positive: BoolArray, scores: FloatArray, weight: FloatArray | None = None) -> Curve:
    """True positive rate against false positive rate, one point for each different score."""
    hits, taken, thresholds = _cumulated(positive, scores, weight)
    false = taken - hits
    return Curve(false / false[-1], hits / hits[-1], thresholds)


def precision_recall_curve(positive: BoolArray, scores: FloatArray, weight: FloatArray | None = None) -> Curve:
    """Precision against recall, one point for each different score, from recall 0 (where precision is 1 by convention)."""
    hits, taken, thresholds = _cumulated(positive, scores, weight)
    precision = np.divide(hits, taken, out=np.ones_like(hits), where=taken > 0)
    return Curve(hits / hits[-1], precision, thresholds)


def _cumulated(positive: BoolArray, scores: FloatArray, weight: FloatArray | None) -> tuple[FloatArray, FloatArray, FloatArray]:
    w = np.ones(len(scores)) if weight is None else weight
    counted = w > 0  # rows without weight make no step, so they make no point either
    positive, scores, w = positive[counted], scores[counted], w[counted]
    order = np.argsort(-scores, kind="stable")
    ends = _ends_of_ties(scores[order])
    taken = np.cumsum(w[order])[ends]
    hits = np.cumsum((w * positive)[order])[ends]
    zero = np.zeros(1)
    return (
        np.concatenate([zero, hits]),
        np.concatenate([zero, taken]),
        np.concatenate([[np.inf], scores[order][ends]]),
    )


def placements(positive: BoolArray, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """DeLong's components: the share of negatives below each positive row, and of positives above each negative."""
    ups, downs = scores[positive], scores[~positive]
    sorted_ups, sorted_downs = np.sort(ups), np.sort(downs)

    def share(of: FloatArray, among: FloatArray) -> FloatArray:
        left, right = np.searchsorted(among, of, side="left"), np.searchsorted(among, of, side="right")
        return np.asarray((left + right) / (2 * len(among)))

    return share(ups, sorted_downs), 1 - share(downs, sorted_ups)
