"""Whether a phase trains on features of its frozen part, computed once, and the training if it does.

Decides from what is frozen, from the data and from a prediction of what is saved; a plan can decide instead. Whatever the
answer, it comes with its reason. May import Keras and the floors below.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.frontier import Split, split
from transferkit.data import Data, is_arrays, row_count
from transferkit.tuning.epoch import Rows, rows_of_features, train
from transferkit.tuning.epochs import Watch
from transferkit.tuning.features import BATCH, Features, repeats
from transferkit.tuning.phases import PhasePlan
from transferkit.tuning.sharing import features_of, is_shared

__all__ = ["Cache", "CachedPhase", "planned_split"]

#: What splitting and tracing cost more than the training without them, about.
_OVERHEAD_SECONDS = 0.2
#: What a step loses in Python when each is a call of its own, about; a compiled epoch saves it.
_STEP_SECONDS = 5e-4
#: Multiplications and additions a second, for a guess before anything ran.
_FLOPS = 2e10
#: What reading features costs a byte, from a disk or past the caches.
_SECONDS_PER_BYTE = 5e-10


def planned_split(model: Any, plan: PhasePlan) -> Split:
    """The split of the model in a phase that isn't in effect yet; changes nothing."""
    frozen = [row.layer for row in plan.layers if row.silenced or (row.parameters and not row.trained)]
    return split(model, frozen=frozen)


@dataclass(frozen=True)
class CachedPhase:
    """A phase ready to be trained on features.

    Args:
        split: The two parts.
        features: Of the training rows.
        rows: The training rows.
        validation: The validation rows; None without any, or where they are no features.
        words: What was decided and why.
    """

    split: Split
    features: Features = field(repr=False)
    rows: Rows = field(repr=False)
    validation: Rows | None = field(repr=False)
    words: str

    def fit(
        self,
        model: Any,
        *,
        loss: Any,
        loss_weights: Any,
        metrics: Any,
        order: Callable[[int], np.ndarray[Any, Any]],
        epochs: int,
        initial_epoch: int,
        batch_size: int,
        callbacks: Any,
        evaluate: Callable[[], Mapping[str, Any]] | None,
        watch: Watch | None = None,
    ) -> None:
        """Trains the model's suffix by the model's optimizer; callbacks know the model, whose weights are the suffix's."""
        suffix = self.split.suffix
        suffix.compile(
            optimizer=model.optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            jit_compile=model.jit_compile,
            run_eagerly=model.run_eagerly,
        )
        train(
            suffix,
            self.rows,
            order=order,
            epochs=epochs,
            initial_epoch=initial_epoch,
            batch_size=batch_size,
            callbacks=callbacks,
            shown=model,
            validation=self.validation,
            evaluate=None if self.validation is not None else evaluate,
            watch=watch,
        )


class Cache:
    """The features of one run, kept from phase to phase.

    Args:
        setting: True, False or a folder, as the plan says; None decides by what pays.
        data: What `fit` takes, checked.
        validation: The same, or None.
        batch_size: Of the training.
        class_weight: As `fit` takes it.
        mixes: Whether the inputs of a batch are mixed.
        steps_per_epoch: As `fit` takes it.
    """

    def __init__(
        self,
        setting: bool | str | None,
        *,
        data: Any,
        validation: Any,
        batch_size: int,
        class_weight: Mapping[int, float] | None,
        mixes: bool,
        steps_per_epoch: int | None,
    ) -> None:
        self._wanted = None if setting is None else bool(setting)
        self._folder = setting if isinstance(setting, str) else None
        self._data, self._validation = data, validation
        self._batch_size, self._class_weight = batch_size, class_weight
        self._mixes, self._steps = mixes, steps_per_epoch
        self._held: dict[str, Features] = {}

    def phase(self, model: Any, plan: PhasePlan, *, decided: tuple[bool, str] | None = None) -> tuple[CachedPhase | None, str]:
        """The phase on features, or None; and why. The phase must be in effect.

        Args:
            model: The model.
            plan: The phase.
            decided: What was decided when the phase began, and why, for one that goes on after a stop.
        """
        why = self._excluded(plan) if decided is None or decided[0] else decided[1]
        if why:
            return None, why
        made = split(model, sample=self._sample())
        why = self._not_worth_it(made, plan.phase.epochs) if decided is None else ""
        if why:
            return None, why
        mark = _weights_mark(made)
        kept = {name: item for name, item in self._held.items() if name.endswith(mark)}
        self._held.clear()  # features of another cut are of no more use, and may be large
        self._held.update(kept)
        features = self._features("training", mark, made, self._data)
        tested = self._validation is not None and not _unfit(self._validation)
        validation = self._features("validation", mark, made, self._validation) if tested else None
        words = f"{len(made.cached)} layers computed once, up to {_places(made)}: {features}"
        return CachedPhase(
            split=made,
            features=features,
            rows=rows_of_features(features, class_weight=self._class_weight),
            validation=None if validation is None else rows_of_features(validation),
            words=words,
        ), words

    def _excluded(self, plan: PhasePlan) -> str:
        """What speaks against it before the model is looked at."""
        if self._wanted is False:
            return "computed in full, as the plan says"
        if plan.phase.train.is_everything:
            return "computed in full: every layer trains"
        if self._mixes:
            return "computed in full: the inputs of each batch are mixed, which features of single rows can't be"
        if self._steps is not None:
            return "computed in full: steps_per_epoch cuts the data into epochs of its own"
        if tf.distribute.has_strategy() and tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return "computed in full: the batches are shared among several replicas"
        why = _unfit(self._data)
        if why:
            return f"computed in full: {why}"
        if self._wanted is None and not (is_arrays(self._data) or isinstance(self._data, Data)):
            # Its batches and their order are the user's; features of single rows would come in the library's.
            return "computed in full: the data comes in batches of its own; .cache(True) takes its rows one by one"
        return ""

    def _not_worth_it(self, made: Split, epochs: int) -> str:
        if not made:
            return f"computed in full: {made.reason}"
        if not any(layer.weights for layer in made.prefix.layers):
            return f"computed in full: nothing with weights lies before {made.blocked[0][0]}, for {made.blocked[0][1]}"
        if self._wanted or is_shared(made.prefix, self._data):
            return ""
        if epochs < 2:
            return "computed in full: one epoch computes everything once anyway"
        rows = len(self._data) if isinstance(self._data, Data) else row_count(self._data)
        steps = math.ceil(rows / self._batch_size)
        gain = epochs * steps * _STEP_SECONDS - _OVERHEAD_SECONDS
        if (epochs - 1) * rows * _flops(made) / _FLOPS + gain < 0:
            return "computed in full: so few rows and layers that computing them once saves nothing"
        seconds = self._timed(made)
        reading = made.nbytes * _SECONDS_PER_BYTE
        if (epochs - 1) * rows * seconds - epochs * rows * reading + gain < 0:
            return f"computed in full: reading {made.nbytes:,} bytes a row costs more than computing them"
        return ""

    def _timed(self, made: Split) -> float:
        """Seconds that the prefix takes for a row, on one batch of the real rows."""
        rows = self._first(BATCH)
        count = len(tf.nest.flatten(rows)[0])
        index = np.arange(BATCH) % count
        batch = tf.nest.map_structure(lambda array: tf.convert_to_tensor(np.asarray(array)[index]), rows)
        function = made.prefix.as_function()
        function(batch)  # traces
        begun = time.perf_counter()
        tf.nest.map_structure(lambda tensor: tensor.numpy(), function(batch))
        return (time.perf_counter() - begun) / BATCH

    def _sample(self) -> Any:
        return self._first(3)

    def _first(self, count: int) -> Any:
        if isinstance(self._data, Data):
            return self._data.rows(np.arange(min(count, len(self._data)))).x
        if is_arrays(self._data):
            return tf.nest.map_structure(lambda array: np.asarray(array[:count]), self._data[0])
        return None

    def _features(self, name: str, mark: str, made: Split, data: Any) -> Features:
        key = f"{name} {mark}"
        if key not in self._held:
            self._held[key] = features_of(made.prefix, data, folder=self._folder)
        return self._held[key]


def _unfit(data: Any) -> str:
    return "" if isinstance(data, Data) else repeats(data)


def _places(made: Split) -> str:
    return " and ".join(item.name for item in made.boundary)


def _flops(made: Split) -> float:
    """Multiplications and additions of the prefix for a row, guessed: each kernel at each place of its output."""
    total = 0.0
    for layer in made.prefix.layers:
        places = 1
        try:
            shape = keras.tree.flatten(layer.output)[0].shape
        except (AttributeError, ValueError, IndexError):
            shape = ()
        for length in shape[1:-1]:
            places *= length or 1
        total += 2.0 * places * sum(math.prod(weight.shape) for weight in layer.weights if len(weight.shape) > 1)
    return total


def _weights_mark(made: Split) -> str:
    digest = hashlib.sha256(repr((made.cached, [item.name for item in made.boundary])).encode())
    for variable in made.prefix.variables:
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()
