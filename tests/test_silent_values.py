"""Lists, links and values in a file that plain Keras takes without a word: here each one either arrives right or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import weights_files as files
from keras import layers

from transferkit.errors import MatchError
from transferkit.weights.loader import WeightLoader
from transferkit.weights.saving import save_weights


def scrambled(model: Any) -> Any:
    """The model with values that tell every tensor from every other."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 1, variable.shape))
    return model


def equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


def chain(*names: str | None) -> Any:
    start = x = keras.Input((4,))
    for name in names:
        x = layers.Dense(4, name=name)(x)
    return keras.Model(start, x, name="net")


def refused(path: Path, model: Any) -> str:
    before = [np.array(v) for v in model.weights]
    with pytest.raises(MatchError) as caught:
        WeightLoader(path).load(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights, strict=True))
    return str(caught.value)


def test_layers_and_arrays_listed_in_another_order(tmp_path: Path) -> None:
    saved = scrambled(keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a"), layers.BatchNormalization(name="b")]))
    save_weights(saved, tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        names = [name.decode() if isinstance(name, bytes) else name for name in file["b"].attrs["weight_names"]]
        file["b"].attrs["weight_names"] = [name.encode() for name in reversed(names)]
        file.attrs["layer_names"] = [b"b", b"a"]
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a"), layers.BatchNormalization(name="b")])
    WeightLoader(tmp_path / "w.h5").load(model)
    assert equal(model, saved)


def test_lists_of_plain_keras_exchange_arrays_without_a_word(tmp_path: Path) -> None:
    saved = scrambled(chain("a", "b"))
    save_weights(saved, tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        file.attrs["layer_names"] = [b"b", b"a"]
    plain, model = chain("a", "b"), chain("a", "b")
    plain.load_weights(tmp_path / "w.h5")
    assert np.array_equal(plain.get_layer("a").kernel, saved.get_layer("b").kernel)
    WeightLoader(tmp_path / "w.h5").load(model)
    assert equal(model, saved)


def test_a_list_of_layers_in_another_order(tmp_path: Path) -> None:
    class Net(keras.Model):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.blocks = [layers.Dense(4, name=name) for name in names]

        def call(self, x: Any) -> Any:
            return sum(block(x) for block in self.blocks)

    saved, model = Net("query", "key"), Net("key", "query")
    saved(np.zeros((1, 4)))
    model(np.zeros((1, 4)))
    scrambled(saved).save_weights(tmp_path / "w.weights.h5")
    WeightLoader(tmp_path / "w.weights.h5").load(model)
    for mine, theirs in zip(model.blocks, reversed(saved.blocks), strict=True):
        assert np.array_equal(mine.kernel, theirs.kernel)


@pytest.mark.parametrize("file", ["w.h5", "w.weights.h5"])
def test_more_residual_blocks_than_the_model_has(tmp_path: Path, file: str) -> None:
    def net(blocks: int) -> Any:
        keras.utils.clear_session()
        start = keras.Input((4,))
        x = layers.Dense(4)(start)
        for _ in range(blocks):
            x = layers.Add()([x, layers.Dense(4)(layers.Dense(4)(x))])
        return keras.Model(start, layers.Dense(4)(x))

    saved = scrambled(net(2))
    (saved.save if file == "w.h5" else saved.save_weights)(tmp_path / file)
    assert "more than one way to match" in refused(tmp_path / file, net(1))


def in_h5(path: Path, value: Any) -> None:
    save_weights(chain("a"), path)
    with h5py.File(path, "r+") as file:
        found: list[str] = []
        file.visititems(lambda name, node: found.append(name) if getattr(node, "shape", ()) == (4, 4) else None)
        del file[found[0]]
        file[found[0]] = value


def in_npz(path: Path, value: Any) -> None:
    files.save_arrays(path, {"a/kernel": value, "a/bias": np.zeros(4, "float32")})


@pytest.mark.parametrize(("file", "write"), [("w.h5", in_h5), ("w.weights.h5", in_h5), ("w.npz", in_npz)])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.ones((4, 4), bool), "bool values for a float32 variable"),
        (np.full((4, 4), 1e300), "values up to 1e+300 become infinite as float32"),
        (np.full((4, 4), -np.inf, "float32"), "16 values aren't finite (0 NaN), the first at (0, 0)"),
    ],
)
def test_values_that_are_no_weights(
    tmp_path: Path, file: str, write: Callable[[Path, Any], None], value: Any, found: str
) -> None:
    write(tmp_path / file, value)
    assert f"has {found}" in refused(tmp_path / file, chain("a"))


@pytest.mark.parametrize("form", ["checkpoint", "saved model"])
def test_checkpoints_and_saved_models_which_load_weights_refuses(tmp_path: Path, form: str) -> None:
    saved = scrambled(chain("a", "b"))
    if form == "checkpoint":
        tf.train.Checkpoint(model=saved).save(str(tmp_path / "net"))
    else:
        saved.export(str(tmp_path), verbose=False)
    model = chain("a", "b")
    with pytest.raises(ValueError, match="File format not supported"):
        model.load_weights(tmp_path)
    report = WeightLoader(tmp_path).load(model)
    assert report.coverage == 1
    assert equal(model, saved)
