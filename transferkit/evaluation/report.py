"""The `Evaluation`: figures with their intervals, and the predictions they come from, of which all else can be asked later."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transferkit._table import Table, Tabular
from transferkit.errors import EvaluationError, did_you_mean
from transferkit.evaluation.calibration import Reliability, reliability
from transferkit.evaluation.comparing import Comparison, TransferGain, compare_rows
from transferkit.evaluation.estimating import Estimate, Scored, Uncertainty, estimates_of, greater_is_better
from transferkit.evaluation.fetching import files_of, inputs_of
from transferkit.evaluation.inspecting import (
    Confusion,
    Mistakes,
    PerClass,
    confusion_of,
    mistakes_of,
    per_class_of,
    suspects_of,
)
from transferkit.evaluation.page import page_of
from transferkit.evaluation.rows import FloatArray, Rows
from transferkit.evaluation.slicing import Slice, Slices, masks_of
from transferkit.evaluation.temperature import Temperature, temperature_of
from transferkit.storage import write_text
from transferkit.tasks import Task

if TYPE_CHECKING:
    from transferkit.evaluation.evaluator import Evaluator

__all__ = ["Evaluation"]


@dataclass(frozen=True, eq=False)
class Evaluation(Tabular, Mapping[str, Estimate]):
    """What an evaluation found: a mapping from metric to `Estimate`, made by `Evaluator.run`.

    Args:
        estimates: The figures by name.
        scored: Labels, predictions, weights, groups and losses, in the data's order.
        task: What head and labels make together.
        evaluator: The plan that was run.
        uncertainty: How the intervals were made.
        loss_name: The loss's name in Keras.
        output: The output that was judged, for a model of several.
        positions: Positions of each example (1, or more for outputs with inner axes).
        doubts: What looked wrong with the inputs; part of `notes`.
    """

    estimates: Mapping[str, Estimate]
    scored: Scored
    task: Task
    evaluator: Evaluator
    uncertainty: Uncertainty = field(default_factory=Uncertainty)
    loss_name: str = ""
    output: str = ""
    positions: int = 1
    doubts: tuple[str, ...] = ()

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
    def _own(self) -> list[str]:
        """The metrics that can be computed again from the rows: all but Keras's."""
        return [name for name, one in self.estimates.items() if one.greater_is_better is not None]

    @property
    def rows(self) -> Rows:
        """Labels, predictions, weights and groups, in the data's order."""
        return self.scored.rows

    @property
    def losses(self) -> FloatArray | None:
        """The loss of each row (n,), or None where it wasn't asked for."""
        return self.scored.losses

    @property
    def labels(self) -> NDArray[np.generic]:
        """The labels in the data's order: class indices (n,), zeros and ones (n, k), or quantities (n, d)."""
        return self.rows.labels

    @property
    def predictions(self) -> FloatArray:
        """The predictions in the data's order: probabilities (n,) or (n, k), or quantities (n, d)."""
        return self.rows.predictions

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes or labels."""
        return self.rows.classes

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know."""
        notes = list(self.doubts)
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
        if "loss" in self.estimates and self.scored.penalty:
            notes.append(f"loss includes {self.scored.penalty:.4g} of penalties (regularisers and add_loss)")
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

    def __repr__(self) -> str:
        return str(self)

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

    def records(self) -> list[dict[str, Any]]:
        """One dict a metric."""
        return [{"metric": name, **one.to_dict()} for name, one in self.estimates.items()]

    # ── asking more of the same predictions ──────────────────────────────────────────────────────────────────────────────

    def compare(
        self,
        other: Evaluation,
        *,
        names: tuple[str, str] = ("first", "second"),
        resamples: int = 2000,
        level: float = 0.95,
        stratified: bool = False,
        seed: int = 0,
    ) -> Comparison:
        """Compares this model with another on the same rows, metric by metric.

        Args:
            other: The other model's evaluation, on the same rows in the same order.
            names: What to call this model and the other.
            resamples: How many resamples, which both share.
            level: Of the intervals of the differences, 0 – 1.
            stratified: Draw as many rows of each class as there are.
            seed: Of the draws.

        Raises:
            EvaluationError: when the rows aren't the same, or no metric is in both.
        """
        shared = [name for name in self._own if name in other._own]
        if not shared:
            raise EvaluationError(
                f"Comparing {names[0]} with {names[1]}.",
                found=f"no metric in both: {', '.join(self.estimates)} and {', '.join(other.estimates)}",
                fix="run the same Evaluator on both models",
            )
        return compare_rows(
            {name: self.scored.statistic(name) for name in shared},
            {name: other.scored.statistic(name) for name in shared},
            (self.rows, other.rows),
            {name: greater_is_better(name) for name in shared},
            names=names,
            uncertainty=Uncertainty(level, resamples, "percentile", stratified, seed),
        )

    def transfer_gain(
        self, *, scratch: Evaluation | None = None, before: Evaluation | None = None, resamples: int = 2000, seed: int = 0
    ) -> TransferGain:
        """What transfer brought this model, and whether it did harm.

        Args:
            scratch: The same architecture trained from scratch on the same data, evaluated on the same rows.
            before: This model before it was tuned, evaluated on the same rows.
            resamples: How many resamples.
            seed: Of the draws.

        Raises:
            EvaluationError: when neither is given, or the rows aren't the same.
        """
        if scratch is None and before is None:
            raise EvaluationError(
                "Judging what transfer brought.",
                found="nothing to compare with",
                fix="transfer_gain(scratch=evaluation_of_the_other)",
            )

        def against(other: Evaluation | None, name: str) -> Comparison | None:
            return None if other is None else self.compare(other, names=("transfer", name), resamples=resamples, seed=seed)

        return TransferGain(against(scratch, "from scratch"), against(before, "before"))

    def confusion(self) -> Confusion:
        """How many rows of each class were taken for each."""
        return confusion_of(self.rows)

    def per_class(self) -> PerClass:
        """Precision, recall, F1 and AUC of each class or label, with intervals."""
        return per_class_of(self.rows, level=self.uncertainty.level)

    def slices(self, by: Any, *, names: Sequence[str] | None = None) -> Slices:
        """The same metrics on parts of the rows.

        Args:
            by: A value a row (n,), of which each different one makes a slice; or boolean masks (n,) by name.
            names: Names for the values 0, 1, … of `by`.

        Raises:
            EvaluationError: for an empty slice.
        """
        metrics = self._own
        parts: dict[str, Slice] = {}
        for name, mask in masks_of(by, len(self.rows), names).items():
            scored = self.scored.take(mask)
            figures: dict[str, Estimate] = {}
            refused: dict[str, str] = {}
            for metric in metrics:
                try:
                    figures |= estimates_of(scored, [metric], self.uncertainty)
                except EvaluationError as error:
                    refused[metric] = error.found[0]
            parts[name] = Slice(name, int(mask.sum()), figures, refused)
        return Slices(parts, tuple(metrics), self.uncertainty.level)

    def mistakes(self, n: int = 20, *, inputs: Any = None) -> Mistakes:
        """The wrong predictions of which the model was surest.

        Args:
            n: How many at most.
            inputs: The data that was evaluated, to have the inputs of these rows beside them, and their files where it is read
                from files. It is gone over once; when its labels come in another order than before that is an error.
        """
        return self._with_inputs(mistakes_of(self.rows, n), inputs)

    def label_suspects(self, n: int = 20, *, inputs: Any = None) -> Mistakes:
        """Rows whose label looks wrong, by confident learning; best asked of rows the model wasn't trained on.

        Args:
            n: How many at most.
            inputs: As for `mistakes`.
        """
        return self._with_inputs(suspects_of(self.rows, n), inputs)

    def _with_inputs(self, chosen: Mistakes, data: Any) -> Mistakes:
        if data is None:
            return chosen
        inputs = inputs_of(data, chosen.index, self.rows, output=self.output)
        return replace(chosen, inputs=inputs, files=files_of(data, chosen.index))

    def reliability(self, *, bins: int = 15, equal_mass: bool = False) -> Reliability:
        """Confidence against accuracy, bin by bin.

        Args:
            bins: How many.
            equal_mass: Bins of equally many rows instead of equal width.
        """
        if self.rows.kind == "multilabel":
            return reliability(self.rows.predictions.ravel(), self.rows.labels.ravel() == 1, bins=bins, equal_mass=equal_mass)
        self._classification("Comparing confidence with accuracy.")
        return reliability(self.rows.confidence, self.rows.decisions == self.rows.labels, bins=bins, equal_mass=equal_mass)

    def temperature(self) -> Temperature:
        """The temperature that calibrates the model best on these rows; `apply` puts it into a copy of the model.

        Fit it on validation rows and judge the calibrated model on others.
        """
        self._classification("Fitting a temperature.")
        return temperature_of(self.rows, output=self.output)

    def _classification(self, asked: str) -> None:
        if self.rows.kind == "regression":
            raise EvaluationError(asked, found="a regression task, which has no probabilities", fix="evaluate a classifier")

    def to_html(self, *, title: str = "Evaluation", inputs: Any = None) -> str:
        """One page with figures, tables and pictures, that needs no network.

        Args:
            title: Its heading.
            inputs: The data that was evaluated, to show the pictures the model was surest about and wrong.
        """
        return page_of(self, title=title, inputs=inputs)

    def save_html(self, path: str | os.PathLike[str], *, title: str = "Evaluation", inputs: Any = None) -> None:
        """Writes the page to a file; an existing one is replaced whole.

        Args:
            path: Where to.
            title: Its heading.
            inputs: As for `to_html`.
        """
        write_text(path, self.to_html(title=title, inputs=inputs))


class _MissingFigureError(EvaluationError, KeyError):
    """Also a KeyError, so that an evaluation is a mapping like any other."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, on one line.
        return self._message()
