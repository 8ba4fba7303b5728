"""Resampling: how much a figure would move on other rows of the same kind.

The bootstrap (Efron, Annals of Statistics 1979) draws rows with replacement. A resample is kept as how often each row was
drawn, so that metrics see a matrix (resamples, rows) of multiplicities and work on many at once, a bounded piece of it at a
time. Rows can be drawn within strata, or groups of rows as a whole (the cluster bootstrap, Field and Welsh, JRSS B 2007).
Intervals are percentiles, or corrected for bias and skewness (BCa: Efron, JASA 1987), with the acceleration from a jackknife.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from transferkit.errors import EvaluationError
from transferkit.evaluation.intervals import Interval, normal_quantile
from transferkit.evaluation.ranking import Statistic
from transferkit.evaluation.rows import FloatArray, IntArray

__all__ = ["Method", "Sampling", "bootstrap_interval", "distributions", "jackknife", "multiplicities"]

Method = Literal["percentile", "bca"]

#: Cells of a piece of the matrix: 1 MiB of float64, which stays in the processor's cache.
CELLS = 1 << 17
#: Units left out one by one in a jackknife; beyond, blocks of units are left out, which changes the acceleration little.
MOST_LEFT_OUT = 2000


@dataclass(frozen=True)
class Sampling:
    """What is drawn.

    Args:
        rows: How many rows there are.
        strata: A code for each row (n,): every resample has as many rows of each as the data.
        groups: A code 0 … g-1 for each row (n,): rows of a group are drawn together.
    """

    rows: int
    strata: IntArray | None = None
    groups: IntArray | None = None

    def __post_init__(self) -> None:
        if self.strata is not None and self.groups is not None:
            pairs = np.unique(np.stack([self.groups, self.strata]), axis=1)
            if pairs.shape[1] != self.groups.max() + 1:
                raise EvaluationError(
                    "Resampling groups within strata.",
                    found="groups with rows of several strata",
                    cause="rows of one group have different labels, so a group belongs to no stratum",
                    fix="leave `stratified` out; groups are drawn whole either way",
                )

    @property
    def units(self) -> int:
        """How many independent things there are to draw: groups, or rows."""
        return self.rows if self.groups is None else int(self.groups.max()) + 1

    def _strata_of_units(self) -> IntArray | None:
        if self.strata is None or self.groups is None:
            return self.strata
        first = np.unique(self.groups, return_index=True)[1]
        return self.strata[first]

    def spread(self, per_unit: FloatArray) -> FloatArray:
        """Multiplicities of units (b, units) as those of rows (b, n)."""
        return per_unit if self.groups is None else per_unit[:, self.groups]


def multiplicities(sampling: Sampling, *, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Draws resamples, a bounded number at a time.

    Args:
        sampling: What is drawn.
        resamples: How many resamples in all.
        seed: Of the draws: equal seeds give equal resamples.

    Yields:
        How often each row is drawn, float64 of shape (b, n).
    """
    generator = np.random.Generator(np.random.SFC64(seed))
    units = sampling.units
    strata = sampling._strata_of_units()
    members = [np.arange(units)] if strata is None else [np.flatnonzero(strata == s) for s in np.unique(strata)]
    at_once = max(1, CELLS // max(units, sampling.rows))
    for start in range(0, resamples, at_once):
        b = min(at_once, resamples - start)
        drawn = np.empty((b, units))
        for inside in members:
            m = len(inside)
            picks = generator.integers(0, m, size=(b, m))
            picks += (np.arange(b) * m)[:, None]
            counts = np.bincount(picks.ravel(), minlength=b * m).reshape(b, m)
            if len(members) == 1:
                drawn[:] = counts
            else:
                drawn[:, inside] = counts
        yield sampling.spread(drawn)


def distributions(statistics: Mapping[str, Statistic], sampling: Sampling, *, resamples: int, seed: int) -> dict[str, FloatArray]:
    """The values of several statistics over the same resamples, each of shape (resamples,)."""
    pieces: dict[str, list[FloatArray]] = {name: [] for name in statistics}
    for drawn in multiplicities(sampling, resamples=resamples, seed=seed):
        for name, statistic in statistics.items():
            pieces[name].append(statistic(drawn))
    return {name: np.concatenate(parts) for name, parts in pieces.items()}


def jackknife(statistic: Statistic, sampling: Sampling) -> FloatArray:
    """The values with each unit left out; blocks of units, in random order, where there are more than 2,000."""
    units = sampling.units
    blocks = np.arange(units)
    if units > MOST_LEFT_OUT:
        blocks = np.random.default_rng(0).permutation(units) % MOST_LEFT_OUT
    count = int(blocks.max()) + 1
    at_once = max(1, CELLS // max(units, sampling.rows))
    values = []
    for start in range(0, count, at_once):
        left_out = np.arange(start, min(start + at_once, count))
        kept = (blocks[None, :] != left_out[:, None]).astype(np.float64)
        values.append(statistic(sampling.spread(kept)))
    return np.concatenate(values)


def bootstrap_interval(
    value: float,
    distribution: FloatArray,
    *,
    level: float = 0.95,
    method: Method = "percentile",
    left_out: FloatArray | None = None,
) -> Interval:
    """The interval that a bootstrap distribution gives.

    Args:
        value: The value on the data itself.
        distribution: Its values over resamples (b,); those that are NaN are left out and counted.
        level: Share of such intervals that hold the truth, 0 – 1.
        method: `"percentile"`, or `"bca"`, which needs `left_out`.
        left_out: The jackknife's values.

    Raises:
        EvaluationError: when the value was defined in fewer than half of the resamples.
    """
    defined = distribution[np.isfinite(distribution)]
    undefined = len(distribution) - len(defined)
    if undefined * 2 > len(distribution):
        raise EvaluationError(
            "Putting an interval around a figure by resampling.",
            found=f"a value that isn't defined in {undefined} of {len(distribution)} resamples",
            cause="so few rows of a class that most resamples have none",
            fix="draw within classes: bootstrap(stratified=True); or use more rows",
        )
    tail = (1 - level) / 2
    if method == "percentile" or left_out is None:
        low, high = np.quantile(defined, [tail, 1 - tail])
        return Interval(float(low), float(high), "percentile bootstrap", undefined)
    below = (np.sum(defined < value) + 0.5 * np.sum(defined == value)) / len(defined)
    bias = normal_quantile(float(below))
    deviations = np.mean(left_out[np.isfinite(left_out)]) - left_out[np.isfinite(left_out)]
    spread = float((deviations**2).sum()) ** 1.5
    acceleration = 0.0 if spread == 0 else float((deviations**3).sum()) / (6 * spread)

    def corrected(probability: float) -> float:
        z = bias + normal_quantile(probability)
        if not math.isfinite(z):
            return 0.0 if z < 0 else 1.0
        return NormalDist().cdf(bias + z / (1 - acceleration * z))

    low, high = np.quantile(defined, [corrected(tail), corrected(1 - tail)])
    return Interval(float(low), float(high), "BCa bootstrap", undefined)


def strata_of(labels: NDArray[np.generic]) -> IntArray:
    """A stratum for each row (n,): its class, or its combination of labels (n, k)."""
    axis = 0 if labels.ndim == 2 else None
    return np.asarray(np.unique(labels, axis=axis, return_inverse=True)[1]).reshape(-1).astype(np.int64)
