"""Principal components as a layer; scikit-learn is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import decomposition

import transferkit as tk
from transferkit import errors

Array = np.ndarray[Any, Any]


def rows(n: int = 200, d: int = 9, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    return (random.normal(size=(n, d)) * 2.0 ** -np.arange(d) @ random.normal(size=(d, d)) + 30).astype("float32")


@settings(max_examples=15, deadline=None)
@given(st.integers(13, 60), st.integers(2, 12), st.booleans(), st.integers(1, 12), st.integers(0, 2**31))
def test_it_is_scikit_learns(n: int, d: int, whiten: bool, wanted: int, seed: int) -> None:
    x, kept = rows(n, d, seed), min(wanted, d)
    theirs = decomposition.PCA(kept, whiten=whiten, svd_solver="full").fit(x.astype(np.float64))
    layer = tk.PCA(kept, whiten=whiten)
    cuts = sorted(np.random.default_rng(seed).integers(0, n, 2))
    layer.adapt([part for part in np.split(x, cuts) if len(part)])
    scale = 1 if whiten else np.abs(theirs.transform(x)).max()
    # float32 on both sides of a subtraction of means near 30; a whitened direction enlarges that by its spread.
    spread = np.sqrt(theirs.explained_variance_.min()) if whiten else scale
    np.testing.assert_allclose(layer(x), theirs.transform(x), atol=1e-4 * max(1, 1 / spread) * max(1, scale))
    np.testing.assert_allclose(layer.explained, theirs.explained_variance_ratio_, atol=1e-6)


def test_directions_to_the_digits_of_float32() -> None:
    x = rows()
    layer = tk.PCA(4)
    layer.adapt(x)
    theirs = decomposition.PCA(4, svd_solver="full").fit(x.astype(np.float64))
    np.testing.assert_allclose(np.asarray(layer.directions).T, theirs.components_, atol=2e-7)
    np.testing.assert_allclose(layer.mean, theirs.mean_, rtol=1e-7)


def test_positions_are_rows_and_a_direction_without_spread_is_zero() -> None:
    x = np.repeat(rows(60, 3), 2, axis=1).reshape(15, 4, 6)
    layer = tk.PCA(5, whiten=True)
    layer.adapt(x)
    out = np.asarray(layer(x))
    assert out.shape == (15, 4, 5)
    np.testing.assert_allclose(out.reshape(60, 5).std(axis=0, ddof=1), [1, 1, 1, 0, 0], atol=1e-4)


def test_a_model_with_one_goes_through_files(tmp_path: Path) -> None:
    x = rows()
    plan = tk.ModelBuilder((9,)).pca(4, whiten=True).dense(3, "relu").classifier(2)
    assert tk.ModelBuilder.from_json(plan.to_json()) == plan
    model = plan.build(seed=0)
    assert [layer.name for layer in model.layers] == ["input", "pca", "dense", "head"]
    model.get_layer("pca").adapt(x)
    model.save(tmp_path / "m.keras")
    for again in (keras.models.load_model(tmp_path / "m.keras"), tk.open_model(tmp_path / "m.keras")):
        np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
    assert not model.get_layer("pca").trainable_weights


def test_half_precision_keeps_small_variances() -> None:
    x = rows() * np.float32(1e-3)
    layer = tk.PCA(4, whiten=True, dtype="mixed_float16")
    layer.adapt(x)
    assert np.asarray(layer(x)).dtype == np.float16
    np.testing.assert_allclose(np.asarray(layer(x), dtype=np.float32).std(axis=0), 1, atol=0.02)


def test_what_it_refuses() -> None:
    with pytest.raises(errors.PlanError) as plan:
        tk.PCA(0.9)  # type: ignore[arg-type]
    assert str(plan.value) == (
        "Making a PCA layer.\n  found: components=0.9; it must be a whole number above 0\n  to fix it: PCA(32)"
    )
    with pytest.raises(errors.ModelError) as model:
        tk.ModelBuilder((9,)).pca(10).build()
    assert str(model.value) == (
        "Building the layer 'pca', which keeps 10 components.\n"
        "  found: inputs of 9 features\n"
        "  to fix it: keep 9 components at most"
    )
    with pytest.raises(errors.DataError) as data:
        tk.PCA(4, name="pca").adapt(rows(4))
    assert str(data.value) == (
        "Adapting the layer 'pca', which keeps 4 components.\n"
        "  found: 4 rows, which lie in at most 3 directions\n"
        "  to fix it: give more rows, or keep fewer components"
    )
    with pytest.raises(errors.DataError, match="features that aren't finite"):
        tk.PCA(2).adapt(np.full((5, 3), np.nan))
    with pytest.raises(errors.DataError, match="no rows"):
        tk.PCA(2).adapt([])


def test_before_it_has_learned_it_gives_no_number() -> None:
    layer = tk.PCA(2)
    assert not layer.is_adapted
    assert np.isnan(np.asarray(layer(rows()))).all()
    layer.adapt(rows())
    assert layer.is_adapted
