"""Two models on the same rows: the difference of each metric, its interval, and how easily chance gives one as large.

Resamples are shared by both models (the paired bootstrap: Efron and Tibshirani, 1993, chapter 16), so that rows hard for both
don't blur the difference. Accuracy is tested by McNemar's test (Psychometrika 1947) in its mid-p form, which keeps its level
where the exact form is too cautious (Fagerland, Lydersen and Laake, BMC Medical Research Methodology 2013); the area under a
binary ROC curve by DeLong's test (Biometrics 1988).

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from transferkit._table import Table, Tabular
from transferkit.errors import EvaluationError
from transferkit.evaluation.estimating import Uncertainty, sampling_of
from transferkit.evaluation.intervals import delong_covariance
from transferkit.evaluation.ranking import Statistic, placements
from transferkit.evaluation.resampling import distributions
from transferkit.evaluation.rows import FloatArray, Rows

__all__ = ["Comparison", "Difference", "TransferGain", "compare_rows", "delong_test", "mcnemar"]


@dataclass(frozen=True)
class Difference:
    """One metric of two models.

    Args:
        name: The metric.
        first: Its value for the first model.
        second: For the second.
        low: Lower end of the interval of `first - second`.
        high: Upper end.
        level: The interval's level, 0 – 1.
        p_value: How often chance alone gives a difference as large.
        test: What gave the p-value.
        greater_is_better: The direction of improvement.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    level: float
    p_value: float
    test: str
    greater_is_better: bool

    @property
    def value(self) -> float:
        """`first - second`."""
        return self.first - self.second

    def __float__(self) -> float:
        return self.value

    @property
    def verdict(self) -> str:
        """`"better"` or `"worse"` for the first model where the interval leaves out zero, else `"not told apart"`."""
        if self.low <= 0 <= self.high:
            return "not told apart"
        return "better" if (self.low > 0) == self.greater_is_better else "worse"

    def to_dict(self) -> dict[str, Any]:
        """The difference as plain values."""
        return {
            "first": self.first,
            "second": self.second,
            "difference": self.value,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "p_value": self.p_value,
            "test": self.test,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, eq=False)
class Comparison(Tabular, Mapping[str, Difference]):
    """Differences by metric, first model minus second; made by `Evaluation.compare`.

    Args:
        differences: By metric.
        names: What to call the two models.
        rows: How many rows both were judged on.
    """

    differences: Mapping[str, Difference]
    names: tuple[str, str]
    rows: int

    def __getitem__(self, name: str) -> Difference:
        return self.differences[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.differences)

    def __len__(self) -> int:
        return len(self.differences)

    def table(self) -> Table:
        """The differences as a table."""
        level = next(iter(self.differences.values())).level
        body = [
            (
                d.name,
                f"{d.first:.4f}",
                f"{d.second:.4f}",
                f"{d.value:+.4f}",
                f"{d.low:+.4f} – {d.high:+.4f}",
                _p(d.p_value),
                d.test,
                d.verdict,
            )
            for d in self.differences.values()
        ]
        notes = []
        if len(self) > 1:
            notes.append(f"{len(self)} metrics were looked at: the p-values aren't corrected for that")
        return Table(
            (
                "metric",
                f">{self.names[0]}",
                f">{self.names[1]}",
                ">difference",
                f">{level:.0%} interval",
                ">p",
                "test",
                "verdict",
            ),
            body,
            title=f"{self.names[0]} against {self.names[1]} on the same {self.rows:,} rows",
            notes=notes,
        )

    def __repr__(self) -> str:
        return str(self)

    def to_dict(self) -> dict[str, Any]:
        """The differences as plain values."""
        return {"names": list(self.names), "rows": self.rows, "metrics": {d.name: d.to_dict() for d in self.differences.values()}}

    def records(self) -> list[dict[str, Any]]:
        """One dict a metric."""
        return [{"metric": d.name, **d.to_dict()} for d in self.differences.values()]


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


@dataclass(frozen=True, eq=False)
class TransferGain(Tabular):
    """What transfer brought: the tuned model against one from scratch, and against itself before tuning.

    Args:
        against_scratch: The comparison with the model trained from scratch, or None.
        against_before: The comparison with the model before it was tuned, or None.
    """

    against_scratch: Comparison | None
    against_before: Comparison | None

    @property
    def is_negative(self) -> bool:
        """Whether some metric is worse than from scratch, its interval wholly on the wrong side, and none is better."""
        verdicts = [d.verdict for d in (self.against_scratch or {}).values()]
        return "worse" in verdicts and "better" not in verdicts

    @property
    def verdict(self) -> str:
        """One sentence for each comparison."""
        said = []
        if self.against_scratch is not None:
            said.append(_sentence(self.against_scratch, "from scratch", negative=self.is_negative))
        if self.against_before is not None:
            said.append(_sentence(self.against_before, "before tuning", negative=False))
        return "\n".join(said)

    def _comparisons(self) -> list[Comparison]:
        return [one for one in (self.against_scratch, self.against_before) if one is not None]

    def table(self) -> Table:
        """Both comparisons, one below the other, and the verdict."""
        tables = [one.table() for one in self._comparisons()]
        body = [(one.names[1], *row) for one, table in zip(self._comparisons(), tables, strict=True) for row in table.rows]
        columns = list(tables[0].columns)
        columns[1:3] = [">transfer", ">the other"]
        rows = self._comparisons()[0].rows
        return Table(
            ("against", *columns),
            body,
            title=f"what transfer brought, on the same {rows:,} rows",
            notes=(*self.verdict.splitlines(), *tables[0].notes),
        )

    def __repr__(self) -> str:
        return str(self)

    def records(self) -> list[dict[str, Any]]:
        """One dict a comparison and metric."""
        return [{"against": one.names[1], **record} for one in self._comparisons() for record in one.records()]

    def to_dict(self) -> dict[str, Any]:
        """Both comparisons and the verdict as plain values."""
        return {
            "scratch": None if self.against_scratch is None else self.against_scratch.to_dict(),
            "before": None if self.against_before is None else self.against_before.to_dict(),
            "negative_transfer": self.is_negative,
            "verdict": self.verdict,
        }


def _sentence(comparison: Comparison, than: str, *, negative: bool) -> str:
    def shown(d: Difference) -> str:
        side = "lower" if d.value < 0 else "higher"
        ends = sorted((abs(d.low), abs(d.high)))
        return f"{d.name} is {abs(d.value):.4f} {side} ({ends[0]:.4f} – {ends[1]:.4f})"

    worse = [d for d in comparison.values() if d.verdict == "worse"]
    better = [d for d in comparison.values() if d.verdict == "better"]
    if worse and better:
        return f"mixed: than {than}, " + ", ".join(map(shown, better)) + "; but " + ", ".join(map(shown, worse))
    if worse:
        return ("negative transfer: " if negative else "worse: ") + ", ".join(map(shown, worse)) + f" than {than}"
    if better:
        return "gain: " + ", ".join(map(shown, better)) + f" than {than}"
    return f"no difference shown to {than}: every interval holds zero"


def compare_rows(
    first: Mapping[str, Statistic],
    second: Mapping[str, Statistic],
    rows: tuple[Rows, Rows],
    directions: Mapping[str, bool],
    *,
    names: tuple[str, str],
    uncertainty: Uncertainty,
) -> Comparison:
    """Compares statistics of two models on the same rows.

    Args:
        first: The first model's statistics by metric.
        second: The second's.
        rows: The rows with either model's predictions.
        directions: Whether greater is better, by metric.
        names: What to call the models.
        uncertainty: How many resamples, and of what kind.

    Raises:
        EvaluationError: when the rows aren't the same.
    """
    _same_rows(*rows, names=names)
    sampling = sampling_of(rows[0], stratified=uncertainty.stratified)
    # One pass over the resamples for both, so that each sees the same draws.
    both = {f"a {name}": first[name] for name in directions} | {f"b {name}": second[name] for name in directions}
    drawn = distributions(both, sampling, resamples=uncertainty.resamples, seed=uncertainty.seed)
    ones = np.ones((1, len(rows[0])))
    tail = (1 - uncertainty.level) / 2
    differences = {}
    for name, greater in directions.items():
        a, b = float(first[name](ones)[0]), float(second[name](ones)[0])
        moved = drawn[f"a {name}"] - drawn[f"b {name}"]
        moved = moved[np.isfinite(moved)]
        if not len(moved):
            continue
        low, high = np.quantile(moved, [tail, 1 - tail])
        p, test = _test(name, rows, moved)
        differences[name] = Difference(name, a, b, float(low), float(high), uncertainty.level, p, test, greater)
    return Comparison(differences, names, len(rows[0]))


def _same_rows(a: Rows, b: Rows, *, names: tuple[str, str]) -> None:
    asked = f"Comparing {names[0]} with {names[1]}."
    problems = []
    if a.kind != b.kind:
        problems.append(f"a {a.kind} and a {b.kind} task")
    if len(a) != len(b):
        problems.append(f"{len(a)} and {len(b)} rows")
    elif a.kind == b.kind and (a.labels.shape != b.labels.shape or not np.array_equal(a.labels, b.labels)):
        differ = int((a.labels != b.labels).reshape(len(a), -1).any(axis=1).sum()) if a.labels.shape == b.labels.shape else len(a)
        problems.append(f"labels that differ in {differ} of {len(a)} rows")
    for what, one, other in (("sample weights", a.weight, b.weight), ("groups", a.groups, b.groups)):
        if (one is None) != (other is None) or (one is not None and other is not None and not np.array_equal(one, other)):
            problems.append(f"{what} that differ")
    if problems:
        raise EvaluationError(
            asked,
            found=problems,
            cause="the two were evaluated on different data, or on one that comes in another order each time",
            fix="evaluate both on the same arrays, or on a data set without shuffling",
        )


def _test(name: str, rows: tuple[Rows, Rows], moved: FloatArray) -> tuple[float, str]:
    a, b = rows
    plain = a.weight is None and a.groups is None
    if plain and name == "accuracy" and a.kind in ("binary", "multiclass"):
        right_a, right_b = a.decisions == a.labels, b.decisions == b.labels
        return mcnemar(int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())), "McNemar"
    two_classes = a.kind in ("binary", "multiclass") and a.width == 2
    if plain and name == "auc" and two_classes and np.bincount(a.labels.astype(np.int64), minlength=2).min() >= 2:
        return delong_test(a.labels == 1, a.class_probabilities[:, 1], b.class_probabilities[:, 1]), "DeLong"
    # Each tail with one more, so that no p-value is zero (Davison and Hinkley, 1997, section 4.2.3).
    n = len(moved)
    below, above = (np.sum(moved <= 0) + 1) / (n + 1), (np.sum(moved >= 0) + 1) / (n + 1)
    return float(min(1.0, 2 * min(below, above))), "bootstrap"


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's test, mid-p, two-sided.

    Args:
        only_first: Rows that the first model alone has right.
        only_second: Rows that the second alone has right.

    Example:
        >>> round(mcnemar(10, 2), 4)
        0.0225
    """
    n = only_first + only_second
    if n == 0:
        return 1.0
    small = min(only_first, only_second)
    log_half = n * math.log(0.5)

    def probability(k: int) -> float:
        return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half)

    # Terms fall quickly from the middle outward; those past 50 standard deviations are zero in floating point.
    first = max(0, small - int(25 * math.sqrt(n)) - 1)
    tail = math.fsum(probability(k) for k in range(first, small + 1))
    return min(1.0, 2 * tail - probability(small))


def delong_test(positive: np.ndarray[Any, np.dtype[np.bool_]], first: FloatArray, second: FloatArray) -> float:
    """DeLong's test of equal areas under two ROC curves on the same rows, two-sided.

    Args:
        positive: Whether each row is of the positive class (n,).
        first: The first model's scores (n,).
        second: The second's.
    """
    up_a, down_a = placements(positive, first)
    up_b, down_b = placements(positive, second)
    covariance = delong_covariance((up_a, up_b), (down_a, down_b))
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = float(up_a.mean() - up_b.mean())
    # Equal scores leave a variance of rounding size.
    if variance <= 1e-18:
        return 1.0 if abs(difference) < 1e-12 else 0.0
    return 2 * NormalDist().cdf(-abs(difference) / math.sqrt(variance))
