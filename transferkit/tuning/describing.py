"""`Description`: what a plan means for a model, as tables to be read before a step is run.

May import Keras and the floors below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transferkit._table import Table, Tabular
from transferkit.building.frontier import Split
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.caching import obstacle
from transferkit.tuning.costs import PhaseCost, count_of
from transferkit.tuning.optimizers import decays
from transferkit.tuning.phases import PhasePlan, ResolvedLayer

__all__ = ["Description", "PhaseDescription"]


@dataclass(frozen=True)
class PhaseDescription(Tabular):
    """What one phase means for a model.

    Args:
        plan: The phase, layer by layer.
        split: The model cut where it is frozen; None where the plan wants everything computed in every epoch.
        cost: What it costs.
        weight_decay: The optimizer's weight decay, or None.
        cache: How features are computed and kept.
    """

    plan: PhasePlan
    split: Split | None
    cost: PhaseCost
    weight_decay: float | None = None
    cache: CacheSettings = field(default_factory=CacheSettings)

    def table(self) -> Table:
        """The phase as a table, one row for each layer that has weights or changes its behaviour."""
        plan, phase = self.plan, self.plan.phase
        columns = ["layer", "class", "output", ">parameters", "in this phase", ">learning rate"]
        columns += [">decay"] if self.weight_decay else []
        columns += [">operations a row", "computed"]
        rows = [self._row(row, flops) for row, flops in zip(plan.layers, self.cost.flops, strict=True)]
        rows = [row for row, item in zip(rows, plan.layers, strict=True) if item.parameters or item.silenced]
        if plan.own_weights:
            trained = phase.train.is_everything
            own = ["(the model's own)", "", "", f"{plan.own_parameters:,}", "trained" if trained else "frozen"]
            own += [self._rate(1.0) if trained else "–", *([""] if self.weight_decay else []), "", ""]
            rows.append(own)
        return Table(
            columns=columns,
            rows=rows,
            title=f"Phase {phase.name!r}: {phase.epochs} epochs, trains {phase.train!r}",
            notes=(
                f"{plan.trained_parameters:,} of {plan.parameters:,} parameters train.",
                *([f"The learning rate runs by {phase.schedule!r}."] if phase.schedule is not None else []),
                *self.cost.notes(),
                self._computed(),
            ),
        )

    def _row(self, row: ResolvedLayer, flops: int) -> list[str]:
        cells = [row.path, type(row.layer).__name__, row.shape, f"{row.parameters:,}", _mode(row)]
        cells.append(self._rate(row.multiplier) if row.trained else "–")
        if self.weight_decay:
            decayed = row.trained and any(decays(weight) for weight in row.layer.weights)
            cells.append(f"{self.weight_decay:.4g}" if decayed else "–")
        return [*cells, count_of(flops), "once" if self._is_once(row.path) else "each epoch"]

    def _is_once(self, path: str) -> bool:
        return bool(self.cost.once) and self.split is not None and path in self.split.cached

    def _rate(self, multiplier: float) -> str:
        rate = self.plan.phase.learning_rate
        if rate is not None:
            return f"{rate * multiplier:.4g}"
        return "the optimizer's" if multiplier == 1.0 else f"the optimizer's × {multiplier:.4g}"

    def _computed(self) -> str:
        made = self.split
        if made is None:
            return "Every layer is computed in every epoch, as the plan says."
        why = obstacle(made)
        if why and self.cache.wanted and not self.plan.phase.train.is_everything:
            return f"Every layer is computed in every epoch, though the plan says .cache({self.cache.cache!r}): {why}."
        if why:
            return "Every layer is computed in every epoch."
        places = " and ".join(item.name for item in made.boundary)
        count = len(made.cached)
        said = f"{count} layer{'s' if count != 1 else ''} can be computed once, up to {places}: {made.nbytes:,} bytes a row."
        words = {
            "dtype": "kept as {}",
            "views": "in {} views",
            "noise": "with noise of {:g} standard deviations on features",
            "extraction": "computed the way {!r}",
        }
        found = [words[name].format(value) for name, value in self.cache.unusual().items() if value is not None]
        return f"{said} For training {', '.join(found)}; the run says how far that is from exact." if found else said

    def to_dict(self) -> dict[str, Any]:
        """The table as plain lists and dicts."""
        return {
            "name": self.plan.phase.name,
            "epochs": self.plan.phase.epochs,
            "layers": [
                {
                    "path": row.path,
                    "class": type(row.layer).__name__,
                    "output": row.shape,
                    "parameters": row.parameters,
                    "trained": row.trained,
                    "multiplier": row.multiplier,
                    "batch_norm": row.batch_norm,
                    "silenced": row.silenced,
                    "operations": flops,
                }
                for row, flops in zip(self.plan.layers, self.cost.flops, strict=True)
            ],
            "computed_once": list(self.split.cached) if self.split else [],
            "cost": self.cost.to_dict(),
        }


@dataclass(frozen=True)
class Description(Tabular):
    """What a plan means for a model, before a step is run: each phase as a table of the model's layers.

    Args:
        parts: The phases in order.
    """

    parts: tuple[PhaseDescription, ...]

    @property
    def phases(self) -> tuple[PhasePlan, ...]:
        """Each phase, layer by layer."""
        return tuple(part.plan for part in self.parts)

    @property
    def costs(self) -> tuple[PhaseCost, ...]:
        """What each phase costs."""
        return tuple(part.cost for part in self.parts)

    def table(self) -> Table:
        """The phases, a row each; each has a table of its own."""
        rows = [
            (
                part.plan.phase.name,
                str(part.plan.phase.epochs),
                f"{part.plan.trained_parameters:,}",
                count_of(part.cost.forward),
                count_of(part.cost.backward),
            )
            for part in self.parts
        ]
        return Table(columns=("phase", ">epochs", ">parameters trained", ">forward a row", ">backward a row"), rows=rows)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.parts))

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """The tables as plain lists and dicts."""
        return {"phases": [part.to_dict() for part in self.parts]}


def _mode(row: ResolvedLayer) -> str:
    if row.silenced:
        return "off"
    mode = "trained" if row.trained else "frozen"
    if row.low_rank is not None:
        return f"trained by factors of rank {row.low_rank.rank}"
    return f"{mode}, statistics {row.batch_norm}" if row.batch_norm else mode
