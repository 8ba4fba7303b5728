"""Slices: the same metrics on parts of the rows. Imports NumPy and this package's pure files only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transferkit._table import Table, Tabular
from transferkit.errors import EvaluationError
from transferkit.evaluation.estimating import Estimate

__all__ = ["Slice", "Slices", "masks_of"]


@dataclass(frozen=True, eq=False)
class Slice:
    """The figures of one slice.

    Args:
        name: The slice.
        rows: How many rows it has.
        estimates: Its figures by metric.
        refused: Why a metric could not be computed, by metric.
    """

    name: str
    rows: int
    estimates: Mapping[str, Estimate]
    refused: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Slices(Tabular, Mapping[str, Slice]):
    """The same metrics on parts of the rows, by the name of the part."""

    parts: Mapping[str, Slice]
    metrics: tuple[str, ...]
    level: float

    def __getitem__(self, name: str) -> Slice:
        return self.parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def table(self) -> Table:
        """The figures as a table; a dash where a metric isn't defined in the slice."""

        def cell(part: Slice, metric: str) -> str:
            one = part.estimates.get(metric)
            if one is None or not np.isfinite(one.value):
                return "—"
            if one.low is None or one.high is None:
                return f"{one.value:.3f}"
            return f"{one.value:.3f} ({one.low:.3f} – {one.high:.3f})"

        body = [(part.name, f"{part.rows:,}", *(cell(part, m) for m in self.metrics)) for part in self.parts.values()]
        notes = [f"{part.name}: no {metric}, {why}" for part in self.parts.values() for metric, why in part.refused.items()]
        columns = ("slice", ">rows", *(f">{m}" for m in self.metrics))
        return Table(columns, body, title=f"by slice, {self.level:.0%} intervals", notes=notes)

    def __repr__(self) -> str:
        return str(self)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            part.name: {
                "rows": part.rows,
                "metrics": {name: one.to_dict() for name, one in part.estimates.items()},
                "refused": dict(part.refused),
            }
            for part in self.parts.values()
        }

    def records(self) -> list[dict[str, Any]]:
        """One dict a slice and metric."""
        return [
            {"slice": part.name, "rows": part.rows, "metric": name, **one.to_dict()}
            for part in self.parts.values()
            for name, one in part.estimates.items()
        ]


def masks_of(by: Any, n: int, names: Sequence[str] | None = None) -> dict[str, NDArray[np.bool_]]:
    """Slices as masks by name.

    Args:
        by: A value a row (n,), each different one a slice; or masks (n,) by name.
        n: How many rows there are.
        names: Names for the values 0, 1, … where `by` holds such.

    Raises:
        EvaluationError: for a slice of no rows, or of another length.
    """
    asked = "Evaluating by slices."
    if isinstance(by, Mapping):
        masks = {str(name): np.asarray(mask) for name, mask in by.items()}
        bad = {name: mask for name, mask in masks.items() if mask.shape != (n,) or mask.dtype != bool}
        wrong = [f"{name!r}: a mask of type {mask.dtype} and shape {mask.shape}" for name, mask in bad.items()]
        if wrong:
            raise EvaluationError(asked, found=wrong, fix=f"give boolean masks of shape ({n},)")
    else:
        values = np.asarray(by)
        if values.shape != (n,):
            raise EvaluationError(asked, found=f"slice values of shape {values.shape} for {n} rows", fix="give one value a row")
        masks = {}
        for value in np.unique(values):
            masks[names[int(value)] if names is not None else str(value)] = values == value
        if len(masks) > max(50, n // 2):
            raise EvaluationError(
                asked,
                found=f"{len(masks)} different values in {n} rows",
                cause="a quantity, or a name of its own for each row",
                fix="put it into classes first: np.digitize(values, np.quantile(values, [0.25, 0.5, 0.75]))",
            )
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty or not masks:
        raise EvaluationError(
            asked,
            found=[f"the slice {name!r} has no rows" for name in empty] or "no slices",
            fix="leave empty slices out",
        )
    return masks
