"""Folds for cross-validation, and an interval for its mean that owns up to training sets that overlap.

Stratified folds deal the rows of each class out in turn; grouped ones keep a group on one side, and balance classes as far as
the groups allow. The interval is Nadeau and Bengio's corrected resampled t (Machine Learning 2003, equation 9): the variance
of k scores is multiplied by 1/k + n_test/n_train rather than 1/k, since the scores share training rows.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferkit.errors import EvaluationError
from transferkit.evaluation.intervals import Interval, t_quantile

__all__ = ["Fold", "folds", "nadeau_bengio"]


@dataclass(frozen=True, eq=False)
class Fold:
    """One split into rows to train on and rows to test on.

    Args:
        train: Indices, ascending.
        test: Indices, ascending.
        fold: Its number, from 0.
        repeat: The number of its repetition, from 0.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    fold: int
    repeat: int


def folds(
    rows: int,
    count: int = 5,
    *,
    labels: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> list[Fold]:
    """Splits rows into folds, each of which is the test set once in every repetition.

    Args:
        rows: How many rows there are.
        count: How many folds.
        labels: A class for each row (n,): every fold gets its share of each class.
        groups: A group for each row (n,): a group is never on both sides.
        repeats: How often all is dealt anew.
        seed: Of the dealing.

    Returns:
        `count * repeats` folds.

    Raises:
        EvaluationError: when a fold would be empty, or a class is in fewer rows or groups than there are folds.

    Example:
        >>> [fold.test.tolist() for fold in folds(6, 3, labels=[0, 0, 0, 1, 1, 1])]
        [[0, 5], [1, 4], [2, 3]]
    """
    asked = f"Making {count} folds of {rows} rows."
    y = None if labels is None else _codes(labels, rows, "labels", asked)
    g = np.arange(rows) if groups is None else _codes(groups, rows, "groups", asked)
    units = int(g.max()) + 1 if rows else 0
    problems = []
    if count < 2:
        problems.append(f"{count} folds; there must be two at least")
    elif units < count:
        problems.append(f"{units} {'rows' if groups is None else 'groups'}, fewer than folds")
    elif y is not None:
        what = "rows" if groups is None else "groups"
        sizes = [len(np.unique(g[y == c])) for c in range(int(y.max()) + 1)]
        names = np.unique(np.asarray(labels))
        problems += [f"class {names[c]!s} is in {size} {what}, fewer than folds" for c, size in enumerate(sizes) if size < count]
    if repeats < 1:
        problems.append(f"{repeats} repetitions")
    if problems:
        fewer = "take fewer folds, or leave classes out that are too rare"
        raise EvaluationError(asked, found=problems, fix="give folds=2 or more" if count < 2 else fewer)
    made = []
    for repeat in range(repeats):
        generator = np.random.Generator(np.random.Philox(key=[seed, repeat]))
        where = _deal(g, y, count, generator)
        of_row = where[g]
        for fold in range(count):
            test = of_row == fold
            made.append(Fold(np.flatnonzero(~test), np.flatnonzero(test), fold, repeat))
    return made


def _codes(values: ArrayLike, rows: int, what: str, asked: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.shape != (rows,):
        raise EvaluationError(asked, found=f"{what} of shape {array.shape}", fix=f"give {what} of shape ({rows},)")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def _deal(g: NDArray[np.int64], y: NDArray[np.int64] | None, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """The fold of each group."""
    units = int(g.max()) + 1
    where = np.empty(units, dtype=np.int64)
    if units == len(g):
        # Every row by itself: dealt class by class, each going on where the last stopped, so that sizes differ by one at most.
        of_unit = np.zeros(units, dtype=np.int64) if y is None else y[np.argsort(g)]
        shuffled = generator.permutation(units)
        ordered = shuffled[np.argsort(of_unit[shuffled], kind="stable")]
        where[ordered] = np.arange(units) % count
        return where
    classes = 1 if y is None else int(y.max()) + 1
    counts = np.zeros((units, classes))
    np.add.at(counts, (g, np.zeros_like(g) if y is None else y), 1.0)
    share = counts / counts.sum(axis=0)
    # The largest first, each to the fold that it leaves most even: the greedy rule for balanced sums.
    order = generator.permutation(units)
    order = order[np.argsort(-share[order].max(axis=1), kind="stable")]
    filled = np.zeros((count, classes))
    for unit in order:
        after = filled + share[unit]
        # How uneven all folds would be if this group went to each in turn; the emptier fold where that is equal.
        uneven = (after**2 - filled**2).sum(axis=1)
        best = np.lexsort((filled.sum(axis=1), uneven))[0]
        where[unit] = best
        filled[best] += share[unit]
    return where


def nadeau_bengio(scores: Sequence[float] | NDArray[np.float64], *, train: int, test: int, level: float = 0.95) -> Interval:
    """The interval of the mean of cross-validated scores, corrected for shared training rows.

    Args:
        scores: One for each fold, all repetitions together (k,).
        train: Rows in a training set.
        test: Rows in a test set.
        level: Share of such intervals that hold the truth, 0 – 1.

    Raises:
        EvaluationError: with fewer than two scores.

    Example:
        >>> interval = nadeau_bengio([0.8, 0.9, 0.85, 0.95, 0.9], train=80, test=20)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.774, 0.986)
    """
    values = np.asarray(scores, dtype=np.float64)
    k = len(values)
    if k < 2:
        raise EvaluationError("Finding the interval of cross-validated scores.", found=f"{k} score", fix="use two folds at least")
    half = t_quantile(0.5 + level / 2, k - 1) * math.sqrt((1 / k + test / train) * float(values.var(ddof=1)))
    mean = float(values.mean())
    return Interval(mean - half, mean + half, "Nadeau–Bengio t")
