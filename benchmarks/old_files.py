"""Real Keras files of 2017 to 2026: what plain Keras does with each, what `open_model` does, and whether the outputs are right.

    TRANSFERKIT_DATA=… python benchmarks/old_files.py --out result.json

Outputs are compared with a forward pass in NumPy over the arrays as h5py reads them, written out below layer by layer, in double
precision; where that would be a long network that Keras opens as well, with Keras's own. Custom layers are given, the functions
of the Lambdas too after they were refused. It needs the folder `keras_files` in $TRANSFERKIT_DATA.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import h5py
import keras
import numpy as np

import transferkit as tk
from transferkit.storage import write_json

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
MOST = 1e-5


# --- Layers in NumPy, channels last ---------------------------------------------------------------------------------


def dense(x: Array, w: Arrays, name: str) -> Array:
    return np.asarray(x @ w[f"{name}/kernel"] + w[f"{name}/bias"])


def convolution(x: Array, w: Arrays, name: str, padding: str = "valid", stride: int = 1) -> Array:
    """A convolution over any number of axes; "same" as TensorFlow pads."""
    kernel = w[f"{name}/kernel"]
    space = kernel.shape[:-2]
    if padding == "same":
        wanted = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(x.shape[1:-1], space, strict=True)]
        x = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in wanted), (0, 0)))
    axes = tuple(range(1, len(space) + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, space, axes)
    windows = windows[(slice(None), *(slice(None, None, stride) for _ in space))]
    moved = np.moveaxis(windows, len(space) + 1, -1)  # (n, places…, offsets…, channels)
    return np.tensordot(moved, kernel, axes=len(space) + 1) + w[f"{name}/bias"]


def norm(x: Array, w: Arrays, name: str, epsilon: float = 1e-3) -> Array:
    gamma, beta, mean, variance = (w[f"{name}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance"))
    return np.asarray((x - mean) / np.sqrt(variance + epsilon) * gamma + beta)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def old_hard_sigmoid(x: Array) -> Array:
    return np.clip(0.2 * x + 0.5, 0, 1)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def halved(x: Array) -> Array:
    """The largest of two along every axis of space."""
    for axis in range(1, x.ndim - 1):
        n = x.shape[axis] // 2 * 2
        pairs = np.split(np.take(x, range(n), axis), n // 2, axis)
        x = np.concatenate([pair.max(axis, keepdims=True) for pair in pairs], axis)
    return x


def lstm(x: Array, gates: Callable[[str], tuple[Array, Array, Array]], squash: Callable[[Array], Array]) -> Array:
    """All states; `gates` gives W, U and b of the gate i, f, c or o."""
    hidden = cell = np.zeros((len(x), gates("i")[2].size))
    outputs = []
    for step in x.transpose(1, 0, 2):
        i, f, c, o = (step @ W + hidden @ U + b for W, U, b in map(gates, "ifco"))
        cell = squash(f) * cell + squash(i) * np.tanh(c)
        hidden = squash(o) * np.tanh(cell)
        outputs.append(hidden)
    return np.stack(outputs, 1)


def joined(w: Arrays, name: str) -> Callable[[str], tuple[Array, Array, Array]]:
    parts = [np.split(w[f"{name}/{part}"], 4, axis=-1) for part in ("kernel", "recurrent_kernel", "bias")]
    return lambda gate: tuple(part["ifco".index(gate)] for part in parts)  # type: ignore[return-value]


# --- The networks ---------------------------------------------------------------------------------------------------


def acceptor(x: Array, w: Arrays) -> Array:
    x = norm(relu(convolution(x, w, "convSpliceSite", "same")), w, "batch_normalization_1")
    x = norm(relu(convolution(x, w, "conv1by1")), w, "batch_normalization_2")
    return sigmoid(dense(x.reshape(len(x), -1), w, "denseSS"))


def intron(x: Array, w: Arrays) -> Array:
    return dense(relu(convolution(x, w, "conv", "same")).mean(axis=1), w, "dense3")


def serdar(x: Array, w: Arrays, first: int = 1) -> Array:
    for number in range(10):
        x = relu(convolution(x, w, f"conv1d_{first + number}", "same"))
    return convolution(x, w, f"conv1d_{first + 10}", "same")


def crnn(x: Array, w: Arrays) -> Array:
    x = relu(norm(convolution(x, w, "conv1d", "same"), w, "batch_normalization"))
    x = relu(norm(convolution(x, w, "conv1d_1", "same"), w, "batch_normalization_1"))
    ahead = lstm(x, joined(w, "forward"), sigmoid)
    behind = lstm(x[:, ::-1], joined(w, "backward"), sigmoid)[:, ::-1]
    return dense(np.concatenate([ahead, behind], -1), w, "dense")


def lstm_of_keras_1(x: Array, w: Arrays) -> Array:
    own = {gate: tuple(w[f"lstm_1/lstm_1_{part}_{gate}"] for part in "WUb") for gate in "ifco"}
    last = lstm(x, lambda gate: own[gate], old_hard_sigmoid)[:, -1]  # type: ignore[arg-type, return-value]
    return np.asarray(last @ w["dense_1/dense_1_W"] + w["dense_1/dense_1_b"])


def lstm_of_keras_2(x: Array, w: Arrays) -> Array:
    return dense(lstm(x, joined(w, "lstm_1"), old_hard_sigmoid)[:, -1], w, "dense_1")


def two_dense(x: Array, w: Arrays) -> Array:
    return softmax(dense(relu(dense(x, w, "dense_1")), w, "dense_2"))


def two_convolutions(x: Array, w: Arrays) -> Array:
    x = convolution(relu(norm(convolution(x, w, "conv2d_1"), w, "batch_normalization_1")), w, "conv2d_2")
    return dense(x.reshape(len(x), -1), w, "dense_1")


def three_d(x: Array, w: Arrays) -> Array:
    for name in ("conv3d_24", "conv3d_25"):
        x = halved(np.tanh(convolution(x, w, name, "same"))[:, 1:-1, 1:-1, 1:-1])
    return x


def lambdas(x: Array, w: Arrays) -> Array:
    return softmax(dense(3 * relu(dense(x, w, "dense_3")) ** 2, w, "dense_4"))


def three_norms(x: Array, w: Arrays) -> Array:
    for number in (1, 2, 3):
        x = relu(norm(dense(x, w, f"fc{number}_relu"), w, f"bn{number}", 1e-6))
    return softmax(norm(dense(x, w, "output_softmax"), w, "bn4", 1e-6))


def digits(x: Array, w: Arrays) -> Array:
    x = halved(relu(convolution(x, w, "conv2d")))
    x = norm(relu(convolution(x, w, "conv2d_1")), w, "batch_normalization")
    x = norm(relu(convolution(x, w, "conv2d_2", "same", 2)), w, "batch_normalization_1")
    x = norm(relu(convolution(x, w, "conv2d_3")), w, "batch_normalization_2")
    x = norm(relu(convolution(x, w, "conv2d_4")), w, "batch_normalization_3")
    x = norm(relu(convolution(x, w, "conv2d_5", "same", 2)), w, "batch_normalization_4")
    return softmax(dense(x.reshape(len(x), -1), w, "dense"))


# --- The files ------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="benchmarks")
class ConvDNA(keras.layers.Conv1D):  # type: ignore[misc]
    """The author's Conv1D with one argument more."""

    def __init__(self, *, seq_length: int | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seq_length = seq_length


Network = Callable[[Array, Arrays], Array]
#: File, written by, network in NumPy (None: Keras opens it), shape of the input, what is given, the configuration's file.
FILES: Sequence[tuple[str, str, Network | None, tuple[int, ...], dict[str, Any], str]] = (
    ("face_classification__fer2013_mini_XCEPTION.119-0.65.hdf5", "Keras 2.0.5", None, (2, 48, 48, 1), {}, ""),
    ("MMSplice_MTSplice__Intron3.h5", "Keras 2.1.3", intron, (2, 40, 4), {}, ""),
    ("MMSplice_MTSplice__Acceptor.h5", "Keras 2.1.3", acceptor, (2, 53, 4), {"ConvDNA": ConvDNA}, ""),
    ("rapidtide__model_serdar__model.h5", "Keras 2.2.2", serdar, (2, 30, 1), {}, ""),
    ("rapidtide__model_serdar_tf2__model.keras", "tf_keras 2.18", serdar, (2, 30, 1), {}, ""),
    ("rapidtide__model_crnn_tf2__model.keras", "tf_keras 2.19", crnn, (2, 128, 1), {}, ""),
    ("dl4j-test-resources__simple_lstm_tf_keras_1_model.h5", "Keras 1.2.2", lstm_of_keras_1, (2, 1, 1), {}, ""),
    ("dl4j-test-resources__simple_lstm_tf_keras_2_model.h5", "Keras 2.0.6", lstm_of_keras_2, (25, 1, 1), {}, ""),
    ("dl4j-test-resources__adam.h5", "Keras 2.0.9", two_dense, (2, 100), {}, ""),
    ("dl4j-test-resources__cnn_batch_norm.h5", "Keras 2.1.3", two_convolutions, (2, 10, 10, 3), {}, ""),
    ("dl4j-test-resources__cnn3d_16.h5", "tf.keras 2.2.4", three_d, (2, 10, 10, 10, 3), {}, ""),
    (
        "dl4j-test-resources__model_lambda.h5",
        "Keras 2.0.9",
        lambdas,
        (2, 784),
        {"lambda_3": lambda x: x**2, "lambda_4": lambda x: 3 * x},
        "",
    ),
    (
        "digit-detection-unlearning__model.weights.h5",
        "Keras 3",
        digits,
        (2, 28, 28, 1),
        {},
        "digit-detection-unlearning__model.json",
    ),
    (
        "example-models__KERAS_3layer_batch_norm_weights.h5",
        "Keras 2.0.8",
        three_norms,
        (2, 16),
        {},
        "example-models__KERAS_3layer_batch_norm.json",
    ),
)
_PLACES = {"conv": ("kernel", "bias"), "dense": ("kernel", "bias"), "batch": ("gamma", "beta", "moving_mean", "moving_variance")}


def arrays_of(path: Path) -> Arrays:
    """The arrays of a file as h5py reads them, by layer and name; in double precision."""
    content: Any = path
    if path.suffix == ".keras":
        content = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    found: Arrays = {}

    def keep(name: str, node: Any) -> None:
        if not isinstance(node, h5py.Dataset) or "optimizer" in name:
            return
        parts = name.removeprefix("model_weights/").split(":")[0].split("/")
        if "vars" in parts:  # of Keras 3 and tf_keras, by number
            place = int(parts[-1])
            if "cell" in parts:
                found[f"{parts[2].split('_')[0]}/{('kernel', 'recurrent_kernel', 'bias')[place]}"] = node[()].astype("float64")
                return
            kind = next((words for start, words in _PLACES.items() if parts[1].startswith(start)), None)
            if parts[0] == "layers" and kind is not None:  # else a metric's state, or a random seed
                found[f"{parts[1]}/{kind[place]}"] = node[()].astype("float64")
        else:
            found[f"{parts[0]}/{parts[-1]}"] = node[()].astype("float64")

    with h5py.File(content) as file:
        file.visititems(keep)
    return found


def of_keras(path: Path, custom: dict[str, Any], config: Path | None) -> tuple[str, Any]:
    """What plain Keras does: a word, and the model where it opens."""
    try:
        if config is None:
            return "opens", keras.models.load_model(path, compile=False, custom_objects=custom if "ConvDNA" in custom else None)
        model = keras.models.model_from_json(config.read_text())
        model.load_weights(path)
        return "opens with the JSON", model
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return f"{type(error).__name__}: {lines[0][:60]}", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(os.environ["TRANSFERKIT_DATA"]) / "keras_files"
    random = np.random.default_rng(0)
    rows = []
    for name, written_by, network, shape, custom, json_name in FILES:
        path, config = folder / name, folder / json_name if json_name else None
        x = random.normal(size=shape)
        said, by_keras = of_keras(path, custom, config)
        outcome = "opens with the JSON" if config else "opens"
        if custom:
            try:
                tk.open_model(path)
                raise AssertionError(f"{name} opened without {list(custom)}")
            except tk.errors.TransferKitError as error:
                outcome = (
                    f"{'refused' if isinstance(error, tk.errors.UnsafeFileError) else 'asks'}; opens with {', '.join(custom)}"
                )
        model = tk.open_model(path, custom, config=config)
        got = model.predict(x.astype("float32"), batch_size=len(x), verbose=0)
        w = arrays_of(path)
        if network is serdar and path.suffix == ".keras":
            w = {key.replace("conv1d/", "conv1d_0/"): value for key, value in w.items()}
            expected = serdar(x.astype("float32").astype("float64"), w, first=0)
        elif network is not None:
            expected = network(x.astype("float32").astype("float64"), w)
        else:
            expected = by_keras.predict(x.astype("float32"), batch_size=len(x), verbose=0)
        difference = float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-3))
        assert got.shape == expected.shape, (name, got.shape, expected.shape)
        assert difference < MOST, f"{name}: outputs differ by {difference:.2g}"
        oracle = "NumPy" if network is not None else "Keras"
        rows.append(
            {
                "file": name,
                "written_by": written_by,
                "keras": said,
                "transferkit": outcome,
                "oracle": oracle,
                "difference": difference,
            }
        )
    print(f"{'file':56} {'written by':15} {'plain Keras':75} {'open_model':45} outputs against")
    for row in rows:
        print(
            f"{row['file']:56} {row['written_by']:15} {row['keras']:75} {row['transferkit']:45} "
            f"{row['oracle']}: {row['difference']:.1e}"
        )
    if options.out:
        versions = {"python": platform.python_version(), "keras": keras.__version__, "numpy": np.__version__}
        write_json(options.out, {"rows": rows, "versions": versions | {"transferkit": tk.__version__}})


if __name__ == "__main__":
    main()
