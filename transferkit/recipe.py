"""`Recipe`: the four plans as one frozen value, which makes a new model each time it is run and so can be replayed.

May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np
from typing_extensions import Self

from transferkit._keras import keras, tf
from transferkit._objects import FunctionReference, HeldModel, as_value
from transferkit._plan import Plan, steps_named
from transferkit.building.builder import ModelBuilder
from transferkit.building.heads import leaf_layers
from transferkit.building.pca import PCA
from transferkit.data import batches
from transferkit.errors import ModelError, PlanError, did_you_mean, shorten
from transferkit.evaluation.evaluator import Evaluator
from transferkit.evaluation.report import Evaluation
from transferkit.placement import Placement, check_placement
from transferkit.tuning.fronts import outputs_of
from transferkit.tuning.run import Run
from transferkit.tuning.sessions import stored_seed
from transferkit.tuning.tuner import FineTuner
from transferkit.weights.loader import WeightLoader
from transferkit.weights.report import LoadReport

__all__ = ["Recipe", "Result"]


@dataclass(frozen=True, eq=False)
class Result:
    """What running a recipe gave.

    Args:
        model: The trained model, plain Keras.
        run: What the fine-tuning did.
        load: What was loaded, where the recipe loads weights.
        evaluation: What the evaluation found, where there was data to evaluate on.
    """

    model: Any = field(repr=False)
    run: Run
    load: LoadReport | None = None
    evaluation: Evaluation | None = None

    def _parts(self) -> list[Any]:
        return [part for part in (self.load, self.run, self.evaluation) if part is not None]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts()))

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in self._parts())

    def to_dict(self) -> dict[str, Any]:
        """The reports as plain lists and dicts, without the model."""
        return {
            "load": None if self.load is None else self.load.to_dict(),
            "run": self.run.to_dict(),
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
        }


@final
class Recipe(Plan):
    """How a model is made, loaded, fine-tuned and judged, from nothing, as often as needed.

    Args:
        model: A `ModelBuilder`; or a Keras model, copied with its weights at each run; or a function that makes a model.
        loader: Which weights it starts from; None to leave them as they are made.
        tuner: How it is fine-tuned.
        evaluator: How it is judged.

    Example:
        >>> import transferkit as tk
        >>> tk.Recipe(tk.ModelBuilder((4,)).dense(8, "relu").classifier(3), evaluator=tk.Evaluator("accuracy"))
        Recipe(ModelBuilder((4,)).dense(8, 'relu').classifier(3), evaluator=Evaluator('accuracy'))
    """

    STEPS: ClassVar[frozenset[str]] = frozenset({"adapt"})

    def __init__(
        self,
        model: Any,
        loader: WeightLoader | None = None,
        tuner: FineTuner | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        value = as_value(model)
        kinds = (
            (
                "model",
                value,
                (ModelBuilder, HeldModel, FunctionReference),
                "a ModelBuilder, a Keras model or a function that makes one",
            ),
            ("loader", loader, (WeightLoader, type(None)), "a WeightLoader"),
            ("tuner", tuner, (FineTuner, type(None)), "a FineTuner"),
            ("evaluator", evaluator, (Evaluator, type(None)), "an Evaluator"),
        )
        problems = [
            f"{name}={given!r}, which is not {wanted}" for name, given, kind, wanted in kinds if not isinstance(given, kind)
        ]
        if problems:
            raise PlanError("Writing a Recipe.", found=problems, fix="Recipe(builder, loader, tuner, evaluator)")
        self._begin(model=value, loader=loader, tuner=tuner, evaluator=evaluator)

    def adapt(self, *names: str) -> Self:
        """Lets layers learn from the training rows before anything trains: Normalization its mean, `PCA` its directions.

        Done anew in each run, on that run's training rows only, so that in cross-validation nothing is learned from the rows it
        is judged on. A layer learns from what the layers before it give, so these mustn't train in any phase.

        Args:
            names: The layers' names, in the order in which they adapt.
        """
        if not names:
            raise PlanError("Recipe.adapt was called.", found="no layer", fix='.adapt("normalization")')
        return self._then("adapt", names=names)

    def _part(self, name: str) -> Any:
        order = ("model", "loader", "tuner", "evaluator")
        given = dict(zip(order, self._start.positional, strict=False)) | self._start.arguments
        return given.get(name)

    @property
    def tuner(self) -> FineTuner:
        """The plan of the fine-tuning."""
        tuner = self._part("tuner")
        return tuner if tuner is not None else FineTuner()

    @property
    def evaluator(self) -> Evaluator:
        """The plan of the evaluation."""
        evaluator = self._part("evaluator")
        return evaluator if evaluator is not None else Evaluator()

    def make(self, data: Any, *, seed: int | None = None, batch_size: int = 32) -> tuple[Any, LoadReport | None]:
        """A new model, built, loaded and adapted to the rows of `data`, but not trained; and what was loaded into it.

        Args:
            data: The training rows; read only where a layer adapts.
            seed: Fixes the initial weights.
            batch_size: Rows at a time while adapting.

        Raises:
            ModelError, WeightsError: when it can't be built or loaded.
        """
        source = self._part("model")
        if isinstance(source, ModelBuilder):
            model = source.build(seed=seed)
        else:
            if seed is not None:
                keras.utils.set_random_seed(seed % 2**32)
            model = source.fresh()() if isinstance(source, FunctionReference) else source.fresh()
        loader = self._part("loader")
        report = None if loader is None else loader.load(model)
        for step in steps_named(self, ["adapt"]):
            for name in step.positional:
                _adapt(model, name, data, tuner=self.tuner, batch_size=batch_size)
        _check_adapted(model)
        return model, report

    def run(
        self,
        data: Any,
        *,
        validation_data: Any = None,
        test_data: Any = None,
        batch_size: int = 32,
        callbacks: Sequence[Any] = (),
        class_weight: Mapping[int, float] | None = None,
        seed: int | None = None,
        placement: Placement | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        save_every: int | float | None = None,
        keep_checkpoints: int = 3,
        verbose: Any = "auto",
    ) -> Result:
        """Makes a new model, loads it, fine-tunes it and judges it. Changes nothing that was there before.

        Args:
            data: The training rows, as for `FineTuner.fit`.
            validation_data: As for `FineTuner.fit`.
            test_data: The rows it is judged on; without any it isn't judged.
            batch_size: Rows in a batch.
            callbacks: As for `FineTuner.fit`.
            class_weight: As for `FineTuner.fit`.
            seed: Fixes the initial weights, the order of the rows, dropout and augmentation. Without one it is drawn, and stands
                in the result's `run`.
            placement: Where it is built and runs; where TensorFlow puts it without one.
            checkpoint_dir: As for `FineTuner.fit`.
            resume: As for `FineTuner.fit`.
            save_every: As for `FineTuner.fit`.
            keep_checkpoints: As for `FineTuner.fit`.
            verbose: As for Keras's `fit`.
        """
        check_placement(placement, "Running a recipe.")
        seed = stored_seed(checkpoint_dir, resume=resume) if seed is None else seed
        seed = secrets.randbits(31) if seed is None else seed
        with placement.scope() if placement else contextlib.nullcontext():
            model, report = self.make(data, seed=seed, batch_size=batch_size)
        run = self.tuner.fit(
            model,
            data,
            validation_data=validation_data,
            batch_size=batch_size,
            callbacks=callbacks,
            class_weight=class_weight,
            seed=seed,
            placement=placement,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            save_every=save_every,
            keep_checkpoints=keep_checkpoints,
            verbose=verbose,
        )
        evaluation = None
        if test_data is not None:
            evaluation = self.evaluator.run(model, test_data, batch_size=batch_size, placement=placement)
        return Result(model=model, run=run, load=report, evaluation=evaluation)


def _adapt(model: Any, name: str, data: Any, *, tuner: FineTuner, batch_size: int) -> None:
    """Adapts the layer of that name to the rows of `data`, as they come out of the layers before it."""
    asked = f"Adapting the layer {name!r} of the model {model.name!r}."
    layers = {path.rpartition("/")[2]: layer for path, layer in leaf_layers(model)}
    able = [key for key, layer in layers.items() if hasattr(layer, "adapt")]
    if name not in able:
        what = "a layer without an `adapt` method" if name in layers else "no layer of that name"
        raise ModelError(
            asked,
            found=f"{what}{did_you_mean(name, able)}",
            fix=f"the layers that adapt are {', '.join(map(repr, able)) or 'none'}",
        )
    layer = layers[name]
    front = _front(model, layer, asked)
    if front is None:
        position = next(index for index, tensor in enumerate(model.inputs) if layer.input is tensor)
        rows = np.concatenate([tf.nest.flatten(batch.x)[position] for batch in batches(data, batch_size=batch_size)])
    else:
        moving = _trained_in(front, model, tuner)
        if moving:
            raise ModelError(
                asked,
                found=f"layers before it that train: {shorten(moving)}",
                cause="it would learn from values that training then changes",
                fix="freeze them in every phase, as in .phase(..., train=tk.Layers.head()); or put it directly behind an input",
            )
        rows = outputs_of(front, data, batch_size=batch_size)
    layer.adapt(rows)


def _front(model: Any, layer: Any, asked: str) -> Any:
    """The part of the model that gives the layer its input; None where that is an input of the model."""
    try:
        if any(layer.input is tensor for tensor in model.inputs):
            return None
        return keras.Model(model.inputs[0] if isinstance(model, keras.Sequential) else model.input, layer.input)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            asked,
            found="no way from the model's inputs to this layer that could be followed",
            cause="it lies within a nested or subclassed model, or is used more than once",
            fix="put it into the model itself, once: a functional or Sequential model, or a ModelBuilder",
        ) from error


def _trained_in(front: Any, model: Any, tuner: FineTuner) -> list[str]:
    """The layers of the front that train in some phase."""
    chosen = {path for phase in tuner.phases() for path in phase.train.resolve(model)}
    inside = {id(layer) for _, layer in leaf_layers(front)}
    return [path for path, layer in leaf_layers(model) if id(layer) in inside and path in chosen and layer.trainable_weights]


def _check_adapted(model: Any) -> None:
    """Raises a ModelError for a layer that gives nothing before it has learned."""
    waiting = [layer.name for _, layer in leaf_layers(model) if isinstance(layer, PCA) and not layer.is_adapted]
    if waiting:
        raise ModelError(
            f"Making the model {model.name!r} of a recipe.",
            found=[f"the layer {name!r}, a PCA that has learned no directions" for name in waiting],
            fix=f"Recipe(…).adapt({', '.join(map(repr, waiting))})",
        )
