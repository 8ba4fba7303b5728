"""Plans are frozen values: equality, hash, the chain as repr, JSON there and back."""

from __future__ import annotations

import json
import pickle
from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit import errors
from transferkit._plan import FrozenMapping, freeze

PLANS = [
    tk.ModelBuilder((784,)).dense(128, "relu").dense(64, activation="relu").classifier(10),
    tk.ModelBuilder({"a": (3,), "b": (4,)}).dense(2, name="left").at("b").merge("concatenate", "left").regression(2),
    tk.ModelBuilder((8, 8, 3)).augment(keras.layers.RandomFlip("horizontal")).layer(keras.layers.Conv2D(3, 3)).pool(),
    tk.ModelBuilder((4,))
    .dense(2, kernel_initializer=keras.initializers.HeNormal(seed=3), use_bias=False)
    .multi_label(["x", "y"]),
    tk.FineTuner(),
    tk.FineTuner()
    .phase("head", train=tk.Layers.head(), epochs=3)
    .phase("all", train=tk.Layers.all(), epochs=5, learning_rate=1e-4),
    tk.FineTuner().phase("some", train=tk.Layers.named("a*") | (tk.Layers.last(2) - tk.Layers.of(keras.layers.Dense)), epochs=1),
    tk.FineTuner()
    .optimizer(keras.optimizers.SGD(0.1, momentum=0.9))
    .loss("mse")
    .metrics("mae")
    .early_stopping(2)
    .batch_norm("adapt"),
    tk.FineTuner().loss({"a": "mse", "b": keras.losses.Huber()}, weights={"a": 1.0, "b": 0.5}),
]


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_json_there_and_back_gives_an_equal_plan(plan: Any) -> None:
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert repr(again) == repr(plan)
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize("plan", PLANS[4:6], ids=repr)
def test_pickle_gives_an_equal_plan(plan: Any) -> None:
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_repr_is_the_chain_and_evaluates_to_the_plan() -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3, learning_rate=1e-3).batch_norm("adapt")
    assert repr(plan) == "FineTuner().phase('head', train=Layers.head(), epochs=3, learning_rate=0.001).batch_norm('adapt')"
    assert eval(repr(plan), {"FineTuner": tk.FineTuner, "Layers": tk.Layers}) == plan


def test_branching_a_plan_never_changes_the_first() -> None:
    base = tk.ModelBuilder((4,)).dense(3)
    before = base.to_json()
    left, right = base.classifier(2), base.regression()
    assert left != right
    assert base.to_json() == before
    assert base.build().output_shape == (None, 3)


def test_plans_cannot_be_assigned_to() -> None:
    plan = tk.FineTuner()
    with pytest.raises(AttributeError) as caught:
        plan._steps = ()
    assert str(caught.value) == "FineTuner is a frozen value; its methods give a new one"


def test_a_default_written_out_is_the_same_plan() -> None:
    assert tk.ModelBuilder((4,)).pool("avg") == tk.ModelBuilder((4,)).pool()
    three: Any = np.int64(3)
    assert tk.ModelBuilder([4]).dense(three) == tk.ModelBuilder((4,)).dense(units=3)


def test_an_array_has_no_place_in_a_plan() -> None:
    with pytest.raises(errors.PlanError) as caught:
        freeze(np.zeros(3))
    assert str(caught.value) == (
        "Keeping a value in a plan.\n"
        "  found: a ndarray, which has no place in a plan\n"
        "  likely cause: a plan holds settings, to be compared, printed and replayed; "
        "arrays, models and devices go to the verbs\n"
        "  to fix it: give a number, a string, a list or dict of these, or another plan"
    )


def test_frozen_mappings_compare_without_order() -> None:
    left, right = FrozenMapping({"a": 1, "b": [2]}), FrozenMapping({"b": [2], "a": 1})
    assert left == right
    assert hash(left) == hash(right)
    assert len({left, right}) == 1


def test_functions_go_to_json_by_name_and_come_back_only_from_the_user() -> None:
    def double(x: Any) -> Any:
        return 2 * x

    plan = tk.ModelBuilder((4,)).dense(3, double)
    assert tk.ModelBuilder.from_json(plan.to_json(), custom_objects={"double": double}) == plan
    with pytest.raises(errors.PlanError) as caught:
        tk.ModelBuilder.from_json(plan.to_json())
    assert str(caught.value) == (
        "Reading a plan from JSON.\n"
        "  found: the function 'double', which only its author has\n"
        "  to fix it: from_json(text, custom_objects={'double': the_function})"
    )


class Scale(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
    """A custom layer that Keras doesn't know."""

    def __init__(self, by: float, **options: Any) -> None:
        super().__init__(**options)
        self.by = by

    def call(self, x: Any) -> Any:
        return x * self.by

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "by": self.by}


def test_custom_layers_are_asked_for_by_name() -> None:
    plan = tk.ModelBuilder((4,)).layer(Scale(2.0))
    assert tk.ModelBuilder.from_json(plan.to_json(), custom_objects={"Scale": Scale}).build().layers[-1].by == 2.0
    with pytest.raises(errors.PlanError) as caught:
        tk.ModelBuilder.from_json(plan.to_json())
    assert "found: the custom object 'Scale', which only its author has" in str(caught.value)


def test_a_text_can_only_call_the_steps_of_a_plan() -> None:
    content = json.loads(tk.FineTuner().to_json())
    content["value"].append(["fit", [], {}])
    with pytest.raises(errors.PlanError) as caught:
        tk.FineTuner.from_json(json.dumps(content))
    assert str(caught.value) == (
        "Reading a FineTuner from JSON.\n"
        "  found: an unknown step 'fit'\n"
        "  likely cause: the text was written by another version of transferkit, or by hand"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "text that is no JSON"),
        ("[]", "format version None; this version of transferkit reads 1"),
        ('{"transferkit": 99}', "format version 99; this version of transferkit reads 1"),
        (tk.ModelBuilder((3,)).to_json(), "a 'ModelBuilder'"),
    ],
)
def test_texts_that_are_no_plan_are_told_apart(text: str, found: str) -> None:
    with pytest.raises(errors.PlanError) as caught:
        tk.FineTuner.from_json(text)
    assert found in str(caught.value)


def test_errors_survive_pickling() -> None:
    error = errors.MatchError("Loading.", found=["a", "b"], cause="c", fix="d")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.MatchError
    assert str(again) == str(error) == "Loading.\n  found 2 problems:\n    - a\n    - b\n  likely cause: c\n  to fix it: d"


def test_an_object_that_keras_cannot_make_again_is_refused() -> None:
    class Bare(keras.metrics.Mean):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__(name="bare")

    with pytest.raises(errors.PlanError, match=r"(?s)Taking a Bare into a plan.*unexpected keyword argument.*take \*\*kwargs"):
        tk.FineTuner().metrics(Bare())
