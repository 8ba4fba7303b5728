"""Where a model errs: by class, by slice, row by row; and which labels look wrong.

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferkit._table import Table, Tabular
from transferkit.errors import EvaluationError
from transferkit.evaluation.intervals import Interval, delong_interval, wilson
from transferkit.evaluation.ranking import auc_statistic
from transferkit.evaluation.rows import FloatArray, Rows

__all__ = ["ClassFigures", "Confusion", "Mistakes", "PerClass", "confusion_of", "mistakes_of", "per_class_of", "suspects_of"]


def _classes_only(rows: Rows, asked: str) -> None:
    if rows.kind not in ("binary", "multiclass"):
        raise EvaluationError(
            asked,
            found=f"a {rows.kind} task",
            cause="only classes that exclude each other have it",
            fix="evaluate a model whose rows are each of one class",
        )


@dataclass(frozen=True, eq=False)
class Confusion(Tabular):
    """How many rows of each class were taken for each: rows are the labels, columns the predictions.

    Args:
        counts: (k, k); sums of weights where there are any.
        classes: Names.
    """

    counts: FloatArray
    classes: tuple[str, ...]

    @property
    def shares(self) -> FloatArray:
        """Each row divided by its sum; NaN for a class without rows."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.counts / self.counts.sum(axis=1, keepdims=True))

    def most_confused(self, n: int = 10) -> list[tuple[str, str, float]]:
        """The n pairs of classes, label and prediction, that are mixed up most, with their counts."""
        off = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-off, axis=None, kind="stable")[:n]
        pairs = [np.unravel_index(i, off.shape) for i in order]
        return [(self.classes[i], self.classes[j], float(off[i, j])) for i, j in pairs if off[i, j] > 0]

    def table(self) -> Table:
        """The counts as a table, or the pairs mixed up most where there are more than 12 classes."""
        if len(self.classes) > 12:
            body = [(a, b, f"{c:g}") for a, b, c in self.most_confused()]
            return Table(("label", "taken for", ">rows"), body, title=f"the most frequent of {len(self.classes)} classes")
        body = [(name, *(f"{c:g}" for c in row)) for name, row in zip(self.classes, self.counts, strict=True)]  # type: ignore[misc]
        return Table(("label \\ taken for", *(f">{name}" for name in self.classes)), body)

    def to_dict(self) -> dict[str, Any]:
        """Names and counts as lists."""
        return {"classes": list(self.classes), "counts": self.counts.tolist()}

    def records(self) -> list[dict[str, Any]]:
        """One dict a class, with the rows taken for each."""
        pairs = zip(self.classes, self.counts.tolist(), strict=True)
        return [{"label": name, **dict(zip(self.classes, row, strict=True))} for name, row in pairs]


def confusion_of(rows: Rows) -> Confusion:
    """The confusion matrix of the rows."""
    _classes_only(rows, "Making a confusion matrix.")
    k = rows.width
    cell = rows.labels.astype(np.int64) * k + rows.decisions.astype(np.int64)
    return Confusion(np.bincount(cell, weights=rows.weight, minlength=k * k).reshape(k, k).astype(np.float64), rows.classes)


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class or label.

    Args:
        name: The class.
        rows: Rows that have it.
        predicted: Rows it was predicted for.
        values: Precision, recall, F1 and AUC against the rest, by name; NaN where not defined.
        intervals: Their intervals by name, fewer with weights or groups.
    """

    name: str
    rows: int
    predicted: int
    values: Mapping[str, float]
    intervals: Mapping[str, Interval]


@dataclass(frozen=True, eq=False)
class PerClass(Tabular, Mapping[str, ClassFigures]):
    """Figures for each class, those with the lowest F1 first in the table."""

    figures: Mapping[str, ClassFigures]
    level: float

    def __getitem__(self, name: str) -> ClassFigures:
        return self.figures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)

    def table(self) -> Table:
        """The figures as a table."""

        def cell(one: ClassFigures, name: str) -> str:
            value, interval = one.values[name], one.intervals.get(name)
            if not np.isfinite(value):
                return "—"
            return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval.low:.3f} – {interval.high:.3f})"

        names = ("precision", "recall", "f1", "auc")
        ordered = sorted(self.figures.values(), key=lambda one: np.nan_to_num(one.values["f1"], nan=2.0))
        body = [(one.name, str(one.rows), str(one.predicted), *(cell(one, name) for name in names)) for one in ordered]
        empty = [one.name for one in ordered if one.rows == 0]
        notes = [f"no row of: {', '.join(empty)}"] if empty else []
        columns = ("class", ">rows", ">predicted", *(f">{n}" for n in names))
        return Table(columns, body, title=f"by class, {self.level:.0%} intervals", notes=notes)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            name: {
                "rows": one.rows,
                "predicted": one.predicted,
                **{
                    metric: {
                        "value": value,
                        "low": getattr(one.intervals.get(metric), "low", None),
                        "high": getattr(one.intervals.get(metric), "high", None),
                    }
                    for metric, value in one.values.items()
                },
            }
            for name, one in self.figures.items()
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a class and figure."""
        return [
            {"class": name, "rows": one["rows"], "predicted": one["predicted"], "metric": metric, **one[metric]}
            for name, one in self.to_dict().items()
            for metric in self.figures[name].values
        ]


def per_class_of(rows: Rows, *, level: float = 0.95) -> PerClass:
    """Precision, recall, F1 and one-against-rest AUC of each class or label.

    Precision and recall have Wilson's interval. F1 is 2J / (1 + J) for the share J of true positives among the rows that are
    of the class or were taken for it, and has the image of J's Wilson interval. AUC has DeLong's.
    """
    if rows.kind == "regression":
        raise EvaluationError("Making a table by class.", found="a regression task", fix="evaluate a classifier")
    weight = np.ones(len(rows)) if rows.weight is None else rows.weight
    plain = rows.weight is None and rows.groups is None
    figures = {}
    for c, name in enumerate(rows.classes):
        if rows.kind == "multilabel":
            actual, predicted, scores = rows.labels[:, c] == 1, rows.decisions[:, c] == 1, rows.predictions[:, c]
        else:
            actual, predicted, scores = rows.labels == c, rows.decisions == c, rows.class_probabilities[:, c]
        right, of, taken = (float(weight[m].sum()) for m in (actual & predicted, actual, predicted))
        either = of + taken - right
        values = {
            "precision": right / taken if taken else float("nan"),
            "recall": right / of if of else float("nan"),
            "f1": 2 * right / (of + taken) if of + taken else float("nan"),
            "auc": float(auc_statistic(actual, scores)(weight[None])[0]) if actual.any() and not actual.all() else float("nan"),
        }
        intervals: dict[str, Interval] = {}
        if plain:
            if taken:
                intervals["precision"] = wilson(right, taken, level=level)
            if of:
                intervals["recall"] = wilson(right, of, level=level)
            if either:
                share = wilson(right, either, level=level)
                intervals["f1"] = replace(share, low=2 * share.low / (1 + share.low), high=2 * share.high / (1 + share.high))
            area = delong_interval(actual, scores, level=level)
            if area is not None:
                intervals["auc"] = area
        figures[name] = ClassFigures(name, int(actual.sum()), int(predicted.sum()), values, intervals)
    return PerClass(figures, level)


@dataclass(frozen=True, eq=False)
class Mistakes(Tabular):
    """Rows that stand out, the worst first.

    Args:
        index: Their places in the data (m,).
        labels: The labels' names.
        instead: The classes predicted (mistakes) or suggested (label suspects).
        confidence: The probability of that class (m,).
        of_label: The probability of the label (m,).
        found: How many there are in all.
        rows: Out of how many rows.
        title: What they are.
        inputs: The inputs of these rows, where they were asked for.
        files: The files of these rows, where the inputs were asked for and come from files; else ().
    """

    index: NDArray[np.int64]
    labels: tuple[str, ...]
    instead: tuple[str, ...]
    confidence: FloatArray
    of_label: FloatArray
    found: int
    rows: int
    title: str
    inputs: Any = None
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def table(self) -> Table:
        """The rows as a table."""
        body: list[tuple[str, ...]] = [
            (str(i), label, other, f"{p:.4f}", f"{q:.4f}")
            for i, label, other, p, q in zip(self.index, self.labels, self.instead, self.confidence, self.of_label, strict=True)
        ]
        title = f"{self.title}: {len(self)} of {self.found} (of {self.rows:,} rows)"
        columns: tuple[str, ...] = (">row", "label", "model says", ">with probability", ">of the label")
        if self.files:
            columns, body = (*columns, "file"), [(*row, name) for row, name in zip(body, self.files, strict=True)]
        return Table(columns, body, title=title)

    def to_dict(self) -> dict[str, Any]:
        """The rows as lists, without inputs."""
        return {
            "index": self.index.tolist(),
            "labels": list(self.labels),
            "instead": list(self.instead),
            "confidence": self.confidence.tolist(),
            "of_label": self.of_label.tolist(),
            "found": self.found,
            "rows": self.rows,
            **({"files": list(self.files)} if self.files else {}),
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a row."""
        names = ("index", "labels", "instead", "confidence", "of_label", *(["files"] if self.files else []))
        columns = [np.asarray(getattr(self, name)).tolist() for name in names]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _listed(rows: Rows, order: NDArray[np.intp], instead: NDArray[np.generic], n: int, title: str) -> Mistakes:
    top = order[:n]
    probabilities, labels = rows.class_probabilities, rows.labels.astype(np.intp)
    other = instead[top].astype(np.intp)
    return Mistakes(
        index=top.astype(np.int64),
        labels=tuple(rows.classes[c] for c in labels[top]),
        instead=tuple(rows.classes[c] for c in other),
        confidence=probabilities[top, other],
        of_label=probabilities[top, labels[top]],
        found=len(order),
        rows=len(rows),
        title=title,
    )


def mistakes_of(rows: Rows, n: int = 20) -> Mistakes:
    """The wrong predictions of which the model was surest."""
    _classes_only(rows, "Listing mistakes.")
    wrong = np.flatnonzero(rows.decisions != rows.labels)
    order = wrong[np.argsort(-rows.confidence[wrong], kind="stable")]
    return _listed(rows, order, rows.decisions, n, "most confident mistakes")


def suspects_of(rows: Rows, n: int = 20) -> Mistakes:
    """Rows whose label looks wrong, by confident learning.

    A class claims a row when its probability reaches the mean it has over the rows labelled so; a row claimed by another
    class than its label's is a suspect (Northcutt, Jiang and Chuang, JAIR 2021, section 3.1). The widest margin comes first.
    Classes without a row claim none.
    """
    _classes_only(rows, "Looking for wrong labels.")
    p, labels = rows.class_probabilities, rows.labels.astype(np.intp)
    own = p[np.arange(len(p)), labels]
    count = np.bincount(labels, minlength=rows.width)
    usual = np.bincount(labels, weights=own, minlength=rows.width) / np.maximum(count, 1)
    claims = np.where((p >= usual) & (count > 0), p, -1.0)
    claimed = claims.argmax(axis=1)
    suspect = np.flatnonzero((claims.max(axis=1) >= 0) & (claimed != labels))
    margin = p[suspect, claimed[suspect]] - own[suspect]
    return _listed(rows, suspect[np.argsort(-margin, kind="stable")], claimed, n, "labels that look wrong")
