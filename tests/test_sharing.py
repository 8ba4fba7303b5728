"""Features shared by runs over parts of one data set: each run is the run by itself, to the bit."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import transferkit as tk
from transferkit.tuning.features import compute
from transferkit.tuning.sharing import shared_features

ROWS = 60


def _data() -> tk.Data:
    random = np.random.default_rng(0)
    return tk.Data.arrays(random.normal(size=(ROWS, 8, 8, 3)).astype("float32"), random.integers(0, 3, ROWS))


def _model(shift: float = 0.0) -> Any:
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    a = layers.Conv2D(6, 3, activation="relu")(x)
    model = keras.Model(x, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(a)))
    model.layers[1].bias.assign(model.layers[1].bias + shift)
    return model


def _fold(data: tk.Data, model: Any, turn: int = 0) -> Any:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3, learning_rate=1e-2).cache(True)
    train = np.flatnonzero((np.arange(ROWS) + turn) % 4 != 0)
    return plan.fit(model, data.take(train), validation_data=0.2, batch_size=16, seed=turn, verbose=0)


def _computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that features are computed of from now on."""
    found: list[int] = []
    real = compute

    def told(prefix: Any, data: Any, **settings: Any) -> Any:
        found.append(len(data))
        return real(prefix, data, **settings)

    monkeypatch.setattr("transferkit.tuning.sharing.compute", told)
    return found


def test_folds_share_one_computation_and_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    alone = [_fold(data, _model(), turn).history for turn in range(3)]
    computed = _computed(monkeypatch)
    with shared_features():
        runs = [_fold(data, _model(), turn) for turn in range(3)]
    assert [run.history for run in runs] == alone
    assert computed == [ROWS]
    assert "36 rows computed in" in runs[0].phases[0].frozen
    assert "36 rows found in" in runs[2].phases[0].frozen


def test_other_weights_get_features_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    alone = [_fold(data, _model(shift)).history for shift in (0.0, 0.5)]
    computed = _computed(monkeypatch)
    with shared_features():
        assert [_fold(data, _model(shift)).history for shift in (0.0, 0.5)] == alone
    assert computed == [ROWS, ROWS]


def test_other_kernels_get_features_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    data, computed = _data(), _computed(monkeypatch)
    with shared_features():
        _fold(data, _model())
        with tk.same_kernels():
            _fold(data, _model())
    assert computed == [ROWS, ROWS]


def test_a_small_part_is_no_reason_to_compute_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = _computed(monkeypatch)
    with shared_features():
        plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2).cache(True)
        plan.fit(_model(), _data().take(np.arange(20)), seed=0, verbose=0)
    assert computed == [20]


def test_nothing_is_shared_outside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _data()
    computed = _computed(monkeypatch)
    for _ in range(2):
        _fold(data, _model())
    assert computed == [36, 9, 36, 9]
