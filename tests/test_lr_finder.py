"""The finders: a sensible suggestion, a valley where there is one, and a model left exactly as it was."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit import errors
from transferkit.tuning.lr_finder import LearningRates, _valley, find_batch_size, find_learning_rate

Array = Any


def problem(rows: int = 128) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    y = random.integers(0, 3, rows)
    return (random.normal(size=(rows, 6)) + 2 * y[:, None]).astype("float32"), y


def network() -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="a"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.get_layer("a").trainable = False
    return model


def test_the_suggestion_is_a_rate_that_trains_and_far_from_those_that_do_not() -> None:
    found = find_learning_rate(network(), problem(), tuner=tk.FineTuner().optimizer("sgd"), lowest=1e-5, highest=100, steps=60)
    assert 3e-3 < found.suggestion < 3
    assert len(found.rates) == len(found.losses)
    assert found.losses[-1] > 1.2 * min(found.losses), "it went on until the loss rose"
    assert f"Suggestion: {found.suggestion:.2g}" in str(found)


def test_the_valley_is_two_thirds_into_the_longest_fall() -> None:
    losses = [5.0, 5.1, 4.0, 3.9, 3.5, 3.0, 2.0, 2.5, 9.0]
    rates = np.arange(9.0)
    assert _valley(rates, losses) == 4.0  # the fall 5.1 … 2.0 runs from 1 to 6 (the first of equals), two thirds in is 4


def test_the_model_is_left_exactly_as_it_was() -> None:
    model = network()
    x, y = problem()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(x, y, verbose=0)
    optimizer, loss = model.optimizer, model.loss
    before = [variable.numpy() for variable in [*model.variables, *optimizer.variables, *model.metrics_variables]]
    flags = [layer.trainable for layer in model.layers]
    history = model.history
    find_learning_rate(model, (x, y), steps=20)
    find_batch_size(model, (x, y), largest=4)
    with pytest.raises(errors.DataError):
        find_learning_rate(model, (x * np.float32("inf"), y), steps=20)
    assert model.optimizer is optimizer
    assert model.loss is loss
    assert model.history is history
    assert [layer.trainable for layer in model.layers] == flags
    after = [variable.numpy() for variable in [*model.variables, *optimizer.variables, *model.metrics_variables]]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    twin = network()
    twin.set_weights(model.get_weights())
    assert model.fit(x, y, verbose=0).history["loss"][0] < 10


def test_a_loss_that_is_a_function_is_the_mean_over_rows_as_in_fit() -> None:
    def squared(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.square(keras.ops.one_hot(keras.ops.cast(y_true, "int32"), 3) - y_pred), axis=-1)

    x, y = problem()
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    found = find_learning_rate(model, (x, y), tuner=tk.FineTuner().loss(squared), steps=10, batch_size=len(x))
    model.compile(loss=squared)
    assert found.losses[0] == pytest.approx(model.evaluate(x, y, batch_size=len(x), verbose=0), rel=1e-3)


def test_a_phase_of_the_plan_is_tried_with_what_it_freezes() -> None:
    tuner = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1).phase("all", train=tk.Layers.all(), epochs=1)
    assert find_learning_rate(network(), problem(), tuner=tuner, steps=10).phase == "head"
    assert find_learning_rate(network(), problem(), tuner=tuner, phase="all", steps=10).phase == "all"
    with pytest.raises(errors.PlanError, match="found: the phases 'head', 'all'"):
        find_learning_rate(network(), problem(), tuner=tuner, phase="al", steps=10)


def test_the_batch_grows_until_the_limit() -> None:
    found = find_batch_size(network(), problem(8), limit=2**33, largest=16)
    assert [size for size, _ in found.bytes_by_size] == [1, 2, 4, 8, 16]
    assert found.best == 16
    big = keras.Sequential([keras.Input((6,)), keras.layers.Dense(400_000), keras.layers.Dense(3)])
    # Far above the first step's own (weights, gradients, the traced step), far below the 6 GiB that 4,096 rows take.
    limited = find_batch_size(big, problem(8), limit=2**28, largest=4096)
    assert limited.best < 4096


def test_a_planned_rate_far_from_the_suggestion_is_told() -> None:
    def found(planned: float | None) -> LearningRates:
        return LearningRates((1e-4, 1e-3), (2.0, 1.0), suggestion=1e-3, steepest=5e-4, phase="all", planned=planned)

    assert found(0.1).warning == "The plan's rate of 0.1 is 1e+02 times the suggestion: it may diverge."
    assert found(1e-5).warning == "The plan's rate of 1e-05 is 1e+02 times less than suggested: it may hardly move."
    assert found(0.1).warning in str(found(0.1))
    assert [found(rate).warning for rate in (None, 1e-3, 4e-3, 3e-4)] == [""] * 4
