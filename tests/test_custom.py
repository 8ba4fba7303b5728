"""Everything a user wrote for Keras, fine-tuned in two phases, saved and reloaded: it works unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk

Array = Any
RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.integers(0, 3, 48)
TWO = (
    tk.FineTuner()
    .phase("head", train=tk.Layers.head(), epochs=1, learning_rate=0.05)
    .phase("all", train=tk.Layers.all(), epochs=2, learning_rate=0.01, layer_decay=0.5, schedule="cosine")
)


@keras.saving.register_keras_serializable(package="tests")
class Scale(keras.layers.Layer):
    """A layer with a weight of its own, a loss added and a constraint."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(
            shape=(shape[-1],), initializer="ones", constraint=keras.constraints.NonNeg(), name="factor"
        )

    def call(self, x: Any) -> Any:
        self.add_loss(0.01 * keras.ops.sum(keras.ops.square(self.factor)))
        return x * self.factor


@keras.saving.register_keras_serializable(package="tests")
class Focal(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        picked = keras.ops.take_along_axis(keras.ops.softmax(y_pred), keras.ops.cast(y_true[:, None], "int32"), axis=1)[:, 0]
        return -keras.ops.square(1 - picked) * keras.ops.log(picked + 1e-7)


@keras.saving.register_keras_serializable(package="tests")
class Confident(keras.metrics.Metric):
    def __init__(self, name: str = "confident", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.total = self.add_weight(name="total", initializer="zeros")
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        del y_true, sample_weight
        self.total.assign_add(keras.ops.sum(keras.ops.max(keras.ops.softmax(y_pred), axis=-1)))
        self.count.assign_add(keras.ops.cast(keras.ops.shape(y_pred)[0], "float32"))

    def result(self) -> Any:
        return self.total / self.count


@keras.saving.register_keras_serializable(package="tests")
class Halved(keras.optimizers.SGD):
    """A user's optimizer: half of every step."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, keras.ops.multiply(learning_rate, 0.5))


class Recorder(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.layer_rates: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        self.events.append("begin")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.events.append(f"{epoch}: {sorted(logs)}")

    def on_train_end(self, logs: Any = None) -> None:
        del logs
        self.events.append("end")


def assert_same_outputs_after_saving(model: Any, inputs: Any, folder: Path) -> Any:
    model.save(folder / "model.keras")
    again = keras.models.load_model(folder / "model.keras")
    for a, b in zip(
        keras.tree.flatten(model.predict(inputs, verbose=0)), keras.tree.flatten(again.predict(inputs, verbose=0)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    return again


def moved(before: list[Array], model: Any) -> bool:
    return all(not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_a_layer_loss_metric_optimizer_callback_and_constraint_of_the_users(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh"), Scale(name="scale"), keras.layers.Dense(3)])
    before = model.get_weights()
    recorder = Recorder()
    plan = TWO.loss(Focal()).metrics("accuracy", Confident()).optimizer(Halved(0.1, momentum=0.9))
    run = plan.fit(model, (X, Y), validation_data=(X, Y), batch_size=16, callbacks=[recorder], seed=0, verbose=0)
    names = sorted(["accuracy", "confident", "loss", "val_accuracy", "val_confident", "val_loss"])
    assert recorder.events == ["begin", *[f"{epoch}: {names}" for epoch in range(3)], "end"]
    assert sorted(run.history) == names
    assert moved(before, model)
    assert type(model.optimizer) is Halved
    again = assert_same_outputs_after_saving(model, X, tmp_path)
    assert type(again.optimizer) is Halved
    assert type(again.loss) is Focal
    assert again.evaluate(X, Y, verbose=0) == pytest.approx(model.evaluate(X, Y, verbose=0))


def test_a_users_optimizer_steps_as_in_plain_keras() -> None:
    def made() -> Any:
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)])

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batches = [(X[i : i + 16], Y[i : i + 16]) for i in (0, 16, 32)]
    ours, plain = made(), made()
    # A rate for a layer that has none of its own: the wrapped optimizer at work, though every factor is 1.
    plan = (
        tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2, learning_rate=0.1).loss(loss).optimizer(Halved()).l2_sp(0.0)
    )
    plan.fit(ours, batches, seed=0, verbose=0)
    plain.compile(Halved(0.1), loss)
    plain.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_constraint_holds_at_every_rate_and_in_the_average() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), Scale(name="scale"), keras.layers.Dense(3)])
    plan = (
        tk.FineTuner()
        .phase("all", train=tk.Layers.all(), epochs=3, learning_rate=5.0)
        .optimizer("sgd")
        .rate(tk.Layers.named("scale"), times=2.0)
        .ema(0.5)
    )
    plan.fit(model, (X, Y), batch_size=16, seed=0, verbose=0)
    assert model.get_layer("scale").factor.numpy().min() >= 0


@keras.saving.register_keras_serializable(package="tests")
class OwnStep(keras.Model):
    """A subclassed model with a train_step of its own: the loss counts twice, and a tracker of the user's is in the logs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(8, "relu", name="hidden")
        self.out = keras.layers.Dense(3, name="out")
        self.tracker = keras.metrics.Mean(name="twice")

    def build(self, shape: Any) -> None:
        self.hidden.build(shape)
        self.out.build((shape[0], 8))
        self.built = True

    def call(self, x: Any) -> Any:
        return self.out(self.hidden(x))

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker]

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        with tf.GradientTape() as tape:
            loss = 2 * self.compute_loss(x, y, self(x, training=True))
        self.optimizer.apply_gradients(zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True))
        self.tracker.update_state(loss)
        return {"loss": loss, "twice": self.tracker.result()}


def test_a_subclassed_model_with_its_own_train_step(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = OwnStep()
    model.build((None, 6))
    before = model.get_weights()
    plan = TWO.loss(keras.losses.SparseCategoricalCrossentropy(from_logits=True)).l2_sp(0.01)
    run = plan.fit(model, (X, Y), batch_size=16, seed=0, verbose=0)
    assert set(run.history) == {"loss", "twice"}
    assert moved(before, model)
    assert_same_outputs_after_saving(model, X, tmp_path)


def two_by_two() -> Any:
    keras.utils.set_random_seed(0)
    a, b = keras.Input((6,), name="a"), keras.Input((2,), name="b")
    joined = keras.layers.Concatenate()(
        [keras.layers.Dense(8, "relu", name="left")(a), keras.layers.Dense(4, "relu", name="right")(b)]
    )
    return keras.Model(
        {"a": a, "b": b}, {"kind": keras.layers.Dense(3, name="kind")(joined), "size": keras.layers.Dense(1, name="size")(joined)}
    )


def test_two_inputs_and_two_outputs_with_weighted_losses(tmp_path: Path) -> None:
    model = two_by_two()
    inputs = {"a": X, "b": X[:, :2]}
    labels = {"kind": Y, "size": X[:, :1]}
    before = model.get_weights()
    plan = (
        TWO.loss(
            {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mae"},
            weights={"kind": 1.0, "size": 0.3},
        )
        .metrics({"kind": ["accuracy"], "size": ["mse"]})
        .label_smoothing(0.0)
        .l2_sp(0.001)
    )
    run = plan.fit(model, (inputs, labels), validation_data=(inputs, labels), batch_size=16, seed=0, verbose=0)
    assert {"kind_loss", "size_loss", "val_kind_accuracy", "val_size_mse"} <= set(run.history)
    last = {name: values[-1] for name, values in run.history.items()}
    assert last["val_loss"] == pytest.approx(last["val_kind_loss"] + 0.3 * last["val_size_loss"], rel=1e-4)
    assert moved(before, model)
    assert_same_outputs_after_saving(model, inputs, tmp_path)


def test_sample_weights_of_zero_leave_rows_out() -> None:
    def trained(y: Array, weights: Array) -> list[Array]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
        tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2).fit(model, (X, y, weights), seed=0, verbose=0)
        found: list[Array] = model.get_weights()
        return found

    weights = (np.arange(48) % 2).astype("float32")
    wrong = np.where(weights > 0, Y, (Y + 1) % 3)
    for a, b in zip(trained(Y, weights), trained(wrong, weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_multi_label_head() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(4, "sigmoid")])
    labels = (X[:, :4] > 0).astype("float32")
    run = TWO.label_smoothing(0.05).fit(model, (X, labels), validation_data=(X, labels), seed=0, verbose=0)
    assert type(model.loss) is keras.losses.BinaryCrossentropy
    assert "val_binary_accuracy" in run.history
