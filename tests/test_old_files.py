"""Files of Keras 1 and 2 loaded into models of Keras 3 by `WeightLoader`: right, with what was done in the report, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers

import transferkit as tk

Array = np.ndarray[Any, Any]
rng = np.random.default_rng(0)


def weights_file(path: Path, arrays: Mapping[str, Mapping[str, Array]], *, config: Any = None, **attributes: str) -> Path:
    """A weights file of Keras 1 or 2: layer → the file's name of an array → its values."""
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if config else file
        for key, value in attributes.items():
            file.attrs[key] = value
        if config:
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": config})
        group.attrs["layer_names"] = [name.encode() for name in arrays]
        for layer, own in arrays.items():
            inner = group.create_group(layer)
            inner.attrs["weight_names"] = [name.encode() for name in own]
            for name, array in own.items():
                inner[name] = array.astype("float32")
    return path


def gates(name: str, letters: str, inputs: int, units: int, ending: str = ":0") -> dict[str, Array]:
    shapes = {"W": (inputs, units), "U": (units, units), "b": (units,)}
    return {f"{name}_{part}_{gate}{ending}": rng.normal(size=shapes[part]) for gate in letters for part in shapes}


def hard(x: Array) -> Array:
    return np.clip(0.2 * x + 0.5, 0, 1)


def lstm_of_keras_1(own: Mapping[str, Array], name: str, x: Array) -> Array:
    """The last state, by the equations of Keras 1 and a sigmoid."""
    units = own[f"{name}_b_i:0"].size
    h = c = np.zeros((len(x), units))
    for step in x.transpose(1, 0, 2):
        i, new, f, o = (step @ own[f"{name}_W_{g}:0"] + h @ own[f"{name}_U_{g}:0"] + own[f"{name}_b_{g}:0"] for g in "icfo")
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
        h = sigmoid(o) * np.tanh(c)
    return h


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def test_an_lstm_of_keras_1_from_twelve_arrays(tmp_path: Path) -> None:
    own = gates("lstm_1", "icfo", 3, 4)
    model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(4)])
    report = tk.WeightLoader(weights_file(tmp_path / "w.h5", {"lstm_1": own})).load(model)
    assert [t.why for t in report.tensors] == ["four gates of three arrays joined"] * 3
    assert [t.status for t in report.tensors] == ["adapted"] * 3
    x = rng.normal(size=(2, 5, 3))
    np.testing.assert_allclose(model.predict(x, verbose=0), lstm_of_keras_1(own, "lstm_1", x), atol=1e-5)
    assert report.verify(model)


def test_a_bidirectional_lstm_of_keras_1(tmp_path: Path) -> None:
    forward, backward = gates("forward_lstm_1", "icfo", 3, 4), gates("backward_lstm_1", "icfo", 3, 4)
    path = weights_file(tmp_path / "w.h5", {"bidirectional_1": {**forward, **backward}})
    model = keras.Sequential([keras.Input((5, 3)), layers.Bidirectional(layers.LSTM(4))])
    tk.WeightLoader(path).load(model)
    x = rng.normal(size=(2, 5, 3))
    expected = [lstm_of_keras_1(forward, "forward_lstm_1", x), lstm_of_keras_1(backward, "backward_lstm_1", x[:, ::-1])]
    np.testing.assert_allclose(model.predict(x, verbose=0), np.concatenate(expected, -1), atol=1e-5)


def test_another_slope_of_hard_sigmoid_is_told(tmp_path: Path) -> None:
    config = [{"class_name": "LSTM", "config": {"name": "lstm_1", "output_dim": 4, "inner_activation": "hard_sigmoid"}}]
    path = weights_file(tmp_path / "w.h5", {"lstm_1": gates("lstm_1", "icfo", 3, 4)}, config=config, keras_version="1.2.2")
    notes = {
        activation: tk.WeightLoader(path)
        .load(keras.Sequential([keras.Input((5, 3)), layers.LSTM(4, recurrent_activation=activation, name="lstm_1")]))
        .notes
        for activation in ("hard_sigmoid", "sigmoid")
    }
    assert notes["hard_sigmoid"][0] == (
        "'lstm_1' gives other outputs than the saved layer: recurrent_activation='hard_sigmoid' was clip(0.2 x + 0.5, 0, 1) in "
        "the file's Keras, has the slope 1/6 in this one"
    )
    assert notes["sigmoid"][0] == (
        "'lstm_1' gives other outputs than the saved layer: recurrent_activation='hard_sigmoid' in the file, "
        "'sigmoid' in the model"
    )


@pytest.mark.parametrize(("kind", "count"), [("LSTM", 4), ("GRU", 3)])
def test_gates_of_cudnn(tmp_path: Path, kind: str, count: int) -> None:
    """CuDNN computes each gate from the transposed pieces that its file has: x Wᵀ + h Uᵀ + b + c."""
    units = 4
    kernel, recurrent = rng.normal(size=(3, count * units)), rng.normal(size=(units, count * units))
    bias = rng.normal(size=2 * count * units)
    name = f"cu_dnn{kind.lower()}"
    arrays = {f"{name}/{word}:0": a for word, a in (("kernel", kernel), ("recurrent_kernel", recurrent), ("bias", bias))}
    path = weights_file(tmp_path / "w.h5", {name: arrays}, keras_version="2.2.4", backend="tensorflow")
    model = keras.Sequential([keras.Input((5, 3)), getattr(layers, kind)(units)])
    report = tk.WeightLoader(path).load(model)
    assert report.adapted[0].why.startswith("CuDNN's gates transposed, its two biases")
    w = [piece.T.reshape(piece.shape, order="F") for piece in np.split(kernel, count, 1)]
    u = [piece.T for piece in np.split(recurrent, count, 1)]
    b, c = (np.split(half, count) for half in np.split(bias, 2))
    x = rng.normal(size=(2, 5, 3))
    h = cell = np.zeros((2, units))
    for step in x.transpose(1, 0, 2):
        if kind == "LSTM":
            i, f, new, o = (step @ w[g] + h @ u[g] + b[g] + c[g] for g in range(4))
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(new)
            h = sigmoid(o) * np.tanh(cell)
        else:
            z, r = (sigmoid(step @ w[g] + h @ u[g] + b[g] + c[g]) for g in range(2))
            h = z * h + (1 - z) * np.tanh(step @ w[2] + b[2] + r * (h @ u[2] + c[2]))
    np.testing.assert_allclose(model.predict(x, verbose=0), h, atol=1e-5)


def test_a_gru_with_another_reset_is_refused(tmp_path: Path) -> None:
    arrays = {"kernel": np.zeros((3, 12)), "recurrent_kernel": np.zeros((4, 12)), "bias": np.zeros(12)}
    own = {f"gru/{word}:0": array for word, array in arrays.items()}
    path = weights_file(tmp_path / "w.h5", {"gru": own}, keras_version="2.2.4", backend="tensorflow")
    refused = tk.WeightLoader(path).match(keras.Sequential([keras.Input((5, 3)), layers.GRU(4, name="gru")]))
    assert refused.problems == (
        "'gru/gru_cell/bias': the file's 'gru/bias' has the shape (12,), the variable (2, 12); the file's layer applies its "
        "reset gate before the recurrent kernel: build GRU(…, reset_after=False)",
    )
    tk.WeightLoader(path).load(keras.Sequential([keras.Input((5, 3)), layers.GRU(4, reset_after=False, name="gru")]))


def convolved(x: Array, kernel: Array) -> Array:
    """Correlation of (n, c, h, w) with (filters, channels, rows, columns)."""
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))
    return np.asarray(np.einsum("nchwij,ocij->nohw", windows, kernel))


@pytest.mark.parametrize("backend", ["theano", "tensorflow"])
@pytest.mark.parametrize("told", ["by the names", "by the layout", "by the configuration"])
def test_theanos_kernels_and_the_rows_behind_their_flatten(tmp_path: Path, backend: str, told: str) -> None:
    kernel, bias = rng.normal(size=(4, 2, 3, 3)), rng.normal(size=4)
    weight, offset = rng.normal(size=(4 * 3 * 4, 5)), rng.normal(size=5)
    ending = ":0" if backend == "tensorflow" and told != "by the layout" else ""
    arrays = {
        "convolution2d_1": {f"convolution2d_1_W{ending}": kernel, f"convolution2d_1_b{ending}": bias},
        "dense_1": {f"dense_1_W{ending}": weight, f"dense_1_b{ending}": offset},
    }
    config = [
        {"class_name": "Convolution2D", "config": {"name": "convolution2d_1", "dim_ordering": "th"}},
        {"class_name": "Flatten", "config": {"name": "flatten_1"}},
        {"class_name": "Dense", "config": {"name": "dense_1"}},
    ]
    by_config: Any = {"config": config, "keras_version": "1.2.2"} if told == "by the configuration" else {}
    loader = tk.WeightLoader(weights_file(tmp_path / "w.h5", arrays, **by_config))
    if told == "by the layout":
        loader = loader.layout(backend)
    model = keras.Sequential([keras.Input((5, 6, 2)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(5)])
    report = loader.load(model)
    assert report.tensors[0].why.startswith("the kernel from Theano's order of axes")
    assert report.tensors[2].why == "rows from channels-first to channels-last order of (3, 4, 4)"
    x = rng.normal(size=(2, 2, 5, 6))
    turned = kernel[:, :, ::-1, ::-1] if backend == "theano" else kernel
    expected = (convolved(x, turned) + bias[:, None, None]).reshape(2, -1) @ weight + offset
    np.testing.assert_allclose(model.predict(x.transpose(0, 2, 3, 1), verbose=0), expected, atol=1e-4)


def test_what_neither_file_nor_shapes_tell_is_asked_for(tmp_path: Path) -> None:
    def net(filters: int) -> Any:
        return keras.Sequential([keras.Input((5, 6, 2)), layers.Conv2D(filters, 3, name="conv")])

    old = {"layer_0": {"param_0": rng.normal(size=(4, 2, 3, 3)), "param_1": rng.normal(size=4)}}
    path = weights_file(tmp_path / "old.h5", old)
    assert tk.WeightLoader(path).match(net(4)).problems == (
        "the file doesn't say whether it was trained on Theano, which turns kernels round ('layer_0'): add .layout(\"theano\") "
        'if it was, .layout("tensorflow") if not',
    )
    loader = tk.WeightLoader(path).map({"conv": "layer_0"})
    assert loader.layout("theano").load(net(4)).coverage == 1
    square = {"conv": {"conv_W:0": rng.normal(size=(2, 3, 3, 2)), "conv_b:0": rng.normal(size=2)}}
    path = weights_file(tmp_path / "square.h5", square)
    assert tk.WeightLoader(path).match(net(2)).problems == (
        "the kernels of 'conv' may be in Theano's order of axes or in TensorFlow's: neither the file nor the shapes tell which",
    )


def test_a_file_of_keras_1_that_needs_nothing_but_names(tmp_path: Path) -> None:
    words = {"gamma": "gamma", "beta": "beta", "running_mean": "moving_mean", "running_std": "moving_variance"}
    norm = {f"batchnormalization_1_{word}:0": rng.uniform(1, 2, size=4) for word in words}
    recurrent = {
        "simplernn_1_W:0": rng.normal(size=(4, 5)),
        "simplernn_1_U:0": rng.normal(size=(5, 5)),
        "simplernn_1_b:0": np.ones(5),
    }
    path = weights_file(tmp_path / "w.h5", {"batchnormalization_1": norm, "simplernn_1": recurrent})
    model = keras.Sequential([keras.Input((3, 4)), layers.BatchNormalization(), layers.SimpleRNN(5)])
    report = tk.WeightLoader(path).load(model)
    assert report.coverage == 1
    assert not report.adapted
    for word, variable in words.items():
        got = next(w for w in model.layers[0].weights if w.name == variable)
        np.testing.assert_array_equal(got, norm[f"batchnormalization_1_{word}:0"].astype("float32"))
