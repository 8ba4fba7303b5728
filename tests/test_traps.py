"""The traps of plain Keras: each goes wrong there, which is shown first, and doesn't here."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit._keras import tf

Array = Any
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(64, 5)) * 3 + 2).astype("float32")
Y = RNG.integers(0, 3, 64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def base() -> Any:
    keras.utils.set_random_seed(0)
    made = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, name="dense"),
            keras.layers.BatchNormalization(name="norm", momentum=0.9),
            keras.layers.Dropout(0.5, name="dropout"),
        ],
        name="base",
    )
    made.get_layer("norm").set_weights([np.full(6, 1.1), np.full(6, 0.1), np.full(6, 0.5), np.full(6, 2.0)])
    return made


def with_head(below: Any) -> Any:
    return keras.Sequential([keras.Input((5,)), below, keras.layers.Dense(3, name="head")])


def statistics(below: Any) -> list[Array]:
    norm = below.get_layer("norm")
    return [norm.moving_mean.numpy(), norm.moving_variance.numpy()]


def same(a: list[Array], b: list[Array]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def fit(model: Any, optimizer: Any = "sgd", **arguments: Any) -> Any:
    model.compile(optimizer, LOSS)
    return model.fit(X, Y, batch_size=16, verbose=0, **arguments)


def test_batch_norm_statistics_after_unfreezing() -> None:
    below = base()
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(3)(below(inputs, training=False)))
    before = statistics(below)
    fit(model)
    if same(statistics(below), before):
        pytest.skip("this version of Keras holds `training=False` inside a functional model")

    below = base()
    model = with_head(below)
    tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2).fit(model, (X, Y), seed=0, verbose=0)
    assert same(statistics(below), before)


def test_dropout_in_a_frozen_base() -> None:
    def outputs_differ(train: Any) -> bool:
        below = base()
        model = with_head(below)
        losses = []
        for seed in (1, 2):
            keras.utils.set_random_seed(seed)
            model.get_layer("head").set_weights([np.arange(18.0).reshape(6, 3), np.zeros(3)])
            for variable in model.variables:
                if "seed_generator" in variable.path:
                    variable.assign(np.array([seed, 0], "uint32"))
            losses.append(train(model, below))
        return bool(losses[0] != losses[1])

    def plain(model: Any, below: Any) -> float:
        below.trainable = False
        return float(fit(model, keras.optimizers.SGD(0.0), shuffle=False).history["loss"][0])

    def ours(model: Any, below: Any) -> float:
        del below
        plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1, learning_rate=1e-30).optimizer("sgd")
        data = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
        return float(plan.fit(model, data, seed=0, verbose=0).history["loss"][0])

    assert outputs_differ(plain), "Keras drops out in what is frozen"
    assert not outputs_differ(ours)


def test_trainable_set_after_compile() -> None:
    model = with_head(base())
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    model.fit(X, Y, verbose=0)
    model.layers[0].trainable = False
    before = model.layers[0].get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, Y, verbose=0)
    assert not same(model.layers[0].get_weights(), before), "Keras went on training it, and said nothing"

    before = model.layers[0].get_weights()
    tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1).fit(model, (X, Y), verbose=0, seed=0)
    assert same(model.layers[0].get_weights(), before)


def test_the_optimizer_across_unfreezing() -> None:
    model = with_head(base())
    model.layers[0].trainable = False
    optimizer = keras.optimizers.Adam()
    fit(model, optimizer)
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match="Unknown variable"):
        fit(model, optimizer)
    fit(model, keras.optimizers.Adam())
    assert int(model.optimizer.iterations) == 4, "a new one has forgotten its steps"

    model = with_head(base())
    two = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1).phase("all", train=tk.Layers.all(), epochs=1)
    two.fit(model, (X, Y), batch_size=16, verbose=0, seed=0)
    assert int(model.optimizer.iterations) == 8


def test_weight_decay_on_batch_norm_and_biases() -> None:
    def moved(train: Any) -> dict[str, bool]:
        below = base()
        below.get_layer("norm").set_weights([np.full(6, 1.1), np.full(6, 0.1), np.zeros(6), np.ones(6)])
        model = with_head(below)
        model.get_layer("head").bias.assign(np.ones(3))
        before = {variable.path: variable.numpy() for variable in model.trainable_variables}
        train(model)
        return {v.name: not np.allclose(before[v.path], v.numpy(), rtol=1e-4) for v in model.trainable_variables}

    tiny = keras.optimizers.AdamW(1e-12, weight_decay=1e11)  # a rate that only the decay can be seen of
    assert moved(lambda model: fit(model, tiny)) == {"kernel": True, "bias": True, "gamma": True, "beta": True}
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).optimizer(tiny).batch_norm("adapt")
    found = moved(lambda model: plan.fit(model, (X, Y), batch_size=16, verbose=0, seed=0))
    assert found == {"kernel": True, "bias": False, "gamma": False, "beta": False}


def test_a_seed_and_the_order_of_rows() -> None:
    def epochs_of(run: Any) -> list[float]:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((1,))
        model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False)(inputs))
        model.set_weights([np.ones((1, 1))])
        rows = np.arange(8, dtype="float32")[:, None]
        history: list[float] = run(model, rows)
        return history

    class Seen(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 0:
                self.losses.append(logs["loss"])

    def plain(model: Any, rows: Array) -> list[float]:
        seen = Seen()
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(rows, 0 * rows, batch_size=1, epochs=6, verbose=0, callbacks=[seen])
        return seen.losses

    def ours(model: Any, rows: Array) -> list[float]:
        seen = Seen()
        plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=6, learning_rate=1e-30).optimizer("sgd").loss("mse")
        plan.fit(model, (rows, 0 * rows), batch_size=1, verbose=0, seed=0, callbacks=[seen])
        return seen.losses

    assert len(set(epochs_of(plain))) == 1, "Keras replays one permutation in every epoch"
    assert len(set(epochs_of(ours))) > 2


def test_scaled_gradients_are_no_rate_under_adam() -> None:
    def first_step(gradient: float) -> float:
        variable = keras.Variable([1.0])
        keras.optimizers.Adam(0.1).apply([keras.ops.array([gradient])], [variable])
        return 1.0 - float(variable[0])

    assert first_step(1.0) == pytest.approx(first_step(0.1), rel=1e-4), "a tenth of the gradient, the same step"

    model = with_head(base())
    start = model.get_layer("base").get_layer("dense").kernel.numpy()
    plan = (
        tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1, learning_rate=0.1).rate(tk.Layers.named("base"), times=0.1)
    )
    plan.fit(model, (X, Y), batch_size=64, verbose=0, seed=0)
    step = np.abs(model.get_layer("base").get_layer("dense").kernel.numpy() - start).max()
    assert step == pytest.approx(0.01, rel=1e-2)


def test_a_schedule_and_a_plateau() -> None:
    model = with_head(base())
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    with pytest.raises(TypeError):
        fit(
            model,
            keras.optimizers.SGD(schedule),
            epochs=3,
            callbacks=[keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=100)],
        )
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=3, learning_rate=0.1, schedule="plateau").loss(LOSS)
    plan.fit(model, (X, Y), validation_data=(X, Y), verbose=0, seed=0)


def test_backup_and_restore_leaves_later_runs_without_epochs(tmp_path: Any) -> None:
    model = with_head(base())
    fit(model, epochs=2, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    run = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2).fit(model, (X, Y), verbose=0, seed=0)
    assert run.epochs == 2
    assert len(run.history["loss"]) == 2


def test_auc_of_several_classes_with_whole_number_labels() -> None:
    model = with_head(base())
    model.compile("sgd", LOSS, metrics=[keras.metrics.AUC(multi_label=True, num_labels=3, from_logits=True)])
    with pytest.raises((ValueError, IndexError)):
        model.fit(X, Y, verbose=0)
    evaluation = tk.Evaluator("accuracy", "auc").run(model, (X, Y))
    assert 0 <= float(evaluation["auc"]) <= 1


def test_metrics_of_an_earlier_compile() -> None:
    model = with_head(base())
    model.compile("sgd", LOSS, metrics=["accuracy"])
    model.fit(X, Y, verbose=0)
    history = fit(model).history
    assert "accuracy" in history, "compiled without metrics, Keras goes on with those of before"
    run = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).loss("mse").fit(model, (X, X[:, :3]), verbose=0, seed=0)
    assert set(run.history) == {"loss"}


def test_a_regularizer_set_on_a_layer_that_is_built() -> None:
    model = with_head(base())
    model.get_layer("head").kernel_regularizer = keras.regularizers.L2(10.0)
    assert model.losses == [], "Keras made no loss of it, and says nothing"
    before = model.get_layer("head").kernel.numpy()
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=5, learning_rate=0.01).optimizer("sgd").loss(LOSS)
    sizes = []
    for strength in (0.0, 10.0):
        model.get_layer("head").kernel.assign(before)
        (plan.l2_sp(strength, head=strength) if strength else plan).fit(model, (X, Y), verbose=0, seed=0)
        sizes.append(np.abs(model.get_layer("head").kernel.numpy()).sum())
    assert sizes[1] < 0.7 * sizes[0]


def test_the_best_checkpoint_across_phases(tmp_path: Any) -> None:
    path = tmp_path / "best.keras"

    def best() -> Any:
        return keras.callbacks.ModelCheckpoint(path, monitor="loss", save_best_only=True)

    model = with_head(base())
    fit(model, callbacks=[best()], epochs=3)
    kept = path.read_bytes()
    fit(model, keras.optimizers.SGD(1e3), callbacks=[best()])
    assert path.read_bytes() != kept, "a second fit with a callback of its own writes over the best with worse"
    model = with_head(base())
    run = (
        tk.FineTuner()
        .phase("one", train=tk.Layers.all(), epochs=3, learning_rate=1e-2)
        .phase("two", train=tk.Layers.all(), epochs=1, learning_rate=1e3)
        .loss(LOSS)
        .fit(model, (X, Y), callbacks=[best()], verbose=0, seed=0)
    )
    losses = run.history["loss"]
    assert losses[3] > min(losses[:3])
    kept_model = keras.models.load_model(path)
    assert float(LOSS(Y, kept_model(X)).numpy()) < losses[3]


def test_a_head_in_half_precision() -> None:
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        plain = keras.layers.Dense(3, activation="softmax")
        assert plain(np.zeros((1, 4), "float32")).dtype == "float16"
        model = tk.ModelBuilder((4,)).dense(5).classifier(3).build(seed=0)
    finally:
        keras.config.set_dtype_policy(policy)
    assert model.output.dtype == "float32"
    assert model.layers[-2].compute_dtype == "float16"


def test_batch_norm_in_a_short_run() -> None:
    model = with_head(base())
    model.get_layer("base").get_layer("norm").momentum = 0.99
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=3).batch_norm("adapt")
    run = plan.fit(model, (X, Y), verbose=0, seed=0)
    assert any(".batch_norm('recalibrate')" in note for note in run.notes)


def test_the_end_of_data_of_unknown_length_is_no_step() -> None:
    x, y = np.eye(8, dtype="float32"), np.arange(8) % 2
    known = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
    unknown = known.filter(lambda *_: True)

    def network() -> Any:
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, kernel_initializer="ones")])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.5), loss)
        return model

    plain = network()
    with pytest.warns(UserWarning, match="ran out of data"):
        plain.fit(unknown, epochs=2, verbose=0, shuffle=False)
    assert int(plain.optimizer.iterations) == 10  # of 8 batches, and the weights are decayed as often

    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2).optimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5))
    for together in (1, 3):
        weights = []
        for data in (known, unknown, [(x[at : at + 2], y[at : at + 2]) for at in range(0, 8, 2)]):
            model = network()
            run = plan.cache(False).fit(model, data, seed=0, verbose=0, steps_per_execution=together)
            assert run.phases[0].steps == int(model.optimizer.iterations) == 8
            weights.append(model.get_weights())
        for other in weights[1:]:
            assert all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(weights[0], other, strict=True))
    assert not np.allclose(plain.get_weights()[0], weights[0][0], atol=1e-3)
