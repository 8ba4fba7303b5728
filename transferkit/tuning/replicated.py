"""A model trained by the replicas of a strategy, as Keras sees it: a model on one device.

The passes over the rows of a batch are shared among the replicas; loss, metrics, gradient clipping and the optimizer's step are
computed once, of the whole batch, outside of the strategy. So Keras's own train function, `evaluate` and `predict` run as they do
on one device, with any loss, metric and optimizer, and give its numbers. Keras's way under `tf.distribute` clips and averages per
replica, can't accumulate gradients, and fails with several workers (Keras 3.15). May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.parts import parts_of
from transferkit.building.replicas import Pass, Replicas, of_all, of_chief
from transferkit.data import Batch
from transferkit.errors import PlacementError
from transferkit.placement import has_workers, worker_count, worker_number
from transferkit.tuning.feeding import OWN_ROWS
from transferkit.tuning.fingerprints import block_mark

__all__ = [
    "ReplicatedModel",
    "agreed_seed",
    "begin_alike",
    "check_alike",
    "fresh_metrics",
    "own_steps",
    "shared",
    "spread_seeds",
    "whole_batch_norm",
]


class ReplicatedModel(keras.Model):
    """A model whose passes are shared among replicas. Has the model's variables, and an own compilation.

    Args:
        model: A built model.
        strategy: The strategy.
    """

    def __init__(self, model: Any, strategy: Any) -> None:
        super().__init__(name=model.name)
        self.whole = model
        self._replicas = Replicas(model, strategy)
        #: Whether each step must be a call of its own: what workers exchange may change its shape from call to call only.
        self.by_step = self._replicas.several
        self._terms: list[Any] = []
        self.output_names = getattr(model, "output_names", None)
        self.built = True

    @property
    def losses(self) -> list[Any]:
        """What comes to the loss beside that of labels and outputs, in the step that is being taken."""
        return self._terms

    def call(self, inputs: Any, training: Any = None) -> Any:
        """The outputs of all rows in inference."""
        del training
        return self._replicas.forward(inputs).outputs()

    def train_step(self, data: Any) -> Any:
        """As Keras's, over the whole batch."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        variables = self.trainable_variables
        with self._replicas.training(*_inputs(x, y), (y, weight)) as (done, backward):
            values = [tf.convert_to_tensor(variable) for variable in variables]
            sources = [*done.flat, *([] if done.added is None else [done.added]), *values]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(sources)
                loss = self._loss_of(x, y, weight, done, values)
                scaled = self.optimizer.scale_loss(loss)
            found = tape.gradient(scaled, sources)
            of_outputs, of_values = found[: len(done.flat)], found[len(sources) - len(values) :]
            of_rows = backward(of_outputs, None if done.added is None else found[len(done.flat)])
        gradients = [_sum(*pair) for pair in zip(of_rows, of_values, strict=True)]
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return self._figures(x, y, weight, done, loss)

    def test_step(self, data: Any) -> Any:
        """As Keras's, over the whole batch."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        done = self._replicas.forward(*_inputs(x, y), (y, weight))
        return self._figures(x, y, weight, done, self._loss_of(x, y, weight, done, None))

    def predict_step(self, data: Any) -> Any:
        """As Keras's, over the whole batch."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self(x)

    def _loss_of(self, x: Any, y: Any, weight: Any, done: Pass, values: Sequence[Any] | None) -> Any:
        self._terms = [*([] if done.added is None else [done.added]), *self._replicas.penalties(values)]
        try:
            return self.compute_loss(x=x, y=y, y_pred=done.outputs(), sample_weight=weight)
        finally:
            self._terms = []

    def _figures(self, x: Any, y: Any, weight: Any, done: Pass, loss: Any) -> Any:
        # The first of a compiled model's metrics is the mean of its loss.
        self.metrics[0].update_state(loss, sample_weight=tf.shape(done.flat[0])[0])
        return self.compute_metrics(x, y, done.outputs(), sample_weight=weight)


def _inputs(x: Any, y: Any) -> tuple[Any, Any]:
    """The inputs, and the rows of the batch where they are of this worker's rows only."""
    if isinstance(x, dict) and set(x) == {OWN_ROWS}:
        return x[OWN_ROWS], tf.shape(tf.nest.flatten(y)[0])[0]
    return x, None


def _sum(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return second if first is None else first
    return tf.convert_to_tensor(first) + tf.cast(second, first.dtype)


def shared(model: Any, strategy: Any, *, loss: Any, loss_weights: Any, metrics: Any) -> Any:
    """What trains a compiled model: the model itself on one device, else a `ReplicatedModel` of it, compiled alike.

    Args:
        model: Compiled.
        strategy: The strategy, or None.
        loss: What it is compiled with.
        loss_weights: The same.
        metrics: The same; in objects of its own.
    """
    if strategy is None:
        return model
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    found = ReplicatedModel(model, strategy)
    found.compile(
        optimizer=model.optimizer,
        loss=loss,
        loss_weights=loss_weights,
        metrics=fresh_metrics(metrics),
        run_eagerly=model.run_eagerly,
        jit_compile=False,
    )
    return found


def fresh_metrics(metrics: Any) -> Any:
    """Metrics keep state in variables of their own, so each phase compiles with new ones.

    None becomes an empty list: compiled with None, a model keeps the metrics of the compile before, made for other labels.
    """
    if metrics is None:
        return []
    return keras.tree.map_structure(
        lambda item: type(item).from_config(item.get_config()) if isinstance(item, keras.metrics.Metric) else item, metrics
    )


def own_steps(model: Any, names: Sequence[str] = ("train_step", "test_step", "compute_loss", "compute_metrics")) -> list[str]:
    """Which of these methods are the user's own, of which nothing is known."""
    if isinstance(model, ReplicatedModel):
        return []
    return [name for name in names if getattr(type(model), name) is not getattr(keras.Model, name)]


def spread_seeds(model: Any, strategy: Any) -> None:
    """Gives each worker random states of its own within the model (dropout, augmentation), made of the one that all have.

    The replicas of one process draw from one state in turn.
    """
    if not has_workers(strategy):
        return
    for variable in model.variables:
        if variable.path.endswith("seed_generator_state"):
            variable.assign(variable + np.array([worker_number(strategy), 0], keras.backend.standardize_dtype(variable.dtype)))


def agreed_seed(seed: int, strategy: Any) -> int:
    """The chief's seed, on every worker."""
    if not has_workers(strategy):
        return seed
    halves = of_chief(strategy, [tf.constant(part, "int32") for part in divmod(seed, 1 << 31)])
    return (int(halves[0]) << 31) + int(halves[1])


def check_alike(marks: Mapping[str, str], batch: Batch, strategy: Any) -> None:
    """Compares on all workers what they are about to train, before anything of it has begun.

    Args:
        marks: What each worker has, in words by name; the same names on all.
        batch: The first rows: a data set that is shuffled without a seed begins with others on each worker.
        strategy: The strategy.

    Raises:
        PlacementError: on every worker, where one of them has something other than the chief.
    """
    if not has_workers(strategy):
        return
    first = tf.nest.map_structure(lambda part: np.asarray(part)[:32], [part for part in batch[:2] if part is not None])
    marks = {**marks, "order of the training data": f"begins with rows of the digest {block_mark(first).hex()[:12]}"}
    digests = [np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "int32") for text in marks.values()]
    every = of_all(strategy, np.stack(digests))
    every = every[:: len(every) // worker_count(strategy)]  # a worker's replicas all say the same
    wrong = [
        f"another {name} than the chief's on worker {', '.join(map(str, np.flatnonzero(apart)))}; here {_short(text)}"
        for (name, text), apart in zip(marks.items(), (every != every[0]).any(axis=2).T, strict=True)
        if apart.any()
    ]
    if wrong:
        raise PlacementError(
            f"Training together on {len(every)} workers.",
            found=wrong,
            cause="every worker must run the same script on the same data, in the same order",
            fix="give random parts of the script, such as shuffle(…), a seed, and every worker the same files",
        )


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def begin_alike(model: Any, strategy: Any) -> None:
    """Gives every worker the weights that the chief has."""
    if not has_workers(strategy):
        return
    weights = [variable for variable in model.variables if "float" in keras.backend.standardize_dtype(variable.dtype)]
    for weight, value in zip(weights, of_chief(strategy, weights), strict=True):
        weight.assign(value)


@contextlib.contextmanager
def whole_batch_norm(model: Any, strategy: Any) -> Iterator[None]:
    """Inside it, BatchNorm that trains takes the statistics of the whole batch, as on one device, and not of a replica's rows.

    The replicas of a process read the moving statistics before they exchange the batch's, so each writes the same new ones.
    """
    norms = [part for part in parts_of(model) if isinstance(part, keras.layers.BatchNormalization)] if strategy else []
    before = [layer.synchronized for layer in norms]
    for layer in norms:
        layer.synchronized = True
    try:
        yield
    finally:
        for layer, synchronized in zip(norms, before, strict=True):
            layer.synchronized = synchronized
