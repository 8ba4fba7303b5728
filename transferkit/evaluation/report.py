"""The `Evaluation`: figures with their intervals, and the predictions they come from, of which all else can be asked later."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from transferkit._table import Table
from transferkit.errors import EvaluationError, did_you_mean
from transferkit.evaluation.estimating import Uncertainty
from transferkit.evaluation.rows import FloatArray, Rows
from transferkit.tasks import Task

if TYPE_CHECKING:
    from transferkit.evaluation.evaluator import Evaluator

__all__ = ["Estimate", "Evaluation"]


@dataclass(frozen=True)
class Estimate:
    """One figure; `float()` gives its value.

    Args:
        name: The metric.
        value: On the data given.
        low: Lower end of the interval, None where there is none.
        high: Upper end.
        level: The interval's level, 0 – 1.
        method: How the interval was found; empty where there is none.
        greater_is_better: The direction of improvement, None where it isn't known.
        undefined: Resamples left out because the figure wasn't defined in them.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    method: str = ""
    greater_is_better: bool | None = True
    undefined: int = 0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} ({self.low:.4f} – {self.high:.4f}, {self.level:.0%}, {self.method})"

    def to_dict(self) -> dict[str, Any]:
        """The figure as plain values."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "method": self.method,
            "greater_is_better": self.greater_is_better,
            "undefined": self.undefined,
        }


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, Estimate]):
    """What an evaluation found: a mapping from metric to `Estimate`, made by `Evaluator.run`.

    Args:
        estimates: The figures by name.
        rows: Labels, predictions, weights and groups, in the data's order.
        task: What head and labels make together.
        evaluator: The plan that was run.
        uncertainty: How the intervals were made.
        losses: The loss of each row (n,), or None.
        loss_name: The loss's name in Keras.
        penalty: What regularisers add to the loss.
        positions: Positions of each example (1, or more for outputs with inner axes).
    """

    estimates: Mapping[str, Estimate]
    rows: Rows
    task: Task
    evaluator: Evaluator
    uncertainty: Uncertainty = field(default_factory=Uncertainty)
    losses: FloatArray | None = None
    loss_name: str = ""
    penalty: float = 0.0
    positions: int = 1

    def __getitem__(self, name: str) -> Estimate:
        try:
            return self.estimates[name]
        except KeyError:
            raise _MissingFigureError(
                f"Looking up {name!r} in an evaluation.",
                found=f"figures for {', '.join(map(repr, self.estimates))}{did_you_mean(name, self.estimates)}",
                fix=f"Evaluator({', '.join(map(repr, [*self.estimates, name]))}).run(...)",
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.estimates)

    def __len__(self) -> int:
        return len(self.estimates)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes or labels."""
        return self.rows.classes

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know."""
        notes = []
        missing = self.rows.missing
        if missing:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            what = "class" if len(missing) == 1 else f"{len(missing)} classes"
            notes.append(f"no row of {what}: {shown}; averages over classes leave out what isn't defined for them")
        for one in self.estimates.values():
            if one.undefined:
                notes.append(
                    f"{one.name}: {one.undefined} of {self.uncertainty.resamples} resamples left out, where it isn't defined"
                )
            if not np.isfinite(one.value):
                notes.append(f"{one.name} isn't defined for these rows")
        if "loss" in self.estimates and self.penalty:
            notes.append(f"loss includes {self.penalty:.4g} of penalties (regularisers and add_loss)")
        if self.positions > 1:
            notes.append(f"{self.positions} positions an example, which are resampled together")
        return tuple(notes)

    def table(self) -> Table:
        """The figures as a table."""
        rows = []
        for one in self.estimates.values():
            span = "" if one.low is None or one.high is None else f"{one.low:.4f} – {one.high:.4f}"
            rows.append((one.name, f"{one.value:.4f}", span, one.method))
        groups = "" if self.rows.groups is None else f", {int(self.rows.groups.max()) + 1} groups"
        title = f"{len(self.rows):,} rows{groups}, {self.task}"
        return Table(("metric", ">value", f">{self.uncertainty.level:.0%} interval", "by"), rows, title=title, notes=self.notes)

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.table().to_html()

    def to_dict(self) -> dict[str, Any]:
        """The figures and where they come from as plain values, without the rows."""
        return {
            "metrics": {name: one.to_dict() for name, one in self.estimates.items()},
            "rows": len(self.rows),
            "task": self.task.kind,
            "classes": list(self.classes) if self.task.is_classification else [],
            "evaluator": repr(self.evaluator),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The same as JSON text; what isn't a finite number is null."""
        return json.dumps(_finite_or_none(self.to_dict()), indent=1)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


class _MissingFigureError(EvaluationError, KeyError):
    """Also a KeyError, so that an evaluation is a mapping like any other."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, on one line.
        return self._message()
