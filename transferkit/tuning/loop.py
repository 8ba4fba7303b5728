"""Runs resolved phases on a model as Keras's `fit` would, as one training: one epoch axis, one history, one start and one end
for callbacks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.replicas import own_places
from transferkit.data import Batch, Data, is_arrays, row_count, rows_of
from transferkit.tuning.averaging import recalibrate_batch_norm
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.caching import Cache
from transferkit.tuning.callbacks import Progress
from transferkit.tuning.checking import BatchChecks
from transferkit.tuning.epochs import run_epochs
from transferkit.tuning.feeding import epoch_order, ordered_dataset
from transferkit.tuning.figures import figure
from transferkit.tuning.full_steps import FullSteps
from transferkit.tuning.guards import check_start, out_of_memory
from transferkit.tuning.objectives import Objective
from transferkit.tuning.optimizer_state import as_plain, raw_steps, set_raw_steps
from transferkit.tuning.phases import PhasePlan, in_effect
from transferkit.tuning.replicated import begin_alike, fresh_metrics, shared, spread_seeds, whole_batch_norm
from transferkit.tuning.resuming import Session
from transferkit.tuning.run import PhaseRecord
from transferkit.tuning.settings import Settings, Targets, take_over
from transferkit.tuning.stream import Stream
from transferkit.tuning.trials import measured_jit

__all__ = ["Job", "compile_as_given", "run_phases", "seed_model"]


@dataclass(frozen=True)
class Job:
    """All that `run_phases` needs beside the model and the phases.

    Args:
        data: What `fit` takes, checked.
        validation: The same, or None.
        objective: Loss and metrics as the user means them, which the model is left with.
        make_optimizer: Gives a fresh optimizer for a learning rate (None: its own).
        make_callbacks: Gives fresh callbacks of the plan's for one phase.
        settings: How phases train.
        targets: What is done to the data for the objective that training minimises.
        callbacks: The user's.
        batch_size: Rows in a batch of in-memory data.
        seed: Of the run.
        class_weight: As `fit` takes it.
        steps_per_epoch: As `fit` takes it.
        validation_steps: As `fit` takes it.
        steps_per_execution: As `compile` takes it.
        verbose: As `fit` takes it.
        cache: Whether and how frozen layers are computed once.
        checks: Looks at each batch that isn't in memory.
        watch: What watches over the run, keeps it in checkpoints and goes on with it.
        strategy: Whose replicas share the rows of each batch; None on one device.
        jit_compile: Whether XLA compiles the steps; `"measured"` where that is faster; None leaves it to Keras.
        first: The first rows of the data.
    """

    data: Any
    validation: Any
    objective: Objective
    make_optimizer: Callable[[float | None], Any]
    make_callbacks: Callable[[], list[Any]]
    settings: Settings
    targets: Targets
    callbacks: Sequence[Any]
    batch_size: int
    seed: int
    class_weight: Any = None
    steps_per_epoch: int | None = None
    validation_steps: int | None = None
    steps_per_execution: int = 1
    verbose: Any = "auto"
    cache: CacheSettings = field(default_factory=CacheSettings)
    checks: BatchChecks | None = None
    strategy: Any = None
    jit_compile: bool | Literal["measured"] | None = None
    first: Batch = field(kw_only=True)
    watch: Session = field(kw_only=True)


@dataclass
class _Epoch:
    """The epoch the run is at, for the data's order."""

    number: int = 0
    history: dict[str, list[Any]] = field(default_factory=dict)


class _PhaseCallbacks(keras.callbacks.CallbackList):
    """The callbacks of one phase; the user's see one training, begun in the first phase and ended in the last."""

    callbacks: list[Any]

    def __init__(self, own: list[Any], users: Sequence[Any], *, first: bool, last: bool, **settings: Any) -> None:
        super().__init__([*own, *users], add_history=True, **settings)
        self._users = {id(callback) for callback in users}
        self._first, self._last = first, last

    def _only(self, users_too: bool) -> list[Any]:
        return [item for item in self.callbacks if users_too or id(item) not in self._users]

    def on_train_begin(self, logs: Any = None) -> None:
        everyone, self.callbacks = self.callbacks, self._only(self._first)
        try:
            super().on_train_begin(logs)
        finally:
            self.callbacks = everyone

    def on_train_end(self, logs: Any = None) -> None:
        everyone, self.callbacks = self.callbacks, self._only(self._last)
        try:
            super().on_train_end(logs)
        finally:
            self.callbacks = everyone


class _Watch(keras.callbacks.Callback):
    """Tells the data which epoch begins, and keeps the history over all phases."""

    def __init__(self, state: _Epoch) -> None:
        super().__init__()
        self._state = state

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        self._state.number = epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        for name, value in (logs or {}).items():
            self._state.history.setdefault(name, []).append(figure(value))


def seed_model(model: Any, seed: int) -> None:
    """Sets every random state within the model (dropout, augmentation) from `seed`, each to one of its own."""
    states = [variable for variable in model.variables if variable.path.endswith("seed_generator_state")]
    numbers = np.random.Generator(np.random.Philox(key=[seed, 2**62])).integers(0, 2**31 - 1, size=len(states))
    for state, number in zip(states, numbers, strict=True):
        state.assign(np.array([number, 0], dtype=keras.backend.standardize_dtype(state.dtype)))


def run_phases(model: Any, plans: Sequence[PhasePlan], job: Job) -> tuple[dict[str, list[Any]], list[PhaseRecord]]:
    """Trains the model, phase after phase. Changes its weights, its `trainable` flags and what it is compiled with.

    Returns:
        The history over all phases, and what each phase did.

    Raises:
        TrainingError: when loss or weights stop being finite, a frozen weight changes, or a step needs more memory than there is.
    """
    state = _Epoch()
    records: list[PhaseRecord] = []
    stream = Stream(
        job.data,
        batch_size=job.batch_size,
        seed=job.seed,
        targets=job.targets,
        class_weight=job.class_weight,
        steps_per_epoch=job.steps_per_epoch,
        checks=job.checks,
        kept=job.watch.keeps,
        own=own_places(job.strategy),
    )
    validation = job.validation
    if isinstance(validation, Data) or is_arrays(validation):
        val_rows = row_count(validation)
        validation = ordered_dataset(
            validation, batch_size=job.batch_size, orders=lambda: [np.arange(val_rows)], own=own_places(job.strategy)
        )
    validation = job.targets.validation(validation)
    check_start(model)
    begin_alike(model, job.strategy)
    seed_model(model, job.seed)
    watch = job.watch
    starts = watch.starts(job.settings.starts(model), model.weights)
    watch.begin(model, state.history, records, stream.by_epoch, spread=lambda: spread_seeds(model, job.strategy))
    minimised = job.targets.objective
    batches_an_epoch = stream.steps
    # Data that comes in batches keeps their size, also where its rows are taken one by one.
    batch_size = job.batch_size if is_arrays(job.data) or isinstance(job.data, Data) else row_count(job.first)
    cache = Cache(
        job.cache,
        data=job.data,
        validation=job.validation,
        batch_size=batch_size,
        class_weight=job.class_weight,
        mixes=job.targets.mixing is not None,
        steps_per_epoch=job.steps_per_epoch,
        seed=job.seed,
        strategy=job.strategy,
    )
    progress = Progress([(plan.phase.name, plan.phase.epochs) for plan in plans])
    optimizer: Any = None
    begun = 0
    for index, plan in enumerate(plans):
        target = [row.layer for row in plan.layers if row.batch_norm == "recalibrated"]
        begun_before = watch.done(index) is not None or watch.decided(index) is not None
        if target and not begun_before:
            recalibrate_batch_norm(model, job.data, batch_size=job.batch_size, layers=target)
        with in_effect(model, plan):
            previous, optimizer = (
                optimizer,
                job.settings.optimizer(
                    job.make_optimizer(plan.phase.learning_rate),
                    model,
                    plan,
                    steps=batches_an_epoch and batches_an_epoch * plan.phase.epochs,
                    previous=optimizer,
                    several=len(plans) > 1,
                    starts=starts,
                ),
            )
            model.compile(
                optimizer=optimizer,
                loss=minimised.loss,
                loss_weights=minimised.loss_weights,
                metrics=fresh_metrics(minimised.metrics),
                steps_per_execution=job.steps_per_execution,
                jit_compile="auto" if job.jit_compile is None else job.jit_compile is True,
            )
            optimizer = model.optimizer  # which wraps the one given under a policy that scales the loss
            trained = shared(
                model, job.strategy, loss=minimised.loss, loss_weights=minimised.loss_weights, metrics=minimised.metrics
            )
            if previous is not None:
                take_over(previous, model)
            before = raw_steps(optimizer)
            done = watch.done(index)
            if done is not None:  # in an earlier call: what comes after builds on its steps only
                set_raw_steps(optimizer, before + done.steps)
                records.append(done)
                begun += done.epochs
                continue
            if job.verbose:
                print(f"Phase {plan.phase.name!r}: {plan.trained_parameters:,} parameters train")
            progress.begin_phase(index, epoch=begun)
            own = [*job.settings.callbacks(plan, first_epoch=begun), *job.make_callbacks()]
            started = time.perf_counter() - watch.elapsed(index)
            callbacks = _PhaseCallbacks(
                [_Watch(state), *own, *([progress] if job.verbose == 2 else [])],
                job.callbacks,
                first=watch.is_first(index),
                last=index == len(plans) - 1,
                add_progbar=job.verbose not in (0, 2),
                verbose=job.verbose,
                epochs=begun + plan.phase.epochs,
                steps=batches_an_epoch,
                model=model,
            )
            cached, words = cache.phase(
                model,
                plan,
                loss=minimised.loss,
                loss_weights=minimised.loss_weights,
                metrics=fresh_metrics(minimised.metrics),
                decided=watch.decided(index),
            )
            if cached is None and job.jit_compile == "measured":
                jit = watch.compiled(index)
                if jit is None:
                    jit, said = _measured(model, job, plan)
                    words = f"{words}; {said}"
                model.jit_compile = jit
            if job.verbose:
                print(words)
            in_full = None
            if cached is None:
                in_full = FullSteps(trained, stream, each=job.steps_per_execution, epochs=begun + plan.phase.epochs)
            watch.begin_phase(
                index,
                plan,
                begun=begun,
                trained=trained if cached is None else cached.trained,
                callbacks=callbacks,
                words=words,
                in_full=in_full,
                stream=stream,
            )
            evaluate = _evaluation(trained, validation, job, callbacks)
            with _within_memory(model, plan, job), whole_batch_norm(model, job.strategy):
                if cached is not None:
                    cached.fit(
                        model,
                        order=lambda epoch: epoch_order(cached.rows.count, seed=job.seed, epoch=epoch),  # noqa: B023 -- used at once
                        epochs=begun + plan.phase.epochs,
                        initial_epoch=begun,
                        batch_size=batch_size,
                        callbacks=callbacks,
                        evaluate=evaluate,
                        watch=watch,
                    )
                else:
                    assert in_full is not None
                    run_epochs(
                        trained,
                        in_full,
                        epochs=begun + plan.phase.epochs,
                        initial_epoch=begun,
                        callbacks=callbacks,
                        shown=model,
                        evaluate=evaluate,
                        watch=watch,
                    )
            if job.settings.swa is not None:
                recalibrate_batch_norm(model, job.data, batch_size=job.batch_size)
            seconds = time.perf_counter() - started
        ran = len(model.history.epoch)
        watch.end_phase(begun, ran)
        steps = raw_steps(optimizer) - before
        records.append(PhaseRecord(plan.phase.name, ran, plan.phase.epochs, plan.trained_parameters, seconds, steps, words))
        begun += ran
    # A model that leaves the library opens without it: a plain optimizer, and the loss without what training did to it.
    plain = as_plain(optimizer)
    if any(row.lowered for row in plans[-1].layers):  # its slots are of factors that are gone
        plain = type(plain).from_config(plain.get_config())
        plain.build(model.trainable_variables)
    if plain is not optimizer or minimised is not job.objective:
        compile_as_given(model, job, plain)
    return state.history, records


def _measured(model: Any, job: Job, plan: PhasePlan) -> tuple[bool, str]:
    """Whether XLA compiles the steps of the phase."""
    rows = min(job.batch_size, len(tf.nest.flatten(job.first.x)[0]))
    batch = Batch(*rows_of(job.first, slice(0, rows)))
    rate = plan.phase.learning_rate
    return measured_jit(model, batch, job.objective.loss, job.objective.loss_weights, lambda: job.make_optimizer(rate))


def compile_as_given(model: Any, job: Job, optimizer: Any) -> None:
    """Compiles the model as it leaves the library: with the loss as the user means it."""
    model.compile(
        optimizer=optimizer,
        loss=job.objective.loss,
        loss_weights=job.objective.loss_weights,
        metrics=fresh_metrics(job.objective.metrics),
    )


@contextlib.contextmanager
def _within_memory(model: Any, plan: PhasePlan, job: Job) -> Iterator[None]:
    """Gives a step that needs more memory than there is as an error with the batch size that fits, and the last good weights."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        rows: Any = None
        if isinstance(job.data, Data):
            rows = lambda count: job.data.rows(np.arange(count)).x  # noqa: E731 -- one of two
        elif is_arrays(job.data):
            rows = lambda count: rows_of(job.data, slice(0, count))[0]  # noqa: E731
        told = out_of_memory(model, rows, job.batch_size, plan.phase.name, error)
        job.watch.go_back()
        raise told from error


def _evaluation(model: Any, validation: Any, job: Job, callbacks: Any) -> Callable[[], Any] | None:
    """Tests the whole model on data that gives no features, as `fit` does."""
    if validation is None:
        return None
    return lambda: model.evaluate(validation, steps=job.validation_steps, callbacks=callbacks, verbose=0, return_dict=True)
