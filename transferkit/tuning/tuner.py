"""`FineTuner`: the plan of a fine-tuning, and `fit`, which carries it out on a plain Keras model."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from typing_extensions import Self

from transferkit._keras import keras
from transferkit._objects import FunctionReference, KerasObject, as_value
from transferkit._plan import FrozenMapping, Plan, steps_named
from transferkit._table import Table
from transferkit.building.frontier import Split
from transferkit.building.heads import heads_of
from transferkit.data import split
from transferkit.errors import DataError, ModelError, PlanError, did_you_mean
from transferkit.placement import Placement
from transferkit.tuning.caching import planned_split
from transferkit.tuning.callbacks import TensorBoardLogs
from transferkit.tuning.defaults import default_plan, explanation
from transferkit.tuning.feeding import check_inputs, complete_class_weights, first_rows
from transferkit.tuning.layers import Layers
from transferkit.tuning.loop import Job, run_phases
from transferkit.tuning.objectives import Objective, objective_of
from transferkit.tuning.phases import BATCH_NORM_POLICIES, Phase, PhasePlan, resolve
from transferkit.tuning.run import PhaseRecord, Run
from transferkit.tuning.schedules import Schedule
from transferkit.tuning.settings import Settings, unsettled, worse_than_chance

__all__ = ["Description", "FineTuner"]


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


@final
class FineTuner(Plan):
    """The plan of a fine-tuning: phases that train more or fewer layers, and how.

    A plan without a phase trains every layer for ten epochs.

    Example:
        >>> import transferkit as tk
        >>> plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3)
        >>> plan.phase("all", train=tk.Layers.all(), epochs=10, learning_rate=1e-4)
        FineTuner().phase('head', train=Layers.head(), epochs=3).phase('all', train=Layers.all(), epochs=10, learning_rate=0.0001)
    """

    STEPS: ClassVar[frozenset[str]] = frozenset(
        {
            "batch_norm",
            "cache",
            "cutmix",
            "early_stopping",
            "ema",
            "l2_sp",
            "label_smoothing",
            "loss",
            "metrics",
            "mixup",
            "optimizer",
            "phase",
            "rate",
            "swa",
            "weight_decay",
        }
    )

    def __init__(self) -> None:
        self._begin()

    @classmethod
    def default(cls, model: Any, data: Any, *, epochs: int | None = None) -> FineTuner:
        """A plan for a model with loaded weights and a new head, chosen by what both are; `explain` says why.

        The head trains first while the rest is frozen, then everything, each block of layers more gently than the one above
        (LP-FT, Kumar et al., ICLR 2022; layer decay, Bao et al., ICLR 2022).

        Args:
            model: A built model.
            data: What `fit` will be given.
            epochs: Epochs in all; chosen by the number of rows where nothing is said.

        Example:
            >>> import keras, numpy as np, transferkit as tk
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
            >>> plan = tk.FineTuner.default(model, (np.zeros((60, 4)), np.arange(60) % 3))
            >>> print(plan.explain())
            What each step of the plan does
            ...
        """
        plan: FineTuner = default_plan(cls(), model, data, epochs=epochs)
        return plan

    def explain(self) -> Table:
        """The plan line by line: what each step does, and where the method comes from."""
        return explanation(self)

    def phase(
        self,
        name: str,
        *,
        train: Layers,
        epochs: int,
        learning_rate: float | None = None,
        layer_decay: float | None = None,
        schedule: Any = None,
    ) -> Self:
        """One more phase, after those before.

        Args:
            name: Its name, another than the others have.
            train: The layers that train. All others are frozen: their weights stay, their BatchNorm keeps its statistics, their
                dropout is off.
            epochs: How many times it goes over the data, at most.
            learning_rate: The optimizer's step size; None for the one the optimizer was given with (Adam's is 0.001). Momenta and
                second moments go on from the phase before for what goes on training.
            layer_decay: Above 0, at most 1: the head trains at the full rate, each block of layers below at this times the rate
                of the one above it. `describe` shows what comes of it.
            schedule: The course of the rate over the phase: a `Schedule` or its name (`"cosine"`, `"one_cycle"` …), or a Keras
                `LearningRateSchedule`, counted from the phase's first step.
        """
        problems = []
        if not isinstance(train, Layers):
            problems.append(f"train={train!r}, which is no selection of layers; Layers.head() and Layers.all() are")
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            problems.append(f"epochs={epochs!r}; it must be a whole number above 0")
        if learning_rate is not None and not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < float("inf")):
            problems.append(f"learning_rate={learning_rate!r}; it must be a number above 0")
        if layer_decay is not None and not (_is_number(layer_decay) and 0 < layer_decay <= 1):
            problems.append(f"layer_decay={layer_decay!r}; it must be a number above 0, at most 1")
        if any(step.positional[0] == name for step in steps_named(self, ["phase"])):
            problems.append(f"a second phase named {name!r}")
        if problems:
            raise PlanError(f"Planning the phase {name!r}.", found=problems)
        if isinstance(schedule, str):
            schedule = Schedule.of(schedule)
        elif schedule is not None and not isinstance(schedule, Schedule):
            own = isinstance(schedule, (KerasObject, keras.optimizers.schedules.LearningRateSchedule))
            if not own:
                raise PlanError(
                    f"Planning the phase {name!r}.",
                    found=f"schedule={schedule!r}, which is neither a Schedule nor a Keras LearningRateSchedule",
                    fix='give a name, schedule="cosine", or a value, schedule=Schedule.cosine(warmup=0.1)',
                )
            schedule = as_value(schedule)
        return self._then(
            "phase",
            name=name,
            train=train,
            epochs=epochs,
            learning_rate=learning_rate,
            layer_decay=layer_decay,
            schedule=schedule,
        )

    def rate(self, layers: Layers, *, times: float) -> Self:
        """A factor on the learning rate of some layers, in every phase that trains them; several multiply.

        Args:
            layers: Which.
            times: The factor, 0 or more.
        """
        if not isinstance(layers, Layers) or not _is_number(times) or times < 0:
            raise PlanError("Planning a rate for some layers.", found=f"{layers!r} and times={times!r}; layers and a number")
        return self._then("rate", layers=layers, times=times)

    def weight_decay(self, weight_decay: float) -> Self:
        """Weight decay of the optimizer: not on biases, normalisation and embeddings, and at each layer's own rate.

        Args:
            weight_decay: The share of a weight that a step takes away, times the rate; 0 or more. An optimizer given with a
                weight decay of its own has it without this.
        """
        if not _is_number(weight_decay) or weight_decay < 0:
            raise PlanError("Planning weight decay.", found=f"{weight_decay!r}; it must be a number, at least 0")
        return self._then("weight_decay", weight_decay=weight_decay)

    def l2_sp(self, strength: float, *, head: float | None = None) -> Self:
        """L2-SP: holds the weights to those that were loaded, and the head's to zero (Li, Grandvalet & Davoine, ICML 2018).

        It goes into the gradients, not into the loss that is reported, and works with any optimizer and `train_step`.

        Args:
            strength: α of α/2 ‖w − w₀‖²; 0 or more.
            head: β of β/2 ‖w‖² on the head; `strength` / 10 where nothing is said.
        """
        head = strength / 10 if head is None and _is_number(strength) else head
        if not _is_number(strength) or not _is_number(head) or strength < 0 or (head or 0.0) < 0:
            raise PlanError("Planning L2-SP.", found=f"strength={strength!r}, head={head!r}; they must be numbers, at least 0")
        return self._then("l2_sp", strength=strength, head=head)

    def label_smoothing(self, smoothing: float) -> Self:
        """Takes a share of each label's weight and gives it to all classes alike, for labels of any kind.

        Args:
            smoothing: The share, from 0 to below 1.
        """
        if not _is_number(smoothing) or not 0 <= smoothing < 1:
            raise PlanError("Planning label smoothing.", found=f"{smoothing!r}; it must be a number from 0 to below 1")
        return self._then("label_smoothing", smoothing=smoothing)

    def mixup(self, alpha: float = 0.2) -> Self:
        """Trains on blends of pairs of rows and their labels (Zhang et al., ICLR 2018).

        Args:
            alpha: Of the Beta distribution of the blend; above 0.
        """
        return self._mixing("mixup", alpha)

    def cutmix(self, alpha: float = 1.0) -> Self:
        """Trains on images with a part of another pasted in, labels in proportion (Yun et al., ICCV 2019).

        Args:
            alpha: Of the Beta distribution of the part's size; above 0.
        """
        return self._mixing("cutmix", alpha)

    def _mixing(self, kind: str, alpha: float) -> Self:
        problems = []
        if not _is_number(alpha) or not alpha > 0:
            problems.append(f"alpha={alpha!r}; it must be a number above 0")
        if steps_named(self, ["cutmix" if kind == "mixup" else "mixup"]):
            problems.append("mixup and cutmix in one plan; it can hold one of them")
        if problems:
            raise PlanError(f"Planning {kind}.", found=problems)
        return self._then(kind, alpha=alpha)

    def ema(self, momentum: float = 0.999) -> Self:
        """Validates, and ends each phase, with a moving average of the weights.

        Args:
            momentum: How much of the average a step keeps, from 0 to below 1; less in the first steps, so that a short phase
                isn't averaged with its own beginning.
        """
        if not _is_number(momentum) or not 0 <= momentum < 1:
            raise PlanError("Planning a moving average.", found=f"momentum={momentum!r}; it must be a number from 0 to below 1")
        return self._averaged("ema", momentum=momentum)

    def swa(self, last: float = 0.25) -> Self:
        """Ends each phase with the mean of the weights at the ends of its last epochs (Izmailov et al., UAI 2018).

        BatchNorm layers that train get the statistics of the training data anew.

        Args:
            last: The share of the phase's epochs that counts, above 0, at most 1.
        """
        if not _is_number(last) or not 0 < last <= 1:
            raise PlanError("Planning an average of weights.", found=f"last={last!r}; it must be a number above 0, at most 1")
        if steps_named(self, ["early_stopping"]):
            raise PlanError(
                "Planning an average of weights.",
                found="early stopping in the same plan, which ends a phase with the weights of one epoch",
                fix="use .ema(), which early stopping can judge",
            )
        return self._averaged("swa", last=last)

    def _averaged(self, name: str, **arguments: Any) -> Self:
        if steps_named(self, ["swa" if name == "ema" else "ema"]):
            raise PlanError("Planning an average of weights.", found="ema and swa in one plan; it can hold one of them")
        return self._then(name, **arguments)

    def optimizer(self, optimizer: Any) -> Self:
        """Which optimizer makes the steps, Adam where nothing is said.

        Args:
            optimizer: A name of Keras's, or an optimizer of Keras or of yours.
        """
        value = as_value(optimizer)
        if isinstance(value, str):
            try:
                keras.optimizers.get(value)
            except ValueError as error:
                known = [name for name in dir(keras.optimizers) if name[0].isupper()]
                raise PlanError(
                    "Choosing an optimizer.", found=f"no optimizer named {value!r}{did_you_mean(value, known)}"
                ) from error
        elif not isinstance(optimizer, (keras.optimizers.Optimizer, KerasObject)):
            raise PlanError(
                "Choosing an optimizer.",
                found=f"{optimizer!r}",
                fix='give a name, .optimizer("adamw"), or an optimizer, .optimizer(keras.optimizers.AdamW())',
            )
        return self._then("optimizer", optimizer=value)

    def loss(self, loss: Any, *, weights: Any = None) -> Self:
        """Which loss is minimised; where nothing is said it follows from the head and the labels.

        Args:
            loss: A name of Keras's, a loss, a function of labels and predictions, or a dict or list of these for several outputs.
            weights: For several outputs, their weights in the sum, in the structure of the losses.
        """
        return self._then("loss", loss=_values(loss), weights=weights)

    def metrics(self, *metrics: Any) -> Self:
        """What is measured while training.

        Args:
            metrics: Names of Keras's, metrics, functions; or one dict of lists of these for several outputs.
        """
        return self._then("metrics", metrics=tuple(_values(metric) for metric in metrics))

    def early_stopping(self, patience: int = 3, *, monitor: str = "val_loss", restore_best: bool = True) -> Self:
        """Ends a phase when it no longer helps, and goes on to the next.

        Args:
            patience: After how many epochs without a gain.
            monitor: Which figure of the history; one with `auc` or `acc` in its name should rise, any other fall.
            restore_best: Whether the phase ends with the weights of its best epoch.
        """
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 0:
            raise PlanError("Planning early stopping.", found=f"patience={patience!r}; it must be a whole number, at least 0")
        return self._then("early_stopping", patience=patience, monitor=monitor, restore_best=restore_best)

    def cache(self, cache: bool | str | os.PathLike[str]) -> Self:
        """Whether what a phase freezes is computed once for every row, and the phase trains on the features.

        Where nothing is said, it is done where it pays. Losses and weights are the same either way; `docs/feature-cache.md`
        says how nearly.

        Args:
            cache: True wherever it can be done, also for data that comes in batches, whose rows are then shuffled like arrays;
                False never; or a folder, where the features are kept for later runs.
        """
        value = os.fspath(cache) if isinstance(cache, os.PathLike) else cache
        if not isinstance(value, (bool, str)) or value == "":
            raise PlanError(
                "Planning the feature cache.", found=f"{cache!r}", fix='.cache(True), .cache(False) or .cache("folder")'
            )
        return self._then("cache", cache=value)

    def batch_norm(self, policy: str) -> Self:
        """What BatchNorm does in layers that train.

        Args:
            policy: `freeze` (what happens where nothing is said): it keeps its statistics, its scale and its offset, unless its
                statistics are still the initial ones, so that there is nothing to keep. `adapt`: it trains like the layers
                around it.
        """
        if policy not in BATCH_NORM_POLICIES:
            raise PlanError(
                "Choosing what BatchNorm does.",
                found=f"{policy!r}{did_you_mean(str(policy), BATCH_NORM_POLICIES)}",
                fix="one of " + ", ".join(map(repr, BATCH_NORM_POLICIES)),
            )
        return self._then("batch_norm", policy=policy)

    # What follows from the plan

    def phases(self) -> tuple[Phase, ...]:
        """The phases in order; the one that a plan without any stands for."""
        found = []
        for step in steps_named(self, ["phase"]):
            (name,) = step.positional
            settings = step.arguments
            found.append(Phase(name, **{"learning_rate": None, **settings}))
        return tuple(found) or (Phase("all", Layers.all(), 10, None),)

    def _last(self, name: str) -> dict[str, Any] | None:
        """The arguments of the last step of that name, positional ones under their parameters' names; None without one."""
        steps = steps_named(self, [name])
        return self._bound(steps[-1]) if steps else None

    def _policy(self) -> str:
        chosen = self._last("batch_norm")
        return str(chosen["policy"]) if chosen else "freeze"

    def describe(self, model: Any) -> Description:
        """What the plan means for the model: per phase and layer what is frozen, what trains and at which rate. Changes nothing.

        Args:
            model: A built model.

        Raises:
            ModelError: when a phase selects layers the model hasn't got, or nothing that could train.
        """
        plans = self._resolved(model)
        off = self._cache() is False
        return Description(plans, tuple(None if off else planned_split(model, plan) for plan in plans))

    def _resolved(self, model: Any) -> tuple[PhasePlan, ...]:
        heads_of(model)
        rates = tuple((layers, factor) for layers, factor in (self._bound(step).values() for step in steps_named(self, ["rate"])))
        plans = tuple(resolve(model, phase, batch_norm=self._policy(), rates=rates) for phase in self.phases())
        idle = [plan.phase.name for plan in plans if plan.trained_parameters == 0]
        if idle:
            raise ModelError(
                f"Planning to fine-tune the model {model.name!r}.",
                found=[f"the phase {name!r} would train nothing" for name in idle],
                cause="it selects only layers without weights, or only BatchNorm, which keeps its weights",
                fix='select layers with weights, or .batch_norm("adapt")',
            )
        return plans

    def _cache(self) -> bool | str | None:
        chosen = self._last("cache")
        return chosen["cache"] if chosen else None

    def make_optimizer(self, learning_rate: float | None = None) -> Any:
        """A fresh optimizer of the plan's, at that rate where one is given."""
        chosen = self._last("optimizer")
        value = chosen["optimizer"] if chosen else "adam"
        optimizer = value.fresh() if isinstance(value, KerasObject) else keras.optimizers.get(value)
        decay = self._last("weight_decay")
        changes = {"learning_rate": learning_rate} if learning_rate is not None else {}
        changes |= {"weight_decay": decay["weight_decay"]} if decay else {}
        return type(optimizer).from_config({**optimizer.get_config(), **changes}) if changes else optimizer

    def _settings(self) -> Settings:
        """What the plan says of how its phases train."""
        of = {name: self._last(name) or {} for name in ("l2_sp", "weight_decay", "label_smoothing", "ema", "swa")}
        mixing = steps_named(self, ["mixup", "cutmix"])
        return Settings(
            l2_sp=tuple(of["l2_sp"].values()) if of["l2_sp"] else None,
            smoothing=of["label_smoothing"].get("smoothing", 0.0),
            mixing=(mixing[-1].name, self._bound(mixing[-1])["alpha"]) if mixing else None,
            average=of["ema"].get("momentum"),
            swa=of["swa"].get("last"),
        )

    def _make_callbacks(self) -> list[Any]:
        chosen = self._last("early_stopping")
        if chosen is None:
            return []
        rising = any(word in chosen["monitor"] for word in ("acc", "auc", "AUC"))
        return [
            keras.callbacks.EarlyStopping(
                monitor=chosen["monitor"],
                mode="max" if rising else "min",
                patience=chosen["patience"],
                restore_best_weights=chosen["restore_best"],
            )
        ]

    def objective(self, model: Any, labels: Any) -> Objective:
        """Loss and metrics for a model and its labels, as `fit` settles them."""
        loss, metrics = self._last("loss"), self._last("metrics")
        chosen = [_fresh(item) for item in metrics["metrics"]] if metrics else None
        if chosen is not None and len(chosen) == 1 and isinstance(chosen[0], dict):
            (chosen,) = chosen
        return objective_of(
            model,
            heads_of(model),
            labels,
            loss=_fresh(loss["loss"]) if loss else None,
            loss_weights=_fresh(loss["weights"]) if loss else None,
            metrics=chosen,
        )

    def fit(
        self,
        model: Any,
        data: Any,
        *,
        validation_data: Any = None,
        batch_size: int = 32,
        callbacks: Sequence[Any] = (),
        class_weight: Mapping[int, float] | None = None,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        seed: int | None = None,
        placement: Placement | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        verbose: Any = "auto",
    ) -> Run:
        """Trains the model by the plan. Changes its weights, its `trainable` flags and what it is compiled with, and nothing
        else.

        Args:
            model: A built Keras model, functional, Sequential or subclassed.
            data: A `Data`, or whatever Keras's `fit` takes: `(x, y)` or `(x, y, sample_weight)` of arrays (dicts and tuples of
                them for several inputs and outputs), a batched `tf.data.Dataset`, a `PyDataset`, a generator or list of batches.
            validation_data: The same; or a fraction of in-memory data to set apart, at random and by class, before training.
            batch_size: Rows in a batch of in-memory data; data that comes in batches keeps its own.
            callbacks: Keras callbacks of any kind. They see one training: it begins with the first phase and ends with the last.
            class_weight: Class → weight of its rows in the loss; 1 for a class that isn't named.
            steps_per_epoch: Batches in an epoch, for data without an end.
            validation_steps: The same for validation.
            seed: Fixes the order of the rows, dropout and augmentation, and Keras's global random state with them. Without one
                it is drawn, and stands in the result.
            placement: Where it runs; where the model is without one.
            tensorboard: A folder for TensorBoard's files: loss, metrics and learning rate of all phases over one axis of steps.
            verbose: As for Keras's `fit`; with 2 a line for each epoch with its phase, rate and the time left.

        Returns:
            A `Run`.

        Raises:
            ModelError, DataError, PlacementError: before anything has changed, when plan, model, data and devices don't fit
                together.
            TrainingError: when the loss stops being finite, or a frozen weight changes.
        """
        plans = self._resolved(model)
        given_seed = seed is not None
        seed = secrets.randbits(31) if seed is None else seed
        _check_arguments(batch_size=batch_size, seed=seed)
        if isinstance(validation_data, float):
            data, validation_data = split(data, validation_data, seed=seed)
        heads = heads_of(model)
        self._check_passes(data, steps_per_epoch)
        batch, data = first_rows(data, name="training data")
        check_inputs(batch, model, heads, name="training data")
        if validation_data is not None:
            val_batch, validation_data = first_rows(validation_data, name="validation data")
            check_inputs(val_batch, model, heads, name="validation data")
        objective = self.objective(model, batch.y)
        self._check_monitors(validation_data, objective)
        settings = self._settings()
        settings.check(self.make_optimizer(None), plans)
        weights = complete_class_weights(class_weight, heads)
        targets = settings.targets(objective, heads, class_weight=weights)
        job = Job(
            data=data,
            validation=validation_data,
            objective=objective,
            make_optimizer=self.make_optimizer,
            make_callbacks=self._make_callbacks,
            settings=settings,
            targets=targets,
            callbacks=[*callbacks, *([TensorBoardLogs(tensorboard)] if tensorboard is not None else [])],
            batch_size=batch_size,
            seed=seed,
            class_weight=weights,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            verbose=verbose,
            cache=self._cache(),
        )
        if given_seed:
            keras.utils.set_random_seed(seed % 2**32)
        if placement is None:
            history, records = run_phases(model, plans, job)
        else:
            with placement.scope() as strategy:
                Placement.check_model(model, strategy)
                history, records = run_phases(model, plans, job)
        return Run(
            history=history,
            phases=tuple(records),
            seed=seed,
            placement=placement.describe() if placement else "",
            notes=(f"Loss: {objective.reason}.", *_notes(history, heads, objective, plans, records)),
        )

    def _check_passes(self, data: Any, steps_per_epoch: int | None) -> None:
        """Raises a DataError for data that can be gone over once only, where the plan goes over it more often."""
        epochs = sum(phase.epochs for phase in self.phases())
        if hasattr(data, "__next__") and steps_per_epoch is None and epochs > 1:
            raise DataError(
                f"Training for {epochs} epochs.",
                found="a generator that can be gone over once, and no steps_per_epoch",
                fix="give a list of batches, a tf.data.Dataset, or a generator without an end and steps_per_epoch=…",
            )

    def _monitors(self) -> list[tuple[str, str]]:
        """What the plan watches: what for, and the figure's name."""
        chosen = self._last("early_stopping")
        found = [("Stopping early", str(chosen["monitor"]))] if chosen else []
        for phase in self.phases():
            schedule = phase.schedule
            if isinstance(schedule, Schedule) and schedule.kind == "plateau":
                found.append((f"Lowering the rate in the phase {phase.name!r} on a plateau", str(schedule.settings["monitor"])))
        return found

    def _check_monitors(self, validation: Any, objective: Objective) -> None:
        """Raises a PlanError for a figure that won't be there; Keras only warns, and goes on without it."""
        known = _figures(objective)
        for purpose, monitor in self._monitors():
            asked = f"{purpose} by {monitor!r}."
            if monitor.startswith("val_") and validation is None:
                raise PlanError(
                    asked,
                    found="no validation data to measure it on",
                    fix="fit(…, validation_data=0.1) sets a tenth of the rows apart",
                )
            if known is not None and monitor.removeprefix("val_") not in known:
                names = [prefix + name for name in known for prefix in ("", "val_")]
                raise PlanError(
                    asked,
                    found=f"no figure of that name{did_you_mean(monitor, names)}",
                    fix=f"one of {', '.join(map(repr, names))}",
                )


def _figures(objective: Objective) -> list[str] | None:
    """The names the history will have, without `val_`; None where Keras makes them up (several outputs, its short names)."""
    metrics = objective.metrics or []
    if isinstance(objective.loss, (dict, list, tuple)) or isinstance(metrics, dict):
        return None
    names = [item if isinstance(item, str) else getattr(item, "name", getattr(item, "__name__", None)) for item in metrics]
    if not all(isinstance(name, str) and name.islower() and len(name) > 3 for name in names) or "crossentropy" in names:
        return None
    return ["loss", *map(str, names)]


def _notes(
    history: Mapping[str, Sequence[float]],
    heads: Sequence[Any],
    objective: Objective,
    plans: Sequence[PhasePlan],
    records: Sequence[PhaseRecord],
) -> list[str]:
    """What the user should know before trusting the run."""
    one = len(heads) == 1 and not isinstance(objective.loss, (dict, list, tuple)) and bool(heads[0].shape)
    chance = worse_than_chance(history, heads[0].shape[-1] if one else None)
    return [*([chance] if chance else []), *unsettled(plans, records)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_arguments(*, batch_size: int, seed: int) -> None:
    problems = []
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        problems.append(f"batch_size={batch_size!r}; it must be a whole number above 0")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        problems.append(f"seed={seed!r}; it must be a whole number from 0 to 2**63 - 1")
    if problems:
        raise PlanError("Fitting a model.", found=problems)


def _values(thing: Any) -> Any:
    """What a plan keeps for a loss or metric, or for a dict or list of them."""
    if isinstance(thing, Mapping):
        return {key: _values(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return tuple(_values(value) for value in thing)
    return as_value(thing)


def _fresh(value: Any) -> Any:
    if isinstance(value, (KerasObject, FunctionReference)):
        return value.fresh()
    if isinstance(value, FrozenMapping):
        return {key: _fresh(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_fresh(item) for item in value]
    return value
