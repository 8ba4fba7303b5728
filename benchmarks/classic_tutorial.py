"""Claim: the classic tutorial (784-128-64-10, batches of 32) through transferkit ends with plain Keras's weights, in its time.

Both ways train the same network from the same file on the same batches; the weights are asserted to be equal to the bit before
any time is printed. A B A B, medians.

    python benchmarks/classic_tutorial.py result.json [mnist.npz]

Without MNIST's file, rows of the same shape made at random stand in for it.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.tuning.feeding import epoch_order

EPOCHS, BATCH, ROWS, TIMES, SEED = 3, 32, 20_000, 3, 0
NETWORK = tk.ModelBuilder((784,)).dense(128, "relu").dense(64, "relu").classifier(10)


def rows_of(mnist: str | None) -> tuple[Any, Any]:
    if mnist is None:
        random = np.random.default_rng(0)
        y = random.integers(0, 10, ROWS)
        return (random.random((ROWS, 784)) * (1 + y[:, None]) / 10).astype("float32"), y
    with np.load(mnist) as held:
        chosen = np.random.default_rng(0).permutation(len(held["x_train"]))[:ROWS]
        return (held["x_train"][chosen].reshape(-1, 784) / 255).astype("float32"), held["y_train"][chosen].astype("int64")


def ours(path: Path, x: Any, y: Any) -> tuple[list[Any], float]:
    model = NETWORK.build(seed=1)
    tk.WeightLoader(path).load(model)
    started = time.perf_counter()
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=EPOCHS, learning_rate=1e-3)
    plan.fit(model, (x, y), batch_size=BATCH, seed=SEED, verbose=0)
    return model.get_weights(), time.perf_counter() - started


def plain(path: Path, x: Any, y: Any) -> tuple[list[Any], float]:
    layers = [keras.layers.Dense(128, "relu"), keras.layers.Dense(64, "relu"), keras.layers.Dense(10, "softmax")]
    model = keras.Sequential([keras.Input((784,)), *layers])
    model.load_weights(path)
    started = time.perf_counter()
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    for epoch in range(EPOCHS):  # Keras's own shuffle can't be told its order, so the rows are put in ours
        order = epoch_order(len(x), seed=SEED, epoch=epoch)
        model.fit(x[order], y[order], batch_size=BATCH, shuffle=False, verbose=0)
    return model.get_weights(), time.perf_counter() - started


def main(target: str, mnist: str | None = None) -> None:
    x, y = rows_of(mnist)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pretrained_model.h5"
        NETWORK.build(seed=SEED).save(path)
        seconds: dict[str, list[float]] = {"transferkit": [], "plain Keras": []}
        for _ in range(TIMES):
            mine, mine_seconds = ours(path, x, y)
            theirs, their_seconds = plain(path, x, y)
            for left, right in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(left, right)
            seconds["transferkit"].append(mine_seconds)
            seconds["plain Keras"].append(their_seconds)
    ratios = [a / b for a, b in zip(seconds["transferkit"], seconds["plain Keras"], strict=True)]
    result = {
        "epochs": EPOCHS,
        "rows": ROWS,
        "data": "MNIST" if mnist else "made at random",
        "seconds": seconds,
        "ratio, median": statistics.median(ratios),
        "ratios": ratios,
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__, "numpy": np.__version__},
        "machine": platform.platform(),
    }
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} – {max(values):.2f}), equal weights")
    print(f"ratio, pair by pair: {statistics.median(ratios):.3f}")
    Path(target).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
