"""Whether probabilities mean what they say, and one number that mends them.

The expected calibration error is the mean distance of confidence and accuracy over bins (Naeini, Cooper and Hauskrecht, AAAI
2015; Guo et al., ICML 2017, equation 3), over bins of equal width or of equally many rows. Temperature scaling divides the
logits by one number that minimises the log loss (Guo et al., section 4.2), found here by Newton's method on the inverse
temperature, in which the loss is convex.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferkit._table import Table, Tabular
from transferkit.errors import EvaluationError
from transferkit.evaluation.intervals import wilson
from transferkit.evaluation.rows import FloatArray

__all__ = ["Reliability", "expected_calibration_error_statistic", "fit_temperature", "log_probabilities", "reliability"]

BINS = 15


def _bin_of(confidence: FloatArray, bins: int, *, equal_mass: bool) -> NDArray[np.intp]:
    """The bin of each row; equal confidences always share one."""
    if equal_mass:
        edges = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1])
        return np.searchsorted(np.unique(edges), confidence, side="left")
    # Bins are open below and closed above, (0, 1/15] and so on, as Guo et al. have them.
    return np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)


def expected_calibration_error_statistic(
    confidence: FloatArray, right: NDArray[np.bool_], *, equal_mass: bool = False, bins: int = BINS
) -> Callable[[FloatArray], FloatArray]:
    """The expected calibration error as a function from row weights (b, n) to values (b,).

    Args:
        confidence: Probability given to what was predicted (n,).
        right: Whether that was right (n,).
        equal_mass: Bins of equally many rows instead of equal width.
        bins: How many.
    """
    where = _bin_of(confidence, bins, equal_mass=equal_mass)
    # Sum over bins of |sum of weight (confidence - right)|, over all weight: the bins' own sizes cancel.
    gaps = np.zeros((len(confidence), int(where.max()) + 1))
    gaps[np.arange(len(confidence)), where] = confidence - right

    def statistic(weights: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1))

    return statistic


@dataclass(frozen=True)
class Reliability(Tabular):
    """Confidence against accuracy, bin by bin; bins without rows are left out.

    Args:
        confidence: Mean confidence in each bin (m,).
        accuracy: Share of rows in it that are right (m,).
        low: Lower end of the 95% Wilson interval of that share (m,).
        high: Upper end (m,).
        count: Rows in it (m,).
        error: The expected calibration error, equal width.
        error_mass: The same over bins of equally many rows.
    """

    confidence: FloatArray
    accuracy: FloatArray
    low: FloatArray
    high: FloatArray
    count: NDArray[np.int64]
    error: float
    error_mass: float

    def table(self) -> Table:
        """The bins, with what they say together."""
        rows = [
            (str(n), f"{c:.3f}", f"{a:.3f}", f"{lo:.3f} – {hi:.3f}")
            for n, c, a, lo, hi in zip(self.count, self.confidence, self.accuracy, self.low, self.high, strict=True)
        ]
        side = "too sure of itself" if self.confidence @ self.count > self.accuracy @ self.count else "not sure enough"
        return Table(
            (">rows", ">confidence", ">right", ">95% interval"),
            rows,
            title=f"calibration error {self.error:.4f} (equal width), {self.error_mass:.4f} (equal mass)",
            notes=(f"on the whole the model is {side}",),
        )

    def to_dict(self) -> dict[str, Any]:
        """The bins as lists, and both errors."""
        return {
            "confidence": self.confidence.tolist(),
            "accuracy": self.accuracy.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "count": self.count.tolist(),
            "error": self.error,
            "error_mass": self.error_mass,
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a bin."""
        bins = {name: getattr(self, name).tolist() for name in ("confidence", "accuracy", "low", "high", "count")}
        return [dict(zip(bins, row, strict=True)) for row in zip(*bins.values(), strict=True)]


def reliability(confidence: FloatArray, right: NDArray[np.bool_], *, bins: int = BINS, equal_mass: bool = False) -> Reliability:
    """Bins rows by confidence and compares it with the share that is right.

    Args:
        confidence: Probability given to what was predicted (n,).
        right: Whether that was right (n,).
        bins: How many.
        equal_mass: Bins of equally many rows instead of equal width.
    """
    from_width = expected_calibration_error_statistic(confidence, right, bins=bins)
    from_mass = expected_calibration_error_statistic(confidence, right, bins=bins, equal_mass=True)
    ones = np.ones((1, len(confidence)))
    where = _bin_of(confidence, bins, equal_mass=equal_mass)
    count = np.bincount(where)
    filled = count > 0
    n = count[filled]
    hits = np.bincount(where, weights=right.astype(np.float64))[filled]
    mean_confidence = np.bincount(where, weights=confidence)[filled] / n
    ends = [wilson(float(h), float(m)) for h, m in zip(hits, n, strict=True)]
    low, high = np.array([e.low for e in ends]), np.array([e.high for e in ends])
    return Reliability(
        mean_confidence, hits / n, low, high, n.astype(np.int64), float(from_width(ones)[0]), float(from_mass(ones)[0])
    )


def log_probabilities(probabilities: FloatArray) -> FloatArray:
    """Logits (up to a constant a row) of probabilities (n, k); zeros become the smallest positive number."""
    return np.asarray(np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)))


def fit_temperature(logits: FloatArray, labels: NDArray[np.generic], weight: FloatArray | None = None) -> float:
    """Finds the temperature that minimises the log loss of softmax(logits / temperature).

    Args:
        logits: (n, k), or log-probabilities.
        labels: Class indices (n,).
        weight: One weight a row (n,).

    Returns:
        The temperature: above 1 for a model too sure of itself.

    Raises:
        EvaluationError: when no temperature is best: every row is right (the loss falls for ever with the temperature), or
            the predictions do no better than chance at any.

    Example:
        >>> logits = np.log([[0.99, 0.01]] * 4)
        >>> round(fit_temperature(logits, np.array([0, 0, 0, 1])), 3)  # sure by 0.99, right by 0.75
        4.183
    """
    w = np.ones(len(logits)) if weight is None else weight
    w = w / w.sum()
    z = logits - logits.max(axis=1, keepdims=True)
    of_label = z[np.arange(len(z)), labels.astype(np.intp)]

    def slope_and_curve(inverse: float) -> tuple[float, float]:
        e = np.exp(inverse * z)
        p = e / e.sum(axis=1, keepdims=True)
        mean = (p * z).sum(axis=1)
        square = (p * z**2).sum(axis=1)
        return float(w @ (mean - of_label)), float(w @ (square - mean**2))

    low, high = 1e-3, 1e3
    asked = "Fitting a temperature."
    if slope_and_curve(high)[0] < 0:
        raise EvaluationError(
            asked,
            found="no lowest loss: it keeps falling as probabilities are pushed to 0 and 1",
            cause="the model is right on every one of these rows, so they say nothing about its doubts",
            fix="use more rows, which the model wasn't trained on",
        )
    if slope_and_curve(low)[0] > 0:
        raise EvaluationError(
            asked,
            found="no lowest loss: it keeps falling as probabilities are levelled out",
            cause="the predictions are no better than chance, or the labels are in another order than the head's units",
            fix="look at the accuracy first",
        )
    inverse = 1.0
    for _ in range(200):
        slope, curve = slope_and_curve(inverse)
        if slope > 0:
            high = inverse
        else:
            low = inverse
        step = inverse - slope / curve if curve > 0 else 0.0
        # Newton where it stays inside the bracket, the middle (in logarithms) where it doesn't.
        following = step if low < step < high else float(np.sqrt(low * high))
        if abs(following - inverse) <= 1e-12 * inverse:
            inverse = following
            break
        inverse = following
    return 1 / inverse
