"""What makes an array fit: against TensorFlow, plain NumPy, and laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import weights_files as files
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import transferkit as tk
from transferkit.errors import MatchError
from transferkit.weights.adapters import resize_grid
from transferkit.weights.loader import WeightLoader


def stem(channels: int, *, name: str = "stem", groups: int = 1) -> Any:
    start = keras.Input((8, 8, channels))
    x = layers.Conv2D(6, 3, name=name, groups=groups)(start)
    return keras.Model(start, layers.Dense(3, name="out")(layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("how", ["auto", "sum", "repeat", "zero"])
@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
def test_other_input_channels_keep_the_scale(tmp_path: Path, how: str, channels: int) -> None:
    saved = stem(3)
    saved.save(tmp_path / "w.h5")
    model = stem(channels)
    plan = WeightLoader(tmp_path / "w.h5").channels(how)
    if channels < 3 and how in ("repeat", "zero"):
        with pytest.raises(MatchError, match="can't make"):
            plan.load(model)
        return
    report = plan.load(model)
    used = "repeat" if channels > 3 else "sum"
    assert report["stem/kernel"].why == f"3 → {channels} input channels by {used if how == 'auto' else how}"
    gray = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype("float32")
    x = np.repeat(gray, channels, axis=-1)
    if how == "zero":
        x[..., 3:] = 9.0
    assert np.allclose(model(x), saved(np.repeat(gray, 3, axis=-1)), atol=1e-5)
    if how in ("auto", "repeat") and channels == 6:
        colour = np.random.default_rng(1).uniform(size=(2, 8, 8, 3)).astype("float32")
        assert np.allclose(model(np.concatenate([colour, colour], -1)), saved(colour), atol=1e-5)


def test_channels_are_adapted_where_asked_only(tmp_path: Path) -> None:
    stem(3).save(tmp_path / "w.h5")
    with pytest.raises(MatchError, match=r"for other input channels \.channels\(\) fits it"):
        WeightLoader(tmp_path / "w.h5").load(stem(4))
    with pytest.raises(MatchError, match="the variable"):
        WeightLoader(tmp_path / "w.h5").channels("sum", layers=["elsewhere"]).load(stem(4))


def head(units: int) -> Any:
    return keras.Sequential([keras.Input((4,)), layers.Dense(4, name="body"), layers.Dense(units, name="head")])


def test_five_classes_to_eight(tmp_path: Path) -> None:
    saved = head(5)
    saved.layers[-1].bias.assign([1, 2, 3, 4, 5])
    saved.save(tmp_path / "w.h5")
    model = head(8)
    own = model.layers[-1].kernel.numpy()
    old, new = ["a", "b", "c", "d", "e"], ["e", "x", "b", "y", "a", "z", "d", "c"]
    plan = WeightLoader(tmp_path / "w.h5")
    with pytest.raises(MatchError, match=r"\.classes\(source=\[…\], target=\[…\]\) copies the rows they share"):
        plan.load(model)
    report = plan.classes(old, new).load(model)
    kernel, bias = model.layers[-1].kernel.numpy(), model.layers[-1].bias.numpy()
    for i, name in enumerate(new):
        if name in old:
            assert np.array_equal(kernel[:, i], saved.layers[-1].kernel.numpy()[:, old.index(name)])
            assert bias[i] == 1 + old.index(name)
        else:
            assert np.array_equal(kernel[:, i], own[:, i])
    assert report["head/kernel"].why == "5 of 8 classes by name; x, y, z keep the model's own values"
    assert report.verify(model)


def test_classes_that_dont_fit_the_shapes_or_share_nothing(tmp_path: Path) -> None:
    head(5).save(tmp_path / "w.h5")
    plan = WeightLoader(tmp_path / "w.h5")
    with pytest.raises(MatchError, match="2 source and 8 target classes were given, the file has 5 and the model 8"):
        plan.classes(["a", "b"], list("abcdefgh")).load(head(8))
    with pytest.raises(MatchError, match="none of the model's classes is among the file's"):
        plan.classes(list("abcde"), list("ijklmnop")).load(head(8))


def test_part_of_an_embedding(tmp_path: Path) -> None:
    def net(words: int) -> Any:
        start = keras.Input((3,), dtype="int32")
        return keras.Model(start, layers.Embedding(words, 2, name="words")(start))

    saved, model = net(3), net(4)
    saved.save(tmp_path / "w.h5")
    own = model.get_layer("words").embeddings.numpy()
    WeightLoader(tmp_path / "w.h5").vocabulary("words", source=["the", "a", "cat"], target=["cat", "dog", "the", "a"]).load(model)
    rows, old = model.get_layer("words").embeddings.numpy(), saved.get_layer("words").embeddings.numpy()
    assert np.array_equal(rows[[0, 2, 3]], old[[2, 0, 1]])
    assert np.array_equal(rows[1], own[1])
    WeightLoader(tmp_path / "w.h5").vocabulary("words").load(model)
    assert np.array_equal(model.get_layer("words").embeddings.numpy()[:3], old)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(7, 5), (14, 14), (4, 9), (3, 3)])
def test_grids_are_resized_as_tensorflow_does(method: str, size: tuple[int, int]) -> None:
    grid = np.random.default_rng(0).normal(size=(7, 5, 3))
    expected = tf.image.resize(grid, size, method=method, antialias=False).numpy()
    # TensorFlow looks the cubic kernel up in a table of 1,024 steps.
    assert np.allclose(resize_grid(grid, size, method=method), expected, atol=3e-3 if method == "bicubic" else 1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["bicubic", "bilinear"]))
def test_a_grid_of_its_own_size_stays_and_a_constant_stays_constant(h: int, w: int, method: str) -> None:
    grid = np.random.default_rng(h * 7 + w).normal(size=(h, w, 2))
    assert resize_grid(grid, (h, w), method=method) is grid
    assert np.allclose(resize_grid(np.full((h, w, 1), 3.0), (5, 4), method=method), 3.0)


class Table(layers.Layer):
    """A table of positions, as vision transformers keep it."""

    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(**options)
        self.shape_of_it = shape

    def build(self, input_shape: Any) -> None:
        del input_shape
        self.table = self.add_weight(name="table", shape=self.shape_of_it, initializer="random_normal")

    def call(self, x: Any) -> Any:
        return x + keras.ops.sum(self.table)


def test_position_grids_with_a_class_token_and_relative_tables(tmp_path: Path) -> None:
    def net(absolute: int, relative: int) -> Any:
        start = keras.Input((2,))
        return keras.Model(start, Table((relative, 3), name="bias")(Table((1, absolute, 4), name="positions")(start)))

    saved, model = net(17, 49), net(37, 121)
    saved.save_weights(tmp_path / "w.weights.h5")
    report = (
        WeightLoader(tmp_path / "w.weights.h5")
        .positions("positions/*", extra=1)
        .positions("bias/*", relative=True, source=(4, 4), target=(6, 6))
        .load(model)
    )
    old, new = (m.get_layer("positions").table.numpy() for m in (saved, model))
    assert np.array_equal(new[:, :1], old[:, :1])
    expected = tf.image.resize(old[:, 1:].reshape(1, 4, 4, 4), (6, 6), method="bicubic").numpy().reshape(1, 36, 4)
    assert np.allclose(new[:, 1:], expected, atol=3e-4)
    assert report["bias/table"].why == "7×7 → 11×11 positions, bicubic"


# PyTorch's layout, against NumPy written out


def test_torch_layouts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def t(*shape: int) -> np.ndarray[Any, Any]:
        return rng.uniform(0.1, 1, shape).astype("float32")

    state = {
        "conv.weight": t(4, 3, 3, 2),
        "up.weight": t(4, 5, 2, 2),
        "depth.weight": t(10, 1, 3, 3),
        "norm.weight": t(10),
        "norm.bias": t(10),
        "norm.running_mean": t(10),
        "norm.running_var": t(10),
        "norm.num_batches_tracked": np.array(7),
        "fc.weight": t(6, 40),
        "fc.bias": t(6),
        "words.weight": t(6, 6),
    }
    files.save_arrays(tmp_path / "w.npz", state)
    start = keras.Input((3, 4, 3))
    x = layers.Conv2D(4, (3, 2), use_bias=False, name="conv")(start)
    x = layers.Conv2DTranspose(5, 2, strides=2, use_bias=False, name="up")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, padding="same", name="depth")(x)
    x = layers.BatchNormalization(name="norm", epsilon=1e-5)(x)
    x = layers.Cropping2D(((0, 0), (0, 4)))(x)
    x = layers.Dropout(0.1)(layers.Flatten()(layers.ZeroPadding2D(((0, 0), (0, 0)))(x)))
    x = layers.Dense(6, name="fc")(x)
    tokens = keras.Input((1,), dtype="int32", name="tokens")
    model = keras.Model([start, tokens], [x, layers.Embedding(6, 6, name="words")(tokens)])
    report = WeightLoader(tmp_path / "w.npz").layout("torch").load(model)
    weights = {f"{layer.name}/{w.name}": w.numpy() for layer in model.layers for w in layer.weights}
    assert np.array_equal(weights["conv/kernel"], np.einsum("oihw->hwio", state["conv.weight"]))
    assert np.array_equal(weights["up/kernel"], np.einsum("iohw->hwoi", state["up.weight"]))
    for channel in range(5):
        for multiple in range(2):
            assert np.array_equal(
                weights["depth/kernel"][:, :, channel, multiple], state["depth.weight"][channel * 2 + multiple, 0]
            )
    assert np.array_equal(weights["norm/moving_variance"], state["norm.running_var"])
    assert np.array_equal(weights["norm/gamma"], state["norm.weight"])
    assert np.array_equal(weights["words/embeddings"], state["words.weight"])
    h, w, c = 2, 2, 10
    rows = state["fc.weight"].reshape(6, c, h, w)
    assert np.array_equal(weights["fc/kernel"].reshape(h, w, c, 6), np.einsum("ochw->hwco", rows))
    assert report.unused["norm.num_batches_tracked"] == '.layout("torch"): a counter that Keras has no use for'
    assert report.coverage == 1


def test_a_normalization_of_another_epsilon_than_torchs_is_told(tmp_path: Path) -> None:
    ones = np.ones(3, "float32")
    files.save_arrays(tmp_path / "w.npz", {f"bn.{k}": ones for k in ("weight", "bias", "running_mean", "running_var")})
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn")])
    notes = WeightLoader(tmp_path / "w.npz").layout("torch").load(model).notes
    assert any("have epsilon=0.001; PyTorch's default is 1e-05" in note for note in notes)


def test_another_number_of_classes_is_told_as_the_cause(tmp_path: Path) -> None:
    three, five = (tk.ModelBuilder((4,)).dense(8, "relu").classifier(count).build(seed=0) for count in (3, 5))
    tk.save_weights(three, tmp_path / "three.h5")
    with pytest.raises(MatchError, match="head has another number of classes than the saved one"):
        WeightLoader(tmp_path / "three.h5").load(five)
