"""The compiled epochs: losses, metrics and weights of plain `fit`, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from transferkit.tuning import epoch as epoch_module
from transferkit.tuning.epoch import Rows, Steps, batch_hooks, class_weights, same_kernels, train

ROWS, WIDTH, CLASSES, BATCH, EPOCHS = 77, 12, 4, 16, 3


def _data(seed: int = 0) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(ROWS, WIDTH)).astype("float32")
    return x, random.integers(0, CLASSES, ROWS), random.uniform(0.1, 2, ROWS).astype("float32")


def _order(epoch: int) -> Any:
    return np.random.default_rng(epoch).permutation(ROWS)


def _head(**optimizer: Any) -> Any:
    x = keras.Input((WIDTH,))
    tensor = layers.Dropout(0.3, seed=7)(layers.Dense(8, activation="relu", kernel_regularizer="l2")(x))
    model = keras.Model(x, layers.Dense(CLASSES)(layers.BatchNormalization()(tensor)))
    for index, weight in enumerate(model.trainable_variables):
        weight.assign(np.random.default_rng(index).normal(size=weight.shape).astype("float32"))
    model.compile(
        keras.optimizers.AdamW(1e-2, **optimizer),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
    )
    return model


def _by_fit(model: Any, x: Any, y: Any, weight: Any = None, **arguments: Any) -> list[dict[str, float]]:
    logs = []
    for epoch in range(EPOCHS):
        order = _order(epoch)
        history = model.fit(
            x[order],
            y[order],
            sample_weight=None if weight is None else weight[order],
            batch_size=BATCH,
            shuffle=False,
            verbose=0,
            **arguments,
        )
        logs.append({name: values[0] for name, values in history.history.items()})
    return logs


def _by_train(model: Any, x: Any, y: Any, weight: Any = None, **arguments: Any) -> list[dict[str, float]]:
    callbacks = keras.callbacks.CallbackList(arguments.pop("users", []), add_history=True, model=model)
    train(model, Rows(x, y, weight, len(x)), order=_order, epochs=EPOCHS, batch_size=BATCH, callbacks=callbacks, **arguments)
    history = model.history.history
    return [{name: values[epoch] for name, values in history.items()} for epoch in range(EPOCHS)]


def _same_state(one: Any, other: Any) -> None:
    for a, b in zip([*one.variables, *one.optimizer.variables], [*other.variables, *other.optimizer.variables], strict=True):
        assert np.array_equal(a.numpy(), b.numpy()), a.path


@pytest.mark.parametrize(
    "optimizer",
    [
        {"use_ema": True, "ema_overwrite_frequency": None},
        {"global_clipnorm": 0.1, "gradient_accumulation_steps": 2},
        pytest.param({"global_clipnorm": 0.1}, marks=pytest.mark.slow),
        pytest.param({"clipvalue": 0.01}, marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    ],
    ids=["ema", "clipnorm and accumulation", "clipnorm", "clipvalue", "accumulation"],
)
def test_the_same_bits_as_fit(optimizer: dict[str, Any]) -> None:
    x, y, _ = _data()
    # Each of fit's calls below is a training of one epoch, at whose end the averages take the weights' place.
    plain, ours = _head(**optimizer), _head(**optimizer)
    if "use_ema" in optimizer:
        plain.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
        train(ours, Rows(x, y, None, ROWS), order=lambda _: np.arange(ROWS), epochs=EPOCHS, batch_size=BATCH)
    else:
        assert _by_train(ours, x, y) == _by_fit(plain, x, y)
    _same_state(ours, plain)


def test_sample_weights_and_validation_are_fits() -> None:
    x, y, weight = _data()
    tx, ty, tw = _data(1)
    plain, ours = _head(), _head()
    expected = _by_fit(plain, x, y, weight, validation_data=(tx, ty, tw))
    assert _by_train(ours, x, y, weight, validation=Rows(tx, ty, tw, ROWS)) == expected
    assert "val_accuracy" in expected[0]
    _same_state(ours, plain)


@pytest.mark.parametrize("shape", ["sparse", "column", "onehot"])
def test_class_weights_are_fits(shape: str) -> None:
    x, y, _ = _data()
    chosen = {0: 3.0, 2: 0.25}
    given = {"sparse": y, "column": y[:, None], "onehot": np.eye(CLASSES, dtype="float32")[y]}[shape]
    assert np.array_equal(class_weights(given, chosen), np.array([chosen.get(label, 1.0) for label in y], "float32"))
    if shape == "sparse":
        plain, ours = _head(), _head()
        assert _by_train(ours, x, y, class_weights(y, chosen)) == _by_fit(plain, x, y, class_weight=chosen)
        _same_state(ours, plain)


def test_loss_scaling_is_kept() -> None:
    x, y, _ = _data()
    plain, ours = _head(), _head()
    for model in (plain, ours):
        inner = keras.optimizers.Adam(1e-2)
        model.compile(
            keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0, dynamic_growth_steps=3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    assert _by_train(ours, x, y) == _by_fit(plain, x, y)
    _same_state(ours, plain)


class OwnStep(keras.Model):
    def train_step(self, data: Any) -> Any:
        logs = super().train_step(data)
        return {**logs, "twice": 2 * logs["loss"]}


def test_a_train_step_of_the_users_runs_and_its_logs_are_told() -> None:
    x, y, _ = _data()
    models = []
    for _ in range(2):
        inner = _head()
        model = OwnStep(inner.input, inner.output)
        model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        models.append(model)
    expected, got = _by_fit(models[0], x, y), _by_train(models[1], x, y)
    assert got == expected
    assert all(log["twice"] == 2 * log["loss"] for log in got)


def test_several_inputs_and_outputs_by_name() -> None:
    def build() -> Any:
        a, b = keras.Input((WIDTH,), name="a"), keras.Input((WIDTH,), name="b")
        one = layers.Dense(1, name="one", kernel_initializer="ones")(a)
        two = layers.Dense(CLASSES, name="two", kernel_initializer=keras.initializers.GlorotUniform(1))(layers.Add()([a, b]))
        model = keras.Model([a, b], {"one": one, "two": two})
        losses = {"one": "mse", "two": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
        model.compile("sgd", losses, loss_weights={"one": 0.1, "two": 1.0}, metrics={"two": ["accuracy"]})
        return model

    x, y, weight = _data()
    plain, ours = build(), build()
    history = plain.fit([x, x[::-1]], {"one": weight, "two": y}, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)
    callbacks = keras.callbacks.CallbackList(add_history=True, model=ours)
    rows = Rows((x, x[::-1].copy()), {"one": weight, "two": y}, None, ROWS)
    train(ours, rows, order=lambda _: np.arange(ROWS), epochs=EPOCHS, batch_size=BATCH, callbacks=callbacks)
    assert ours.history.history == history.history
    _same_state(ours, plain)


def test_steps_may_be_taken_in_parts() -> None:
    x, y, _ = _data()
    whole, parts = _head(), _head()
    rows = Rows(x, y, None, ROWS)
    Steps(whole, batch_size=BATCH).train(rows, _order(0))
    steps = Steps(parts, batch_size=BATCH)
    assert steps.count(ROWS) == 5
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        steps.train(rows, _order(0), start=start, stop=stop)
    _same_state(parts, whole)


@pytest.mark.parametrize("at_once", [1, 3, 32])
def test_rows_may_be_gathered_for_several_steps(
    at_once: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x, y, weight = _data()
    monkeypatch.setattr(epoch_module, "_MOST_AT_ONCE", at_once)
    plain, ours = _head(), _head()
    rows = Rows(tf.constant(x), tf.constant(y), tf.constant(weight), ROWS)
    steps = Steps(ours, batch_size=BATCH)
    steps.train(rows, _order(0), start=0, stop=3)
    logs = steps.train(rows, _order(0), start=3)
    expected = plain.fit(x[_order(0)], y[_order(0)], sample_weight=weight[_order(0)], batch_size=BATCH, shuffle=False, verbose=0)
    assert {name: [float(value)] for name, value in logs.items()} == expected.history
    _same_state(ours, plain)
    assert "not a valid node name" not in caplog.text


@pytest.mark.parametrize("size", [7, 11])
def test_batches_of_one_size_give_the_same_bits(size: int) -> None:
    x, y, weight = _data()
    plain, ours = _head(), _head()
    rows = Rows(tf.constant(x), tf.constant(y), tf.constant(weight), ROWS)
    steps = Steps(ours, batch_size=size)
    steps.warm(rows, train=True)
    for epoch in range(2):
        order = _order(epoch)
        ours.reset_metrics()
        logs = steps.train(rows, order)
        expected = plain.fit(x[order], y[order], sample_weight=weight[order], batch_size=size, shuffle=False, verbose=0)
        assert {name: [float(value)] for name, value in logs.items()} == expected.history
    _same_state(ours, plain)


class _Longest(keras.metrics.Metric):  # type: ignore[misc, unused-ignore]
    """Keeps something that is no variable, and starts at another value than 0."""

    def __init__(self, name: str = "longest") -> None:
        super().__init__(name=name)
        self.longest = self.add_variable((), initializer="ones")
        self.resets = 0

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        del y_true, sample_weight
        self.longest.assign(keras.ops.maximum(self.longest, keras.ops.max(y_pred)))

    def reset_state(self) -> None:
        self.resets += 1
        self.longest.assign(1.0)

    def result(self) -> Any:
        return self.longest * 1.0


@pytest.mark.parametrize("users", [False, True])
def test_metrics_begin_each_epoch_as_in_fit(users: bool) -> None:
    x, y, _ = _data()
    models, own = [_head(), _head()], [_Longest(), _Longest()]
    for model, longest in zip(models, own, strict=True):
        mine = [longest] if users else []
        model.compile(
            "adam",
            "mse",
            metrics=[keras.metrics.F1Score(average="macro"), keras.metrics.AUC(num_thresholds=7, name="auc"), *mine],
        )
    labels = np.eye(CLASSES, dtype="float32")[y]
    expected = models[0].fit(x, labels, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, validation_data=(x, labels))
    callbacks = keras.callbacks.CallbackList(add_history=True, model=models[1])
    rows = Rows(tf.constant(x), tf.constant(labels), None, ROWS)
    train(models[1], rows, order=lambda _: np.arange(ROWS), epochs=EPOCHS, batch_size=BATCH, callbacks=callbacks, validation=rows)
    assert models[1].history.history == expected.history
    assert (own[1].resets > EPOCHS) == users


def test_test_steps_need_no_rows_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, weight = _data()
    model = _head()
    steps, rows = Steps(model, batch_size=BATCH), Rows(tf.constant(x), tf.constant(y), tf.constant(weight), ROWS)
    steps.prepare(rows)
    monkeypatch.setattr(epoch_module, "_batch", None)
    steps.reset_metrics()
    logs = steps.test(rows)
    assert {name: float(value) for name, value in logs.items()} == model.evaluate(
        x, y, sample_weight=weight, batch_size=BATCH, verbose=0, return_dict=True
    )


def test_test_steps_stay_within_the_rows() -> None:
    x, y, _ = _data()
    model, views = _head(), tf.constant(np.concatenate([x, x + 1]))  # of which the second isn't tested on
    steps, labels = Steps(model, batch_size=BATCH), tf.constant(np.concatenate([y, y]))
    rows = Rows(views, labels, None, ROWS, index=lambda order, epoch: order + epoch * ROWS)
    steps.prepare(rows)
    steps.reset_metrics()
    logs = steps.test(rows)
    expected = model.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True)
    assert {name: float(value) for name, value in logs.items()} == expected


def test_an_epoch_takes_its_view_of_each_row() -> None:
    x, y, _ = _data()
    views = np.concatenate([x, x + 1])
    plain, ours = _head(), _head()
    plain.fit((x + 1)[_order(1)], y[_order(1)], batch_size=BATCH, shuffle=False, verbose=0)
    Steps(ours, batch_size=BATCH).train(
        Rows(views, y, None, ROWS, index=lambda order, epoch: order + epoch * ROWS), _order(1), epoch=1
    )
    _same_state(ours, plain)


class _Told(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[Any] = []


def _telling(*names: str) -> Any:
    def hook(name: str) -> Callable[..., None]:
        def said(self: Any, *arguments: Any, **keywords: Any) -> None:
            given = [*arguments, *keywords.values()]
            numbers = [item for item in given if isinstance(item, int)]
            self.said.append((name, numbers, [sorted(item) for item in given if isinstance(item, dict)]))

        return said

    return type("Telling", (_Told,), {name: hook(name) for name in names})()


_EPOCH_HOOKS = ("on_train_begin", "on_epoch_begin", "on_test_begin", "on_test_end", "on_epoch_end", "on_train_end")
_ALL_HOOKS = (*_EPOCH_HOOKS, "on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_test_batch_end")


@pytest.mark.parametrize("hooks", [_EPOCH_HOOKS, _ALL_HOOKS], ids=["epochs", "batches"])
def test_callbacks_hear_what_they_hear_in_fit(hooks: tuple[str, ...]) -> None:
    x, y, _ = _data()
    plain, ours = _head(), _head()
    ears = _telling(*hooks), _telling(*hooks)
    validation = Rows(x, y, None, ROWS)
    plain.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=[ears[0]], validation_data=(x, y))
    callbacks = keras.callbacks.CallbackList([ears[1]], model=ours)
    train(
        ours, validation, order=lambda _: np.arange(ROWS), epochs=2, batch_size=BATCH, callbacks=callbacks, validation=validation
    )
    assert ears[1].said == ears[0].said
    assert len(ears[0].said) > 6


def test_batch_level_callbacks_are_told_apart(tmp_path: Any) -> None:
    told = [
        _telling("on_epoch_end"),
        keras.callbacks.EarlyStopping(),
        keras.callbacks.ModelCheckpoint(tmp_path / "a.keras"),
        keras.callbacks.LambdaCallback(on_epoch_end=print),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.ReduceLROnPlateau(),
    ]
    assert batch_hooks(told) == []
    each = [
        _telling("on_train_batch_end"),
        keras.callbacks.ModelCheckpoint(tmp_path / "b.keras", save_freq=3),
        keras.callbacks.LambdaCallback(on_train_batch_end=print),
        keras.callbacks.TerminateOnNaN(),
    ]
    assert batch_hooks(each) == ["Telling", "ModelCheckpoint", "LambdaCallback", "TerminateOnNaN"]


def test_a_callback_stops_the_training_through_the_model_it_knows() -> None:
    x, y, _ = _data()
    shown, trained = _head(), _head()

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            del logs
            self.model.stop_training = epoch == 1

    callbacks = keras.callbacks.CallbackList([Stop()], add_history=True, model=shown)
    rows = Rows(x, y, None, ROWS)
    train(trained, rows, order=_order, epochs=9, batch_size=BATCH, callbacks=callbacks, shown=shown)
    assert shown.history.epoch == [0, 1]


def test_rewriting_of_graphs_is_off_only_within_the_block() -> None:
    before = tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer", False)
    with same_kernels():
        assert tf.config.optimizer.get_experimental_options()["disable_meta_optimizer"]
    assert tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer", False) == before
