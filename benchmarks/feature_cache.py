"""Claim: what a phase freezes is computed once, with plain Keras's weights, in a fraction of the time of its `fit`.

    python benchmarks/feature_cache.py result.json [--rows 800] [--epochs 10] [--cuts all block_12_add block_6_project_BN]
    python benchmarks/feature_cache.py result.json --images folder-or-zip [--network MobileNetV2-0.35] [--rows 2000] [--size 96]

The same model on the same batches in the same order, A B A B in one process, each turn with a model built anew and compiled;
medians. The first turn is told by itself: a process that builds the same network again doesn't trace its frozen part again. The
weights of both are compared before a time is told: to the bit for a backbone frozen whole, to 1e-6 of the largest where
TensorFlow may rewrite the two graphs in different ways. Without images the rows are random. ImageNet weights come from Keras's
own folder (`KERAS_HOME`); with --random there are none.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import time
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from clocks import settle

import transferkit as tk
from transferkit.tuning.feeding import epoch_order

BATCH, RATE, SEED = 32, 1e-3, 1


def model_of(network: str, size: int, classes: int, *, random: bool) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    name, alpha = network.split("-")
    make = getattr(keras.applications, name)
    base = make((size, size, 3), alpha=float(alpha), include_top=False, pooling="avg", weights=None)
    if not random:
        # The weights were trained at 224 pixels, and fit any size.
        base.set_weights(make((224, 224, 3), alpha=float(alpha), include_top=False, weights="imagenet").get_weights())
    pixels = keras.Input((size, size, 3))
    return keras.Model(pixels, keras.layers.Dense(classes)(base(pixels)))


def freeze(model: Any, up_to: str | None) -> None:
    base = model.layers[1]
    for layer in base.layers:
        layer.trainable = False
    if up_to is not None:
        names = [layer.name for layer in base.layers]
        for layer in base.layers[names.index(up_to) + 1 :]:
            layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)


class Ordered:
    """The rows in the order transferkit takes them, so that both train on the same batches, in a data set like the one that `fit`
    makes of arrays: all in TensorFlow, and told how large batches are where all are alike, by which it may order sums. It is the
    fastest of three ways tried; with a `PyDataset` plain `fit` takes a sixth longer."""

    def __init__(self, x: Any, y: Any) -> None:
        self.parts = tf.constant(x), tf.constant(y)
        self.order = tf.Variable(np.arange(len(x)))

    def begin(self, epoch: int) -> None:
        self.order.assign(epoch_order(len(self.parts[0]), seed=SEED, epoch=epoch))

    def dataset(self) -> Any:
        count = len(self.parts[0])

        def batch(index: Any) -> Any:
            rows = self.order[index * BATCH : (index + 1) * BATCH]
            taken = [tf.gather(part, rows) for part in self.parts]
            for part in taken if count % BATCH == 0 else ():
                part.set_shape((BATCH, *part.shape[1:]))
            return tuple(taken)

        return tf.data.Dataset.range(-(-count // BATCH)).map(batch).prefetch(tf.data.AUTOTUNE)


def by_keras(model: Any, up_to: str | None, train: Any, test: Any, epochs: int) -> tuple[float, Any]:
    freeze(model, up_to)
    begun = time.perf_counter()
    model.compile(keras.optimizers.Adam(RATE), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    rows = Ordered(*train)
    # Keras looks at a batch before the first epoch, so the end of an epoch is no sign that it ran.
    turn = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: rows.begin(epoch))
    given: dict[str, Any] = {"validation_data": test, "validation_batch_size": BATCH, "callbacks": [turn]}
    found = model.fit(rows.dataset(), epochs=epochs, shuffle=False, verbose=0, **given).history
    return time.perf_counter() - begun, found


def by_cache(model: Any, up_to: str | None, train: Any, test: Any, epochs: int) -> tuple[float, Any]:
    layers = tk.Layers.head() if up_to is None else tk.Layers.head() | tk.Layers.above(up_to)
    plan = tk.FineTuner().phase("one", train=layers, epochs=epochs, learning_rate=RATE).metrics("accuracy")
    begun = time.perf_counter()
    run = plan.fit(model, train, validation_data=test, seed=SEED, batch_size=BATCH, verbose=0)
    taken = time.perf_counter() - begun
    if "computed once" not in run.phases[0].frozen:
        raise SystemExit(run.phases[0].frozen)
    return taken, run.history


def pictures(source: str, size: int, rows: int, preprocess: Any) -> tuple[Any, Any, int]:
    """Rows to train and to test on: a folder (or archive) with `train` and `val` or `test`, a folder for each class in both."""
    found: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    if source.endswith(".zip"):
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                parts = name.split("/")
                if name.lower().endswith((".jpg", ".jpeg", ".png")):
                    found["train" if "train" in parts else "test"].append((parts[-2], archive.read(name)))
    else:
        for path in sorted(Path(source).rglob("*.*")):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                found["train" if "train" in path.parts else "test"].append((path.parent.name, path.read_bytes()))
    classes = sorted({name for name, _ in found["train"]})
    parts = []
    for part, most in (("train", rows), ("test", max(rows // 4, 200))):
        chosen = np.random.default_rng(0).permutation(len(found[part]))[:most]
        images = [
            keras.utils.img_to_array(keras.utils.load_img(io.BytesIO(found[part][i][1]), target_size=(size, size)))
            for i in chosen
        ]
        labels = np.array([classes.index(found[part][i][0]) for i in chosen])
        parts.append((preprocess(np.stack(images)), labels))
    return parts[0], parts[1], len(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=int, nargs="*", default=[10])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--network", nargs="*", default=["MobileNetV2-0.35"])
    parser.add_argument("--images")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--cuts", nargs="*", default=["all", "block_12_add", "block_6_project_BN"])
    given = parser.parse_args()
    results = []
    for network in given.network:
        preprocess = keras.applications.mobilenet_v2.preprocess_input  # the same for MobileNet: to −1 … 1
        test: Any = None
        if given.images:
            train, test, classes = pictures(given.images, given.size, given.rows, preprocess)
        else:
            random = np.random.default_rng(0)
            shape = (given.rows, given.size, given.size, 3)
            train = random.uniform(-1, 1, shape).astype("float32"), random.integers(0, 10, given.rows)
            classes = 10
        for cut in given.cuts:
            for epochs in given.epochs:
                results.append(measured(given, network, cut, train, test, classes, epochs))
    machine = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count() or 0, "load": list(os.getloadavg())}
    content = {"images": Path(given.images).name if given.images else None, "machine": machine, "results": results}
    Path(given.result).write_text(json.dumps(content, indent=1))


def measured(given: Any, network: str, cut: str, train: Any, test: Any, classes: int, epochs: int) -> dict[str, Any]:
    up_to = None if cut == "all" else cut
    seconds: dict[str, list[float]] = {"keras": [], "cached": []}
    difference = 0.0
    for _ in range(given.turns):
        models, histories = [], []
        for name, way in (("keras", by_keras), ("cached", by_cache)):
            model = model_of(network, given.size, classes, random=given.random)
            settle()
            taken, history = way(model, up_to, train, test, epochs)
            seconds[name].append(taken)
            models.append(model)
            histories.append(history)
        for a, b in zip(models[0].weights, models[1].weights, strict=True):
            largest = max(float(np.max(np.abs(a.numpy()), initial=0.0)), 1e-30)
            difference = max(difference, float(np.max(np.abs(a.numpy() - b.numpy()), initial=0.0)) / largest)
    if difference > (0.0 if up_to is None else 1e-6):
        raise SystemExit(f"{cut}: weights differ by {difference:.1e} of the largest; no times are told of different results")
    first = {name: values[0] for name, values in seconds.items()}
    medians = {name: statistics.median(values[1:] or values) for name, values in seconds.items()}
    times, times_first = medians["keras"] / medians["cached"], first["keras"] / first["cached"]
    accuracies = [history["val_accuracy"][-1] for history in histories] if test is not None else []
    beside = f", accuracy {accuracies[0]:.3f} and {accuracies[1]:.3f} of {len(test[1])}" if accuracies else ""
    print(
        f"{network}, {len(train[1])} rows, frozen {cut}, {epochs} epochs: plain fit {medians['keras']:.1f} s, cached "
        f"{medians['cached']:.2f} s, {times:.1f} times; the first turn of the process {first['keras']:.1f} s, "
        f"{first['cached']:.2f} s, {times_first:.1f} times{beside}; largest relative difference {difference:.1e}",
        flush=True,
    )
    return {
        "network": network,
        "rows": len(train[1]),
        "epochs": epochs,
        "cut": cut,
        "seconds": seconds,
        "times": times,
        "times_first": times_first,
        "accuracies": accuracies,
        "largest_difference": difference,
    }


if __name__ == "__main__":
    main()
