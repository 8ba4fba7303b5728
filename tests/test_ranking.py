"""Ranking candidates by the features their heads would be trained on."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import transferkit as tk
from transferkit import errors
from transferkit.selection import scores

Array = np.ndarray[Any, Any]


def digits() -> tuple[Array, Array]:
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32")[:200], y[:200]


def recipe(noise: float) -> tk.Recipe:
    """Features with the digits in them, and more or less noise: the wider the noise the less a head can do."""
    body = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, name="body")])
    random = np.random.default_rng(0)
    kernel = np.eye(64) if noise == 0 else np.eye(64)[:, random.permutation(64)] * (np.arange(64) < 64 * (1 - noise))
    body.layers[0].set_weights([kernel.astype("float32"), np.zeros(64, "float32")])
    return tk.Recipe(tk.ModelBuilder((64,)).backbone(body).classifier(10))


def test_the_candidate_with_the_better_features_comes_first() -> None:
    x, y = digits()
    found = tk.rank({"few": recipe(0.9), "all": recipe(0), "most": recipe(0.05)}, (x, y))
    assert list(found)[-1] == "few"
    assert found["few"].verdict == "behind"
    assert found[found.best].behind is None
    assert {one.verdict for name, one in found.items() if name in ("all", "most")} == {"best", "not told apart"}
    one = found["all"].scores
    assert float(one["linear_probe"]) == scores.linear_probe(x, y)
    assert float(one["logme"]) == pytest.approx(scores.logme(x, y))
    assert float(one["h_score"]) == pytest.approx(scores.h_score(x, y))
    assert float(one["nearest_neighbours"]) == scores.nearest_neighbours(x, y)
    # For the mean of hits the jackknife is near the binomial spread.
    probe = one["linear_probe"]
    assert probe.low is not None
    assert probe.high is not None
    spread = 2 * 2.1 * np.sqrt(probe.value * (1 - probe.value) / len(y))
    assert 0.4 * spread < probe.high - probe.low < 2.5 * spread
    assert found["all"].features == 64
    assert str(found).startswith("promise of 3 networks for 200 rows, before training; 95% intervals\ncandidate")
    assert len(found.records()) == 12
    assert found.to_dict()["candidates"][0]["name"] == found.best


def test_models_and_more_rows_than_are_needed() -> None:
    x, y = digits()
    model = recipe(0).make(None, seed=0)[0]
    before = model.get_weights()
    found = tk.rank({"model": model}, tk.Data.arrays(x, y), scores=["nearest_neighbours"], most=100)
    assert found.rows == 100
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_what_cannot_be_ranked() -> None:
    x, y = digits()
    with pytest.raises(errors.PlanError) as plan:
        tk.rank({"a": "MobileNet"}, (x, y), scores=["logmee"])
    assert str(plan.value) == (
        "Ranking 1 candidates.\n"
        "  found 2 problems:\n"
        "    - no score named 'logmee' (did you mean 'logme'?)\n"
        "    - 'a' is a str\n"
        "  to fix it: rank({'name': recipe, …}, data, scores=['linear_probe', 'nearest_neighbours', 'logme', 'h_score'])"
    )
    with pytest.raises(errors.DataError) as data:
        tk.rank({"a": recipe(0)}, (x, np.eye(10)[y]))
    assert str(data.value) == (
        "Ranking 1 candidates.\n"
        "  found: labels of shape (200, 10) and type float64\n"
        "  likely cause: the scores are for classes that exclude each other\n"
        "  to fix it: give one class index a row: y.argmax(axis=1) for one-hot rows"
    )
    two = tk.ModelBuilder((64,)).dense(4, name="both").classifier(3, name="a").at("both").regression(name="b").build()
    with pytest.raises(errors.ModelError, match="'two' has 2 outputs"):
        tk.rank({"two": two}, (x, y))


def test_rows_that_are_not_finite_are_refused_whatever_a_layer_makes_of_them() -> None:
    x, y = np.random.default_rng(0).normal(size=(40, 4)).astype("float32"), np.arange(40) % 2
    x[3] = np.nan  # which ReLU makes 0 of on a processor
    with pytest.raises(errors.DataError, match="inputs that are NaN or infinite"):
        tk.rank({"one": tk.Recipe(tk.ModelBuilder((4,)).dense(6, "relu").classifier(2))}, (x, y))


def test_candidates_without_names_are_refused() -> None:
    with pytest.raises(tk.errors.PlanError, match="a list, where candidates have names"):
        tk.rank([keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])], (np.zeros((8, 4)), np.arange(8) % 2))  # type: ignore[arg-type]


def test_a_score_that_says_nothing_and_shares_beyond_their_range_are_not_told() -> None:
    x, y = np.random.default_rng(0).normal(size=(24, 64)).astype("float32"), np.arange(24) % 2
    found = tk.rank({"one": recipe(0), "other": recipe(0.5)}, (x, y))
    assert "h_score says nothing of" in str(found)
    assert "—" in str(found)
    for one in found.values():
        for name in ("linear_probe", "nearest_neighbours"):
            low, high = one.scores[name].low, one.scores[name].high
            assert low is not None
            assert high is not None
            assert 0 <= low <= high <= 1
