"""`Description`: what a plan means for a model, as tables to be read before a step is run.

May import Keras and the floors below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transferkit._table import Table
from transferkit.building.frontier import Split
from transferkit.tuning.phases import PhasePlan

__all__ = ["Description"]


@dataclass(frozen=True)
class Description:
    """What a plan means for a model, before a step is run: each phase as a table of the model's layers."""

    phases: tuple[PhasePlan, ...]
    splits: tuple[Split | None, ...] = ()

    def _tables(self) -> list[Table]:
        tables = [plan.table() for plan in self.phases]
        return [
            replace(table, notes=(*table.notes, _computed(made)))
            for table, made in zip(tables, self.splits or [None] * len(tables), strict=True)
        ]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    def _repr_html_(self) -> str:
        return "".join(table.to_html() for table in self._tables())

    def to_dict(self) -> dict[str, Any]:
        """The tables as plain lists and dicts."""
        return {
            "phases": [
                {
                    "name": plan.phase.name,
                    "epochs": plan.phase.epochs,
                    "layers": [_row(item) for item in plan.layers],
                    "computed_once": list(made.cached) if made else [],
                }
                for plan, made in zip(self.phases, self.splits or [None] * len(self.phases), strict=True)
            ]
        }


def _computed(made: Split | None) -> str:
    if made is None:
        return "Every layer is computed in every epoch, as the plan says."
    if not made or not any(layer.weights for layer in made.prefix.layers):
        return "Every layer is computed in every epoch."
    places = " and ".join(item.name for item in made.boundary)
    return f"{len(made.cached)} layers can be computed once, up to {places}: {made.nbytes:,} bytes a row."


def _row(item: Any) -> dict[str, Any]:
    return {
        "path": item.path,
        "class": type(item.layer).__name__,
        "output": item.shape,
        "parameters": item.parameters,
        "trained": item.trained,
        "batch_norm": item.batch_norm,
        "silenced": item.silenced,
    }
