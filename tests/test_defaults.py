"""The default plan fits the model and the data, and explains itself."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk


def model(layers: int) -> Any:
    keras.utils.set_random_seed(0)
    body = [keras.layers.Dense(8, "relu", name=f"block_{index}") for index in range(layers)]
    return keras.Sequential([keras.Input((4,)), *body, keras.layers.Dense(3, name="head")])


def data(rows: int) -> Any:
    random = np.random.default_rng(0)
    y = random.integers(0, 3, rows)
    return (random.normal(size=(rows, 4)) + 2 * y[:, None]).astype("float32"), y


@pytest.mark.parametrize(("rows", "epochs"), [(60, (40, 27)), (4_800, (5, 7)), (100_000, (5, 4))])
def test_small_data_is_gone_over_more_often(rows: int, epochs: tuple[int, int]) -> None:
    plan = tk.FineTuner.default(model(2), (np.zeros((rows, 4), "float32"), np.zeros(rows, int)))
    assert tuple(phase.epochs for phase in plan.phases()) == epochs


def test_rows_that_fit_would_refuse_get_no_plan() -> None:
    x, y = data(60)
    x[7, 2] = np.nan
    with pytest.raises(tk.errors.DataError, match="1 values that are NaN or infinite, the first in row 7"):
        tk.FineTuner.default(model(2), (x, y))
    with pytest.raises(tk.errors.DataError, match=r"rows of shape \(3,\), where the model takes \(4,\)"):
        tk.FineTuner.default(model(2), (x[:, :3], y))


def test_where_features_cannot_be_kept_the_head_has_a_third() -> None:
    batches = tf.data.Dataset.from_tensor_slices((np.zeros((320, 4), "float32"), np.zeros(320, int))).batch(32)
    plan = tk.FineTuner.default(model(2), batches, epochs=12)
    assert [(phase.epochs, phase.learning_rate) for phase in plan.phases()] == [(4, 1e-3), (8, 2e-3)]


def test_where_a_random_layer_comes_first_the_head_has_a_third() -> None:
    flat = [keras.layers.Flatten(), *model(2).layers]
    network = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.RandomFlip(), *flat])
    x, y = data(60)
    plan = tk.FineTuner.default(network, (x.reshape(-1, 2, 2, 1), y), epochs=12)
    assert [phase.epochs for phase in plan.phases()] == [4, 8]


def test_a_step_moves_the_heads_outputs_alike_whatever_the_features_size() -> None:
    network = model(2)
    x, y = data(60)
    features = keras.Model(network.inputs[0], network.layers[-1].input)(x).numpy()
    rate = tk.FineTuner.default(network, (x, y)).phases()[0].learning_rate
    assert rate is not None
    assert rate == pytest.approx(min(1e-2, 0.1 / np.abs(features).sum(1).mean()), rel=0.5)
    larger = tk.FineTuner.default(network, (100 * x, y)).phases()[0].learning_rate
    assert larger is not None
    assert 3e-4 <= larger < rate / 5


def test_deep_networks_train_at_a_lower_rate() -> None:
    rates = [tk.FineTuner.default(model(depth), data(60)).phases()[1].learning_rate for depth in (1, 3, 20)]
    assert rates == [3e-3, 1e-3, 3e-4]


def test_the_head_comes_first_and_the_plan_learns() -> None:
    network = model(2)
    plan = tk.FineTuner.default(network, data(96), epochs=30)
    assert [(phase.name, phase.epochs) for phase in plan.phases()] == [("head", 40), ("all", 20)]
    run = plan.fit(network, data(96), batch_size=8, seed=0, verbose=0)
    losses = run.history["loss"]
    assert losses[59] < losses[39] < losses[0], "each phase helps"


def test_a_model_that_is_all_head_has_one_phase() -> None:
    assert [phase.name for phase in tk.FineTuner.default(model(0), data(60)).phases()] == ["all"]


def test_every_step_is_explained() -> None:
    plan = (
        tk.FineTuner.default(model(2), data(60), epochs=3)
        .rate(tk.Layers.head(), times=2.0)
        .optimizer("adamw")
        .loss("sparse_categorical_crossentropy")
        .metrics("accuracy")
        .early_stopping(2)
        .batch_norm("adapt")
        .weight_decay(0.01)
        .l2_sp(0.1)
        .label_smoothing(0.1)
        .mixup()
        .ema()
    )
    text = str(plan.explain())
    for words in (
        "trains Layers.head() for 40 epochs at a learning rate of",
        "first the head alone, so that a random one doesn't tear the loaded weights (LP-FT, Kumar et al. 2022)",
        "each block below the head at 0.8 × the rate of the one above it",
        "multiplies the rate of Layers.head() by 2.0",
        "holds weights to the loaded ones with strength 0.1, the head's to zero with 0.01 (Li et al. 2018)",
        "gives 10% of each label's weight to all classes alike",
        "blends pairs of rows and labels, λ ~ Beta(0.2, 0.2)",
    ):
        assert words in text, text
    assert len(plan.explain().rows) >= len(repr(plan).split(")."))
