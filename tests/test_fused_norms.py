"""A convolution and the BatchNorm after it as one kernel: the bits of Keras's own two, or two they stay."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from transferkit.building import fused_norms
from transferkit.building.frontier import split
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.epoch import same_kernels
from transferkit.tuning.features import compute

SHAPE = (12, 11, 5)


def _model(*parts: Any) -> Any:
    """A frozen backbone of these layers, BatchNorms with statistics of their own, and a head."""
    x = keras.Input(SHAPE)
    y = x
    for part in parts:
        y = part(y)
    model = keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D(name="last")(y)))
    random = np.random.default_rng(1)
    for layer in model.layers[:-1]:
        layer.trainable = False
        if layer.weights:
            low = 0.2 if isinstance(layer, layers.BatchNormalization) else -1.0
            layer.set_weights([random.uniform(low, 2.0, weight.shape) for weight in layer.get_weights()])
    return model


def _rows(count: int = 40) -> Any:
    return np.random.default_rng(2).normal(size=(count, *SHAPE)).astype("float32")


def _expected(model: Any, rows: Any) -> Any:
    return keras.Model(model.input, model.get_layer("last").output).predict(rows, batch_size=32, verbose=0)


def _found(model: Any) -> int:
    """How many BatchNorms could be computed with the convolution before them."""
    prefix = split(model).prefix
    prefix.as_function()
    return len(prefix._quick.value[1])


CONVOLUTIONS = {
    "1×1": lambda: layers.Conv2D(32, 1, use_bias=False),
    "3×3": lambda: layers.Conv2D(17, 3, padding="same", use_bias=False),
    "with a bias": lambda: layers.Conv2D(16, 3, padding="same"),
    "with strides": lambda: layers.Conv2D(24, (3, 2), strides=(2, 1), padding="same"),
    "depthwise": lambda: layers.DepthwiseConv2D(3, padding="same", use_bias=False),
    "depthwise with a bias": lambda: layers.DepthwiseConv2D(5),
    "depthwise with strides": lambda: layers.DepthwiseConv2D(3, strides=2),
}


@pytest.mark.parametrize("after", [lambda: layers.ReLU(6.0), lambda: layers.Activation("relu"), lambda: layers.MaxPooling2D()])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_features_are_what_predict_gives_to_the_bit(kind: str, after: Any) -> None:
    model = _model(CONVOLUTIONS[kind](), layers.BatchNormalization(), after(), layers.ZeroPadding2D())
    rows = _rows(100)
    assert _found(model) == 1
    assert np.array_equal(compute(split(model).prefix, (rows,)).arrays[0], _expected(model, rows))


@pytest.mark.parametrize("settings", [{"scale": False}, {"center": False}, {"epsilon": 0.1}, {"axis": 3}])
def test_a_batch_norm_of_any_setting_is_computed_with_the_convolution(settings: dict[str, Any]) -> None:
    model = _model(layers.Conv2D(16, 3), layers.BatchNormalization(**settings), layers.ReLU())
    rows = _rows()
    assert _found(model) == 1
    assert np.array_equal(compute(split(model).prefix, (rows,)).arrays[0], _expected(model, rows))


@pytest.mark.parametrize(
    "parts",
    [
        [layers.Conv2D(8, 3, activation="relu"), layers.BatchNormalization()],
        [layers.Conv2D(8, 3, dilation_rate=2), layers.BatchNormalization()],
        [layers.Conv2D(10, 3, groups=5), layers.BatchNormalization()],
        [layers.DepthwiseConv2D(3, depth_multiplier=2), layers.BatchNormalization()],
        [layers.Conv2D(8, 3), layers.BatchNormalization(axis=1)],
        [layers.Conv2D(8, 3), layers.ReLU(), layers.BatchNormalization()],
        [layers.SeparableConv2D(8, 3), layers.BatchNormalization()],
        [layers.Conv2D(8, 3, dtype="mixed_float16"), layers.BatchNormalization()],
    ],
    ids=["activation", "dilation", "groups", "multiplier", "axis", "between", "separable", "float16"],
)
def test_anything_else_is_left_to_keras(parts: list[Any]) -> None:
    model = _model(*parts)
    rows = _rows()
    assert not _found(model)
    found = compute(split(model).prefix, (rows,)).arrays[0]
    assert np.allclose(found, _expected(model, rows), rtol=1e-5, atol=1e-5)


def test_a_convolution_that_something_else_reads_too_is_left_to_keras() -> None:
    x = keras.Input(SHAPE)
    convolved = layers.Conv2D(6, 3)(x)
    normed = layers.ReLU()(layers.BatchNormalization()(convolved))
    both = layers.Concatenate()([layers.Flatten()(convolved), layers.Flatten()(normed)])
    model = keras.Model(x, layers.Dense(2, name="head")(both))
    for layer in model.layers[:-1]:
        layer.trainable = False
    assert not _found(model)


def test_a_layer_called_twice_keeps_its_weights_in_both_places() -> None:
    shared = layers.Conv2D(5, 3, padding="same", use_bias=False)
    model = _model(shared, layers.BatchNormalization(), layers.ReLU(), shared, layers.BatchNormalization())
    rows = _rows()
    assert _found(model) == 2
    assert np.array_equal(compute(split(model).prefix, (rows,)).arrays[0], _expected(model, rows))


def test_weights_are_those_of_the_time() -> None:
    model = _model(layers.Conv2D(16, 3), layers.BatchNormalization(), layers.ReLU())
    rows, prefix = _rows(), split(model).prefix
    compute(prefix, (rows,))
    for layer in (model.layers[1], model.layers[2]):
        layer.set_weights([1.5 * weight for weight in layer.get_weights()])
    assert np.array_equal(compute(prefix, (rows,)).arrays[0], _expected(model, rows))


def test_where_tensorflow_rewrites_no_graphs_nothing_is_fused_and_afterwards_again() -> None:
    model = _model(layers.Conv2D(16, 3), layers.BatchNormalization(), layers.ReLU())
    rows, prefix = _rows(), split(model).prefix
    before = prefix._shortcuts()[1]
    assert np.array_equal(compute(prefix, (rows,)).arrays[0], _expected(model, rows))
    with same_kernels():
        assert not prefix._shortcuts()[1]
        assert np.array_equal(compute(prefix, (rows,)).arrays[0], _expected(model, rows))
    assert prefix._shortcuts()[1] == before
    assert np.array_equal(compute(prefix, (rows,)).arrays[0], _expected(model, rows))


def test_functions_that_run_eagerly_have_the_same_bits() -> None:
    model = _model(layers.DepthwiseConv2D(3), layers.BatchNormalization(), layers.ReLU())
    rows = _rows()
    wanted = _expected(model, rows)
    tf.config.run_functions_eagerly(True)
    try:
        found = compute(split(model).prefix, (rows,)).arrays[0]
    finally:
        tf.config.run_functions_eagerly(False)
    assert np.array_equal(found, wanted)


def test_a_kind_that_has_other_bits_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norms, "_holds", {})
    monkeypatch.setattr(fused_norms, "apply_norm", lambda x, constants: x * constants[0] + constants[1] * (1 + 1e-6))
    model = _model(layers.Conv2D(16, 3), layers.BatchNormalization(), layers.ReLU())
    rows = _rows()
    prefix = split(model).prefix
    assert not prefix._shortcuts()[1]
    assert np.array_equal(compute(prefix, (rows,)).arrays[0], _expected(model, rows))


def test_a_kind_that_tensorflow_has_no_kernel_for_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: Any, **__: Any) -> Any:
        raise tf.errors.UnimplementedError(None, None, "no groups")

    monkeypatch.setattr(fused_norms, "_holds", {})
    monkeypatch.setattr(fused_norms.Fusion, "norm", no_kernel)
    model = _model(layers.DepthwiseConv2D(3), layers.BatchNormalization(), layers.ReLU())
    assert not split(model).prefix._shortcuts()[1]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_number_that_is_none_shows_in_the_features_as_it_does_in_keras(broken: float) -> None:
    model = _model(layers.Conv2D(16, 3), layers.BatchNormalization(), layers.ReLU(6.0))
    kernel, bias = model.layers[1].get_weights()
    kernel[0, 0, 0, 3] = broken
    model.layers[1].set_weights([kernel, bias])
    rows = _rows()
    found, wanted = compute(split(model).prefix, (rows,)).arrays[0], _expected(model, rows)
    assert np.isnan(wanted).any() == np.isnan(broken)
    assert np.array_equal(found, wanted, equal_nan=True)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_folded_features_are_nearly_those(kind: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not grouped:
        monkeypatch.setattr("transferkit.building.graph_model.holding", lambda _: {})
    model = _model(CONVOLUTIONS[kind](), layers.BatchNormalization(), layers.ReLU(6.0))
    rows = _rows()
    made = compute(split(model).prefix, (rows,), settings=CacheSettings(True, extraction="folded"))
    wanted = _expected(model, rows)
    assert np.abs(made.arrays[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_sum_of_folded_convolutions_is_nearly_that_of_keras() -> None:
    x = keras.Input(SHAPE)
    ways = [layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same")(x)) for _ in range(2)]
    model = keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D(name="last")(layers.ReLU()(layers.add(ways)))))
    for layer in model.layers[:-1]:
        layer.trainable = False
    rows, wanted = _rows(), _expected(model, _rows())
    made = compute(split(model).prefix, (rows,), settings=CacheSettings(True, extraction="folded"))
    assert 0 < made.inexact < 1e-5
    assert np.allclose(made.arrays[0], wanted, rtol=1e-5, atol=1e-5)
