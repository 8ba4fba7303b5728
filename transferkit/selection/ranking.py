"""Which of several pretrained networks to take: scores of their features on the data at hand, before anything is trained.

The interval of a score is the jackknife's with groups of rows left out (Shao and Tu, The Jackknife and Bootstrap, 1995, section
2.3), and so is that of its distance to the best, on the same groups: rows that are hard for all don't blur it. May import Keras
and the floors below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit._table import Table, Tabular
from transferkit.building.heads import heads_of
from transferkit.data import Data, is_arrays, split_rows
from transferkit.errors import DataError, ModelError, PlanError, did_you_mean
from transferkit.evaluation.estimating import Estimate
from transferkit.evaluation.intervals import t_quantile
from transferkit.recipe import Recipe
from transferkit.selection import scores as of
from transferkit.tuning.fronts import outputs_of
from transferkit.weights.values import is_finite

__all__ = ["Candidate", "Ranking", "rank"]

Array = np.ndarray[Any, Any]

#: Groups of rows that are left out one after the other.
_GROUPS = 20
#: Scores of rows one by one, whose mean is the score: leaving rows out needs no new computation.
_BY_ROW: dict[str, Callable[[Array, Array], Array]] = {
    "linear_probe": of.linear_probe_hits,
    "nearest_neighbours": of.nearest_neighbour_hits,
}
_WHOLE: dict[str, Callable[[Array, Array], float]] = {"logme": of.logme, "h_score": of.h_score}
_KNOWN = (*_BY_ROW, *_WHOLE)


@dataclass(frozen=True, eq=False)
class Candidate:
    """What was found of one network.

    Args:
        name: What it is called.
        scores: By name, each with its interval.
        behind: How far the first score is behind the best candidate's; None for the best itself.
        features: How many features it gives.
        parameters: How many numbers its weights hold.
        seconds: What computing its features and scores took.
    """

    name: str
    scores: Mapping[str, Estimate]
    behind: Estimate | None
    features: int
    parameters: int
    seconds: float

    @property
    def verdict(self) -> str:
        """`best`, `behind`, or `not told apart` from the best."""
        if self.behind is None:
            return "best"
        return "behind" if self.behind.low is not None and self.behind.low > 0 else "not told apart"


@dataclass(frozen=True, eq=False)
class Ranking(Tabular, Mapping[str, Candidate]):
    """The candidates, the most promising first; made by `rank`.

    Args:
        candidates: By name.
        rows: How many rows they were judged on.
        level: Of the intervals, 0 to 1.
    """

    candidates: Mapping[str, Candidate]
    rows: int
    level: float

    def __getitem__(self, name: str) -> Candidate:
        return self.candidates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.candidates)

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def best(self) -> str:
        """The name of the first."""
        return next(iter(self.candidates))

    def table(self) -> Table:
        """The candidates with their scores."""
        names = list(self[self.best].scores)

        empty = [one.name for one in self.values() if "h_score" in names and one.features >= self.rows - 1]
        said = (
            [f"h_score says nothing of {', '.join(empty)}: with as many features as rows any classes are apart."] if empty else []
        )

        def cell(candidate: Candidate, name: str) -> str:
            one = candidate.scores[name]
            return "—" if name == "h_score" and candidate.name in empty else f"{one.value:.3f} ({one.low:.3f} – {one.high:.3f})"

        rows = [
            (one.name, *(cell(one, name) for name in names), f"{one.features:,}", f"{one.parameters:,}", one.verdict)
            for one in self.values()
        ]
        return Table(
            columns=("candidate", *(f">{name}" for name in names), ">features", ">parameters", "by the first score"),
            rows=rows,
            title=f"promise of {len(self)} networks for {self.rows:,} rows, before training; {self.level:.0%} intervals",
            notes=(
                "A score of frozen features: networks that are tuned as a whole can change places. "
                "Where two aren't told apart, take the smaller, or cross-validate both.",
                *said,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain values."""
        return {
            "rows": self.rows,
            "level": self.level,
            "candidates": [
                {
                    "name": one.name,
                    "scores": {name: score.to_dict() for name, score in one.scores.items()},
                    "behind": None if one.behind is None else one.behind.to_dict(),
                    "verdict": one.verdict,
                    "features": one.features,
                    "parameters": one.parameters,
                    "seconds": one.seconds,
                }
                for one in self.values()
            ],
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a candidate and score."""
        return [
            {"candidate": one.name, "score": name, "value": score.value, "low": score.low, "high": score.high}
            for one in self.values()
            for name, score in one.scores.items()
        ]


def rank(
    candidates: Mapping[str, Any],
    data: Any,
    *,
    scores: Sequence[str] = _KNOWN,
    most: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int = 32,
) -> Ranking:
    """Scores the features that each candidate's head would be trained on. Trains nothing.

    Args:
        candidates: Recipes, or Keras models with a head of any kind, by name.
        data: A `Data`, or `(x, y)` of arrays; the labels are class indices.
        scores: Which scores, the one that ranks first: `linear_probe` (accuracy of a ridge classifier on rows left out),
            `nearest_neighbours` (accuracy of the five nearest), `logme` and `h_score`.
        most: How many rows at most; of more a random part is taken, each class in its proportion.
        level: Of the intervals, 0 to 1.
        seed: Fixes that part, the groups and what the candidates make at random.
        batch_size: Rows at a time.

    Returns:
        A `Ranking`, the most promising first.

    Raises:
        PlanError: for no candidates, candidates without names, or an unknown score.
        DataError: for labels that aren't class indices.
        ModelError: for a model of several outputs.

    Example:
        >>> import numpy as np
        >>> import transferkit as tk
        >>> x, y = np.random.default_rng(0).normal(size=(60, 8)).astype("float32"), np.arange(60) % 2
        >>> wide, narrow = (tk.Recipe(tk.ModelBuilder((8,)).dense(n, "relu").classifier(2)) for n in (32, 2))
        >>> sorted(tk.rank({"wide": wide, "narrow": narrow}, (x, y), scores=["linear_probe"]))
        ['narrow', 'wide']
    """
    if not isinstance(candidates, Mapping):
        raise PlanError(
            "Ranking candidates.",
            found=f"a {type(candidates).__name__}, where candidates have names",
            fix='give a dict: rank({"one": recipe, "another": recipe}, data)',
        )
    asked = f"Ranking {len(candidates)} candidates."
    problems = [f"no score named {name!r}{did_you_mean(name, _KNOWN)}" for name in scores if name not in _KNOWN]
    problems += [
        f"{name!r} is a {type(one).__name__}" for name, one in candidates.items() if not isinstance(one, (Recipe, keras.Model))
    ]
    if not candidates:
        problems.append("no candidate")
    if not scores:
        problems.append("no score")
    if problems:
        raise PlanError(asked, found=problems, fix=f"rank({{'name': recipe, …}}, data, scores={list(_KNOWN)})")
    rows = _rows(data, asked, most=most, seed=seed)
    y = np.asarray(rows.labels)
    group = np.random.default_rng(seed).permutation(len(y)) % min(_GROUPS, len(y))
    found = {}
    for name, one in candidates.items():
        begun = time.perf_counter()
        model, features = _features(one, rows, asked=asked, name=name, seed=seed, batch_size=batch_size)
        left_out = {score: _jackknife(score, features, y, group) for score in scores}
        found[name] = model.count_params(), features.shape[1], left_out, time.perf_counter() - begun
    ordered = sorted(found, key=lambda name: -found[name][2][scores[0]][0])
    leader = found[ordered[0]][2][scores[0]]

    def behind(name: str) -> Estimate | None:
        if name == ordered[0]:
            return None
        own = found[name][2][scores[0]]
        return _estimate("behind", (leader[0] - own[0], leader[1] - own[1]), level)

    made = {
        name: Candidate(
            name=name,
            scores={score: _estimate(score, found[name][2][score], level) for score in scores},
            behind=behind(name),
            features=found[name][1],
            parameters=found[name][0],
            seconds=found[name][3],
        )
        for name in ordered
    }
    return Ranking(made, len(y), level)


def _rows(data: Any, asked: str, *, most: int, seed: int) -> Data:
    if not isinstance(data, Data):
        if not is_arrays(data) or len(data) < 2:
            raise DataError(asked, found=f"data of type {type(data).__name__}", fix="give (x, y) of arrays, or a tk.Data")
        data = Data.arrays(data[0], data[1])
    labels = np.asarray(data.labels)
    if labels.dtype.kind not in "iub" or labels.size != len(data):
        raise DataError(
            asked,
            found=f"labels of shape {labels.shape} and type {labels.dtype}",
            cause="the scores are for classes that exclude each other",
            fix="give one class index a row: y.argmax(axis=1) for one-hot rows",
        )
    rows: Data = data if len(data) <= most else data.take(split_rows(len(data), labels, most / len(data), seed=seed)[1])
    if rows.in_memory and not all(map(is_finite, keras.tree.flatten(rows.rows(np.arange(len(rows))).x))):
        raise DataError(asked, found="inputs that are NaN or infinite", fix="fill or drop rows that aren't finite")
    return rows


def _features(one: Any, data: Data, *, asked: str, name: str, seed: int, batch_size: int) -> tuple[Any, Array]:
    """The model, and what its head is given (n, d): positions side by side."""
    model = one.make(data, seed=seed, batch_size=batch_size)[0] if isinstance(one, Recipe) else one
    heads = heads_of(model)
    try:
        (head,) = heads
        front = keras.Model(model.inputs[0] if isinstance(model, keras.Sequential) else model.input, head.layer.input)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            asked,
            found=f"{name!r} has {len(heads)} outputs, or a head whose input can't be followed to the model's own",
            cause="several outputs, a subclassed model, or a head within a nested model",
            fix="give a functional or Sequential model with one head at its end",
        ) from error
    values = outputs_of(front, data, batch_size=batch_size)
    return model, values.reshape(len(values), -1)


def _jackknife(score: str, features: Array, y: Array, group: Array) -> tuple[float, Array]:
    """The score, and its value with each group of rows left out."""
    groups = range(int(group.max()) + 1)
    if score in _BY_ROW:
        hits = _BY_ROW[score](features, y)
        return float(hits.mean()), np.array([hits[group != g].mean() for g in groups])
    function = _WHOLE[score]
    return function(features, y), np.array([function(features[group != g], y[group != g]) for g in groups])


def _estimate(name: str, found: tuple[float, Array], level: float) -> Estimate:
    value, left_out = found
    count = len(left_out)
    error = float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))
    half = t_quantile(0.5 + level / 2, count - 1) * error
    low, high = value - half, value + half
    if name in _BY_ROW:  # a share of the rows
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(name, value, low=low, high=high, level=level, method="jackknife")
