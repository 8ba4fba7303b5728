"""Averages of weights against NumPy: EMA, SWA, WiSE-FT, soups, and BatchNorm's statistics after them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transferkit._keras import keras, tf
from transferkit.errors import ModelError
from transferkit.tuning.averaging import (
    AverageWeights,
    StochasticWeightAverage,
    greedy_soup,
    recalibrate_batch_norm,
    wise_ft,
)
from transferkit.tuning.optimizer_state import carry_over, swap_averages
from transferkit.tuning.optimizers import with_multipliers

Array = Any
X = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
Y = X @ np.array([[1.0], [-2.0], [0.5]], "float32")


def model_of(*layers: Any) -> Any:
    keras.utils.set_random_seed(4)
    return keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1, name="out")])


class Trace(keras.callbacks.Callback):
    """The weights after every step, and those that validation and epoch ends see."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[Array]] = []
        self.validated: list[list[Array]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.steps.append(self.model.get_weights())

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.validated.append(self.model.get_weights())


def close(a: list[Array], b: list[Array]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_the_moving_average_is_numpys_and_is_what_validation_sees_and_the_phase_leaves() -> None:
    model = model_of()
    average = model.get_weights()
    optimizer = with_multipliers(keras.optimizers.SGD(0.1), model.trainable_variables, average=0.8)
    model.compile(optimizer, "mse", jit_compile=False)
    trace = Trace()
    settings = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}
    model.fit(X, Y, **settings, validation_data=(X, Y), validation_batch_size=32, callbacks=[AverageWeights(), trace])
    assert len(trace.validated) == 3
    after_epoch = []
    for step, weights in enumerate(trace.steps):
        momentum = min(0.8, (1 + step) / (10 + step))
        average = [momentum * mean + (1 - momentum) * weight for mean, weight in zip(average, weights, strict=True)]
        if step % 4 == 3:
            after_epoch.append(average)
    for seen, expected in zip(trace.validated, after_epoch, strict=True):
        close(seen, expected)
    close(model.get_weights(), average)
    plain = model_of()
    plain.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    plain.fit(X, Y, **settings)
    close(trace.steps[-1], plain.get_weights())


def test_an_average_begins_anew_in_the_next_phase() -> None:
    variable = keras.Variable([0.0])
    first = with_multipliers(keras.optimizers.SGD(1.0), [variable], average=0.5)
    first.apply([tf.constant([-4.0])], [variable])
    swap_averages(first)
    assert float(variable[0]) == pytest.approx(3.6)  # momentum 1/10 in the first step
    second = with_multipliers(keras.optimizers.SGD(1.0), [variable], average=0.5)
    carry_over(first, second)
    swap_averages(second)
    assert float(variable[0]) == pytest.approx(3.6)


def test_swa_is_the_mean_of_the_last_epochs() -> None:
    model = model_of()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    trace = Trace()
    model.fit(X, Y, batch_size=8, epochs=5, shuffle=False, verbose=0, callbacks=[trace, StochasticWeightAverage(2)])
    ends = [trace.steps[4 * epoch + 3] for epoch in (2, 3, 4)]
    close(model.get_weights(), [np.mean(arrays, axis=0) for arrays in zip(*ends, strict=True)])


def test_recalibration_gives_the_statistics_of_the_data_and_changes_nothing_else() -> None:
    model = model_of(keras.layers.Dense(4, name="a"), keras.layers.Dropout(0.5), keras.layers.BatchNormalization(name="norm"))
    model.get_layer("norm").momentum = 0.99
    frozen_model = model_of(keras.layers.BatchNormalization(trainable=False))
    inputs = X @ model.get_layer("a").kernel.numpy()
    model.layers[1].rate = 0.0
    before = {v.path: v.numpy() for v in model.variables}
    assert recalibrate_batch_norm(model, (X, Y), batch_size=16) == 1
    halves = inputs.reshape(2, 16, 4)
    np.testing.assert_allclose(model.get_layer("norm").moving_mean.numpy(), halves.mean(1).mean(0), atol=1e-6)
    np.testing.assert_allclose(model.get_layer("norm").moving_variance.numpy(), halves.var(1).mean(0), atol=1e-6)
    assert model.get_layer("norm").momentum == 0.99
    for variable in model.variables:
        if "moving" not in variable.path:
            assert np.array_equal(before[variable.path], variable.numpy())
    assert recalibrate_batch_norm(frozen_model, (X, Y)) == 0


def distance_to(target: float) -> Any:
    return lambda model: -abs(float(model.get_weights()[1][0]) - target)


def set_bias(model: Any, value: float) -> list[Array]:
    kernel, _ = model.get_weights()
    model.set_weights([kernel, np.array([value], "float32")])
    weights: list[Array] = model.get_weights()
    return weights


def test_wise_ft_sweeps_between_before_and_after() -> None:
    model = model_of()
    before = set_bias(model, 0.0)
    set_bias(model, 10.0)
    found = wise_ft(model, before, distance_to(3.0))
    assert found.best == 0.3
    assert len(found.scores) == 11
    assert float(model.get_weights()[1][0]) == pytest.approx(3.0)
    (shown,) = [line for line in str(found).splitlines() if "← the model now" in line]
    assert shown.split()[0] == "0.3"


def test_wise_ft_keeps_the_ends_exactly_and_the_model_when_the_score_fails() -> None:
    model = model_of()
    before = set_bias(model, 0.1)
    after = set_bias(model, 0.7)
    assert wise_ft(model, before, lambda _: 1.0).best == 1.0, "ties go to the fine-tuned weights"
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), after, strict=True))
    with pytest.raises(ZeroDivisionError):
        wise_ft(model, before, lambda _: 1 / 0)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), after, strict=True))


def test_a_greedy_soup_takes_what_helps() -> None:
    model = model_of()
    ingredients = [set_bias(model, value) for value in (1.0, 4.0, 100.0, 2.5)]
    soup = greedy_soup(model, ingredients, distance_to(2.0))
    assert soup.chosen == (3, 0)  # 2.5 and 1 make 1.75; with 4 they would make 2.5 again
    assert soup.score == pytest.approx(-0.25)


def test_weights_of_another_model_are_an_error() -> None:
    model, other = model_of(), model_of(keras.layers.Dense(2))
    with pytest.raises(ModelError) as caught:
        wise_ft(model, other.get_weights(), lambda _: 0.0)
    assert str(caught.value) == (
        "Interpolating with the weights before fine-tuning.\n"
        "  found: weights: 4 arrays for 2, the first that differs (3, 2) for (3, 1)\n"
        "  to fix it: take them with model.get_weights() from a copy of this model"
    )
