"""Values with their intervals: resampled together where that is asked for, by formula where one holds.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferkit.errors import EvaluationError
from transferkit.evaluation.intervals import Interval, delong_interval, mean_interval, wilson
from transferkit.evaluation.means import Mean
from transferkit.evaluation.metrics import metric_named, statistic_of
from transferkit.evaluation.ranking import Statistic
from transferkit.evaluation.resampling import Method, Sampling, bootstrap_interval, distributions, jackknife, strata_of
from transferkit.evaluation.rows import FloatArray, Rows

__all__ = ["Estimate", "Loss", "Scored", "Uncertainty", "estimate", "estimates_of", "greater_is_better", "sampling_of"]


@dataclass(frozen=True)
class Uncertainty:
    """How intervals are made.

    Args:
        level: Share of such intervals that hold the truth, 0 – 1.
        resamples: How many resamples; 0 for intervals by formula.
        method: The kind of bootstrap interval.
        stratified: Whether rows are drawn within classes.
        seed: Of the draws.
    """

    level: float = 0.95
    resamples: int = 0
    method: Method = "percentile"
    stratified: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """One figure; `float()` gives its value.

    Args:
        name: The metric.
        value: On the data given.
        low: Lower end of the interval, None where there is none.
        high: Upper end.
        level: The interval's level, 0 – 1.
        method: How the interval was found; empty where there is none.
        greater_is_better: The direction of improvement, None where it isn't known.
        undefined: Resamples left out because the figure wasn't defined in them.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    method: str = ""
    greater_is_better: bool | None = True
    undefined: int = 0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} ({self.low:.4f} – {self.high:.4f}, {self.level:.0%}, {self.method})"

    def to_dict(self) -> dict[str, Any]:
        """The figure as plain values."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "method": self.method,
            "greater_is_better": self.greater_is_better,
            "undefined": self.undefined,
        }


@dataclass(frozen=True, eq=False)
class Scored:
    """Rows, and the loss of each where it is known: all that a figure is computed from.

    Args:
        rows: Labels and predictions.
        losses: The loss of each row (n,), or None.
        penalty: What regularisers add to the mean loss.
    """

    rows: Rows
    losses: FloatArray | None = None
    penalty: float = 0.0

    def take(self, chosen: NDArray[np.generic]) -> Scored:
        """The rows that a mask or an index array chooses."""
        return Scored(self.rows.take(chosen), None if self.losses is None else self.losses[chosen], self.penalty)

    def statistic(self, name: str) -> Statistic:
        """A metric by name, `loss` among them, as a function of multiplicities."""
        if name != "loss":
            return statistic_of(name, self.rows)
        if self.losses is None:
            raise EvaluationError("Computing loss.", found="no loss of each row", fix='Evaluator("loss", …).run(model, data)')
        return Loss(self.losses if self.rows.weight is None else self.losses * self.rows.weight, self.penalty)


@dataclass(frozen=True, eq=False)
class Loss:
    """Keras's mean loss: weights multiply the rows' losses, but rows are counted without them; plus the penalties.

    Args:
        per_row: Losses times weights (n,).
        penalty: What is added.
    """

    per_row: FloatArray
    penalty: float

    def __call__(self, multiplicities: FloatArray) -> FloatArray:
        return np.asarray(multiplicities @ self.per_row / multiplicities.sum(axis=1) + self.penalty)


def greater_is_better(name: str) -> bool:
    """The direction of improvement of a metric by name, `loss` among them."""
    return False if name == "loss" else metric_named(name).greater_is_better


def sampling_of(rows: Rows, *, stratified: bool) -> Sampling:
    """What is drawn from these rows: rows or their groups, within classes or not."""
    strata = strata_of(rows.labels) if stratified and rows.kind != "regression" else None
    return Sampling(len(rows), strata=strata, groups=rows.groups)


def estimate(
    statistics: Mapping[str, Statistic], rows: Rows, uncertainty: Uncertainty
) -> tuple[dict[str, Interval], dict[str, float]]:
    """Computes each statistic and, where one can be given, its interval.

    Args:
        statistics: Functions of multiplicities, by name.
        rows: What they are functions of.
        uncertainty: How intervals are made.

    Returns:
        Intervals by name, fewer where no formula is known; and all values by name.
    """
    ones = np.ones((1, len(rows)))
    values = {name: float(statistic(ones)[0]) for name, statistic in statistics.items()}
    if not uncertainty.resamples:
        by_formula = {name: _formula(name, statistic, rows, uncertainty.level) for name, statistic in statistics.items()}
        return {name: interval for name, interval in by_formula.items() if interval is not None}, values
    sampling = sampling_of(rows, stratified=uncertainty.stratified)
    if sampling.units < 2:
        return {}, values
    drawn = distributions(statistics, sampling, resamples=uncertainty.resamples, seed=uncertainty.seed)
    intervals = {}
    for name, statistic in statistics.items():
        if not np.isfinite(values[name]):
            continue
        left_out = jackknife(statistic, sampling) if uncertainty.method == "bca" else None
        intervals[name] = bootstrap_interval(
            values[name], drawn[name], level=uncertainty.level, method=uncertainty.method, left_out=left_out
        )
    return intervals, values


def estimates_of(scored: Scored, names: Iterable[str], uncertainty: Uncertainty) -> dict[str, Estimate]:
    """Each metric with its interval, by name."""
    statistics = {name: scored.statistic(name) for name in names}
    intervals, values = estimate(statistics, scored.rows, uncertainty)
    made = {}
    for name, value in values.items():
        interval = intervals.get(name)
        made[name] = Estimate(
            name,
            value,
            low=interval.low if interval else None,
            high=interval.high if interval else None,
            level=uncertainty.level,
            method=interval.method if interval else "",
            greater_is_better=greater_is_better(name),
            undefined=interval.undefined if interval else 0,
        )
    return made


def _formula(name: str, statistic: Statistic, rows: Rows, level: float) -> Interval | None:
    plain = rows.weight is None and rows.groups is None
    if isinstance(statistic, Mean):
        hits = statistic.per_row
        if plain and bool(((hits == 0) | (hits == 1)).all()):
            return wilson(float(hits.sum()), len(hits), level=level)
        return mean_interval(hits, weight=statistic.weight, groups=rows.groups, level=level)
    if isinstance(statistic, Loss):
        interval = mean_interval(statistic.per_row, groups=rows.groups, level=level)
        shift = statistic.penalty
        return None if interval is None else replace(interval, low=interval.low + shift, high=interval.high + shift)
    if name == "auc" and rows.kind in ("binary", "multiclass") and rows.width == 2 and plain:
        # The two classes of a softmax mirror each other, so their mean is the area of either.
        return delong_interval(rows.labels == 1, rows.class_probabilities[:, 1], level=level)
    return None
