"""Claim: where nothing is frozen, transferkit trains in the time of plain `fit`, with its weights.

    python benchmarks/training_in_full.py result.json [--rows 640] [--epochs 4] [--turns 3]

MobileNetV2 0.35 at 96 pixels, every layer trains; the same batches in the same order, A B C B C A. Timed from the begin of an
epoch to its end, the first of each, which holds the tracing, left out; medians. Plain `fit` goes over arrays and over a data set
of the same batches, whose size is known: a graph that doesn't know it is slower by 5%, and its last bits are others.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from clocks import Clock, settle

import transferkit as tk
from transferkit.tuning.feeding import epoch_order

SIZE, BATCH, RATE, SEED = 96, 32, 1e-3, 1


def model_of() -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    base = keras.applications.MobileNetV2((SIZE, SIZE, 3), alpha=0.35, include_top=False, pooling="avg", weights=None)
    pixels = keras.Input((SIZE, SIZE, 3))
    return keras.Model(pixels, keras.layers.Dense(10)(base(pixels)))


def by_keras(x: Any, y: Any, epochs: int, *, arrays: bool) -> tuple[list[float], Any]:
    model, clock = model_of(), Clock()
    model.compile(keras.optimizers.Adam(RATE), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    for epoch in range(epochs):
        order = epoch_order(len(x), seed=SEED, epoch=epoch)
        rows = x[order], y[order]
        more: dict[str, Any] = {"initial_epoch": epoch, "epochs": epoch + 1, "callbacks": [clock], "verbose": 0}
        if arrays:
            model.fit(*rows, batch_size=BATCH, shuffle=False, **more)
        else:
            model.fit(
                tf.data.Dataset.from_tensor_slices(rows).batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE), **more
            )
    return clock.seconds[1:], model


def by_transferkit(x: Any, y: Any, epochs: int) -> tuple[list[float], Any]:
    model, clock = model_of(), Clock()
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=epochs, learning_rate=RATE)
    plan = plan.batch_norm("adapt").metrics("accuracy")
    plan.fit(model, (x, y), batch_size=BATCH, seed=SEED, callbacks=[clock], verbose=0)
    return clock.seconds[1:], model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    if given.rows % BATCH:
        parser.error(f"--rows must be a multiple of {BATCH}")
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (given.rows, SIZE, SIZE, 3)).astype("float32")
    y = random.integers(0, 10, given.rows)
    ways = {
        "fit on arrays": functools.partial(by_keras, arrays=True),
        "fit on a data set": functools.partial(by_keras, arrays=False),
        "transferkit": by_transferkit,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.turns):
        weights = {}
        order = list(ways)
        for name in order[turn % 3 :] + order[: turn % 3]:
            settle()
            taken, model = ways[name](x, y, given.epochs)
            seconds[name] += taken
            weights[name] = model.get_weights()
        for name in list(ways)[:2]:
            if not all(np.array_equal(a, b) for a, b in zip(weights[name], weights["transferkit"], strict=True)):
                raise SystemExit(f"{name}: the weights differ; no times are told of different results")
    told = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = {name: min(values) for name, values in seconds.items()}
    ratios = {}
    for name in list(ways)[:2]:
        ratios[name] = {"median": told["transferkit"] / told[name], "fastest": fastest["transferkit"] / fastest[name]}
        print(f"{name}: {told[name]:.3f} s an epoch (fastest {fastest[name]:.3f}); transferkit × {ratios[name]}")
    print(f"transferkit: {told['transferkit']:.3f} s an epoch (fastest {fastest['transferkit']:.3f}); weights equal to the bit")
    machine = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count() or 0, "load": list(os.getloadavg())}
    content = {"machine": machine, "seconds": seconds, "ratios": ratios}
    Path(given.result).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
