"""`FineTuner`: the plan of a fine-tuning, and `fit`, which carries it out on a plain Keras model."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, final

from transferkit._keras import keras, tf
from transferkit._objects import KerasObject
from transferkit._plan import steps_named
from transferkit._table import Table
from transferkit.building.heads import heads_of
from transferkit.building.scaling import unscaled
from transferkit.data import Data, is_arrays, row_count, split
from transferkit.errors import DataError, ModelError, PlanError, did_you_mean
from transferkit.placement import Placement, has_workers, is_chief, running
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.caching import planned_split
from transferkit.tuning.callbacks import TensorBoardLogs
from transferkit.tuning.checking import BatchChecks, check_classes
from transferkit.tuning.costs import cost_of
from transferkit.tuning.defaults import default_plan, explanation
from transferkit.tuning.describing import Description, PhaseDescription
from transferkit.tuning.differences import check_batch, differences
from transferkit.tuning.feeding import check_inputs, complete_class_weights, first_rows
from transferkit.tuning.identity import identity
from transferkit.tuning.layers import Layers
from transferkit.tuning.loop import Job, compile_as_given, run_phases
from transferkit.tuning.low_rank import LowRank
from transferkit.tuning.noise import restore, set_stochastic_depth
from transferkit.tuning.objectives import Objective, objective_of
from transferkit.tuning.optimizers import changed
from transferkit.tuning.phases import PhasePlan, resolve
from transferkit.tuning.replicated import agreed_seed, check_alike, spread_seeds
from transferkit.tuning.resuming import Session
from transferkit.tuning.run import PhaseRecord, Run
from transferkit.tuning.schedules import Schedule
from transferkit.tuning.sessions import session
from transferkit.tuning.settings import Settings, unsettled, worse_than_chance
from transferkit.tuning.steps import TuningSteps, fresh

__all__ = ["FineTuner"]


@final
class FineTuner(TuningSteps):
    """The plan of a fine-tuning: phases that train more or fewer layers, and how.

    A plan without a phase trains every layer for ten epochs.

    Example:
        >>> import transferkit as tk
        >>> plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3)
        >>> plan.phase("all", train=tk.Layers.all(), epochs=10, learning_rate=1e-4)
        FineTuner().phase('head', train=Layers.head(), epochs=3).phase('all', train=Layers.all(), epochs=10, learning_rate=0.0001)
    """

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
            epochs: How often the data may go through the whole network; chosen by the number of rows where nothing is said. Two
                thirds are for training all of it. Where the rest can be computed once, the head's own epochs don't count, and it
                has as many as it needs to settle.

        Raises:
            DataError: for rows that aren't the model's or aren't finite.

        Example:
            >>> import keras, numpy as np, transferkit as tk
            >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
            >>> plan = tk.FineTuner.default(model, (np.zeros((60, 4)), np.arange(60) % 3))
            >>> print(plan.explain())
            What each step of the plan does
            ...
        """
        if isinstance(data, Data) or is_arrays(data):
            check_inputs(first_rows(data, name="data")[0], model, heads_of(model), name="data")
        head = cls().phase("head", train=Layers.head(), epochs=1)
        plan: FineTuner = default_plan(
            cls(), model, data, epochs=epochs, once=lambda: planned_split(model, head._resolved(model)[0]).useful
        )
        return plan

    def explain(self) -> Table:
        """The plan line by line: what each step does, and where the method comes from."""
        return explanation(self)

    def describe(self, model: Any, *, batch_size: int = 32, rows: int | None = None) -> Description:
        """What the plan means for the model, and what it costs; changes nothing.

        Per phase and layer: what is frozen, what trains and at which rate, and what is computed once; per phase its operations
        and the memory of a step.

        Args:
            model: A built model.
            batch_size: Rows in a batch, for the memory.
            rows: Rows of the training data, for the size of the features that are computed once.

        Raises:
            ModelError: when a phase selects layers the model hasn't got, or nothing that could train.
        """
        plans, cache = self._resolved(model), self._cache()
        parts = []
        for plan in plans:
            made = None if cache.wanted is False else planned_split(model, plan, views=cache.views > 1)
            useful = made is not None and made.useful
            optimizer = self.make_optimizer(plan.phase.learning_rate)
            cost = cost_of(
                plan,
                once=made.cached if made is not None and useful else (),
                row_bytes=made.nbytes if made is not None and useful else 0,
                optimizer=optimizer,
                own_slots=self._settings().own_slots,
                batch_size=batch_size,
                rows=rows,
            )
            decay = getattr(getattr(optimizer, "inner_optimizer", optimizer), "weight_decay", None)
            parts.append(PhaseDescription(plan, made, cost, decay if isinstance(decay, float) else None, cache))
        return Description(tuple(parts))

    def _resolved(self, model: Any) -> tuple[PhasePlan, ...]:
        heads_of(model)
        rates = tuple((layers, factor) for layers, factor in (self._bound(step).values() for step in steps_named(self, ["rate"])))
        thin = self._last("lora")
        low_rank = None
        if thin:
            layers = Layers.all() - Layers.head() if thin["layers"] is None else thin["layers"]
            low_rank = (layers, LowRank(thin["rank"], thin["alpha"], thin["times"]))
        on = (self._last("frozen_dropout") or {"on": False})["on"]
        settings: dict[str, Any] = {"batch_norm": self._policy(), "rates": rates, "low_rank": low_rank, "dropout_on": on}
        plans = tuple(resolve(model, phase, **settings) for phase in self.phases())
        if low_rank and not any(row.lowered for plan in plans for row in plan.layers):
            raise ModelError(
                f"Planning to fine-tune the model {model.name!r} by LoRA.",
                found="no layer that trains, is meant and can: Dense, EinsumDense, Embedding, convolutions, attention",
                fix=".lora(rank, layers=Layers.named(…)), of layers that a phase trains",
            )
        depth = self._last("stochastic_depth")
        if depth:
            restore(set_stochastic_depth(model, depth["rate"]))
        idle = [plan.phase.name for plan in plans if plan.trained_parameters == 0]
        if idle:
            raise ModelError(
                f"Planning to fine-tune the model {model.name!r}.",
                found=[f"the phase {name!r} would train nothing" for name in idle],
                cause="it selects only layers without weights, or only BatchNorm, which keeps its weights",
                fix='select layers with weights, or .batch_norm("adapt")',
            )
        return plans

    def _cache(self) -> CacheSettings:
        return CacheSettings(**(self._last("cache") or {}))

    def make_optimizer(self, learning_rate: float | None = None) -> Any:
        """A fresh optimizer of the plan's, at that rate where one is given."""
        chosen = self._last("optimizer")
        value = chosen["optimizer"] if chosen else "adam"
        optimizer = value.fresh() if isinstance(value, KerasObject) else keras.optimizers.get(value)
        decay = self._last("weight_decay")
        changes = {"learning_rate": learning_rate} if learning_rate is not None else {}
        changes |= {"weight_decay": decay["weight_decay"]} if decay else {}
        return changed(optimizer, **changes) if changes else optimizer

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
        chosen = [fresh(item) for item in metrics["metrics"]] if metrics else None
        if chosen is not None and len(chosen) == 1 and isinstance(chosen[0], dict):
            (chosen,) = chosen
        return objective_of(
            model,
            heads_of(model),
            labels,
            loss=fresh(loss["loss"]) if loss else None,
            loss_weights=fresh(loss["weights"]) if loss else None,
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
        steps_per_execution: int = 1,
        seed: int | None = None,
        placement: Placement | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        save_every: int | float | None = None,
        keep_checkpoints: int = 3,
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
            steps_per_execution: How many steps are taken in one call of the compiled function, as for Keras's `compile`.
            seed: Fixes the order of the rows, dropout and augmentation, and Keras's global random state with them. Without one
                it is drawn, and stands in the result.
            placement: Where it runs; where the model is without one. On several devices they share the rows of each batch.
            tensorboard: A folder for TensorBoard's files: loss, metrics and learning rate of all phases over one axis of steps.
            checkpoint_dir: A folder for checkpoints, of this run alone. With it, Ctrl-C finishes the step, writes a checkpoint
                and raises a `TrainingInterruptedError`, and SIGTERM ends the process with code 75; a second one stops at once.
            resume: Whether to go on with the run in `checkpoint_dir`: to the bit as if it had never stopped. Without one there it
                begins; one that is finished gives its result at once.
            save_every: How often a checkpoint is written: after so many steps, or after so many seconds with a point (`30.0`);
                None for as often as costs less than one percent of the time.
            keep_checkpoints: How many of the last are kept.
            verbose: As for Keras's `fit`; with 2 a line for each epoch with its phase, rate and the time left.

        Returns:
            A `Run`.

        Raises:
            ModelError, DataError, PlacementError: before anything has changed, when plan, model, data and devices don't fit
                together.
            StorageError: when `checkpoint_dir` holds another run, is held by one, or can't be written to.
            TrainingError: when loss or weights stop being finite (the model has its last good weights again), a frozen weight
                changes, or a step needs more memory than there is.
            TrainingInterruptedError: on Ctrl-C, where there is a `checkpoint_dir`.
        """
        with (
            running(placement, model) as strategy,
            session(
                checkpoint_dir, resume=resume, save_every=save_every, keep=keep_checkpoints, writes=is_chief(strategy)
            ) as watch,
        ):
            return self._fit(
                model,
                data,
                watch,
                strategy,
                validation_data=validation_data,
                batch_size=batch_size,
                callbacks=callbacks,
                class_weight=class_weight,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                steps_per_execution=steps_per_execution,
                seed=seed,
                placement=placement,
                tensorboard=tensorboard,
                verbose=verbose,
            )

    def _fit(
        self,
        model: Any,
        data: Any,
        watch: Session,
        strategy: Any,
        *,
        validation_data: Any,
        batch_size: int,
        callbacks: Sequence[Any],
        class_weight: Mapping[int, float] | None,
        steps_per_epoch: int | None,
        validation_steps: int | None,
        steps_per_execution: int,
        seed: int | None,
        placement: Placement | None,
        tensorboard: str | os.PathLike[str] | None,
        verbose: Any,
    ) -> Run:
        """`fit` under its watch."""
        plans = self._resolved(model)
        apart = differences(model, plans, strategy)
        given_seed = seed is not None
        seed = watch.seed(seed)
        seed = agreed_seed(secrets.randbits(31) if seed is None else seed, strategy)
        _check_arguments(batch_size=batch_size, steps_per_execution=steps_per_execution, seed=seed)
        share = validation_data if isinstance(validation_data, float) else None
        if share is not None:
            data, validation_data = split(data, share, seed=seed)
        heads = heads_of(model)
        self._check_passes(data, steps_per_epoch)
        batch, data = first_rows(data, name="training data")
        check_inputs(batch, model, heads, name="training data")
        flat = unscaled(model, batch.x)
        if flat:
            watch.tell(flat)
        if self._policy() == "recalibrate" and not any(row.batch_norm == "recalibrated" for plan in plans for row in plan.layers):
            watch.tell('batch_norm("recalibrate") finds nothing to do: no phase trains a layer around a BatchNorm.')
        check_batch(batch_size if is_arrays(data) or isinstance(data, Data) else row_count(batch), strategy)
        if validation_data is not None:
            val_batch, validation_data = first_rows(validation_data, name="validation data")
            check_inputs(val_batch, model, heads, name="validation data")
            flat = "" if flat else unscaled(model, val_batch.x)
            if flat:
                watch.tell(f"Validation data: {flat}")
        check_classes(data, validation_data, heads)
        objective = self.objective(model, batch.y)
        checks = BatchChecks(objective, heads)
        checks.whole(batch, name="training data")
        if validation_data is not None:
            checks.whole(val_batch, name="validation data")
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
            callbacks=_told(callbacks, tensorboard, strategy),
            batch_size=batch_size,
            seed=seed,
            class_weight=weights,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            steps_per_execution=steps_per_execution,
            strategy=strategy,
            jit_compile=placement.jit_compile if placement else None,
            first=batch,
            verbose=verbose if is_chief(strategy) else 0,
            cache=self._cache(),
            checks=checks,
            watch=watch,
        )
        if watch.keeps or has_workers(strategy):
            marks = identity(
                self,
                model,
                data=data,
                validation=validation_data,
                seed=seed,
                batch_size=batch_size,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                class_weight=weights,
                validation_share=share,
                loss=objective.reason,
            )
            check_alike({**marks, "checkpoint": watch.begins_at}, batch, strategy)
            watch.check(marks)
        finished = watch.finished(model, plans, lambda optimizer: compile_as_given(model, job, optimizer), self.make_optimizer)
        if finished is not None:
            spread_seeds(model, strategy)
            return finished
        if verbose and placement is not None and is_chief(strategy):
            print(f"Runs on {placement.describe()}")
        if verbose and watch.goes_on and is_chief(strategy):
            print(f"Goes on from {watch.begins_at}")
        for note in apart:
            watch.tell(note)
        if given_seed:
            keras.utils.set_random_seed(seed % 2**32)
        history, records = run_phases(model, plans, job)
        run = Run(
            history=history,
            phases=tuple(records),
            seed=seed,
            placement=placement.describe() if placement else "",
            notes=(f"Loss: {objective.reason}.", *_notes(history, heads, objective, plans, records), *watch.notes),
        )
        watch.finish(run)
        return run

    def _check_passes(self, data: Any, steps_per_epoch: int | None) -> None:
        """Raises a DataError for data that can't be gone over as often as the plan does: once only, or never to an end."""
        epochs = sum(phase.epochs for phase in self.phases())
        if hasattr(data, "__next__") and steps_per_epoch is None and epochs > 1:
            raise DataError(
                f"Training for {epochs} epochs.",
                found="a generator that can be gone over once, and no steps_per_epoch",
                fix="give a list of batches, a tf.data.Dataset, or a generator without an end and steps_per_epoch=…",
            )
        endless = isinstance(data, tf.data.Dataset) and data.cardinality() == tf.data.INFINITE_CARDINALITY
        if steps_per_epoch is None and endless:
            raise DataError(
                f"Training for {epochs} epochs.",
                found="a data set without an end, and no steps_per_epoch",
                fix="say how many batches an epoch has, steps_per_epoch=…, or leave .repeat() out of the data set",
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


def _told(callbacks: Sequence[Any], tensorboard: str | os.PathLike[str] | None, strategy: Any) -> list[Any]:
    """The callbacks of this process: Keras's own that write files are the chief's."""
    if is_chief(strategy):
        return [*callbacks, *([TensorBoardLogs(tensorboard)] if tensorboard is not None else [])]
    known = keras.callbacks
    writers = (known.ModelCheckpoint, known.BackupAndRestore, known.CSVLogger, known.TensorBoard, known.RemoteMonitor)
    return [item for item in callbacks if not isinstance(item, writers)]


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


def _check_arguments(*, batch_size: int, steps_per_execution: int, seed: int) -> None:
    problems = []
    for name, number in (("batch_size", batch_size), ("steps_per_execution", steps_per_execution)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            problems.append(f"{name}={number!r}; it must be a whole number above 0")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        problems.append(f"seed={seed!r}; it must be a whole number from 0 to 2**63 - 1")
    if problems:
        raise PlanError("Fitting a model.", found=problems)
