"""What a plan says of how phases train, on real runs: rates by block, state carried over, schedules, penalties, averages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk
from transferkit import errors
from transferkit.tuning.optimizer_state import as_plain
from transferkit.tuning.optimizers import with_multipliers
from transferkit.tuning.rates import blocks_of
from transferkit.tuning.schedules import Schedule

Array = Any


def problem(rows: int = 48) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    y = random.integers(0, 3, rows)
    return (random.normal(size=(rows, 6)) + y[:, None]).astype("float32"), y


def network() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="block_1_dense"),
            keras.layers.Dense(8, "relu", name="block_2_dense"),
            keras.layers.Dense(3, name="head"),
        ]
    )


class Watch(keras.callbacks.Callback):
    """The optimizer's options and rate in each epoch, and the weights after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[list[tuple[float, int]]] = []
        self.rates: list[float] = []
        self.weights: list[list[Array]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.weights.append(self.model.get_weights())

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        options = getattr(self.model.optimizer, "options", ())
        self.options.append([(option.multiplier, option.origin) for option in options])


def fit(tuner: Any, model: Any, **arguments: Any) -> Watch:
    watch = Watch()
    tuner.fit(model, problem(), batch_size=16, seed=3, verbose=0, callbacks=[watch], **arguments)
    return watch


def one_phase(**settings: Any) -> Any:
    return tk.FineTuner().phase("all", **{"train": tk.Layers.all(), "epochs": 2, "learning_rate": 0.1, **settings})


# ── rates ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_layer_decay_falls_by_block_from_the_head_down_and_is_what_the_table_says() -> None:
    model = network()
    tuner = one_phase(layer_decay=0.5).optimizer("sgd").rate(tk.Layers.named("block_1*"), times=0.1)
    table = str(tuner.describe(model))
    rates = {line.split()[0]: line.split()[5] for line in table.splitlines() if line.startswith(("block", "head"))}
    assert rates == {"block_1_dense": "0.0025", "block_2_dense": "0.05", "head": "0.1"}
    before = model.get_weights()
    x, y = problem(16)
    with tf.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x))
    gradients = tape.gradient(loss, model.trainable_variables)
    one_phase(epochs=1, layer_decay=0.5).optimizer("sgd").rate(tk.Layers.named("block_1*"), times=0.1).fit(
        model, (x, y), batch_size=16, seed=0, verbose=0
    )
    for old, new, gradient, rate in zip(
        before, model.get_weights(), gradients, [0.0025] * 2 + [0.05] * 2 + [0.1] * 2, strict=True
    ):
        np.testing.assert_allclose(new, old - rate * np.asarray(gradient), atol=2e-7)


def test_blocks_are_those_of_the_applications_names() -> None:
    mobile = keras.applications.MobileNetV2(weights=None, alpha=0.35, input_shape=(32, 32, 3), classes=2)
    blocks = blocks_of(mobile)
    assert blocks[-1] == ["predictions"]
    assert blocks[0] == ["Conv1", "bn_Conv1"]
    assert blocks[3] == [
        f"block_2_{part}" for part in ("expand", "expand_BN", "depthwise", "depthwise_BN", "project", "project_BN")
    ]
    assert len(blocks) == 20
    first = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=2)
    assert blocks_of(first)[1] == ["conv_dw_1", "conv_dw_1_bn", "conv_pw_1", "conv_pw_1_bn"]
    assert len(blocks_of(first)) == 15


# ── from phase to phase ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_head_goes_on_with_its_momenta_and_what_joins_counts_its_own_steps() -> None:
    """Against plain Keras on the head alone for as long as nothing below changes what it sees."""
    tuner = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=2, learning_rate=0.05)
        .phase("all", train=tk.Layers.all(), epochs=2, learning_rate=0.05)
        .rate(tk.Layers.below("head"), times=0.0)
    )
    ours = network()
    watch = fit(tuner, ours)
    assert watch.options[2] == [(0.0, 6)] * 4 + [(1.0, 0)] * 2
    alone = network()
    fit(tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=4, learning_rate=0.05), alone)
    for a, b in zip(ours.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_model_is_left_with_a_plain_optimizer_and_loss_that_open_without_the_library(tmp_path: Path) -> None:
    model = network()
    tuner = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=1)
        .phase("all", train=tk.Layers.all(), epochs=1, learning_rate=0.01, schedule="cosine")
        .label_smoothing(0.1)
        .l2_sp(0.01)
    )
    tuner.fit(model, problem(), seed=0, verbose=0)
    assert type(model.optimizer) is keras.optimizers.Adam
    assert int(model.optimizer.iterations) == 4
    assert type(model.loss) is keras.losses.SparseCategoricalCrossentropy
    assert float(np.abs(model.optimizer.variables[2].numpy()).max()) > 0, "the momenta are kept"
    model.save(tmp_path / "model.keras")
    code = (
        "import sys, keras; model = keras.models.load_model(sys.argv[1]); "
        "print(type(model.optimizer).__name__, 'transferkit' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.keras")], capture_output=True, text=True, timeout=200)
    assert out.stdout.split() == ["Adam", "False"], out.stderr


def test_a_plain_optimizer_goes_on_as_the_other_would_have() -> None:
    variables = [keras.Variable(np.ones(3)), keras.Variable(np.ones((2, 2)))]
    twins = [keras.Variable(np.ones(3)), keras.Variable(np.ones((2, 2)))]
    grads = [tf.constant([1.0, -2.0, 3.0]), tf.constant([[1.0, 2.0], [3.0, 4.0]])]
    ours, plain = with_multipliers(keras.optimizers.Adam(0.1), variables), keras.optimizers.Adam(0.1)
    for optimizer, own in ((ours, variables), (plain, twins)):
        for _ in range(3):
            optimizer.apply(grads, own)
    as_plain(ours).apply(grads, variables)
    plain.apply(grads, twins)
    for a, b in zip(variables, twins, strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


# ── schedules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_schedule_runs_over_its_own_phase() -> None:
    tuner = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=1, learning_rate=0.2)
        .phase("all", train=tk.Layers.all(), epochs=3, learning_rate=0.1, schedule=Schedule.cosine(warmup=0.3))
        .optimizer("sgd")
    )
    watch = fit(tuner, network())
    expected = [0.2] * 3 + Schedule.cosine(warmup=0.3).curve(0.1, steps=9)
    np.testing.assert_allclose(watch.rates, expected, rtol=1e-5, atol=1e-8)


def test_a_keras_schedule_is_counted_from_the_phase() -> None:
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5, staircase=True)
    tuner = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=1, learning_rate=0.2)
        .phase("all", train=tk.Layers.all(), epochs=2, schedule=decay)
    )
    np.testing.assert_allclose(fit(tuner, network()).rates, [0.2] * 3 + [0.1] * 3 + [0.05] * 3, rtol=1e-6)


def test_plateau_lowers_the_rate_by_a_callback() -> None:
    tuner = one_phase(epochs=4, learning_rate=1e-12, schedule=Schedule.plateau(factor=0.5, patience=1, monitor="loss"))
    rates = fit(tuner.optimizer("sgd"), network()).rates[::3]
    assert rates[0] == pytest.approx(1e-12)
    assert rates[-1] <= 0.5e-12


# ── decay, penalties, labels ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_weight_decay_spares_the_biases() -> None:
    model = network()
    for layer in model.layers:
        layer.bias.assign(np.ones(layer.bias.shape))
    before = model.get_weights()
    fit(one_phase(epochs=1, learning_rate=1e-9).optimizer("sgd").weight_decay(1e8), model)  # a rate that moves nothing else
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(new, old * (0.9**3 if old.ndim == 2 else 1.0), atol=1e-6)


def test_l2_sp_holds_to_the_loaded_weights_over_all_phases() -> None:
    """A pull so strong that only what was loaded remains, though the middle phase froze the layer after it had moved."""
    model = network()
    start = model.get_weights()
    strong = (
        tk.FineTuner()
        .phase("one", train=tk.Layers.all(), epochs=1, learning_rate=0.05)
        .phase("head", train=tk.Layers.head(), epochs=1, learning_rate=0.05)
        .phase("two", train=tk.Layers.all(), epochs=20, learning_rate=0.01)
        .optimizer("sgd")
    )
    free = network()
    fit(strong, free)
    fit(strong.l2_sp(50.0), model)
    held, moved = (np.abs(m.get_weights()[0] - start[0]).max() for m in (model, free))
    assert moved > 0.03
    assert held < 0.01
    assert np.abs(model.get_weights()[4]).max() < np.abs(free.get_weights()[4]).max()


def test_label_smoothing_trains_as_keras_does_on_one_hot_labels() -> None:
    ours, keras_own = network(), network()
    fit(one_phase().optimizer("sgd").label_smoothing(0.3), ours)
    x, y = problem()
    hot = keras.utils.to_categorical(y)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3)
    one_phase().optimizer("sgd").loss(loss).fit(keras_own, (x, hot), batch_size=16, seed=3, verbose=0)
    for a, b in zip(ours.get_weights(), keras_own.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", ["arrays", "list"])
def test_mixup_works_with_whole_number_labels_on_any_data_and_replays(kind: str) -> None:
    x, y = problem()
    data: Any = (x, y)
    if kind == "list":
        data = [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    results = []
    for tuner in (one_phase().mixup(0.4), one_phase().mixup(0.4), one_phase()):
        model = network()
        run = tuner.fit(model, data, validation_data=(x, y), batch_size=16, seed=3, verbose=0)
        results.append(model.get_weights())
        assert run.history["val_accuracy"][-1] > 0.5
    assert all(np.array_equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not np.array_equal(results[0][0], results[2][0])


def test_mixing_with_class_weights_is_refused_and_changes_nothing() -> None:
    model = network()
    before = model.get_weights()
    with pytest.raises(errors.DataError) as caught:
        one_phase().mixup().metrics(keras.metrics.SparseTopKCategoricalAccuracy(2)).fit(model, problem(), class_weight={0: 2.0})
    assert str(caught.value) == (
        "Mixing batches by mixup.\n"
        "  found 2 problems:\n"
        "    - class_weight, though a mixed row has no single class\n"
        "    - the metric SparseTopKCategoricalAccuracy, which takes whole numbers as labels\n"
        "  to fix it: leave it out of the plan, or those of the call"
    )
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert all(layer.trainable for layer in model.layers)


# ── averages ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ema_leaves_the_average_of_the_last_phase() -> None:
    model, x_y = network(), problem()
    watch = fit(one_phase(epochs=3).optimizer("sgd").ema(0.7), model, validation_data=x_y)
    average = network().get_weights()
    for step, weights in enumerate(watch.weights):
        momentum = min(0.7, (1 + step) / (10 + step))
        average = [momentum * mean + (1 - momentum) * weight for mean, weight in zip(average, weights, strict=True)]
    for a, b in zip(model.get_weights(), average, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_early_stopping_keeps_the_best_average() -> None:
    model = network()
    tuner = one_phase(epochs=6, learning_rate=3.0).optimizer("sgd").ema(0.5).early_stopping(1)
    run = tuner.fit(model, problem(), validation_data=problem(), batch_size=16, seed=3, verbose=0)
    found = model.evaluate(*problem(), verbose=0)[0]
    assert found == pytest.approx(min(run.history["val_loss"]), rel=1e-4)


def test_swa_leaves_the_mean_of_the_last_epochs() -> None:
    model = network()
    watch = fit(one_phase(epochs=4).optimizer("sgd").swa(0.5), model)
    ends = [watch.weights[3 * epoch + 2] for epoch in (2, 3)]
    for now, first, second in zip(model.get_weights(), *ends, strict=True):
        np.testing.assert_allclose(now, (first + second) / 2, atol=1e-6)


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plans_are_values_and_survive_json() -> None:
    plan = (
        one_phase(layer_decay=0.7, schedule="one_cycle")
        .rate(tk.Layers.named("block_1*"), times=0.1)
        .weight_decay(0.01)
        .l2_sp(0.1)
        .label_smoothing(0.1)
        .mixup()
        .ema()
    )
    assert tk.FineTuner.from_json(plan.to_json()) == plan
    assert repr(plan) == (
        "FineTuner().phase('all', train=Layers.all(), epochs=2, learning_rate=0.1, layer_decay=0.7, "
        "schedule=Schedule.one_cycle())"
        ".rate(Layers.named('block_1*'), times=0.1).weight_decay(0.01).l2_sp(0.1, head=0.01).label_smoothing(0.1).mixup().ema()"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: one_phase(layer_decay=1.5), "layer_decay=1.5; it must be a number above 0, at most 1"),
        (lambda: one_phase(schedule="cosin"), "no schedule named 'cosin' (did you mean 'cosine'?)"),
        (lambda: one_phase(schedule=3), "schedule=3, which is neither a Schedule nor a Keras LearningRateSchedule"),
        (lambda: tk.FineTuner().rate(tk.Layers.all(), times=-1), "Layers.all() and times=-1; layers and a number"),
        (lambda: tk.FineTuner().l2_sp(-1.0), "strength=-1.0, head=-0.1; they must be numbers, at least 0"),
        (lambda: tk.FineTuner().label_smoothing(1.0), "1.0; it must be a number from 0 to below 1"),
        (lambda: tk.FineTuner().mixup().cutmix(), "mixup and cutmix in one plan; it can hold one of them"),
        (lambda: tk.FineTuner().ema().swa(), "ema and swa in one plan; it can hold one of them"),
        (
            lambda: tk.FineTuner().early_stopping().swa(),
            "early stopping in the same plan, which ends a phase with the weights of one epoch",
        ),
        (lambda: tk.FineTuner().weight_decay(-0.1), "-0.1; it must be a number, at least 0"),
    ],
)
def test_plans_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(errors.PlanError) as caught:
        make()
    assert caught.value.found == (message,)


def test_a_schedule_needs_to_know_how_many_steps_there_are() -> None:
    def endless() -> Any:
        while True:
            yield problem(16)

    with pytest.raises(errors.DataError, match="no steps_per_epoch"):
        one_phase(schedule="cosine").fit(network(), endless(), verbose=0)
    run = one_phase(schedule="cosine").fit(network(), endless(), steps_per_epoch=2, verbose=0)
    assert run.epochs == 2


def test_a_run_worse_than_chance_and_unsettled_batch_norm_are_told() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(3)])
    x, y = problem()
    run = one_phase(learning_rate=1e-9).fit(model, (x, y), validation_data=(x, (y + 1) % 3), verbose=0, seed=0)
    notes = "\n".join(run.notes)
    assert "norm: after 4 steps its statistics are still 96% those it began with (momentum 0.99)." in notes
    settled = one_phase(epochs=3, learning_rate=0.5).fit(network(), (x, y), validation_data=(x, y), verbose=0, seed=0)
    assert len(settled.notes) == 1
    wrong = network()
    one_phase(epochs=20, learning_rate=0.5).fit(wrong, (x, y), verbose=0, seed=0)
    shifted = one_phase(learning_rate=1e-9).fit(wrong, (x, y), validation_data=(x, (y + 1) % 3), verbose=0, seed=0)
    assert "guessing among 3 classes gives 0.333" in "\n".join(shifted.notes)


def test_a_line_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    one_phase().fit(network(), problem(), seed=0, verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all ")]
    assert [line.split("  ")[:2] for line in lines] == [["all 1/2", "rate 0.1"], ["all 2/2", "rate 0.1"]]


def test_recalibrated_batch_norm_has_the_datas_statistics_and_keeps_them() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(name="low"),
            keras.layers.Dense(6, name="body"),
            keras.layers.BatchNormalization(name="high"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    for name in ("low", "high"):
        model.get_layer(name).moving_mean.assign(np.full(model.get_layer(name).moving_mean.shape, 7.0))
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(64, 4)).astype("float32")
    y = np.arange(64) % 3
    top = tk.FineTuner().phase("top", train=tk.Layers.above("low"), epochs=3).batch_norm("recalibrate").cache(False)
    assert "statistics recalibrated" in str(top.describe(model))
    start = model.get_layer("body").get_weights()
    low = [np.array(weight) for weight in model.get_layer("low").weights]
    top.fit(model, (x, y), batch_size=64, seed=0, verbose=0)
    for weight, before in zip(model.get_layer("low").weights, low, strict=True):
        np.testing.assert_array_equal(weight, before)  # frozen: not recalibrated either
    gamma, beta, mean, variance = low
    inputs = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
    reached = inputs @ start[0] + start[1]
    high = model.get_layer("high")
    np.testing.assert_allclose(high.moving_mean, reached.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(high.moving_variance, reached.var(0), rtol=1e-3)
    np.testing.assert_array_equal(high.gamma, np.ones(6))
