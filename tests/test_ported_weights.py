"""Real files of other frameworks into Keras models, through the public face, without torch."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from networks import resnet20

import transferkit as tk
from transferkit.errors import MatchError
from transferkit.weights.readers import open_archive

CIFAR_MEAN, CIFAR_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convolved(x: np.ndarray[Any, Any], kernel: np.ndarray[Any, Any], stride: int, padding: int) -> np.ndarray[Any, Any]:
    """PyTorch's convolution written out: x (n, c, h, w), kernel (o, c, kh, kw)."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.asarray(np.einsum("nchwij,ocij->nohw", windows, kernel, optimize=True))


def resnet20_in_numpy(state: dict[str, np.ndarray[Any, Any]], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The forward pass of the PyTorch model from its state dict alone, (n, 3, 32, 32) → logits."""

    def unit(x: np.ndarray[Any, Any], conv: str, bn: str, stride: int) -> np.ndarray[Any, Any]:
        x = convolved(x, state[f"{conv}.weight"], stride, 1)
        mean, variance, scale, offset = (state[f"{bn}.{k}"][:, None, None] for k in _NORM)
        return np.asarray((x - mean) / np.sqrt(variance + 1e-5) * scale + offset)

    x = np.maximum(unit(x, "conv1", "bn1", 1), 0)
    for stage in (1, 2, 3):
        for block in range(3):
            stride, place = 2 if stage > 1 and block == 0 else 1, f"layer{stage}.{block}"
            y = np.maximum(unit(x, f"{place}.conv1", f"{place}.bn1", stride), 0)
            y = unit(y, f"{place}.conv2", f"{place}.bn2", 1)
            if stride == 2:
                x = x[:, :, ::2, ::2]
                pad = (y.shape[1] - x.shape[1]) // 2
                x = np.pad(x, ((0, 0), (pad, pad), (0, 0), (0, 0)))
            x = np.maximum(x + y, 0)
    return np.asarray(x.mean(axis=(2, 3)) @ state["linear.weight"].T + state["linear.bias"])


_NORM = ("running_mean", "running_var", "weight", "bias")


def cifar(folder: Path, every: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    image = pytest.importorskip("PIL.Image")
    with zipfile.ZipFile(folder / "images" / "cifar10_jpg_subset_12k.zip") as archive:
        names = sorted(n for n in archive.namelist() if "/test/" in n and n.endswith(".jpg"))[::every]
        classes = sorted({n.split("/")[-2] for n in names})
        x = np.stack([np.asarray(image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names])
    y = np.array([classes.index(n.split("/")[-2]) for n in names])
    scaled = (x.astype("float32") / 255 - np.array(CIFAR_MEAN, "float32")) / np.array(CIFAR_DEVIATION, "float32")
    return scaled, y


def test_resnet20_of_pytorch(shared_data: Path) -> None:
    path = shared_data / "torch" / "resnet20-12fca82f.th"
    model = resnet20()
    refused = tk.WeightLoader(path).match(model)
    assert refused.problems == (
        "the file is PyTorch's, whose kernels are stored transposed: "
        'add .layout("torch"), or .layout("keras") if its arrays are in Keras\'s layout',
    )
    report = tk.WeightLoader(path).layout("torch").load(model)
    assert report.coverage == 1
    x, y = cifar(shared_data, every=1)
    logits = model.predict(x, batch_size=250, verbose=0)
    assert 0.81 <= (logits.argmax(1) == y).mean() <= 0.83
    with open_archive(path) as archive:
        state = {name: np.array(archive.read(name), "float64") for name in archive.arrays}
    few = x[::125]
    assert (
        np.abs(resnet20_in_numpy(state, few.transpose(0, 3, 1, 2).astype("float64")) - model.predict(few, verbose=0)).max() < 1e-4
    )


def test_resnet20_by_order_into_names_of_ones_own(shared_data: Path) -> None:
    path = shared_data / "torch" / "resnet20-12fca82f.th"
    model = resnet20()
    by_name = tk.WeightLoader(path).layout("torch").load(model)
    other = keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "name": f"mine_{layer.name}x"})
    )
    assert not tk.WeightLoader(path).layout("torch").match(other).ok
    report = tk.WeightLoader(path).layout("torch").by_order().load(other)
    assert any("matched by their order alone, as asked" in note for note in report.notes)
    assert [t.source for t in report.tensors] == [t.source for t in by_name.tensors]


def test_digits_of_pytorch_through_a_flatten(shared_data: Path) -> None:
    start = keras.Input((28, 28, 1))
    x = layers.ReLU()(layers.MaxPooling2D()(layers.Conv2D(10, 5, name="conv1")(start)))
    x = layers.ReLU()(layers.MaxPooling2D()(layers.Conv2D(20, 5, name="conv2")(x)))
    x = layers.Dense(50, "relu", name="fc1")(layers.Flatten()(x))
    model = keras.Model(start, layers.Dense(10, name="fc2")(x))
    report = tk.WeightLoader(shared_data / "torch" / "aimed_digits.pth").layout("torch").load(model)
    assert report["fc1/kernel"].why == "transposed, rows from channels-first to channels-last order of (4, 4, 20)"
    with np.load(shared_data / "images" / "mnist.npz") as data:
        x_test, y_test = data["x_test"][::5, ..., None].astype("float32") / 255, data["y_test"][::5]
    assert (model.predict(x_test, verbose=0).argmax(1) == y_test).mean() > 0.95


def pnet() -> Any:
    start = x = keras.Input((None, None, 3))
    for number, filters in enumerate((10, 16, 32), 1):
        x = layers.Conv2D(filters, 3, name=f"conv{number}")(x)
        x = layers.PReLU(shared_axes=[1, 2], name=f"prelu{number}")(x)
        x = layers.MaxPooling2D(padding="same")(x) if number == 1 else x
    return keras.Model(start, [layers.Conv2D(n, 1, name=f"conv4_{i}")(x) for i, n in ((1, 2), (2, 4), (3, 10))])


def test_pnet_of_a_tensorflow_checkpoint(shared_data: Path) -> None:
    path = shared_data / "tf_checkpoint" / "PNet" / "PNet-18.index"
    alphas = {f"prelu{n}/alpha": f"conv{n}/alphas" for n in (1, 2, 3)}
    model = pnet()
    report = tk.WeightLoader(path).map(alphas).skip("Variable", of="file").load(model)
    assert report.coverage == 1
    assert report["prelu1/alpha"].why == "reshaped from (10,)"
    assert any("optimizer state" in note for note in report.notes)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 12, 12, 3)).astype("float32")
    with open_archive(path) as archive:
        state = {name: np.array(archive.read(name), "float64") for name in archive.arrays}

    def conv(x: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        kernel = state[f"{name}/weights"].transpose(3, 2, 0, 1)
        return np.asarray(convolved(x, kernel, 1, 0) + state[f"{name}/biases"][:, None, None])

    h = x.transpose(0, 3, 1, 2).astype("float64")
    for n in (1, 2, 3):
        h = conv(h, f"conv{n}")
        h = np.where(h > 0, h, h * state[f"conv{n}/alphas"][:, None, None])
        if n == 1:
            h = h.reshape(1, 10, 5, 2, 5, 2).max(axis=(3, 5))
    for number, output in enumerate(model.predict(x, verbose=0), 1):
        assert np.abs(conv(h, f"conv4_{number}").transpose(0, 2, 3, 1) - output).max() < 1e-4


def squeezenet(separator: str) -> Any:
    def fire(x: Any, number: int, squeeze: int, expand: int) -> Any:
        place = f"fire{number}{separator}"
        x = layers.Conv2D(squeeze, 1, activation="relu", name=f"{place}squeeze1x1")(x)
        left = layers.Conv2D(expand, 1, activation="relu", name=f"{place}expand1x1")(x)
        right = layers.Conv2D(expand, 3, padding="same", activation="relu", name=f"{place}expand3x3")(x)
        return layers.Concatenate()([left, right])

    start = keras.Input((96, 96, 3))
    x = layers.MaxPooling2D(3, 2)(layers.Conv2D(64, 3, 2, activation="relu", name="conv1")(start))
    for number, squeeze, expand in ((2, 16, 64), (3, 16, 64), (4, 32, 128), (5, 32, 128), (6, 48, 192), (7, 48, 192)):
        x = fire(x, number, squeeze, expand)
        x = layers.MaxPooling2D(3, 2)(x) if number in (3, 5) else x
    return keras.Model(start, fire(fire(x, 8, 64, 256), 9, 64, 256), name="squeezenet")


def test_squeezenet_into_a_builder_of_ones_own(shared_data: Path) -> None:
    path = shared_data / "weights" / "squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"
    model, plain = squeezenet("_"), squeezenet("_")
    with pytest.raises(MatchError, match="doesn't say whether it was trained on Theano"):
        tk.WeightLoader(path).load(model)  # a file of Keras 1, whose name alone says so
    report = tk.WeightLoader(path).layout("tensorflow").load(model)
    assert report.coverage == 1
    plain.load_weights(path)  # by topology: the file lists the layers in this very order
    x = np.random.default_rng(0).uniform(-128, 128, (2, 96, 96, 3)).astype("float32")
    assert np.array_equal(model.predict(x, verbose=0), plain.predict(x, verbose=0))


@pytest.mark.filterwarnings("ignore:This model usually expects 1 or 3 input channels")
@pytest.mark.parametrize("channels", [1, 6])
def test_an_imagenet_stem_on_other_channels(shared_data: Path, channels: int) -> None:
    path = next((shared_data / "keras_home" / "models").glob("mobilenet_2_5_*_no_top.h5"))
    saved = keras.applications.MobileNet((96, 96, 3), alpha=0.25, include_top=False, weights=None)
    tk.WeightLoader(path).load(saved)
    start = keras.Input((96, 96, channels))
    inner = keras.applications.MobileNet((96, 96, channels), alpha=0.25, include_top=False, weights=None)
    model = keras.Model(start, inner(start))
    report = tk.WeightLoader(path).channels().load(model)
    assert [t.name.rpartition("/")[2] for t in report.adapted] == ["kernel"]
    gray = np.random.default_rng(0).uniform(-1, 1, (2, 96, 96, 1)).astype("float32")
    few, three = np.repeat(gray, channels, -1), np.repeat(gray, 3, -1)
    assert np.abs(inner.layers[1](few).numpy() - saved.layers[1](three).numpy()).max() < 1e-5
    expected = saved.predict(three, verbose=0)
    assert np.abs(model.predict(few, verbose=0) - expected).max() < 1e-5 * np.abs(expected).max()
