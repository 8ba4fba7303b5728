"""Loading Keras's own files into Keras models, with plain Keras as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from transferkit.errors import MatchError, ModelError, PlanError, WeightsFileError
from transferkit.weights.loader import WeightLoader


def mlp(*units: int, inputs: int = 12, head: str | None = None) -> Any:
    start = keras.Input((inputs,))
    x = start
    for n in units[:-1]:
        x = layers.Dense(n, "relu")(x)
    return keras.Model(start, layers.Dense(units[-1], name=head)(x), name="net")


def values(model: Any) -> list[np.ndarray[Any, Any]]:
    return [np.array(v) for v in model.weights]


def same(one: list[np.ndarray[Any, Any]], other: list[np.ndarray[Any, Any]]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("file", ["w.h5", "w.weights.h5", "w.keras"])
def test_what_keras_wrote_arrives_to_the_bit(tmp_path: Path, file: str) -> None:
    saved = mlp(8, 6, 3)
    path = tmp_path / file
    (saved.save_weights if file == "w.weights.h5" else saved.save)(path)
    model = mlp(8, 6, 3, head="head")
    plan = WeightLoader(path)
    dry = plan.match(model)
    assert dry.ok
    assert not same(values(model), values(saved))
    report = plan.load(model)
    assert report == dry
    assert report.applied
    assert not dry.applied
    assert same(values(model), values(saved))
    assert report.coverage == 1
    assert report.verify(model).ok
    model.layers[-1].bias.assign(np.ones(3))
    assert report.verify(model).changed == ("head/bias",)


def test_ten_classes_into_five_and_one_more_layer(tmp_path: Path) -> None:
    path = str(tmp_path / "pretrained_model.h5")
    mlp(8, 6, 10).save(path)
    keras.utils.clear_session()
    model = mlp(8, 6, 4, 5, head="head")
    before = values(model)
    report = WeightLoader(path).match(model)
    assert not report.ok
    assert [t.name for t in report.loaded] == ["dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias"]
    assert [t.name for t in report.missing] == ["dense_2/kernel", "dense_2/bias", "head/kernel", "head/bias"]
    with pytest.raises(MatchError) as caught:
        WeightLoader(path).load(model)
    assert str(caught.value) == (
        f"Loading {path!r} into the model 'net'.\n"
        "  found 3 problems:\n"
        "    - nothing for the model's 'dense_2' (kernel, bias): no layer of the file fits\n"
        "    - nothing for the model's 'head' (kernel, bias): no layer of the file fits\n"
        "    - no use for the file's 'dense_2' (kernel, bias): no layer of the model fits\n"
        "  likely cause: the model has other layers, or other names, than the one that was saved\n"
        '  to fix it: add the rules that say what you mean: .skip("dense_2/*", "head/*", of="model"); '
        '.skip("dense_2/*", of="file")'
    )
    assert same(values(model), before)
    plan = WeightLoader(path).skip("dense_2/*", "head/*", of="model").skip("dense_2/*", of="file")
    report = plan.load(model)
    assert [t.status for t in report.tensors] == ["loaded"] * 4 + ["skipped"] * 4
    assert same(values(model)[4:], before[4:])
    assert not same(values(model)[:4], before[:4])


def test_the_plan_is_a_value() -> None:
    plan = WeightLoader("a.h5").only("backbone/*").rename("^x", "y").map({"a": "b"}).min_coverage(0.5).by_order()
    assert repr(plan) == (
        "WeightLoader('a.h5').only('backbone/*').rename('^x', 'y').map({'a': 'b'}).min_coverage(0.5).by_order()"
    )
    assert WeightLoader.from_json(plan.to_json()) == plan
    assert plan.skip("c") != plan


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: WeightLoader(""),
        lambda: WeightLoader("a").skip(),
        lambda: WeightLoader("a").skip("x", of="it"),
        lambda: WeightLoader("a").rename("(", ""),
        lambda: WeightLoader("a").min_coverage(2),
        lambda: WeightLoader("a").allow("all"),
        lambda: WeightLoader("a").sha256("12"),
    ],
)
def test_a_plan_refuses_what_it_cant_hold(wrong: Any) -> None:
    with pytest.raises(PlanError):
        wrong()


def test_the_report_reads_and_serialises(tmp_path: Path) -> None:
    mlp(4, 2).save(tmp_path / "w.h5")
    report = WeightLoader(tmp_path / "w.h5").match(mlp(4, 2))
    assert "2 of 2 layers, 62 of 62 parameters (100.0%)." in str(report)
    assert "<table>" in report._repr_html_()
    assert json.loads(report.to_json())["coverage"] == 1.0
    assert report.layers == dict.fromkeys(report.layers, 1.0)


def test_a_model_that_isnt_built_or_is_none_at_all(tmp_path: Path) -> None:
    mlp(4, 2).save(tmp_path / "w.h5")
    with pytest.raises(ModelError, match="call it once on data before loading"):
        WeightLoader(tmp_path / "w.h5").match(keras.Sequential([layers.Dense(4), layers.Dense(2)]))
    with pytest.raises(ModelError, match="not a Keras model"):
        WeightLoader(tmp_path / "w.h5").match("model")


def test_a_wrong_file_is_told_as_such(tmp_path: Path) -> None:
    other = keras.Sequential(
        [keras.Input((6, 6, 3)), layers.Conv2D(4, 3, name="stem"), layers.Flatten(), layers.Dense(2, name="out")]
    )
    other.save_weights(tmp_path / "other.weights.h5")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="hidden"), layers.Dense(5, name="head")])
    with pytest.raises(MatchError) as raised:
        WeightLoader(tmp_path / "other.weights.h5").load(model)
    assert "likely cause: nothing in the file fits any layer of the model: it is most likely the file of another model" in str(
        raised.value
    )
    (tmp_path / "model.json").write_text(model.to_json())
    with pytest.raises(WeightsFileError) as said:
        WeightLoader(tmp_path / "model.json").load(model)
    assert str(said.value) == (
        f"Reading weights from {str(tmp_path / 'model.json')!r}.\n"
        "  found: the configuration of a Keras model as JSON, which holds no weights\n"
        "  likely cause: model.to_json() keeps the architecture alone; the weights are in a file of their own\n"
        "  to fix it: give the weights file; open_model(weights, config=this_file) makes a model of the two"
    )


def test_rules_that_load_something_are_told_apart_from_those_that_leave_it_out(tmp_path: Path) -> None:
    start = keras.Input((3,))
    saved, other = (keras.Model(start, keras.layers.Dense(2, name=name)(start)) for name in ("old_top", "new_top"))
    saved.save(tmp_path / "w.h5")
    with pytest.raises(MatchError) as caught:
        WeightLoader(tmp_path / "w.h5").load(other)
    assert str(caught.value).endswith(
        '  to fix it: add .map({"new_top": "old_top"}); .by_order() to load what differs in name or order alone, or '
        '.skip("new_top/*", of="model"); .skip("old_top/*", of="file") to leave it out'
    )
