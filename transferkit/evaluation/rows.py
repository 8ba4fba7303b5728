"""Labels and predictions side by side, checked once and brought to one form, which every metric then reads.

Class labels become indices, predictions probabilities in float64; what doesn't fit (logits where probabilities must stand,
rows that don't sum to one, labels outside the head, values that aren't finite) is an error here, so that no metric meets it.

Imports NumPy and `errors` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferkit.errors import EvaluationError

__all__ = ["FloatArray", "IntArray", "Kind", "Rows", "probabilities_of"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Kind = Literal["binary", "multiclass", "multilabel", "regression"]


@dataclass(frozen=True)
class Rows:
    """The rows to be judged, in the form that belongs to the kind; made by `Rows.of`, which checks them.

    Args:
        kind: The task.
        labels: Class indices (n,) for `"binary"` and `"multiclass"`, zeros and ones (n, k) for `"multilabel"`, quantities (n,
            d) for `"regression"`.
        predictions: Probability of class 1 (n,) for `"binary"`, of each class (n, k) for `"multiclass"`, of each label (n, k) for
            `"multilabel"`; quantities (n, d) for `"regression"`.
        weight: One sample weight a row (n,), or None for equal ones.
        groups: One group code a row (n,), 0 … g-1, or None: rows of a group aren't independent and are resampled together.
        threshold: The probability above which class 1 or a label is predicted.
        classes: A name for each class, label or quantity.
        soft_labels: Class probabilities (n, k) where the labels were such; `labels` then holds the most probable class.
    """

    kind: Kind
    labels: NDArray[np.generic]
    predictions: FloatArray
    weight: FloatArray | None = None
    groups: IntArray | None = None
    threshold: float = 0.5
    classes: tuple[str, ...] = ()
    soft_labels: FloatArray | None = None

    @classmethod
    def of(
        cls,
        labels: ArrayLike,
        predictions: ArrayLike,
        *,
        kind: Kind | None = None,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        threshold: float = 0.5,
        classes: Sequence[str] | None = None,
        asked: str = "Judging predictions.",
    ) -> Rows:
        """Checks labels and predictions and brings them to one form.

        Args:
            labels: Class indices (n,) or (n, 1), one-hot rows, class probabilities or zeros and ones (n, k), or quantities.
            predictions: Probabilities: (n,) or (n, 1) of class 1, (n, k) of each class or label; or quantities.
            kind: The task; told from the values when left out (several columns whose rows sum to one are classes, other
                probabilities labels that don't exclude each other, everything else quantities).
            sample_weight: Weights (n,), finite, not negative, not all zero.
            groups: Group of each row (n,), of any sortable type.
            threshold: The probability above which class 1 or a label is predicted.
            classes: A name for each class.
            asked: What the caller wanted, for messages.

        Raises:
            EvaluationError: when anything doesn't fit.
        """
        y, p = np.asarray(labels), np.asarray(predictions)
        if y.dtype.kind not in "buif" or p.dtype.kind not in "buif":
            raise EvaluationError(
                asked,
                found=f"labels of type {y.dtype} and predictions of type {p.dtype}, where both must be numbers",
                fix="turn labels into class indices: classes, y = np.unique(labels, return_inverse=True)",
            )
        if y.ndim == 0 or p.ndim == 0 or len(y) == 0 or len(p) == 0:
            raise EvaluationError(
                asked, found="no rows", cause="the data, or the slice of it, is empty", fix="give at least one row"
            )
        if len(y) != len(p):
            raise EvaluationError(
                asked,
                found=f"{len(y)} labels and {len(p)} predictions",
                cause="labels and predictions were collected in two passes, or a part was left out",
            )
        p = p.astype(np.float64)
        if p.ndim == 1:
            p = p[:, None]
        if y.ndim == 1:
            y = y[:, None]
        if p.ndim != 2 or y.ndim != 2:
            raise EvaluationError(
                asked,
                found=f"labels of shape {np.shape(labels)} and predictions of shape {np.shape(predictions)}",
                fix="flatten positions to rows: predictions.reshape(-1, predictions.shape[-1])",
            )
        _finite(y, "labels", asked)
        _finite(p, "predictions", asked)
        told = kind or _kind_of(y, p)
        n = len(y)
        rows = cls(
            told,
            y,
            p,
            weight=None if sample_weight is None else _weights(sample_weight, n, asked),
            groups=None if groups is None else _groups(groups, n, asked),
            threshold=threshold,
        )
        canonical = {"binary": _binary, "multiclass": _multiclass, "multilabel": _multilabel, "regression": _regression}[told]
        rows = canonical(rows, asked)
        return replace(rows, classes=_names(classes, rows, asked))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """The number of classes, labels or quantities."""
        return 2 if self.kind == "binary" else int(self.predictions.shape[1])

    @property
    def decisions(self) -> NDArray[np.generic]:
        """Predicted class indices (n,), zeros and ones (n, k) for several labels, or the quantities themselves."""
        if self.kind == "multiclass":
            return np.asarray(self.predictions.argmax(axis=1))
        if self.kind == "regression":
            return self.predictions
        return (self.predictions > self.threshold).astype(np.int64)

    @property
    def class_probabilities(self) -> FloatArray:
        """Probabilities (n, k) of every class, for `"binary"` and `"multiclass"` alike."""
        return np.stack([1 - self.predictions, self.predictions], axis=1) if self.kind == "binary" else self.predictions

    @property
    def confidence(self) -> FloatArray:
        """The probability (n,) given to the predicted class."""
        probabilities = self.class_probabilities
        return np.asarray(np.take_along_axis(probabilities, self.decisions[:, None].astype(np.intp), axis=1)[:, 0])

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the classes or labels that no row has."""
        if self.kind == "regression":
            return ()
        if self.kind == "multilabel":
            present = (self.labels == 1).any(axis=0)
        else:
            present = np.bincount(self.labels.astype(np.intp), minlength=self.width) > 0
        return tuple(name for name, there in zip(self.classes, present, strict=True) if not there)

    def take(self, chosen: NDArray[np.generic]) -> Rows:
        """The rows that a mask or an index array chooses."""
        groups = None
        if self.groups is not None:
            groups = np.unique(self.groups[chosen], return_inverse=True)[1].astype(np.int64)
        return replace(
            self,
            labels=self.labels[chosen],
            predictions=self.predictions[chosen],
            weight=None if self.weight is None else self.weight[chosen],
            groups=groups,
            soft_labels=None if self.soft_labels is None else self.soft_labels[chosen],
        )


def _finite(values: NDArray[np.generic], what: str, asked: str) -> None:
    if values.dtype.kind != "f":
        return
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise EvaluationError(
            asked,
            found=f"{what} that aren't finite in {int(bad.sum())} of {len(values)} rows, the first in row {int(bad.argmax())}",
            cause="the model's weights or its inputs aren't finite" if what == "predictions" else "missing values in the labels",
            fix="look at the inputs of that row, and at the weights for NaN"
            if what == "predictions"
            else "drop or fill these rows first",
        )


def _kind_of(y: NDArray[np.generic], p: FloatArray) -> Kind:
    inside = bool(((p >= 0) & (p <= 1)).all())
    if p.shape[1] == 1:
        zero_one = bool(((y == 0) | (y == 1)).all())
        return "binary" if zero_one else "regression"
    if y.shape[1] == 1:
        return "multiclass"
    if inside and bool((np.abs(p.sum(axis=1) - 1) < 1e-3).all()):
        return "multiclass"
    return "multilabel" if bool(((y == 0) | (y == 1)).all()) else "regression"


def _weights(weights: ArrayLike, n: int, asked: str) -> FloatArray:
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim == 2 and w.shape[1] == 1:
        w = w[:, 0]
    problems = []
    if w.shape != (n,):
        problems.append(f"sample weights of shape {w.shape} for {n} rows")
    else:
        if not np.isfinite(w).all():
            problems.append(f"{int((~np.isfinite(w)).sum())} sample weights that aren't finite")
        if (w < 0).any():
            problems.append(f"{int((w < 0).sum())} negative sample weights")
        if not problems and w.sum() == 0:
            problems.append("sample weights that are all zero")
    if problems:
        raise EvaluationError(asked, found=problems, fix="give one finite weight a row, zero or more")
    return w


def _groups(groups: ArrayLike, n: int, asked: str) -> IntArray:
    g = np.asarray(groups)
    if g.shape != (n,):
        raise EvaluationError(asked, found=f"groups of shape {g.shape} for {n} rows", fix="give one group a row")
    codes = np.unique(g, return_inverse=True)[1].astype(np.int64)
    if codes.max() == 0:
        raise EvaluationError(
            asked, found="one group only", cause="an interval needs several independent groups", fix="leave `groups` out"
        )
    return codes


def probabilities_of(values: FloatArray, *, exclusive: bool, asked: str) -> FloatArray:
    """Gives `values` back when they are probabilities.

    Args:
        values: Predictions of shape (n, k).
        exclusive: Whether a row must sum to one.
        asked: What the caller wanted, for messages.

    Raises:
        EvaluationError: when a value lies outside 0 … 1 or a row doesn't sum to one.
    """
    slack = 1e-6
    if bool((values < -slack).any()) or bool((values > 1 + slack).any()):
        raise EvaluationError(
            asked,
            found=f"predictions between {values.min():.4g} and {values.max():.4g}, where probabilities lie in 0 … 1",
            cause="logits are taken for probabilities: the head has no softmax or sigmoid",
            fix="compile with a loss of from_logits=True, give the head its activation, or pass probabilities",
        )
    if exclusive:
        sums = values.sum(axis=1)
        # float16 heads miss one by up to 1e-3; anything further isn't rounding.
        off = np.abs(sums - 1)
        if bool((off > 2e-3).any()):
            row = int(off.argmax())
            raise EvaluationError(
                asked,
                found=f"{int((off > 2e-3).sum())} of {len(values)} rows of probabilities don't sum to one "
                f"(row {row} sums to {sums[row]:.4g})",
                cause="sigmoids instead of a softmax, or probabilities that were cut or changed afterwards",
                fix="use a softmax for classes that exclude each other; give zeros and ones (n, k) as labels where they don't",
            )
    return np.clip(values, 0.0, 1.0)


def _binary(rows: Rows, asked: str) -> Rows:
    y, p = rows.labels, rows.predictions
    if p.shape[1] == 2:
        p = probabilities_of(p, exclusive=True, asked=asked)[:, 1:]
    if y.shape[1] != 1 or p.shape[1] != 1:
        raise EvaluationError(
            asked,
            found=f"labels of shape {y.shape} and predictions of shape {p.shape} for two classes",
            fix="give one column of each",
        )
    if not bool(((y == 0) | (y == 1)).all()):
        raise EvaluationError(
            asked,
            found=f"labels between {float(y.min()):g} and {float(y.max()):g}, where one unit takes 0 and 1",
            cause="labels outside the head: more classes than it has room for, or labels such as 1 and 2",
            fix="give a head with one unit for each class, or labels 0 and 1",
        )
    return replace(rows, labels=y[:, 0].astype(np.int64), predictions=probabilities_of(p, exclusive=False, asked=asked)[:, 0])


def _multiclass(rows: Rows, asked: str) -> Rows:
    y = rows.labels
    p = probabilities_of(rows.predictions, exclusive=True, asked=asked)
    k = p.shape[1]
    soft: FloatArray | None = None
    if y.shape[1] == 1:
        numbers = y[:, 0].astype(np.float64)
        if not bool((numbers == np.floor(numbers)).all()):
            raise EvaluationError(
                asked,
                found=f"labels that aren't whole numbers, between {numbers.min():g} and {numbers.max():g}",
                cause="quantities, and a head for classes",
                fix="use a linear head and metrics for quantities, such as 'mae'",
            )
        outside = (numbers < 0) | (numbers >= k)
        if bool(outside.any()):
            shown = ", ".join(f"{v:g}" for v in np.unique(numbers[outside])[:5])
            raise EvaluationError(
                asked,
                found=f"{int(outside.sum())} of {len(y)} labels outside the head ({shown}); {k} units take 0 to {k - 1}",
                cause="labels that start at 1, or classes the head wasn't trained for",
                fix="let labels start at 0, and give the head one unit for each class",
            )
        indices = numbers.astype(np.int64)
    else:
        numbers = y.astype(np.float64)
        if y.shape[1] != k:
            raise EvaluationError(
                asked,
                found=f"label rows of {y.shape[1]} classes and predictions of {k}",
                cause="another head than the labels' one",
            )
        if bool((numbers < 0).any()) or bool((np.abs(numbers.sum(axis=1) - 1) > 1e-3).any()):
            raise EvaluationError(
                asked,
                found="label rows that don't sum to one",
                cause="several labels a row, and predictions of classes that exclude each other",
                fix="use sigmoids and labels of zeros and ones for labels that don't exclude each other",
            )
        indices = numbers.argmax(axis=1).astype(np.int64)
        if not bool(((numbers == 0) | (numbers == 1)).all()):
            soft = numbers
    return replace(rows, labels=indices, predictions=p, soft_labels=soft)


def _multilabel(rows: Rows, asked: str) -> Rows:
    y, p = rows.labels, rows.predictions
    if y.shape != p.shape:
        raise EvaluationError(
            asked, found=f"labels of shape {y.shape} and predictions of shape {p.shape}", fix="give one column for each label"
        )
    if not bool(((y == 0) | (y == 1)).all()):
        raise EvaluationError(
            asked,
            found=f"labels between {float(y.min()):g} and {float(y.max()):g}, where each is 0 or 1",
            fix="give zeros and ones",
        )
    return replace(rows, labels=y.astype(np.int64), predictions=probabilities_of(p, exclusive=False, asked=asked))


def _regression(rows: Rows, asked: str) -> Rows:
    if rows.labels.shape != rows.predictions.shape:
        raise EvaluationError(
            asked,
            found=f"targets of shape {rows.labels.shape} and predictions of shape {rows.predictions.shape}",
            cause="a head of another width than there are targets",
        )
    return replace(rows, labels=rows.labels.astype(np.float64))


def _names(classes: Sequence[str] | None, rows: Rows, asked: str) -> tuple[str, ...]:
    if classes is None:
        return tuple(str(i) for i in range(rows.width))
    names = tuple(str(name) for name in classes)
    if len(names) != rows.width or len(set(names)) != len(names):
        raise EvaluationError(
            asked,
            found=f"{len(names)} class names ({len(set(names))} of them different) for {rows.width} classes",
            fix="give each class a name of its own, in the order of the head's units",
        )
    return names
