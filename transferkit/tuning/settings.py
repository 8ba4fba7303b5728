"""What a plan says of how its phases train, beside which layers: read from the plan's steps, put into effect phase by phase.

Decides which optimizer a phase gets, which callbacks, and what is done to loss, labels and batches. May import Keras and the
floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit._objects import KerasObject
from transferkit.errors import DataError, ModelError, PlanError
from transferkit.tuning.averaging import AverageWeights, StochasticWeightAverage
from transferkit.tuning.mixing import mixed, one_hot_labels
from transferkit.tuning.objectives import Objective
from transferkit.tuning.optimizer_state import carry_over, raw_steps
from transferkit.tuning.optimizers import changed, check_optimizer, with_multipliers
from transferkit.tuning.phases import PhasePlan
from transferkit.tuning.regularizers import l2_sp_penalty, smoothed, soft_loss
from transferkit.tuning.run import PhaseRecord
from transferkit.tuning.schedules import Schedule, Since

__all__ = ["Settings", "Targets", "take_over", "unsettled", "worse_than_chance"]


@dataclass(frozen=True)
class Settings:
    """How phases train.

    Args:
        l2_sp: Strengths on the distance to the loaded weights and on the head, or None.
        weight_decay: The optimizer's weight decay, or None for what it was given with.
        smoothing: Label smoothing.
        mixing: `mixup` or `cutmix` with its α, or None.
        average: Momentum of the moving average of the weights, or None.
        swa: The share of a phase's epochs whose ends are averaged, or None.
    """

    l2_sp: tuple[float, float] | None = None
    weight_decay: float | None = None
    smoothing: float = 0.0
    mixing: tuple[str, float] | None = None
    average: float | None = None
    swa: float | None = None

    @property
    def own_slots(self) -> int:
        """How many numbers are kept beside each one that trains: a moving average, the loaded value."""
        return int(self.average is not None) + int(bool(self.l2_sp and self.l2_sp[0]))

    def check(self, optimizer: Any, plans: Sequence[PhasePlan]) -> None:
        """Raises a ModelError when the optimizer can't do what the plan asks of it."""
        if any(self._needs_options(optimizer, plan) for plan in plans):
            check_optimizer(optimizer)

    def _needs_options(self, optimizer: Any, plan: PhasePlan) -> bool:
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        decayed = any(getattr(inner, name, None) for name in ("weight_decay", "adam_weight_decay"))
        rates = [row.multiplier * (row.low_rank.times if row.low_rank else 1.0) for row in plan.layers if row.trained]
        scaled = any(rate != 1.0 for rate in rates)
        return bool(decayed or scaled or self.l2_sp or self.average is not None)

    def starts(self, model: Any) -> dict[int, Any]:
        """The weights as they were loaded, by variable, where the plan pulls towards them."""
        return (
            {id(weight): keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(weight)) for weight in model.weights}
            if self.l2_sp
            else {}
        )

    def optimizer(
        self,
        plain: Any,
        model: Any,
        plan: PhasePlan,
        *,
        steps: int | None,
        previous: Any,
        several: bool,
        starts: Mapping[int, Any],
    ) -> Any:
        """The optimizer of a phase.

        Args:
            plain: A fresh optimizer of the user's choice, at the phase's rate.
            model: The model, with the phase's layers frozen.
            plan: The phase.
            steps: Batches in the phase, or None where they can't be told.
            previous: The optimizer of the phase before, or None.
            several: Whether there is more than one phase.
            starts: What `starts` gave.

        Raises:
            PlanError: for a schedule over a number of steps that isn't known.
        """
        plain = _scheduled(plain, plan, steps=steps, start=0 if previous is None else raw_steps(previous))
        if not self._needs_options(plain, plan) and not (several and _can_extend(plain)):
            return plain
        multipliers = {id(weight): row.multiplier for row in plan.layers for weight in row.layer.weights}
        for row in plan.layers:
            if row.low_rank is not None:
                times = row.multiplier * row.low_rank.times
                multipliers |= {id(weight): times for part in row.lowered for weight in part.weights if "lora" in weight.name}
        penalty = l2_sp_penalty(model, strength=self.l2_sp[0], head=self.l2_sp[1]) if self.l2_sp else None
        return with_multipliers(
            plain,
            model.trainable_variables,
            multiplier=lambda variable: multipliers.get(id(variable), 1.0),
            penalty=penalty,
            average=self.average,
            start=(lambda variable: starts[id(variable)]) if self.l2_sp else None,
        )

    def callbacks(self, plan: PhasePlan, *, first_epoch: int) -> list[Any]:
        """Fresh callbacks for a phase that begins with the epoch of that number; they come before the plan's own."""
        found: list[Any] = [AverageWeights()] if self.average is not None else []
        if self.swa is not None:
            epochs = plan.phase.epochs
            found.append(StochasticWeightAverage(first_epoch + epochs - max(1, round(self.swa * epochs))))
        if isinstance(plan.phase.schedule, Schedule):
            found.extend(plan.phase.schedule.callbacks())
        return found

    def targets(self, objective: Objective, heads: Sequence[Any], *, class_weight: Any) -> Targets:
        """The loss that the phases minimise, and what must be done to the data for it.

        Raises:
            DataError: when loss, metrics or class weights can't go with what the plan does to the labels.
        """
        loss = smoothed(objective.loss, self.smoothing) if self.smoothing else objective.loss
        if self.mixing is None:
            return Targets(replace(objective, loss=loss))
        asked = f"Mixing batches by {self.mixing[0]}."
        problems = []
        if len(heads) != 1:
            problems.append(f"a model with {len(heads)} outputs; it must have one")
        if class_weight is not None:
            problems.append("class_weight, though a mixed row has no single class")
        sparse_metrics = [
            type(m).__name__ for m in keras.tree.flatten(objective.metrics) if type(m).__name__.startswith("Sparse")
        ]
        problems.extend(f"the metric {name}, which takes whole numbers as labels" for name in sparse_metrics)
        if problems:
            raise DataError(asked, found=problems, fix="leave it out of the plan, or those of the call")
        soft = soft_loss(loss)
        was_sparse = isinstance(soft, keras.losses.CategoricalCrossentropy) and not _is_categorical(loss)
        classes = int(heads[0].shape[-1]) if was_sparse else None
        return Targets(replace(objective, loss=soft), classes=classes, mixing=self.mixing)


def _is_categorical(loss: Any) -> bool:
    return isinstance(loss, keras.losses.CategoricalCrossentropy) or getattr(loss, "__name__", loss) == "categorical_crossentropy"


def _can_extend(optimizer: Any) -> bool:
    try:
        check_optimizer(getattr(optimizer, "inner_optimizer", optimizer))
    except ModelError:
        return False
    return True


def _scheduled(optimizer: Any, plan: PhasePlan, *, steps: int | None, start: int) -> Any:
    """The optimizer with the phase's schedule, counted from the phase's own first step."""
    schedule = plan.phase.schedule
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    given = vars(inner).get("_learning_rate")
    if isinstance(schedule, KerasObject):
        rate: Any = Since(schedule.fresh(), start)
    elif isinstance(schedule, Schedule):
        peak = plan.phase.learning_rate if plan.phase.learning_rate is not None else float(inner.learning_rate)
        if steps is None and not isinstance(schedule.learning_rate(peak, steps=1), float):
            raise PlanError(
                f"Planning the learning rate of the phase {plan.phase.name!r} by {schedule!r}.",
                found="data that doesn't tell how many batches it has",
                fix="fit(…, steps_per_epoch=…)",
            )
        rate = schedule.learning_rate(peak, steps=steps or 1, start=start)
    elif isinstance(given, keras.optimizers.schedules.LearningRateSchedule) and start:
        rate = Since(given, start)
    else:
        return optimizer
    return changed(optimizer, learning_rate=rate)


def take_over(previous: Any, model: Any) -> None:
    """Gives the model's optimizer the state of the one of the phase before, for the variables that go on training."""
    optimizer = model.optimizer
    if type(previous) is type(optimizer) and hasattr(getattr(optimizer, "inner_optimizer", optimizer), "options"):
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        carry_over(previous, optimizer)


@dataclass(frozen=True)
class Targets:
    """The objective the phases train on, and how the data is brought to it.

    Args:
        objective: Loss, weights and metrics.
        classes: How many classes whole-number labels are spread over as one-hot rows, or None where they stay.
        mixing: `mixup` or `cutmix` with its α, or None.
    """

    objective: Objective
    classes: int | None = None
    mixing: tuple[str, float] | None = field(default=None)

    def validation(self, data: Any) -> Any:
        """Validation data as the objective takes it."""
        return data if data is None or self.classes is None else one_hot_labels(data, self.classes)

    def training(
        self,
        batches: Any,
        *,
        seed: int,
        epoch: Callable[[], int],
        start: Callable[[], int] = lambda: 0,
        steps: int | None = None,
    ) -> Any:
        """Batches of training data as the objective takes them, mixed where the plan says so."""
        if self.classes is not None:
            batches = one_hot_labels(batches, self.classes)
        if self.mixing is None:
            return batches
        kind, alpha = self.mixing
        return mixed(batches, kind=kind, alpha=alpha, seed=seed, epoch=epoch, start=start, steps=steps)


def unsettled(plans: Sequence[PhasePlan], records: Sequence[PhaseRecord]) -> list[str]:
    """A note for each BatchNorm layer whose moving statistics are still largely those it began with; three at most."""
    steps: dict[int, int] = {}
    rows = {}
    for plan, record in zip(plans, records, strict=True):
        for row in plan.layers:
            if row.batch_norm == "adapts":
                steps[id(row.layer)] = steps.get(id(row.layer), 0) + record.steps
                rows[id(row.layer)] = row
    found = []
    for key, row in rows.items():
        left = row.layer.momentum ** steps[key]
        if left > 0.05:
            found.append(
                f"{row.path}: after {steps[key]} steps its statistics are still {left:.0%} those it began with (momentum "
                f"{row.layer.momentum:g}). Train longer, or plan .batch_norm('recalibrate'), which takes them from the data."
            )
    return found[:3]


def worse_than_chance(history: Mapping[str, Sequence[float]], classes: int | None) -> str | None:
    """A note where validation never did better than guessing, else None."""
    figures = history.get("val_accuracy") or history.get("val_sparse_categorical_accuracy")
    if not figures or not classes or classes < 2 or float(np.max(figures)) > 1 / classes:
        return None
    return (
        f"Validation accuracy never rose above {max(figures):.3g}; guessing among {classes} classes gives {1 / classes:.3g}. "
        "Check the order of labels and rows, the preprocessing and the learning rate."
    )
