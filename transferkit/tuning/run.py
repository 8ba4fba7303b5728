"""`Run`: what a fine-tuning did, phase by phase, on one epoch axis. Imports the standard library and `_table` only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transferkit._table import Table, Tabular
from transferkit.tuning.figures import figure_text

__all__ = ["PhaseRecord", "Run"]


@dataclass(frozen=True)
class PhaseRecord:
    """What one phase did.

    Args:
        name: The phase.
        epochs: How many epochs it ran.
        planned: How many it might have run.
        trained_parameters: How many numbers trained.
        seconds: How long it took.
        steps: How many batches it trained on.
        frozen: How its frozen layers were computed, once or in every epoch, and why.
    """

    name: str
    epochs: int
    planned: int
    trained_parameters: int
    seconds: float
    steps: int = 0
    frozen: str = ""


@dataclass(frozen=True)
class Run(Tabular):
    """What `FineTuner.fit` did.

    Args:
        history: Name of a loss or metric → its value after each epoch, over all phases; a list of values for a metric that gives
            several, as `F1Score` does for each class.
        phases: The phases in order.
        seed: What the order of the data and every random choice followed from; give it to `fit` for the same run again.
        placement: The devices, in words.
        notes: What the user should know of it.
    """

    history: Mapping[str, Sequence[Any]]
    phases: tuple[PhaseRecord, ...]
    seed: int
    placement: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def epochs(self) -> int:
        """How many epochs all phases ran together."""
        return sum(phase.epochs for phase in self.phases)

    def table(self) -> Table:
        """A row for each phase and each figure's last value."""
        names = list(self.history)
        rows = []
        end = 0
        for phase in self.phases:
            end += phase.epochs
            figures = [figure_text(self.history[name][end - 1]) if 0 < end <= len(self.history[name]) else "–" for name in names]
            ran = f"{phase.epochs}/{phase.planned}"
            rows.append((phase.name, ran, f"{phase.trained_parameters:,}", f"{phase.seconds:.1f}", *figures))
        return Table(
            columns=("phase", ">epochs", ">parameters trained", ">seconds", *(f">{name}" for name in names)),
            rows=rows,
            title=f"Fine-tuned for {self.epochs} epochs on {self.placement or 'one device'}, seed {self.seed}",
            notes=(*self.notes, *(f"Phase {phase.name!r}: {phase.frozen}." for phase in self.phases if phase.frozen)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The run as plain lists and dicts."""
        return {
            "history": {name: list(values) for name, values in self.history.items()},
            "phases": [vars(phase) for phase in self.phases],
            "seed": self.seed,
            "placement": self.placement,
            "notes": list(self.notes),
        }
