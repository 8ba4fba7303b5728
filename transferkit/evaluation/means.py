"""Statistics as functions of how often every row counts, and the simplest of them: the weighted mean of a value per row.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transferkit.evaluation.ranking import Statistic
from transferkit.evaluation.rows import FloatArray, Rows

__all__ = ["Mean", "mean_statistic", "weighted"]


def weighted(rows: Rows, statistic: Statistic) -> Statistic:
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
