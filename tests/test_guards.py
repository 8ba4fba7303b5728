"""A run that goes wrong stops, says where, and leaves the last good weights; one that looks wrong says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import transferkit as tk
from transferkit.errors import DataError, TrainingError
from transferkit.tuning import guards
from transferkit.tuning.checkpoint import CheckpointFolder
from transferkit.tuning.guards import Guard, loss_spikes
from transferkit.tuning.snapshots import Reader, Snapshot

ROWS, SIZE, BATCH = 40, 8, 8


def rows() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return random.normal(size=(ROWS, SIZE, SIZE, 1)).astype("float32"), random.normal(size=(ROWS, 1)).astype("float32")


@tf.custom_gradient  # type: ignore[untyped-decorator, unused-ignore]
def bad_gradient(x: Any) -> Any:
    return x, lambda upstream: upstream * np.nan


class BadGradient(layers.Layer):  # type: ignore[misc, unused-ignore]
    """Gives its input, and NaN as its gradient."""

    def call(self, x: Any) -> Any:
        return bad_gradient(x)


def network(*more: Any) -> Any:
    image = keras.Input((SIZE, SIZE, 1))
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(image)
    x = layers.MaxPooling2D()(layers.BatchNormalization(name="norm")(x))
    x = layers.Dense(6, activation="relu", name="hidden")(layers.Flatten()(x))
    for layer in more:
        x = layer(x)
    model = keras.Model(image, layers.Dense(1, name="head")(x))
    for index, weight in enumerate(model.trainable_variables):
        weight.assign(np.random.default_rng(index).normal(size=weight.shape, scale=0.3))
    return model


class Spoiling(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    """Does something to the model after the seventh batch, the second of its epoch."""

    def __init__(self, spoil: Callable[[Any], None]) -> None:
        super().__init__()
        self._spoil, self._seen = spoil, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self._seen += 1
        if self._seen == 7:
            self._spoil(self.model)


def weight(layer: str, name: str, value: float = np.nan) -> Callable[[], dict[str, Any]]:
    def spoil(model: Any) -> None:
        variable = getattr(model.get_layer(layer), name)
        array = np.array(variable)
        array.flat[0] = value
        variable.assign(array)

    return lambda: {"callbacks": [Spoiling(spoil)]}


def slots(model: Any) -> None:
    for variable in model.optimizer.variables[2:]:
        variable.assign(np.full(variable.shape, np.nan))


def rate(value: float) -> Callable[[], dict[str, Any]]:
    def spoil(model: Any) -> None:
        model.optimizer.learning_rate = value

    return lambda: {"callbacks": [Spoiling(spoil)]}


def batches(part: int, value: float = np.nan) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        parts = [*rows(), np.ones(ROWS, "float32")]
        parts[part][2 * BATCH + 3] = value
        return {"data": tf.data.Dataset.from_tensor_slices(tuple(parts)).batch(BATCH)}

    return make


def loss_of_nothing(y: Any, y_pred: Any) -> Any:
    return keras.ops.sqrt(keras.ops.mean(y_pred) - 1e9) + 0.0 * keras.ops.mean(y)


PLACES: dict[str, Callable[[], dict[str, Any]]] = {
    "conv kernel": weight("conv", "kernel"),
    "conv bias, before a ReLU": weight("conv", "bias"),
    "gamma, before a max-pool": weight("norm", "gamma"),
    "beta": weight("norm", "beta"),
    "moving mean": weight("norm", "moving_mean"),
    "moving variance": weight("norm", "moving_variance"),
    "hidden kernel, before a ReLU": weight("hidden", "kernel"),
    "hidden bias": weight("hidden", "bias"),
    "head kernel": weight("head", "kernel"),
    "head bias": weight("head", "bias"),
    "infinite kernel": weight("conv", "kernel", np.inf),
    "infinite bias below a ReLU": weight("hidden", "bias", -np.inf),
    "slots of the optimizer": lambda: {"callbacks": [Spoiling(slots)]},
    "learning rate": rate(np.nan),
    "infinite rate": rate(np.inf),
    "inputs": batches(0),
    "infinite inputs": batches(0, np.inf),
    "labels": batches(1),
    "sample weights": batches(2),
    "loss": lambda: {"loss": loss_of_nothing},
    "gradients": lambda: {"model": network(BadGradient())},
}
QUICK = {"conv bias, before a ReLU", "inputs", "gradients", "slots of the optimizer"}


@pytest.mark.parametrize("place", [place if place in QUICK else pytest.param(place, marks=pytest.mark.slow) for place in PLACES])
def test_what_isnt_finite_stops_the_run_at_the_last_good_state(place: str, tmp_path: Path) -> None:
    given = PLACES[place]()
    model, data = given.pop("model", None) or network(), given.pop("data", rows())
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=4).loss(given.pop("loss", "mse")).batch_norm("adapt")
    with pytest.raises((TrainingError, DataError)) as caught:
        plan.fit(model, data, batch_size=BATCH, seed=0, verbose=0, checkpoint_dir=tmp_path, save_every=1, **given)
    text = str(caught.value)
    if isinstance(caught.value, TrainingError):
        assert "Training the phase 'all': step " in text
        assert "weights that are NaN or infinite in" in text or "a loss of nan" in text or "a loss of inf" in text
        assert "the model has the weights of " in text
    else:  # found in the batch, before a step was made with it
        assert "values that are NaN or infinite, the first in row 3" in text
    assert all(np.isfinite(variable.numpy()).all() for variable in model.variables)
    kept = CheckpointFolder(tmp_path, keep=3).newest()
    if kept is not None:
        assert all(np.isfinite(array).all() for name, array in kept.arrays.items() if name.startswith("model/"))


@pytest.mark.slow
def test_the_same_without_onednn() -> None:
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", "-m", "", __file__, "-k", "isnt_finite"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(PLACES)} passed" in done.stdout


def test_weights_that_arent_finite_are_said_before_the_first_step() -> None:
    model = network()
    model.get_layer("norm").moving_mean.assign(np.full(4, np.nan))
    with pytest.raises(TrainingError) as caught:
        tk.FineTuner().loss("mse").fit(model, rows(), verbose=0)
    assert "weights that are NaN or infinite before the first step: 'norm/moving_mean'" in str(caught.value)


def test_the_report_names_the_first_layer_and_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_SHARE", 1e3)  # look after every step, whatever it costs
    with pytest.raises(TrainingError) as caught:
        tk.FineTuner().loss("mse").fit(network(), rows(), batch_size=BATCH, seed=0, verbose=0, **weight("hidden", "kernel")())
    assert caught.value.asked == "Training the phase 'all': step 7, after batch 2 of epoch 1."
    assert caught.value.found[0] == "weights that are NaN or infinite in 1 of 10, first 'hidden/kernel'"
    assert (
        caught.value.fix
        == "train again with a lower learning_rate; the model has the weights of "
        + (caught.value.fix or "").partition("weights of ")[2]
    )


def test_a_large_sum_is_no_error() -> None:
    big = keras.Variable(np.full(4, 3e38, "float32"))
    Guard("a", [big], [big]).look(lambda: "here", {"loss": 1.0})


def test_a_snapshot_stays_as_it_was() -> None:
    variables = [keras.Variable(np.arange(1000.0)), keras.Variable([1.0])]
    reader = Reader(variables)
    values = reader()
    for variable in variables:
        variable.assign_add(np.ones(variable.shape))
    assert np.array_equal(values[0][0].numpy(), np.arange(1000.0, dtype="float32"))
    reader.write(values)
    assert np.array_equal(variables[1].numpy(), [1.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_snapshot_tells_what_was_written(dtype: str) -> None:
    values = np.array([[1.0, np.nan], [-0.0, 2.0]])
    still, written, added, row, negative = (keras.Variable(values, dtype=dtype) for _ in range(5))
    snapshot = Snapshot([still, written, added, row, negative])
    assert snapshot.changed() == []
    written.assign(values)  # what it had
    assert snapshot.changed() == []
    written.assign(values + 1)
    added.assign_add(np.ones((2, 2)))
    row.value.scatter_nd_update([[0]], tf.constant([[3.0, 3.0]], row.value.dtype))
    negative.assign(np.abs(values))
    assert [id(item) for item in snapshot.changed()] == [id(written), id(added), id(row), id(negative)]
    row.value.scatter_nd_update([[0]], tf.constant(values[:1], row.value.dtype))
    assert [id(item) for item in snapshot.changed()] == [id(written), id(added), id(negative)]


def test_values_of_every_dtype_are_read() -> None:
    for dtype in ("float16", "bfloat16", "float64", "int32", "bool"):
        for shape in ((), (3,)):
            (value,) = Reader([keras.Variable(np.ones(shape), dtype=dtype)]).arrays()
            expected = np.ones(shape).astype(value.dtype)
            assert (value.dtype.name, value.shape, value.tobytes()) == (dtype, shape, expected.tobytes())


def test_a_phase_that_changes_nothing_says_so() -> None:
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).rate(tk.Layers.all(), times=0.0).loss("mse")
    run = plan.fit(network(), rows(), batch_size=BATCH, verbose=0)
    assert any(note.startswith("Phase 'all' changed no weight.") for note in run.notes)


def test_a_layer_without_a_gradient_is_said() -> None:
    model = network(layers.ReLU(max_value=0.0, name="dead"))
    run = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).loss("mse").fit(model, rows(), verbose=0)
    assert any(note.startswith("Phase 'all' never changed 'conv/kernel', 'conv/bias'") for note in run.notes)


def test_a_loss_that_jumps_is_said() -> None:
    history = {"loss": [9.0, 1.0, 0.9, 3.0, 1.0]}
    assert loss_spikes(history, first=1, count=4, phase="all") == [
        "Phase 'all': the loss rose from 0.9 to 3 in its epoch 3. A lower learning rate or a warm-up helps."
    ]
    assert loss_spikes({"loss": [1.0, 0.9, 1.1]}, first=0, count=3, phase="all") == []


class Hungry(layers.Layer):  # type: ignore[misc, unused-ignore]
    """Needs more memory than there is for more than five rows."""

    def call(self, x: Any) -> Any:
        extra = tf.maximum(tf.shape(x)[0] - 5, 0)
        return x + tf.reduce_sum(tf.zeros((extra, 1 << 20, 1 << 20)))


@pytest.mark.slow
def test_a_step_without_memory_names_the_batch_that_fits() -> None:
    model = network(Hungry())
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(TrainingError) as caught:
        tk.FineTuner().loss("mse").fit(model, rows(), batch_size=BATCH, seed=0, verbose=0)
    assert caught.value.asked == "Training the phase 'all' with batches of 8 rows."
    assert caught.value.found[0].startswith("not enough memory for a step: ")
    assert caught.value.fix == "fit(…, batch_size=4) fits"
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.variables, strict=True))
