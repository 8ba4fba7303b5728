"""Values with their intervals: resampled together where that is asked for, by formula where one holds.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from transferkit.evaluation.intervals import Interval, delong_interval, mean_interval, wilson
from transferkit.evaluation.metrics import Mean
from transferkit.evaluation.ranking import Statistic
from transferkit.evaluation.resampling import Method, Sampling, bootstrap_interval, distributions, jackknife, strata_of
from transferkit.evaluation.rows import Rows

__all__ = ["Uncertainty", "estimate", "sampling_of"]


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


def _formula(name: str, statistic: Statistic, rows: Rows, level: float) -> Interval | None:
    plain = rows.weight is None and rows.groups is None
    if isinstance(statistic, Mean):
        hits = statistic.per_row
        if plain and bool(((hits == 0) | (hits == 1)).all()):
            return wilson(float(hits.sum()), len(hits), level=level)
        return mean_interval(hits, weight=statistic.weight, groups=rows.groups, level=level)
    if name == "loss":
        per_row = getattr(statistic, "per_row", None)
        interval = None if per_row is None else mean_interval(per_row, groups=rows.groups, level=level)
        shift = float(getattr(statistic, "penalty", 0.0))
        return None if interval is None else replace(interval, low=interval.low + shift, high=interval.high + shift)
    if name == "auc" and rows.kind == "binary" and plain:
        return delong_interval(rows.labels == 1, rows.predictions, level=level)
    return None
