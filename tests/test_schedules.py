"""Schedules against independent formulas, as values, and counted from the phase's first step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transferkit._keras import keras
from transferkit.errors import PlanError
from transferkit.tuning.schedules import PhaseSchedule, Schedule, Since, bit_hyper_rule

EVERY = (
    Schedule.constant(warmup=0.2),
    Schedule.cosine(),
    Schedule.cosine(warmup=0.0, final=0.1),
    Schedule.linear(warmup=0.25),
    Schedule.one_cycle(),
    Schedule.bit(warmup=0.1),
)


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_keras_schedule_is_the_curve(schedule: Schedule, steps: int) -> None:
    keras_schedule = schedule.learning_rate(0.3, steps=steps, start=50)
    given = [float(keras_schedule(50 + step)) for step in range(steps)]
    np.testing.assert_allclose(given, schedule.curve(0.3, steps=steps), rtol=1e-5, atol=1e-7)


def test_cosine_without_warm_up_is_keras_own() -> None:
    keras_own = keras.optimizers.schedules.CosineDecay(0.3, 40, alpha=0.1)
    expected = [float(keras_own(step)) for step in range(40)]
    np.testing.assert_allclose(Schedule.cosine(warmup=0.0, final=0.1).curve(0.3, steps=40), expected, rtol=1e-5)


def test_bit_divides_by_ten_at_30_60_and_90_per_cent() -> None:
    keras_own = keras.optimizers.schedules.PiecewiseConstantDecay([29, 59, 89], [1.0, 0.1, 0.01, 0.001])
    expected = [float(keras_own(step)) for step in range(100)]
    np.testing.assert_allclose(Schedule.bit().curve(1.0, steps=100), expected, rtol=1e-6)


def test_one_cycle_rises_from_a_25th_and_falls_to_almost_nothing() -> None:
    curve = Schedule.one_cycle().curve(1.0, steps=100)
    assert curve[0] == pytest.approx(1 / 25)
    assert max(curve) == curve[25] == 1.0
    assert curve[10] == pytest.approx(1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * 10 / 25)) / 2)
    assert curve[-1] < 1e-3
    assert all(np.diff(curve[:26]) > 0)
    assert all(np.diff(curve[25:]) < 0)


def test_warm_up_takes_a_first_step_and_ends_at_the_rate() -> None:
    np.testing.assert_allclose(Schedule.constant(warmup=0.4).curve(1.0, steps=10), [0.25, 0.5, 0.75] + [1.0] * 7)


def test_a_rate_that_callbacks_may_set_stays_a_number() -> None:
    assert Schedule.constant().learning_rate(0.1, steps=10) == 0.1
    assert Schedule.plateau().learning_rate(0.1, steps=10) == 0.1
    (callback,) = Schedule.plateau(factor=0.5, patience=1, monitor="val_accuracy").callbacks()
    assert (callback.factor, callback.patience, callback.monitor, callback.mode) == (0.5, 1, "val_accuracy", "max")


def test_schedules_are_values() -> None:
    assert Schedule.cosine() == Schedule.of("cosine") != Schedule.cosine(warmup=0.2)
    assert hash(Schedule.cosine()) == hash(Schedule.of("cosine"))
    assert repr(Schedule.cosine(warmup=0.2)) == "Schedule.cosine(warmup=0.2)"
    for schedule in (*EVERY, Schedule.plateau(patience=7)):
        assert Schedule.from_json_value(schedule.to_json_value(), custom_objects={}) == schedule


def test_wrong_settings_are_one_error() -> None:
    with pytest.raises(PlanError) as caught:
        Schedule.cosine(warmup=1.5, final=-1)
    assert str(caught.value) == (
        "Planning the schedule 'cosine'.\n"
        "  found 2 problems:\n"
        "    - warmup=1.5; it must be a share, from 0 to below 1\n"
        "    - final=-1; it must be a share, from 0 to 1"
    )
    with pytest.raises(PlanError) as caught:
        Schedule.of("cosin")
    assert str(caught.value) == (
        "Choosing a schedule of the learning rate.\n"
        "  found: no schedule named 'cosin' (did you mean 'cosine'?)\n"
        "  to fix it: one of 'constant', 'cosine', 'linear', 'one_cycle', 'bit', 'plateau'"
    )


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule.one_cycle().learning_rate(0.1, steps=30, start=4),
        Since(keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5), start=4),
    ],
    ids=["ours", "the user's"],
)
def test_a_model_with_a_schedule_is_saved_and_reloaded(schedule: Any, tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(schedule), "mse")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [float(again.optimizer._learning_rate(step)) for step in range(4, 20)] == [
        float(schedule(step)) for step in range(4, 20)
    ]


def test_a_schedule_of_the_users_counts_from_the_phase() -> None:
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    assert float(Since(decay, start=7)(12)) == float(decay(5)) == pytest.approx(0.05)
    assert isinstance(Schedule.bit().learning_rate(1.0, steps=3), PhaseSchedule)


@pytest.mark.parametrize(
    ("examples", "size", "expected"),
    [
        (19_999, (32, 32), (500, 0.0, 160, 128)),
        (20_000, (96, 96), (10_000, 0.1, 512, 480)),
        (499_999, (95, 96), (10_000, 0.1, 160, 128)),
        (500_000, (300, 200), (20_000, 0.1, 512, 480)),
    ],
)
def test_bit_hyper_rule_is_the_papers(examples: int, size: tuple[int, int], expected: tuple[Any, ...]) -> None:
    rule = bit_hyper_rule(examples, image_size=size)
    assert (rule.steps, rule.mixup, rule.resize, rule.crop) == expected
    assert rule.epochs(examples, batch_size=512) == max(1, round(rule.steps / math.ceil(examples / 512)))
