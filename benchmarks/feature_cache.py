"""Frozen layers computed once, against plain Keras `fit` of the same model on the same batches: the same weights in less time.

    python benchmarks/feature_cache.py result.json --rows 800 --epochs 10 [--weights folder]

A B A B in one process; medians and spread. The weights of both are compared to the bit before a time is told. With --weights,
MobileNetV2 0.35 gets the ImageNet weights found there (`models/mobilenet_v2*0.35*no_top.h5`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.tuning.feeding import epoch_order

SIZE = 96


def model_of(weights: str | None) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    base = keras.applications.MobileNetV2((SIZE, SIZE, 3), alpha=0.35, include_top=False, pooling="avg", weights=None)
    if weights:
        (file,) = Path(weights).glob("models/mobilenet_v2*0.35*no_top.h5")
        base.load_weights(file)
    pixels = keras.Input((SIZE, SIZE, 3))
    return keras.Model(pixels, keras.layers.Dense(10)(base(pixels)))


def freeze(model: Any, up_to: str | None) -> None:
    base = model.layers[1]
    for layer in base.layers:
        layer.trainable = False
    if up_to is not None:
        names = [layer.name for layer in base.layers]
        for layer in base.layers[names.index(up_to) + 1 :]:
            layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)


class Ordered(keras.utils.PyDataset):
    """The rows in the order transferkit takes them, so that both train on the same batches."""

    def __init__(self, x: Any, y: Any) -> None:
        super().__init__()
        self.x, self.y, self.epoch = x, y, 0
        self.order = epoch_order(len(x), seed=1, epoch=0)

    def __len__(self) -> int:
        return -(-len(self.x) // 32)

    def __getitem__(self, index: int) -> Any:
        rows = self.order[32 * index : 32 * index + 32]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self) -> None:
        self.epoch += 1
        self.order = epoch_order(len(self.x), seed=1, epoch=self.epoch)


def by_keras(weights: str | None, up_to: str | None, x: Any, y: Any, epochs: int) -> tuple[float, Any]:
    model = model_of(weights)
    freeze(model, up_to)
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    begun = time.perf_counter()
    model.fit(Ordered(x, y), epochs=epochs, shuffle=False, verbose=0)
    return time.perf_counter() - begun, model


def by_cache(weights: str | None, up_to: str | None, x: Any, y: Any, epochs: int) -> tuple[float, Any]:
    model = model_of(weights)
    train = tk.Layers.head() if up_to is None else tk.Layers.head() | tk.Layers.above(up_to)
    plan = tk.FineTuner().phase("one", train=train, epochs=epochs, learning_rate=1e-3)
    begun = time.perf_counter()
    plan.fit(model, (x, y), seed=1, batch_size=32, verbose=0)
    return time.perf_counter() - begun, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--weights")
    parser.add_argument("--cuts", nargs="*", default=["all", "block_12_add", "block_6_project_BN"])
    given = parser.parse_args()
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (given.rows, SIZE, SIZE, 3)).astype("float32")
    y = random.integers(0, 10, given.rows)
    results = []
    for cut in given.cuts:
        up_to = None if cut == "all" else cut
        seconds: dict[str, list[float]] = {"keras": [], "cached": []}
        difference = 0.0
        for _ in range(given.turns):
            taken, plain = by_keras(given.weights, up_to, x, y, given.epochs)
            seconds["keras"].append(taken)
            taken, ours = by_cache(given.weights, up_to, x, y, given.epochs)
            seconds["cached"].append(taken)
            for a, b in zip(plain.weights, ours.weights, strict=True):
                difference = max(difference, float(np.max(np.abs(a.numpy() - b.numpy()), initial=0.0)))
        if difference > 1e-5:
            raise SystemExit(f"{cut}: weights differ by {difference:.1e}; no times are told of different results")
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        times = medians["keras"] / medians["cached"]
        print(f"{cut}: plain fit {medians['keras']:.1f} s, cached {medians['cached']:.2f} s, {times:.1f} times")
        print(f"  largest difference of a weight: {difference:.1e}")
        results.append({"cut": cut, "seconds": seconds, "times": times, "largest_difference": difference})
    machine = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count() or 0, "load": list(os.getloadavg())}
    content = {"rows": given.rows, "epochs": given.epochs, "machine": machine, "results": results}
    Path(given.result).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
