"""`FineTuner`: the plan of a fine-tuning, and `fit`, which carries it out on a plain Keras model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from typing_extensions import Self

from transferkit._keras import keras
from transferkit._objects import FunctionReference, KerasObject, as_value
from transferkit._plan import FrozenMapping, Plan, steps_named
from transferkit._table import Table
from transferkit.building.heads import heads_of
from transferkit.data import split
from transferkit.errors import ModelError, PlanError, did_you_mean
from transferkit.placement import Placement
from transferkit.tuning.feeding import check_inputs, first_rows
from transferkit.tuning.layers import Layers
from transferkit.tuning.loop import Job, run_phases
from transferkit.tuning.objectives import objective_of
from transferkit.tuning.phases import BATCH_NORM_POLICIES, Phase, PhasePlan, resolve
from transferkit.tuning.run import Run

__all__ = ["Description", "FineTuner"]


@dataclass(frozen=True)
class Description:
    """What a plan means for a model, before a step is run: each phase as a table of the model's layers."""

    phases: tuple[PhasePlan, ...]

    def _tables(self) -> list[Table]:
        return [plan.table() for plan in self.phases]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    def _repr_html_(self) -> str:
        return "".join(table.to_html() for table in self._tables())

    def to_dict(self) -> dict[str, Any]:
        """The tables as plain lists and dicts."""
        return {
            "phases": [
                {"name": plan.phase.name, "epochs": plan.phase.epochs, "layers": [_row(item) for item in plan.layers]}
                for plan in self.phases
            ]
        }


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

    STEPS: ClassVar[frozenset[str]] = frozenset({"batch_norm", "early_stopping", "loss", "metrics", "optimizer", "phase"})

    def __init__(self) -> None:
        self._begin()

    def phase(self, name: str, *, train: Layers, epochs: int, learning_rate: float | None = None) -> Self:
        """One more phase, after those before.

        Args:
            name: Its name, another than the others have.
            train: The layers that train. All others are frozen: their weights stay, their BatchNorm keeps its statistics, their
                dropout is off.
            epochs: How many times it goes over the data, at most.
            learning_rate: The optimizer's step size; None for the one the optimizer was given with (Adam's is 0.001).
        """
        problems = []
        if not isinstance(train, Layers):
            problems.append(f"train={train!r}, which is no selection of layers; Layers.head() and Layers.all() are")
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            problems.append(f"epochs={epochs!r}; it must be a whole number above 0")
        if learning_rate is not None and not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < float("inf")):
            problems.append(f"learning_rate={learning_rate!r}; it must be a number above 0")
        if any(step.positional[0] == name for step in steps_named(self, ["phase"])):
            problems.append(f"a second phase named {name!r}")
        if problems:
            raise PlanError(f"Planning the phase {name!r}.", found=problems)
        return self._then("phase", name=name, train=train, epochs=epochs, learning_rate=learning_rate)

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
            found.append(Phase(name, settings["train"], settings["epochs"], settings.get("learning_rate")))
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
        heads_of(model)
        plans = tuple(resolve(model, phase, batch_norm=self._policy()) for phase in self.phases())
        idle = [plan.phase.name for plan in plans if plan.trained_parameters == 0]
        if idle:
            raise ModelError(
                f"Planning to fine-tune the model {model.name!r}.",
                found=[f"the phase {name!r} would train nothing" for name in idle],
                cause="it selects only layers without weights, or only BatchNorm, which keeps its weights",
                fix='select layers with weights, or .batch_norm("adapt")',
            )
        return Description(plans)

    def _make_optimizer(self, learning_rate: float | None) -> Any:
        chosen = self._last("optimizer")
        value = chosen["optimizer"] if chosen else "adam"
        optimizer = value.fresh() if isinstance(value, KerasObject) else keras.optimizers.get(value)
        if learning_rate is None:
            return optimizer
        return type(optimizer).from_config({**optimizer.get_config(), "learning_rate": learning_rate})

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

    def _objective(self, model: Any, labels: Any) -> Any:
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
            class_weight: Class → weight of its rows in the loss.
            steps_per_epoch: Batches in an epoch, for data without an end.
            validation_steps: The same for validation.
            seed: Fixes the order of the rows, dropout and augmentation, and Keras's global random state with them. Without one
                it is drawn, and stands in the result.
            placement: Where it runs; where the model is without one.
            verbose: As for Keras's `fit`.

        Returns:
            A `Run`.

        Raises:
            ModelError, DataError, PlacementError: before anything has changed, when plan, model, data and devices don't fit
                together.
            TrainingError: when the loss stops being finite, or a frozen weight changes.
        """
        description = self.describe(model)
        given_seed = seed is not None
        seed = secrets.randbits(31) if seed is None else seed
        _check_arguments(batch_size=batch_size, seed=seed)
        if isinstance(validation_data, float):
            data, validation_data = split(data, validation_data, seed=seed)
        heads = heads_of(model)
        batch, data = first_rows(data, name="training data")
        check_inputs(batch, model, heads, name="training data")
        if validation_data is not None:
            val_batch, validation_data = first_rows(validation_data, name="validation data")
            check_inputs(val_batch, model, heads, name="validation data")
        self._check_monitor(validation_data)
        objective = self._objective(model, batch.y)
        job = Job(
            data=data,
            validation=validation_data,
            objective=objective,
            make_optimizer=self._make_optimizer,
            make_callbacks=self._make_callbacks,
            callbacks=list(callbacks),
            batch_size=batch_size,
            seed=seed,
            class_weight=dict(class_weight) if class_weight is not None else None,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            verbose=verbose,
        )
        if given_seed:
            keras.utils.set_random_seed(seed % 2**32)
        if placement is None:
            history, records = run_phases(model, description.phases, job)
        else:
            with placement.scope() as strategy:
                Placement.check_model(model, strategy)
                history, records = run_phases(model, description.phases, job)
        return Run(
            history=history,
            phases=tuple(records),
            seed=seed,
            placement=placement.describe() if placement else "",
            notes=(f"Loss: {objective.reason}.",),
        )

    def _check_monitor(self, validation: Any) -> None:
        chosen = self._last("early_stopping")
        if chosen and chosen["monitor"].startswith("val_") and validation is None:
            raise PlanError(
                f"Stopping early by {chosen['monitor']!r}.",
                found="no validation data to measure it on",
                fix="fit(…, validation_data=0.1) sets a tenth of the rows apart",
            )


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
