"""Selectors against models of every nesting."""

from __future__ import annotations

from typing import Any

import keras
import pytest

import transferkit as tk
from transferkit import errors


def nested() -> Any:
    inner = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="block_1_a"),
            keras.layers.BatchNormalization(name="block_1_bn"),
            keras.layers.Dense(4, name="block_2_a"),
        ],
        name="base",
    )
    return tk.ModelBuilder((6,)).backbone(inner).dropout(0.1).dense(3, name="mid").classifier(2).build()


ALL = ["input", "base/block_1_a", "base/block_1_bn", "base/block_2_a", "dropout", "mid", "head"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (tk.Layers.all(), ALL),
        (tk.Layers.none(), []),
        (tk.Layers.head(), ["head"]),
        (tk.Layers.last(2), ["mid", "head"]),
        (tk.Layers.first(1), ["base/block_1_a"]),
        (tk.Layers.named("block_1*"), ["base/block_1_a", "base/block_1_bn"]),
        (tk.Layers.named("base"), ALL[1:4]),
        (tk.Layers.named("base/block_2_a", "mid"), ["base/block_2_a", "mid"]),
        (tk.Layers.of(keras.layers.BatchNormalization), ["base/block_1_bn"]),
        (tk.Layers.above("block_1_bn"), ALL[3:]),
        (tk.Layers.above("base"), ALL[4:]),
        (tk.Layers.below("block_1_bn"), ALL[:2]),
        (tk.Layers.named("base") - tk.Layers.of(keras.layers.BatchNormalization), ["base/block_1_a", "base/block_2_a"]),
        (tk.Layers.head() | tk.Layers.named("block_2*"), ["base/block_2_a", "head"]),
        (tk.Layers.above("block_1_a") & tk.Layers.of(keras.layers.Dense), ["base/block_2_a", "mid", "head"]),
    ],
    ids=repr,
)
def test_selection(selector: tk.Layers, expected: list[str]) -> None:
    assert selector.resolve(nested()) == expected
    assert tk.Layers.from_json_value(selector.to_json_value(), custom_objects={}) == selector


def test_a_pattern_that_selects_nothing_is_an_error_with_near_names() -> None:
    with pytest.raises(errors.ModelError) as caught:
        tk.Layers.named("blok_1_a", "mid").resolve(nested())
    assert str(caught.value) == (
        "Selecting Layers.named('blok_1_a', 'mid') in the model 'model'.\n"
        "  found: no layer matches 'blok_1_a' (did you mean 'block_1_a' or 'block_2_a' or 'block_1_bn'?)\n"
        "  to fix it: the layers are 'input', 'base/block_1_a', 'base/block_1_bn', 'base/block_2_a', 'dropout', 'mid', 'head'"
    )
    with pytest.raises(errors.ModelError) as caught:
        tk.Layers.of(keras.layers.Conv2D).resolve(nested())
    assert "found: no such layer in it" in str(caught.value)


def test_a_shared_layer_stands_once() -> None:
    shared = keras.layers.Dense(4, name="shared")
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    model = keras.Model([a, b], keras.layers.Add(name="sum")([shared(a), shared(b)]))
    assert tk.Layers.named("shared").resolve(model) == ["shared"]
    assert tk.Layers.head().resolve(model) == ["shared"]


@pytest.mark.parametrize("make", [lambda: tk.Layers.last(0), lambda: tk.Layers.named(), lambda: tk.Layers.of("Dense")])  # type: ignore[arg-type]
def test_selectors_refuse_what_they_cannot_hold(make: Any) -> None:
    with pytest.raises(errors.PlanError):
        make()
