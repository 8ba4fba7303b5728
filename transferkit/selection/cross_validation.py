"""Cross-validation of a recipe: a new model for each fold, and an interval that owns up to training sets that overlap.

What is learned from rows (weights, the statistics of layers that adapt) is learned anew in each fold, on its training rows
only. May import Keras and the floors below.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transferkit._table import Table, Tabular
from transferkit.building.replicas import bytes_of_all
from transferkit.data import Data, is_arrays
from transferkit.errors import DataError, EvaluationError, StorageError, did_you_mean
from transferkit.evaluation.comparing import Comparison, Difference
from transferkit.evaluation.estimating import Estimate, greater_is_better
from transferkit.evaluation.folds import Fold, nadeau_bengio
from transferkit.evaluation.folds import folds as deal
from transferkit.evaluation.intervals import t_tails
from transferkit.placement import Placement, check_placement, has_workers, worker_count, worker_number
from transferkit.recipe import Recipe
from transferkit.storage import atomic_path
from transferkit.tuning.replicated import check_alike
from transferkit.tuning.sharing import shared_features

__all__ = ["CrossValidation", "cross_validate", "fold_seed"]


#: Below this many scores the quantile of Student's t is so large that the interval says little.
_ENOUGH = 5


@dataclass(frozen=True, eq=False)
class CrossValidation(Tabular, Mapping[str, Estimate]):
    """What cross-validation found: a mapping from metric to its mean over the folds, with Nadeau and Bengio's interval.

    Args:
        estimates: The means by metric.
        scores: Metric → its value in each fold, all repetitions one after the other.
        predictions: What the model that hadn't seen the row said of it, in the rows' order: (repeats, n), (repeats, n, k).
        labels: The labels in the same order.
        seconds: How long each fold took; 0 for one that was read back.
        repeats: How often all was dealt anew.
        folds: The folds, all repetitions one after the other.
    """

    estimates: Mapping[str, Estimate]
    scores: Mapping[str, tuple[float, ...]]
    predictions: np.ndarray[Any, Any] = field(repr=False)
    labels: np.ndarray[Any, Any] = field(repr=False)
    seconds: tuple[float, ...] = ()
    repeats: int = 1
    folds: tuple[Fold, ...] = field(default=(), repr=False)

    def __getitem__(self, name: str) -> Estimate:
        if name not in self.estimates:
            raise KeyError(f"{name!r} wasn't measured{did_you_mean(name, self.estimates)}; there are {', '.join(self.estimates)}")
        return self.estimates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.estimates)

    def __len__(self) -> int:
        return len(self.estimates)

    def compare(self, other: CrossValidation, *, names: tuple[str, str] = ("first", "second"), level: float = 0.95) -> Comparison:
        """Compares this recipe with another on the same folds, metric by metric.

        The differences fold by fold have Nadeau and Bengio's corrected t-test and interval.

        Args:
            other: What cross-validation found of the other, with the same folds of the same rows.
            names: What to call this recipe and the other.
            level: Of the intervals of the differences, 0 to 1.

        Raises:
            EvaluationError: when the rows or the folds aren't the same, or no metric is in both.
        """
        asked = f"Comparing {names[0]} with {names[1]}."
        shared = [name for name in self if name in other]
        problems = []
        if not np.array_equal(self.labels, other.labels):
            problems.append("other labels, or the same in another order")
        elif len(self.folds) != len(other.folds) or not all(
            np.array_equal(a.test, b.test) for a, b in zip(self.folds, other.folds, strict=True)
        ):
            problems.append("other folds")
        if not shared:
            problems.append(f"no metric in both: {', '.join(self)} and {', '.join(other)}")
        if problems:
            raise EvaluationError(
                asked,
                found=problems,
                fix="cross-validate both on the same data with the same folds=, repeats=, groups=, stratified= and seed=",
            )
        made = {name: _difference(name, self.scores[name], other.scores[name], self.folds, level) for name in shared}
        return Comparison(made, names, len(self.labels))

    def table(self) -> Table:
        """The means with their intervals, and the spread over the folds."""
        rows = []
        for name, one in self.estimates.items():
            values = self.scores[name]
            rows.append((name, f"{one.value:.4f}", f"{one.low:.4f} – {one.high:.4f}", f"{min(values):.4f} – {max(values):.4f}"))
        count = len(self.seconds) // self.repeats
        notes = ["The interval is Nadeau and Bengio's: the folds share training rows, so their scores aren't independent."]
        if len(self.seconds) < _ENOUGH:
            notes.append(f"{len(self.seconds)} scores say little of their spread: more folds or repeats= narrow the interval.")
        repeated = f", {self.repeats} times" if self.repeats > 1 else ""
        level = next(iter(self.estimates.values())).level
        return Table(
            columns=("metric", ">mean", f">{level:.0%} interval", ">folds"),
            rows=rows,
            title=f"{count}-fold cross-validation{repeated} of {len(self.labels):,} rows",
            notes=notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain lists and dicts, without the predictions."""
        return {
            "metrics": {name: one.to_dict() for name, one in self.estimates.items()},
            "scores": {name: list(values) for name, values in self.scores.items()},
            "rows": len(self.labels),
            "repeats": self.repeats,
            "seconds": list(self.seconds),
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a metric."""
        return [{"metric": name, **one.to_dict()} for name, one in self.estimates.items()]


def cross_validate(
    recipe: Recipe,
    data: Any,
    *,
    folds: int = 5,
    repeats: int = 1,
    groups: ArrayLike | None = None,
    stratified: bool = True,
    level: float = 0.95,
    validation_data: float | None = None,
    batch_size: int = 32,
    class_weight: Mapping[int, float] | None = None,
    seed: int = 0,
    placement: Placement | None = None,
    folder: str | os.PathLike[str] | None = None,
    verbose: Any = 0,
) -> CrossValidation:
    """Runs the recipe once for each fold, on the other folds' rows, and judges it on the fold's.

    Args:
        recipe: What is run.
        data: A `Data`, or `(x, y)` or `(x, y, sample_weight)` of arrays.
        folds: How many.
        repeats: How often the rows are dealt into folds anew.
        groups: A group for each row (n,): rows of one group are never on both sides.
        stratified: Whether each fold gets its share of each class, where labels are whole numbers.
        level: Of the interval, 0 to 1.
        validation_data: A share of each fold's training rows set apart, for early stopping.
        batch_size: Rows in a batch.
        class_weight: As for `FineTuner.fit`.
        seed: Fixes the folds, and with them each fold's run.
        placement: Where it runs. Several workers each take some of the folds, alone, and all have the result; the devices of one
            process share the rows of each batch.
        folder: Where finished folds are kept, so that a run that was stopped goes on from there.
        verbose: As for Keras's `fit`.

    Raises:
        DataError: for data whose rows can't be told apart.
        EvaluationError: when a fold would be empty, or lack a class.

    Example:
        >>> import numpy as np
        >>> import transferkit as tk
        >>> x, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 2
        >>> tuner = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1)
        >>> recipe = tk.Recipe(tk.ModelBuilder((4,)).classifier(2), tuner=tuner, evaluator=tk.Evaluator("accuracy"))
        >>> found = tk.cross_validate(recipe, (x, y), folds=2)
        >>> found["accuracy"].low <= found["accuracy"].value <= found["accuracy"].high
        True
    """
    check_placement(placement, "Cross-validating.")
    source = _as_data(data)
    labels = np.asarray(source.labels)
    by_class = labels if stratified and labels.ndim == 1 and labels.dtype.kind in "iub" else None
    if by_class is not None and len(by_class) and (by_class == by_class[0]).all():
        raise DataError(
            "Cross-validating.",
            found=f"{len(by_class)} rows of one class",
            cause="rows sorted by class, of which the first were taken",
            fix="take rows at random: data.split(…); for quantities that are whole numbers give floats, or stratified=False",
        )
    dealt = deal(len(source), folds, labels=by_class, groups=groups, repeats=repeats, seed=seed)
    settings = (folds, repeats, stratified, groups is not None and list(np.asarray(groups)), seed, batch_size, validation_data)
    keeper = None if folder is None else _Keeper(folder, recipe, source, settings)
    strategy = None
    if placement is not None:
        with placement.scope() as strategy:
            pass
    own, alone = range(len(dealt)), placement
    if placement is not None and has_workers(strategy):
        marks = {"recipe": repr(recipe), "rows": hashlib.sha256(labels.tobytes()).hexdigest(), "settings": repr(settings)}
        check_alike(marks, source.rows(np.arange(min(len(source), 32))), strategy)
        own, alone = own[worker_number(strategy) :: worker_count(strategy)], placement.alone()
    done: dict[int, _Done] = {}
    with shared_features():
        for number in own:
            fold = dealt[number]
            started = time.perf_counter()
            found = keeper.read(fold) if keeper else None
            if found is None:
                result = recipe.run(
                    source.take(fold.train),
                    validation_data=validation_data,
                    test_data=source.take(fold.test),
                    batch_size=batch_size,
                    class_weight=class_weight,
                    seed=fold_seed(seed, fold),
                    placement=alone,
                    verbose=verbose,
                )
                evaluation = result.evaluation
                assert evaluation is not None  # there were test rows
                scores = {name: float(one) for name, one in evaluation.items()}
                found = _Done(scores, np.asarray(evaluation.rows.predictions), time.perf_counter() - started)
                if keeper:
                    keeper.write(fold, found)
            done[number] = found
            if verbose:
                said = ", ".join(f"{name} {value:.4f}" for name, value in found.scores.items())
                print(f"Fold {fold.fold + 1} of {folds}, repetition {fold.repeat + 1} of {repeats}: {said}")
    if has_workers(strategy):
        done = _of_all(done, strategy)
    predictions = np.full((repeats, len(source), *done[0].predictions.shape[1:]), np.nan)
    for number, fold in enumerate(dealt):
        predictions[fold.repeat, fold.test] = done[number].predictions
    by_name = {name: [done[number].scores[name] for number in range(len(dealt))] for name in done[0].scores}
    return CrossValidation(
        estimates={name: _estimate(name, values, dealt, level) for name, values in by_name.items()},
        scores={name: tuple(values) for name, values in by_name.items()},
        predictions=predictions,
        labels=labels,
        seconds=tuple(done[number].seconds for number in range(len(dealt))),
        repeats=repeats,
        folds=tuple(dealt),
    )


@dataclass(frozen=True)
class _Done:
    """What came of a fold.

    Args:
        scores: Metric → its value.
        predictions: For the rows of the fold.
        seconds: How long it took; 0 when it was read back.
    """

    scores: Mapping[str, float]
    predictions: np.ndarray[Any, Any]
    seconds: float = 0.0

    def write(self, file: Any) -> None:
        """Writes it as `.npz`."""
        names, values = np.array(list(self.scores)), np.array(list(self.scores.values()))
        np.savez(file, names=names, values=values, predictions=self.predictions, seconds=self.seconds)

    @classmethod
    def read(cls, file: Any) -> _Done:
        """What `write` wrote."""
        with np.load(file, allow_pickle=False) as kept:
            scores = dict(zip(kept["names"].tolist(), kept["values"].tolist(), strict=True))
            return cls(scores, kept["predictions"], float(kept["seconds"]))


def _of_all(done: Mapping[int, _Done], strategy: Any) -> dict[int, _Done]:
    """The folds of all workers, on each."""
    with io.BytesIO() as packed:
        with zipfile.ZipFile(packed, "w") as archive:
            for number, one in done.items():
                with archive.open(str(number), "w") as file:
                    one.write(file)
        content = packed.getvalue()
    found: dict[int, _Done] = {}
    for part in bytes_of_all(strategy, content):
        with zipfile.ZipFile(io.BytesIO(part)) as archive:
            found |= {int(name): _Done.read(io.BytesIO(archive.read(name))) for name in archive.namelist()}
    return found


def _as_data(data: Any) -> Data:
    if isinstance(data, Data):
        source = data
    elif is_arrays(data):
        x, y, weight = (*data, None, None)[:3]
        source = Data.arrays(x, y, sample_weight=weight)
    else:
        raise DataError(
            "Cross-validating.",
            found=f"data of type {type(data).__name__}, whose rows can't be dealt into folds",
            fix="give (x, y) of arrays, tk.Data.arrays(x, y) or tk.Data.image_folder(…)",
        )
    if source.labels is None or not hasattr(source.labels, "shape"):
        raise DataError("Cross-validating.", found="no array of labels", fix="give (x, y) with one array of labels")
    return source


def fold_seed(seed: int, fold: Fold) -> int:
    """The seed of one fold's run, so that a fold can be run again by itself."""
    return int(np.random.SeedSequence([seed, fold.repeat, fold.fold]).generate_state(1)[0])


def _estimate(name: str, values: Sequence[float], dealt: Sequence[Fold], level: float) -> Estimate:
    if not np.isfinite(values).all():
        raise EvaluationError(
            f"Averaging {name!r} over the folds.",
            found=f"{values}, not all of them finite",
            cause="a fold in which the figure isn't defined, such as one without a class",
            fix="take fewer folds, or leave the metric out",
        )
    train, test = _sizes(dealt)
    interval = nadeau_bengio(values, train=train, test=test, level=level)
    least, most = _limits(name)
    low, high = max(interval.low, least), min(interval.high, most)
    return Estimate(
        name,
        float(np.mean(values)),
        low=low,
        high=high,
        level=level,
        method=interval.method,
        greater_is_better=greater_is_better(name),
    )


def _sizes(dealt: Sequence[Fold]) -> tuple[int, int]:
    """Rows to train on and to test on, on the average."""
    return round(float(np.mean([len(fold.train) for fold in dealt]))), round(float(np.mean([len(fold.test) for fold in dealt])))


def _difference(name: str, first: Sequence[float], second: Sequence[float], dealt: Sequence[Fold], level: float) -> Difference:
    moved = np.subtract(first, second)
    train, test = _sizes(dealt)
    interval = nadeau_bengio(moved, train=train, test=test, level=level)
    error = math.sqrt((1 / len(moved) + test / train) * float(moved.var(ddof=1)))
    mean = float(moved.mean())
    p_value = t_tails(mean / error, len(moved) - 1) if error else float(mean == 0)
    values = float(np.mean(first)), float(np.mean(second))
    return Difference(name, *values, interval.low, interval.high, level, p_value, interval.method, greater_is_better(name))


def _limits(name: str) -> tuple[float, float]:
    """The least and the largest value a figure can have; Student's t knows of neither."""
    if name.startswith(("kappa", "mcc")):
        return -1.0, 1.0
    if name in ("bias", "r2", "explained_variance"):
        return -math.inf, math.inf if name == "bias" else 1.0
    if name in ("loss", "log_loss", "mae", "mse", "rmse", "mape", "msle", "max_error"):
        return (-math.inf if name == "loss" else 0.0), math.inf  # a loss of the user's may be negative
    return 0.0, 2.0 if name == "brier" else 1.0


class _Keeper:
    """Finished folds on disk, each under a name that its recipe, data and settings decide."""

    def __init__(self, folder: str | os.PathLike[str], recipe: Recipe, data: Data, settings: tuple[Any, ...]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        content = "\n".join([recipe.to_json(), data.fingerprint(), repr(settings)])
        self._key = hashlib.sha256(content.encode()).hexdigest()[:32]

    def _path(self, fold: Fold) -> Path:
        return self._folder / f"{self._key}-{fold.repeat}-{fold.fold}.npz"

    def read(self, fold: Fold) -> _Done | None:
        path = self._path(fold)
        if not path.exists():
            return None
        try:
            return replace(_Done.read(path), seconds=0.0)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StorageError(
                f"Reading the finished fold {path}.", found=f"a damaged file ({error})", fix="delete it; the fold is run again"
            ) from error

    def write(self, fold: Fold, done: _Done) -> None:
        with atomic_path(self._path(fold)) as temporary:
            done.write(temporary)
