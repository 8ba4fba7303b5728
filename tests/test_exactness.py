"""Training on features against training in full, at every cut of models of every kind: the same losses and the same weights."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import transferkit as tk

ROWS, BATCH, SEEDS = 45, 16, 10


def _functional(x: Any) -> Any:
    a = layers.Conv2D(4, 3, activation="relu", name="a")(x)
    b = layers.BatchNormalization(name="b")(a)
    return layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(5, 3, activation="relu", name="c")(b))


def _residual(x: Any) -> Any:
    a = layers.Conv2D(4, 3, padding="same", activation="relu", name="a")(x)
    b = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, padding="same", name="b")(a))
    c = layers.Dropout(0.3, seed=1, name="inner")(layers.Add(name="sum")([a, b]))
    d = layers.Conv2D(4, 3, padding="same", activation="relu", name="c")(c)
    return layers.GlobalAveragePooling2D(name="pool")(layers.Add(name="sum2")([c, d]))


def _shared(x: Any) -> Any:
    shared = layers.Conv2D(3, 3, padding="same", activation="relu", name="shared")
    b = layers.Conv2D(3, 3, padding="same", activation="relu", name="b")(shared(x))
    return layers.GlobalMaxPooling2D(name="pool")(shared(b))


def _ended(tensor: Any) -> Any:
    return layers.Dense(3, name="head")(layers.Dropout(0.3, seed=3, name="outer")(tensor))


def _model(kind: str) -> Any:
    x = keras.Input((8, 8, 3), name="x")
    if kind == "two inputs":
        z = keras.Input((4,), name="z")
        beside = layers.Dense(5, activation="tanh", name="beside")(z)
        return keras.Model({"x": x, "z": z}, _ended(layers.Concatenate(name="both")([_functional(x), beside])))
    if kind == "nested":
        return keras.Model(x, _ended(keras.Model(x, _residual(x), name="base")(x)))
    if kind == "sequential":
        inner = [layers.Conv2D(4, 3, activation="relu", name="a"), layers.Conv2D(4, 3, activation="relu", name="b")]
        ending = [layers.Flatten(), layers.Dropout(0.3, seed=3), layers.Dense(3, name="head")]
        return keras.Sequential([x, *inner, *ending])
    return keras.Model(x, _ended({"functional": _functional, "residual": _residual, "shared": _shared}[kind](x)))


#: For each kind what trains beside the head, from nothing to nearly everything: the cut moves down layer by layer.
_CUTS = {
    "functional": ("", "c", "bc"),
    "residual": ("", "c", "cb"),
    "nested": ("", "c", "cb"),
    "sequential": ("", "b"),
    "shared": ("", "b"),
    "two inputs": ("", "c", "c+beside"),
}


def _data(kind: str, seed: int) -> Any:
    random = np.random.default_rng(seed)
    x = random.normal(size=(ROWS, 8, 8, 3)).astype("float32")
    inputs = {"x": x, "z": random.normal(size=(ROWS, 4)).astype("float32")} if kind == "two inputs" else x
    return inputs, random.integers(0, 3, ROWS)


def _trained(kind: str, cut: str, seed: int, cache: bool) -> tuple[Any, list[Any]]:
    keras.utils.set_random_seed(seed + 100)
    model = _model(kind)
    for index, weight in enumerate(model.weights):
        if "moving" in weight.path:  # statistics that are no longer the initial ones, and so are kept
            weight.assign(np.random.default_rng(index).uniform(0.5, 1.5, weight.shape).astype("float32"))
    train = tk.Layers.head()
    for name in cut.split("+") if "+" in cut else cut:
        train |= tk.Layers.named(name)
    plan = tk.FineTuner().phase("one", train=train, epochs=2, learning_rate=1e-2).cache(cache)
    weights = {0: 2.0, 1: 1.0, 2: 0.5}
    data = _data(kind, seed)
    run = plan.fit(model, data, validation_data=data, class_weight=weights, batch_size=BATCH, seed=seed, verbose=0)
    assert cache == ("computed once" in run.phases[0].frozen), run.phases[0].frozen
    return run.history, [variable.numpy() for variable in model.weights]


def _difference(kind: str, cut: str, seed: int) -> float:
    """The largest between the two, of a loss or a weight, against the largest of its kind."""
    (history, weights), (expected_history, expected) = (_trained(kind, cut, seed, cache) for cache in (True, False))
    assert history.keys() == expected_history.keys()
    pairs = [*zip(weights, expected, strict=True), *((np.array(history[n]), np.array(expected_history[n])) for n in history)]
    return max(float(np.max(np.abs(a - b), initial=0.0) / max(np.max(np.abs(b), initial=0.0), 1e-30)) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", _CUTS)
def test_the_deepest_cut_in_the_strict_mode(kind: str) -> None:
    with tk.same_kernels():
        assert _difference(kind, _CUTS[kind][-1], 0) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", _CUTS)
def test_every_cut_of_every_kind_with_ten_seeds(kind: str, strict: bool, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for cut in _CUTS[kind]:
        for seed in range(SEEDS):
            if strict:
                with tk.same_kernels():
                    found[cut, seed] = _difference(kind, cut, seed)
            else:
                found[cut, seed] = _difference(kind, cut, seed)
    same = sum(value == 0.0 for value in found.values())
    with capsys.disabled():
        print(
            f"\n{kind}{', strict' if strict else ''}: {same} of {len(found)} equal to the bit, largest {max(found.values()):.1e}"
        )
    assert max(found.values()) <= (0.0 if strict else 1e-6)
