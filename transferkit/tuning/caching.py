"""Whether a phase trains on features of its frozen part, computed once, and the training if it does.

Decides from what is frozen, from the data and from a prediction of what is saved; a plan can decide instead. Whatever the
answer, it comes with its reason. May import Keras and the floors below.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.constancy import RANDOM, TRAINS
from transferkit.building.frontier import Split, split
from transferkit.building.graph_model import GraphModel
from transferkit.building.replicas import own_places
from transferkit.data import Data, is_arrays, row_count
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.encoding import numpy_dtype
from transferkit.tuning.epoch import Rows, Steps, rows_of_features, train
from transferkit.tuning.epochs import Watch
from transferkit.tuning.extraction import RowsMixedError
from transferkit.tuning.feature_noise import feature_noise
from transferkit.tuning.features import Features, block_of
from transferkit.tuning.fingerprints import repeats
from transferkit.tuning.phases import PhasePlan
from transferkit.tuning.replicated import shared
from transferkit.tuning.sharing import features_of, in_use, is_shared
from transferkit.tuning.snapshots import Snapshot

__all__ = ["Cache", "CachedPhase", "obstacle", "planned_split"]

#: How augmentation and the cache go together.
_OFFER = "; .cache(True, views=4) computes four versions of each row once"
#: What splitting and tracing cost more than the training without them, about.
_OVERHEAD_SECONDS = 0.2
#: What a step loses in Python when each is a call of its own, about; a compiled epoch saves it.
_STEP_SECONDS = 5e-4
#: Multiplications and additions a second, for a guess before anything ran.
_FLOPS = 2e10
#: No machine that trains such models does more, about.
_MOST_FLOPS = 1e12
#: Bytes that are spent on compiling steps while features are computed.
_MOST_ALIKE = 64 << 20
#: What reading features costs a byte, from a disk or past the caches.
_SECONDS_PER_BYTE = 5e-10


def planned_split(model: Any, plan: PhasePlan, *, views: bool = False) -> Split:
    """The split of the model in a phase that isn't in effect yet; changes nothing."""
    frozen = [row.layer for row in plan.layers if row.silenced or (row.parameters and not row.trained)]
    return split(model, frozen=frozen, inference=not plan.dropout_on, views=views)


def obstacle(made: Split) -> str:
    """Why nothing of the model can be computed once; empty when something can."""
    if not made:
        return made.reason + (_OFFER if any(why == RANDOM for _, why in made.blocked) else "")
    if made.useful:
        return ""
    name, why = made.blocked[0]
    return f"nothing with weights lies before {name}, for {why}{_OFFER if why == RANDOM else ''}"


@dataclass(frozen=True)
class CachedPhase:
    """A phase ready to be trained on features.

    Args:
        split: The two parts.
        trained: The suffix, or what trains it on several replicas.
        features: Of the training rows.
        rows: The training rows.
        validation: The validation rows; None without any, or where they are no features.
        steps: Of the suffix, compiled.
        words: What was decided and why.
    """

    split: Split
    trained: Any = field(repr=False)
    features: Features = field(repr=False)
    rows: Rows = field(repr=False)
    validation: Rows | None = field(repr=False)
    steps: Steps = field(repr=False)
    words: str

    def fit(
        self,
        model: Any,
        *,
        order: Callable[[int], np.ndarray[Any, Any]],
        epochs: int,
        initial_epoch: int,
        batch_size: int,
        callbacks: Any,
        evaluate: Callable[[], Mapping[str, Any]] | None,
        watch: Watch | None = None,
    ) -> None:
        """Trains the model's suffix by the model's optimizer; callbacks know the model, whose weights are the suffix's."""
        train(
            self.trained,
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
            steps=self.steps,
        )


class Cache:
    """The features of one run, kept from phase to phase.

    Args:
        settings: What the plan says.
        data: What `fit` takes, checked.
        validation: The same, or None.
        batch_size: Of the training.
        class_weight: As `fit` takes it.
        mixes: Whether the inputs of a batch are mixed.
        steps_per_epoch: As `fit` takes it.
        seed: Of the run.
        strategy: Whose replicas share the rows of each batch; None on one device.
    """

    def __init__(
        self,
        settings: CacheSettings,
        *,
        data: Any,
        validation: Any,
        batch_size: int,
        class_weight: Mapping[int, float] | None,
        mixes: bool,
        steps_per_epoch: int | None,
        seed: int = 0,
        strategy: Any = None,
    ) -> None:
        self._settings, self._seed, self._strategy = settings, seed, strategy
        self._wanted = settings.wanted
        self._data, self._validation = data, validation
        self._batch_size, self._class_weight = batch_size, class_weight
        self._mixes, self._steps = mixes, steps_per_epoch
        self._held: dict[str, Features] = {}
        #: The cut they are of, and the weights in front of it.
        self._of: tuple[Any, Snapshot] | None = None

    def phase(
        self,
        model: Any,
        plan: PhasePlan,
        *,
        loss: Any,
        loss_weights: Any,
        metrics: Any,
        decided: tuple[bool, str] | None = None,
    ) -> tuple[CachedPhase | None, str]:
        """The phase on features, or None; and why. The phase must be in effect, the model compiled.

        Args:
            model: The model.
            plan: The phase.
            loss: What the suffix is compiled with.
            loss_weights: The same.
            metrics: The same, in objects of its own.
            decided: What was decided when the phase began, and why, for one that goes on after a stop.
        """
        if decided is not None and not decided[0]:
            return None, decided[1]
        if self._wanted is False:
            return None, "computed in full, as the plan says"
        why = self._excluded(plan)
        if why:
            return None, self._in_full(plan, why, meant=plan.phase.train.is_everything)
        made = split(model, sample=self._sample(), inference=not plan.dropout_on, views=self._settings.views > 1)
        why = self._not_worth_it(made, plan.phase.epochs) if decided is None else ""
        if why:
            return None, self._in_full(plan, why, meant=all(reason == TRAINS for _, reason in made.blocked))
        made.suffix.compile(
            optimizer=model.optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            jit_compile=model.jit_compile,
            run_eagerly=model.run_eagerly,
        )
        trained = shared(made.suffix, self._strategy, loss=loss, loss_weights=loss_weights, metrics=metrics)
        steps = Steps(trained, batch_size=self._batch_size)
        try:
            features, validation = self._both(made, steps)
        except RowsMixedError as error:
            if own_places(self._strategy) is not None:  # the other workers may have seen rows that don't show it
                raise
            return None, self._in_full(plan, error.found[0], meant=False)
        count = len(made.cached)
        words = f"{count} layer{'s' if count != 1 else ''} computed once, up to {_places(made)}: {features}"
        if self._settings.folder is not None and made.prefix.has_users_code():
            words += "; not kept in the folder, because code that isn't Keras's can't be told by its content"
        if not (is_arrays(self._data) or isinstance(self._data, Data)):
            words += f"; trained in batches of {self._batch_size} like the data's own, their rows in an order of each epoch"
        noise = self._settings.noise
        if noise:
            words += f"; trained with noise of {noise:g} of each feature's standard deviation"
        return CachedPhase(
            split=made,
            trained=trained,
            features=features,
            rows=rows_of_features(
                features,
                class_weight=self._class_weight,
                augment=feature_noise(features, amount=noise, seed=self._seed) if noise else None,
            ),
            validation=None if validation is None else rows_of_features(validation),
            steps=steps,
            words=words,
        ), words

    def _both(self, made: Split, steps: Steps) -> tuple[Features, Features | None]:
        """The features of training and validation; the steps are compiled while they are computed."""
        variables = made.prefix.variables
        cut = (made.cached, [item.name for item in made.boundary], [id(item) for item in variables])
        if self._of is None or self._of[0] != cut or self._of[1].changed():
            self._held.clear()  # features of another cut are of no more use, and may be large
            self._of = (cut, Snapshot(variables))

        def both() -> tuple[Features, Features | None]:
            features = self._features("training", made.prefix, self._data, self._settings, computing.set)
            # Validation is never approximate or augmented: its figures are the model's own.
            tested = self._validation is not None and not repeats(self._validation)
            exact = CacheSettings()
            return features, self._features("validation", made.still, self._validation, exact) if tested else None

        computing = threading.Event()
        alike = [self._alike(made, data) for data in (self._data, self._validation)]
        # What workers exchange they must in the same order, so there is one thread of it.
        if self._held or alike[0] is None or own_places(self._strategy) is not None:
            return both()
        # Python traces in one thread while TensorFlow computes in others; no two traces go on at once.
        with ThreadPoolExecutor(1, "transferkit-computing") as pool:
            found = pool.submit(both)
            found.add_done_callback(lambda _: computing.set())
            computing.wait()
            for rows, trains in zip(alike, (True, False), strict=True):
                if rows is not None:
                    steps.warm(rows, train=trains)
            return found.result()

    def _alike(self, made: Split, data: Any) -> Rows | None:
        """Rows like those that will come of the data, without their values; None where that can't be told."""
        settings = self._settings
        labels = data[1:] if is_arrays(data) else (data.labels,) if isinstance(data, Data) else None
        if labels is None or not isinstance(labels[0], np.ndarray) or any(settings.unusual().values()) or in_use():
            return None
        if any(item.masked or None in item.shape for item in made.boundary) or _elsewhere():
            return None
        rows = len(labels[0])
        if rows * made.nbytes > _MOST_ALIKE:
            return None
        shapes = [[rows, *(length or 0 for length in item.shape)] for item in made.boundary]
        arrays = tuple(np.zeros(shape, numpy_dtype(item.dtype)) for shape, item in zip(shapes, made.boundary, strict=True))
        weight = (*labels, None)[1]
        some = Features(arrays, labels[0], weight, rows, 1, "", False, 0.0, scales=(None,) * len(arrays))
        return rows_of_features(some, class_weight=self._class_weight if data is self._data else None)

    def _in_full(self, plan: PhasePlan, why: str, *, meant: bool) -> str:
        """Words for a phase in full; a warning beside them where the plan asked for the other and trains less than everything."""
        words = f"computed in full: {why}{self._left_out()}"
        if self._wanted and not meant:
            warnings.warn(
                f"Phase {plan.phase.name!r} is {words}. The plan's .cache({self._settings.cache!r}) can't be followed in it.",
                stacklevel=6,
            )
        return words

    def _left_out(self) -> str:
        """What of the plan has no effect on a phase in full."""
        names = [name for name in ("views", "noise") if self._settings.unusual()[name] is not None]
        return (
            f"; the plan's {' and '.join(names)} of features {'has' if names == ['noise'] else 'have'} no part in it"
            if names
            else ""
        )

    def _excluded(self, plan: PhasePlan) -> str:
        """What speaks against it before the model is looked at."""
        if plan.phase.train.is_everything:
            return "every layer trains"
        if self._mixes:
            return "the inputs of each batch are mixed, which features of single rows can't be"
        if self._steps is not None:
            return "steps_per_epoch cuts the data into epochs of its own"
        if tf.distribute.has_strategy() and tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return "the batches are shared among several replicas"
        why = repeats(self._data)
        if why:
            return why
        if self._wanted is None and not (is_arrays(self._data) or isinstance(self._data, Data)):
            # Its batches and their order are the user's; features of single rows would come in the library's.
            return "the data comes in batches of its own; .cache(True) takes its rows one by one"
        return ""

    def _not_worth_it(self, made: Split, epochs: int) -> str:
        why = obstacle(made)
        if why:
            return why
        if self._wanted or is_shared(made.prefix, self._data, settings=self._settings, seed=self._seed):
            return ""
        if epochs < 2:
            return "one epoch computes everything once anyway"
        rows = row_count(self._data)
        steps = math.ceil(rows / self._batch_size)
        gain = epochs * steps * _STEP_SECONDS - _OVERHEAD_SECONDS
        saved = (epochs - 1) * rows * _flops(made)
        reading = made.nbytes * _SECONDS_PER_BYTE
        if saved / _FLOPS + gain < 0:
            return "so few rows and layers that computing them once saves nothing"
        if saved / _MOST_FLOPS > epochs * rows * reading - gain:
            return ""  # however fast the machine
        seconds = self._timed(made)
        if (epochs - 1) * rows * seconds - epochs * rows * reading + gain < 0:
            return f"reading {made.nbytes:,} bytes a row costs more than computing them"
        return ""

    def _timed(self, made: Split) -> float:
        """Seconds that the prefix takes for a row, on one batch of the real rows."""
        block = block_of(self._data, settings=self._settings, folder=self._settings.folder)
        rows = self._first(block)
        count = len(tf.nest.flatten(rows)[0])
        index = np.arange(block) % count
        batch = tf.nest.map_structure(lambda array: tf.convert_to_tensor(np.asarray(array)[index]), rows)
        function = made.prefix.as_function()
        function(batch)  # traces
        begun = time.perf_counter()
        tf.nest.map_structure(lambda tensor: tensor.numpy(), function(batch))
        return (time.perf_counter() - begun) / block

    def _sample(self) -> Any:
        return self._first(3)

    def _first(self, count: int) -> Any:
        if isinstance(self._data, Data):
            return self._data.rows(np.arange(min(count, len(self._data)))).x
        if is_arrays(self._data):
            return tf.nest.map_structure(lambda array: np.asarray(array[:count]), self._data[0])
        return None

    def _features(self, name: str, prefix: GraphModel, data: Any, settings: CacheSettings, traced: Any = None) -> Features:
        if name not in self._held:
            rows = row_count(data) if is_arrays(data) or isinstance(data, Data) else 0
            self._held[name] = features_of(
                prefix,
                data,
                settings=settings,
                folder=self._settings.folder,
                seed=self._seed,
                traced=traced,
                batches={min(self._batch_size, rows or self._batch_size), rows % self._batch_size} - {0},
                strategy=self._strategy,
            )
        return self._held[name]


def _elsewhere() -> bool:
    """Whether it may run elsewhere than where a new thread would put it."""
    return tf.distribute.has_strategy() or bool(tf.config.list_physical_devices("GPU"))


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
