"""What a head and its labels make together: the task, and with it the loss that follows.

The same integers mean classes to a softmax of ten units and nothing at all to a softmax of two; so the task is read from both
sides, the labels' values and the head's width and activation. Training chooses its loss here and evaluation its metrics, so
that the two can't differ. Where two readings are possible none is guessed: the error shows each with the call that chooses it.

Imports NumPy and `errors` only: labels come as an array, the head as the shape and the activation's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferkit.errors import DataError

__all__ = ["Task", "TaskKind", "task_of"]

TaskKind = Literal["binary", "multiclass-sparse", "multiclass-onehot", "multilabel", "regression"]

_LOSSES: dict[TaskKind, str] = {
    "binary": "BinaryCrossentropy",
    "multiclass-sparse": "SparseCategoricalCrossentropy",
    "multiclass-onehot": "CategoricalCrossentropy",
    "multilabel": "BinaryCrossentropy",
    "regression": "MeanSquaredError",
}


@dataclass(frozen=True)
class Task:
    """What a head is for, told from its labels.

    Args:
        kind: `"binary"` (one unit, labels 0 and 1), `"multiclass-sparse"` (several units, one class index a row),
            `"multiclass-onehot"` (several units, a row of class probabilities, mostly one-hot), `"multilabel"` (several units,
            each 0 or 1 by itself) or `"regression"`.
        units: Width of the head: the length of the last axis of its output.
        from_logits: Whether the head gives logits, which a softmax or sigmoid still has to turn into probabilities.
        soft: Whether the labels of `"multiclass-onehot"` hold probabilities other than 0 and 1.
    """

    kind: TaskKind
    units: int
    from_logits: bool = False
    soft: bool = False

    @property
    def loss(self) -> str:
        """The class in `keras.losses` that follows."""
        return _LOSSES[self.kind]

    @property
    def loss_arguments(self) -> dict[str, bool]:
        """The arguments for that class."""
        return {} if self.kind == "regression" else {"from_logits": self.from_logits}

    @property
    def is_classification(self) -> bool:
        """Whether labels are classes rather than quantities."""
        return self.kind != "regression"

    def __str__(self) -> str:
        logits = "" if self.kind == "regression" else (" from logits" if self.from_logits else " from probabilities")
        return f"{self.kind}, {self.units} unit{'s' if self.units != 1 else ''}{logits}"


def task_of(labels: ArrayLike, *, output_shape: Sequence[int | None], activation: str | None, output: str = "") -> Task:
    """Tells the task from all the labels and the shape and activation of the head.

    Args:
        labels: Labels of shape (n,), (n, 1) or (n, *output_shape): integers, booleans or floats. Give all of them where they
            are at hand: a few rows may look one-hot by chance.
        output_shape: Shape of the head's output without the batch axis, such as `(10,)`; `()` counts as `(1,)`.
        activation: Name of the head's activation, such as `"softmax"` or `"linear"`; None when it isn't known.
        output: Name of the output, for messages of models with several.

    Returns:
        The `Task`.

    Raises:
        DataError: when labels and head don't fit, or fit in more than one way.

    Example:
        >>> print(task_of([3, 0, 9], output_shape=(10,), activation="linear"))
        multiclass-sparse, 10 units from logits
        >>> task_of([0.5, 2.5], output_shape=(1,), activation="linear").loss
        'MeanSquaredError'
    """
    shape = tuple(output_shape) or (1,)
    units = shape[-1]
    head = _Head(units=units or 0, activation=activation, name=output)
    if units is None:
        raise head.misfit(
            "an output whose last axis has no fixed length", fix="end the model with a layer of a fixed width, such as Dense"
        )
    values = _checked(labels, head)
    per_row = values.shape[1:]
    if units == 1:
        if per_row not in ((), (1,)) and not _same(per_row, shape) and not _same(per_row, shape[:-1]):
            raise head.shapes(values, shape)
        return _one_unit(values, head)
    if _same(per_row, shape):
        return _row_per_unit(values, head)
    if _same(per_row, shape[:-1]) or _same(per_row, (*shape[:-1], 1)):
        return _class_indices(values, head)
    raise head.shapes(values, shape)


@dataclass(frozen=True)
class _Head:
    units: int
    activation: str | None
    name: str

    @property
    def asked(self) -> str:
        where = f" of output {self.name!r}" if self.name else ""
        units = f"{self.units} unit{'s' if self.units != 1 else ''}"
        shown = f"activation {self.activation!r}" if self.activation else "an activation that can't be told"
        return f"Telling the task from the labels and the head{where} ({units}, {shown})."

    def misfit(self, found: str, *, cause: str | None = None, fix: str | None = None) -> DataError:
        return DataError(self.asked, found=found, cause=cause, fix=fix)

    def shapes(self, values: NDArray[np.generic], shape: tuple[int | None, ...]) -> DataError:
        indices = ("n", *shape[:-1])
        return self.misfit(
            f"labels of shape {values.shape}, but the head gives (n, {', '.join(map(str, shape))})",
            cause="the head has another width than there are classes or targets",
            fix=f"give labels of shape {_shown(indices)} (class indices) or {_shown(('n', *shape))} (one column for each unit), "
            "or change the head's units",
        )

    def ambiguous(self, found: str, *choices: str) -> DataError:
        return self.misfit(
            found, cause="more than one task fits", fix="say which: " + "; or ".join(choices) + "; or give the loss yourself"
        )

    def from_logits(self) -> bool:
        """Whether the head's outputs are logits; an error when nothing tells."""
        if self.activation == "linear":
            return True
        if self.activation in ("softmax", "sigmoid"):
            return False
        shown = f"the activation {self.activation!r}" if self.activation else "no layer with an activation at the end"
        raise self.misfit(
            f"class labels, and {shown}, which gives neither probabilities nor plain logits",
            cause="the loss must know whether it is given probabilities or logits",
            fix='end the model with activation "softmax", "sigmoid" or none, or give the loss yourself',
        )


def _shown(shape: Sequence[object]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _same(found: tuple[int, ...], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(w is None or f == w for f, w in zip(found, wanted, strict=True))


def _checked(labels: ArrayLike, head: _Head) -> NDArray[np.generic]:
    values = np.asarray(labels)
    if values.dtype.kind not in "buif":
        raise head.misfit(
            f"labels of type {values.dtype}",
            cause="labels are names or objects rather than numbers",
            fix="turn them into class indices: classes, y = np.unique(labels, return_inverse=True)",
        )
    if values.ndim == 0 or values.size == 0:
        raise head.misfit(f"no labels (shape {values.shape})", cause="the data is empty", fix="give at least one labelled row")
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise head.misfit(
                f"{int(bad.sum())} of {values.size} labels aren't finite, the first in row {row}",
                cause="a missing value in the table the labels come from",
                fix="drop or fill these rows first",
            )
    return values


def _is_zero_one(values: NDArray[np.generic]) -> bool:
    return values.dtype.kind == "b" or bool(((values == 0) | (values == 1)).all())


def _one_unit(values: NDArray[np.generic], head: _Head) -> Task:
    if head.activation == "softmax":
        raise head.misfit(
            "a softmax over one unit, which gives 1.0 whatever the input",
            cause="a two-class head with a single unit",
            fix='use one unit with activation "sigmoid", or two units with "softmax"',
        )
    whole = values.dtype.kind in "bui"
    low, high = float(values.min()), float(values.max())
    if _is_zero_one(values):
        if head.activation == "sigmoid" or whole:
            return Task("binary", 1, head.from_logits())
        raise head.ambiguous(
            "floats that are only 0.0 and 1.0",
            "for two classes, y.astype('int32')",
            'for a quantity, the loss "mse"',
        )
    if head.activation == "sigmoid":
        raise head.misfit(
            f"labels between {low:g} and {high:g}, where one sigmoid unit takes 0 and 1",
            cause="more classes than the head has room for, labels such as 1 and 2, or probabilities as targets",
            fix="give one unit for each class with softmax, subtract the lowest label, or give the loss yourself",
        )
    if whole:
        raise head.ambiguous(
            f"integers between {low:g} and {high:g} for one unit",
            "for a quantity, y.astype('float32')",
            "for classes, a head with one unit for each of them",
        )
    return Task("regression", 1)


def _class_indices(values: NDArray[np.generic], head: _Head) -> Task:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and not bool((values == np.floor(values.astype(np.float64))).all()):
        raise head.misfit(
            f"one float a row (between {low:g} and {high:g}) for {head.units} units",
            cause="a quantity to predict, and a head for classes",
            fix="use a head of one linear unit",
        )
    if low < 0 or high >= head.units:
        raise head.misfit(
            f"class indices from {low:g} to {high:g}; {head.units} units take 0 to {head.units - 1}",
            cause="labels that start at 1" if low == 1 and high == head.units else "a head with another number of classes",
            fix="y - 1" if low == 1 and high == head.units else "give the head one unit for each class, and labels from 0 on",
        )
    if head.activation == "sigmoid":
        raise head.ambiguous(
            "one class index a row, and a sigmoid for each unit",
            'for classes that exclude each other, activation "softmax"',
            "for labels that don't, one column of 0 and 1 for each unit",
        )
    return Task("multiclass-sparse", head.units, head.from_logits())


def _row_per_unit(values: NDArray[np.generic], head: _Head) -> Task:
    whole = values.dtype.kind in "bui"
    # In float64: a sum of many float16 or uint8 ones must not be rounded or wrap around.
    numbers = values.astype(np.float64)
    sums = numbers.sum(axis=-1)
    low, high = float(numbers.min()), float(numbers.max())
    if _is_zero_one(values):
        one_hot = bool((sums == 1).all())
        if head.activation == "sigmoid":
            return Task("multilabel", head.units)
        if one_hot:
            return Task("multiclass-onehot", head.units, head.from_logits())
        if head.activation == "softmax":
            row = int(np.argwhere(sums != 1)[0][0])
            raise head.misfit(
                f"rows with {int(sums.min())} to {int(sums.max())} ones (the first that hasn't one is row {row})",
                cause="several labels a row, and a softmax, which shares out one",
                fix='use activation "sigmoid" for labels that don\'t exclude each other',
            )
        if whole:
            return Task("multilabel", head.units, head.from_logits())
        raise head.ambiguous(
            "floats that are only 0.0 and 1.0, several ones a row",
            "for labels that don't exclude each other, y.astype('int32')",
            'for quantities, the loss "mse"',
        )
    tolerance = 1e-3 if values.dtype == np.float16 else 1e-5
    shares = low >= 0 and bool((np.abs(sums - 1) <= tolerance).all())
    if head.activation == "softmax":
        if shares:
            return Task("multiclass-onehot", head.units, soft=True)
        raise head.misfit(
            f"rows of numbers between {low:g} and {high:g} that sum to {sums.min():.4g} … {sums.max():.4g}",
            cause="quantities to predict, and a softmax, which gives shares of one",
            fix="use a linear head for quantities; normalise the rows for class probabilities",
        )
    if head.activation == "sigmoid":
        raise head.misfit(
            f"numbers between {low:g} and {high:g}, where sigmoid units take 0 and 1",
            cause="probabilities as targets, or quantities",
            fix="use a linear head for quantities; give the loss yourself for probabilities as targets",
        )
    if whole:
        raise head.ambiguous(
            f"integers between {low:g} and {high:g}, a row of {head.units}", "for quantities, y.astype('float32')"
        )
    if shares:
        raise head.ambiguous(
            "rows of floats that sum to one, and a linear head",
            'for class probabilities, activation "softmax"',
            'for quantities, the loss "mse"',
        )
    return Task("regression", head.units)
