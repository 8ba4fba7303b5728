"""Intervals that follow from a formula, and the distributions they need.

Wilson's interval for a proportion (JASA 1927); the normal interval of a mean, weighted or in groups (linearised ratio, groups
summed first: Cochran, Sampling Techniques, 1977, chapters 6 and 9); DeLong's for the area under the ROC curve (Biometrics
1988) on the logit scale, where it stays inside 0 … 1 (Pepe, 2003, section 5.2.4). They hold for large samples; a resampled
interval is the check.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from transferkit.evaluation.ranking import placements
from transferkit.evaluation.rows import FloatArray, IntArray

__all__ = [
    "Interval",
    "delong_covariance",
    "delong_interval",
    "mean_interval",
    "normal_quantile",
    "t_quantile",
    "t_tails",
    "wilson",
]


@dataclass(frozen=True)
class Interval:
    """An interval and where it comes from.

    Args:
        low: Lower end.
        high: Upper end.
        method: How it was found.
        undefined: Resamples in which the value wasn't defined and which were left out.
    """

    low: float
    high: float
    method: str
    undefined: int = 0


def normal_quantile(probability: float) -> float:
    """The quantile of the standard normal distribution; infinite at 0 and 1."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else NormalDist().inv_cdf(probability)


def t_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's t distribution.

    Args:
        probability: Between 0 and 1, both excluded.
        degrees: Degrees of freedom, above 0.

    Example:
        >>> round(t_quantile(0.975, 9), 4)
        2.2622
    """
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the range to the last digit of a float64
        middle = (low + high) / 2
        if _above_half(middle, degrees) < probability - 0.5:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def t_tails(t: float, degrees: float) -> float:
    """How often Student's t is as far from 0 as `t`, on either side.

    Args:
        t: The value.
        degrees: Degrees of freedom, above 0.

    Example:
        >>> round(t_tails(2.2622, 9), 4)
        0.05
    """
    return max(0.0, 1 - 2 * _above_half(math.atan(abs(t) / math.sqrt(degrees)), degrees))


def _above_half(angle: float, degrees: float) -> float:
    """The probability of t between 0 and sqrt(degrees) tan(angle)."""
    # With t = sqrt(v) tan(a) the density becomes cos(a)**(v - 1), smooth on a finite range.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    angles = (nodes + 1) * angle / 2
    return float(scale * angle / 2 * (weights @ np.cos(angles) ** (degrees - 1)))


def wilson(hits: float, n: float, *, level: float = 0.95) -> Interval:
    """Wilson's interval for a proportion.

    Args:
        hits: Rows that are right.
        n: All rows.
        level: Share of such intervals that hold the truth, 0 – 1.

    Example:
        >>> interval = wilson(9, 10)
        >>> round(interval.low, 4), round(interval.high, 4)
        (0.5958, 0.9821)
    """
    z = normal_quantile(0.5 + level / 2)
    share = hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At 0 and 1 rounding would put the end a hair inside.
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half, "Wilson")


def mean_interval(
    per_row: FloatArray, *, weight: FloatArray | None = None, groups: IntArray | None = None, level: float = 0.95
) -> Interval | None:
    """The normal interval of a weighted mean; None for a single row or group."""
    w = np.ones(len(per_row)) if weight is None else weight
    total = w.sum()
    mean = float(w @ per_row / total)
    residual = w * (per_row - mean) / total
    if groups is not None:
        residual = np.bincount(groups, weights=residual)
    m = len(residual)
    if m < 2:
        return None
    half = normal_quantile(0.5 + level / 2) * math.sqrt(m / (m - 1) * float(residual @ residual))
    return Interval(mean - half, mean + half, "normal" if groups is None else "normal, groups")


def delong_covariance(up: tuple[FloatArray, ...], down: tuple[FloatArray, ...]) -> FloatArray:
    """Covariance of areas from their placement values, one array of `up` and one of `down` for each set of scores."""
    m, n = len(up[0]), len(down[0])
    from_up = np.atleast_2d(np.cov(np.stack(up), ddof=1)) / m
    from_down = np.atleast_2d(np.cov(np.stack(down), ddof=1)) / n
    return np.asarray(from_up + from_down)


def delong_interval(
    positive: np.ndarray[tuple[int], np.dtype[np.bool_]], scores: FloatArray, *, level: float = 0.95
) -> Interval | None:
    """DeLong's interval for the area under the ROC curve; None with fewer than two rows of a class.

    Args:
        positive: Whether each row is of the positive class (n,).
        scores: Higher means more likely positive (n,).
        level: Share of such intervals that hold the truth, 0 – 1.
    """
    if positive.sum() < 2 or (~positive).sum() < 2:
        return None
    up, down = placements(positive, scores)
    area = float(up.mean())
    error = math.sqrt(float(delong_covariance((up,), (down,))[0, 0]))
    if error == 0 or not 0 < area < 1:
        # Every pair right (or wrong): the data hold no trace of the spread.
        return None
    logit = math.log(area / (1 - area))
    half = normal_quantile(0.5 + level / 2) * error / (area * (1 - area))
    return Interval(1 / (1 + math.exp(half - logit)), 1 / (1 + math.exp(-half - logit)), "DeLong")
