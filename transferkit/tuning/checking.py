"""What each batch of the training data must be: looked at when it is read, so that an error names the batch and the row.

Data in memory is looked at as a whole before training. Looking costs one pass over a batch's memory: the product of an array of
floats with itself is finite only if every value is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.heads import Head, check_class_names
from transferkit.data import Data
from transferkit.errors import DataError
from transferkit.tuning.objectives import Objective
from transferkit.weights.values import is_finite

__all__ = ["BatchChecks", "check_classes"]


def check_classes(data: Any, validation: Any, heads: Sequence[Head]) -> None:
    """Raises a DataError where data and model, or two `Data`, number classes differently, so that a label would mean another."""
    ours, theirs = (part.class_names if isinstance(part, Data) else () for part in (data, validation))
    if len(heads) == 1:
        check_class_names(heads[0], ours, asked="Checking the training data against the model.")
    if ours and theirs and ours != theirs:
        found = [f"no class {name!r} in the validation data" for name in ours if name not in theirs]
        found += [f"no class {name!r} in the training data" for name in theirs if name not in ours]
        raise DataError(
            "Checking the validation data against the training data.",
            found=found or "the same classes in another order",
            cause="classes are numbered in the order of their folders, so one number would mean two classes",
            fix="give both the same folders, or set a share of the training data apart: validation_data=0.1",
        )
    if len(heads) == 1:
        check_class_names(heads[0], theirs, asked="Checking the validation data against the model.")


_SPARSE = "SparseCategoricalCrossentropy"
_SPREAD = (tf.RaggedTensor, tf.SparseTensor)
_MARK = "transferkit.checking|"
_NOT_FINITE = "{} {} values that are NaN or infinite, the first in row {}"
_FIX_FINITE = "fill or drop rows that aren't finite"
_OUTSIDE = "hold {} in row {}, where {} classes are numbered 0 to {}"
_FIX_CLASSES = "give labels from 0 on, and the head one unit for each class"


class BatchChecks:
    """The checks of a training.

    Args:
        objective: What it minimises; says which labels are numbers of classes.
        heads: The model's heads; say how many classes there are.
    """

    def __init__(self, objective: Objective, heads: Sequence[Head]) -> None:
        loss = objective.loss
        if isinstance(loss, Mapping):
            losses = {head.output: loss.get(head.output) for head in heads}
        elif isinstance(loss, (list, tuple)):
            losses = {head.output: item for head, item in zip(heads, loss, strict=False)}
        else:
            losses = {head.output: loss for head in heads[:1]}
        #: Output → how many classes it has, where labels are their numbers.
        self._classes = {
            head.output: head.shape[-1] for head in heads if head.shape and head.shape[-1] and _is_sparse(losses.get(head.output))
        }
        self._outputs = [head.output for head in heads]

    def whole(self, data: Any, *, name: str) -> None:
        """Looks at labels and weights of data in memory.

        Args:
            data: Its labels and weights, as a `Batch`.
            name: What the data is, for the error.

        Raises:
            DataError: with every problem found.
        """
        self._raise(self._labels(data.y) + _weights(data.sample_weight), f"Checking the labels of the {name}.")

    def batch(self, item: Any, number: int, over: int) -> None:
        """Looks at one batch.

        Args:
            item: `(x,)`, `(x, y)` or `(x, y, sample_weight)`.
            number: Which batch it is.
            over: Which pass over the data it belongs to.

        Raises:
            DataError: with every problem found.
        """
        if not isinstance(item, tuple) or not 1 <= len(item) <= 3:
            return
        x, y, weight = (*item, None, None)[:3]
        problems = _rows(item)
        for place, leaf in _leaves(x, "the input"):
            problems += _not_finite(place, leaf)
        if not problems:
            problems = self._labels(y) + _weights(weight)
        self._raise(problems, f"Reading batch {number} of pass {over} over the training data.")

    def in_graph(self, item: tuple[Any, ...], number: Any) -> list[Any]:
        """The same for a batch within a graph of TensorFlow's, as operations that fail; Python there could wait for itself.

        Args:
            item: As for `batch`, of symbolic tensors.
            number: Which batch it is, a tensor.
        """
        if not 1 <= len(item) <= 3:
            return []
        x, y, weight = (*item, None, None)[:3]
        made = []

        def look(wrong: Any, leaf: Any, words: str, fix: str) -> Any:
            def fail() -> Any:
                at = tf.where(wrong)
                values = (tf.shape(at)[0] if "values" in words else tf.gather_nd(leaf, at)[0], at[0, 0])
                said = tf.strings.format(f"{_MARK}{{}}|{words}|{fix}|", (number, *values))
                return tf.debugging.Assert(False, [said])

            return tf.cond(tf.reduce_any(wrong), fail, tf.no_op)

        def look_finite(leaf: Any, place: str) -> None:
            words = f"{place} {_NOT_FINITE.format(_have(place), '{}', '{}')}"
            # One pass tells of nearly all batches; squares of large numbers may be infinite where these aren't.
            made.append(
                tf.cond(
                    tf.math.is_finite(tf.nn.l2_loss(leaf)),
                    tf.no_op,
                    lambda: look(~tf.math.is_finite(leaf), leaf, words, _FIX_FINITE),
                )
            )

        for parts, where in ((x, "the input"), (weight, "the weights")):
            for place, leaf in _dense(parts, where):
                if leaf.dtype.is_floating:
                    look_finite(leaf, place)
        for name, values in self._by_output(y).items():
            where = f"the labels of output {name!r}" if len(self._outputs) > 1 else "the labels"
            for place, leaf in _dense(values, where):
                if leaf.dtype.is_floating:
                    look_finite(leaf, place)
                classes = self._classes.get(name)
                if classes is not None and (leaf.dtype.is_integer or leaf.dtype.is_floating):
                    wide = tf.cast(leaf, tf.int64)
                    words = f"{place} {_OUTSIDE.format('{}', '{}', classes, classes - 1)}"
                    made.append(look((wide < 0) | (wide >= classes), wide, words, _FIX_CLASSES))
        return made

    def told_by(self, error: Any, over: int) -> DataError | None:
        """The error that an operation of `in_graph` stands for, or None for another."""
        found = re.search(re.escape(_MARK) + r"(\d+)\|(.*?)\|(.*?)\|", str(error.message))
        if found is None:
            return None
        number, said, fix = (part.replace("\\'", "'") for part in found.groups())
        return DataError(f"Reading batch {number} of pass {over} over the training data.", found=said, fix=fix)

    def _raise(self, problems: list[tuple[str, str]], asked: str) -> None:
        if problems:
            fixes = dict.fromkeys(fix for _, fix in problems)
            raise DataError(asked, found=[found for found, _ in problems], fix="; ".join(fixes))

    def _labels(self, y: Any) -> list[tuple[str, str]]:
        problems = []
        for name, values in self._by_output(y).items():
            where = f"the labels of output {name!r}" if len(self._outputs) > 1 else "the labels"
            for place, leaf in _leaves(values, where):
                classes = self._classes.get(name)
                problems += _not_finite(place, leaf) or ([] if classes is None else _classes(place, leaf, classes))
        return problems

    def _by_output(self, y: Any) -> dict[str, Any]:
        if isinstance(y, Mapping):
            return dict(y)
        if isinstance(y, (list, tuple)):
            return dict(zip(self._outputs, y, strict=False))
        return {} if y is None else dict.fromkeys(self._outputs[:1], y)


def _is_sparse(loss: Any) -> bool:
    if isinstance(loss, str):
        return loss.replace("_", "").lower() == _SPARSE.lower()
    return isinstance(loss, getattr(keras.losses, _SPARSE)) or loss is keras.losses.sparse_categorical_crossentropy


def _dense(part: Any, where: str) -> list[tuple[str, Any]]:
    """The arrays or tensors of a part with words for where they are; what isn't dense is left out."""
    leaves = [] if part is None else tf.nest.flatten(part)
    named = [(f"{where}, part {index}," if len(leaves) > 1 else where, leaf) for index, leaf in enumerate(leaves)]
    return [(place, leaf) for place, leaf in named if hasattr(leaf, "shape") and not isinstance(leaf, _SPREAD)]


def _leaves(part: Any, where: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
    return [(place, np.asarray(leaf)) for place, leaf in _dense(part, where)]


def _rows(item: tuple[Any, ...]) -> list[tuple[str, str]]:
    names = ("inputs", "labels", "sample weights")
    counts = {
        name: sorted({leaf.shape[0] if leaf.ndim else -1 for _, leaf in _leaves(part, "")})
        for name, part in zip(names, item, strict=False)
    }
    found = {count for listed in counts.values() for count in listed}
    if found == {0}:
        return [("no rows", "leave empty batches out")]
    if len(found) <= 1:
        return []
    said = " and ".join(f"{name} of {', '.join(map(str, listed))} rows" for name, listed in counts.items() if listed)
    return [(said, "give one label, and one weight, for each row")]


def _not_finite(place: str, values: np.ndarray[Any, Any]) -> list[tuple[str, str]]:
    if values.dtype.kind != "f" or is_finite(values):
        return []
    bad = ~np.isfinite(values)
    row = int(np.argwhere(bad)[0][0])
    return [
        (
            f"{place} {_NOT_FINITE.format(_have(place), int(bad.sum()), row)}",
            _FIX_FINITE,
        )
    ]


def _have(place: str) -> str:
    return "have" if place.startswith(("the labels", "the weights")) else "has"


def _classes(place: str, values: np.ndarray[Any, Any], classes: int) -> list[tuple[str, str]]:
    if values.dtype.kind not in "buif" or not values.size:
        return []
    if values.dtype.kind == "f" and (broken := values != np.floor(values)).any():
        row = int(np.argwhere(broken)[0][0])
        said = f"{place} hold {float(values[broken][0]):g} in row {row}, where numbers of classes are whole"
        return [(said, "give whole numbers of classes, or a head and a loss for quantities")]
    wrong = (values < 0) | (values >= classes)
    if not wrong.any():
        return []
    row = int(np.argwhere(wrong)[0][0])
    return [(f"{place} {_OUTSIDE.format(int(values[wrong][0]), row, classes, classes - 1)}", _FIX_CLASSES)]


def _weights(weight: Any) -> list[tuple[str, str]]:
    problems = []
    for place, leaf in _leaves(weight, "the weights"):
        problems += _not_finite(place, leaf)
        if not problems and leaf.dtype.kind in "fi" and (leaf < 0).any():
            row = int(np.argwhere(leaf < 0)[0][0])
            problems.append((f"{place} hold {leaf[leaf < 0][0]:g} in row {row}", "give weights of at least 0"))
    return problems
