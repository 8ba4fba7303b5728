"""Pairs of Keras models, the one saved and the other changed: no variable ever takes another layer's values without an error.

Every layer has the same shapes where that can be, so that a wrong pair would load; its values are a number of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import transferkit as tk

KINDS = ("Dense", "Dense", "Dense", "BatchNormalization", "LayerNormalization")
FORMATS = ("plain.h5", "w.weights.h5", "whole.keras", "w.safetensors")
CHANGES = ("reorder", "nest", "freeze", "insert", "drop", "rename")


@dataclass(frozen=True)
class Made:
    """A layer with the role it plays."""

    role: int
    kind: str
    name: str | None
    nested: bool = False
    frozen: bool = False


def built(made: list[Made]) -> tuple[Any, dict[int, Any]]:
    """A model of the layers in order, those that are nested in one model inside it; and its layers by role."""
    by_role: dict[int, Any] = {}

    def layer(one: Made) -> Any:
        options = {"name": one.name} if one.name else {}
        new = layers.Dense(4, **options) if one.kind == "Dense" else getattr(layers, one.kind)(**options)
        by_role[one.role] = new
        return new

    parts: list[Any] = []
    inner = [one for one in made if one.nested]
    for one in made:
        if not one.nested:
            parts.append(layer(one))
        elif one is inner[0]:
            parts.append(keras.Sequential([keras.Input((4,)), *(layer(item) for item in inner)], name="backbone"))
    model = keras.Sequential([keras.Input((4,)), *parts])
    for one in made:
        by_role[one.role].trainable = not one.frozen
        for number, weight in enumerate(by_role[one.role].weights):
            weight.assign(np.full(weight.shape, 1 + one.role + number / 8))
    return model, by_role


def changed(made: list[Made], changes: list[str], seed: int) -> list[Made]:
    """The layers reordered, nested, frozen, inserted, dropped and renamed."""
    rng = random.Random(seed)
    made = list(made)
    for number, change in enumerate(changes):
        place = rng.randrange(len(made))
        if change == "reorder":
            rng.shuffle(made)
        elif change == "insert":
            kind = rng.choice(KINDS)
            made.insert(place, Made(100 + number, kind, None if made[0].name is None else f"new_{number}x"))
        elif change == "drop" and len(made) > 1:
            made.pop(place)
        elif change == "rename" and made[place].name is not None:
            made[place] = replace(made[place], name=f"other_{number}x")
        elif change == "nest":
            last = rng.randint(place + 1, len(made))
            made[place:last] = [replace(one, nested=True) for one in made[place:last]]
        elif change == "freeze":
            made[place] = replace(made[place], frozen=True)
    first = next((i for i, one in enumerate(made) if one.nested), len(made))
    # What is nested stands together.
    return made[:first] + [one for one in made if one.nested] + [one for one in made[first:] if not one.nested]


def check(folder: Path, kinds: list[str], chosen: bool, changes: list[str], suffix: str, seed: int) -> str:
    """Loads the one's file into the other; whether it was refused or came right. Anything else fails."""
    keras.backend.clear_session()
    saved = [Made(i, kind, f"layer{i}_{'qkv'[i % 3]}" if chosen else None) for i, kind in enumerate(kinds)]
    rng = random.Random(seed)
    saved = [replace(one, frozen=rng.random() < 0.3) for one in saved]
    if not chosen:  # without names an order that changed, or a layer in the place of another, can't be told from the saved model
        other = "drop" if "insert" in changes else "insert"
        changes = [change for change in changes if change not in ("reorder", "rename", other)]
    model, _ = built(saved)
    path = folder / suffix
    (model.save if suffix in ("plain.h5", "whole.keras") else lambda p: tk.save_weights(model, p))(path)
    other, by_role = built(changed(saved, changes, seed))
    for weight in other.weights:
        weight.assign(np.full(weight.shape, -1.0) if "variance" not in weight.name else np.full(weight.shape, 0.5))
    before = [np.asarray(weight) for weight in other.weights]
    try:
        tk.WeightLoader(path).load(other)
    except tk.errors.TransferKitError:
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, other.weights, strict=True))
        return "refused"
    for role, layer in by_role.items():
        for number, weight in enumerate(layer.weights):
            assert role < 100, f"layer {role}, which the file doesn't have, was loaded"
            assert np.all(np.asarray(weight) == np.float32(1 + role + number / 8)), (role, weight.path)
    return "right"


PAIRS = (
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    st.booleans(),
    st.lists(st.sampled_from(CHANGES), max_size=3),
    st.sampled_from(FORMATS),
    st.integers(0, 10_000),
)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=15, deadline=None, suppress_health_check=QUIET)
@given(*PAIRS)
def test_no_pair_of_models_loads_wrong(
    tmp_path: Path, kinds: list[str], chosen: bool, changes: list[str], suffix: str, seed: int
) -> None:
    check(tmp_path, kinds, chosen, changes, suffix, seed)


@pytest.mark.slow
def test_no_pair_of_many_models_loads_wrong(tmp_path: Path) -> None:
    outcomes = {"right": 0, "refused": 0}

    @settings(max_examples=500, deadline=None, suppress_health_check=QUIET, database=None)
    @given(*PAIRS)
    def pairs(kinds: list[str], chosen: bool, changes: list[str], suffix: str, seed: int) -> None:
        outcomes[check(tmp_path, kinds, chosen, changes, suffix, seed)] += 1

    pairs()
    print(f"{sum(outcomes.values())} pairs: {outcomes}")
    assert sum(outcomes.values()) >= 500
    assert min(outcomes.values()) > 50
