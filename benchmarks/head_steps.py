"""Claim: a head trains on cached features in a fraction of the time a step of plain `fit` takes on the same features.

    python benchmarks/head_steps.py result.json [--rows 2048 20480] [--epochs 9] [--turns 3]

1280 features, 10 classes, batches of 32; both with a progress bar, validation after each epoch (a tenth of the rows) and early
stopping. Timed from the begin of an epoch to its end, validation included, the first epoch of each left out; A B A B, medians.
The weights of both are equal to the bit, or no time is told. 2,048 rows are 10 MB, which the processor's caches hold; 20,480 are
105 MB, and come from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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
from clocks import Clock

import transferkit as tk
from transferkit.tuning.feeding import epoch_order

WIDTH, CLASSES, BATCH, SEED = 1280, 10, 32, 1


def model_of() -> Any:
    """A frozen layer that leaves its input as it is, and the head."""
    keras.utils.set_random_seed(5)
    x = keras.Input((WIDTH,))
    kept = keras.layers.DepthwiseConv1D(1, depthwise_initializer="ones", use_bias=False, name="kept")
    kept = keras.Sequential([keras.layers.Reshape((1, WIDTH)), kept, keras.layers.Flatten()], name="frozen")
    return keras.Model(x, keras.layers.Dense(CLASSES, name="head")(kept(x)))


def by_keras(train: Any, test: Any, epochs: int) -> tuple[list[float], Any]:
    model = model_of()
    x = keras.Input((WIDTH,))
    head = keras.Model(x, model.get_layer("head")(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    head.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    clock, stopping = Clock(), keras.callbacks.EarlyStopping(patience=epochs)
    for epoch in range(epochs):
        order = epoch_order(len(train[0]), seed=SEED, epoch=epoch)
        head.fit(
            train[0][order],
            train[1][order],
            batch_size=BATCH,
            shuffle=False,
            initial_epoch=epoch,
            epochs=epoch + 1,
            validation_data=test,
            validation_batch_size=BATCH,
            callbacks=[clock, stopping],
            verbose=1,
        )
    return clock.seconds[1:], model


def by_cache(train: Any, test: Any, epochs: int) -> tuple[list[float], Any]:
    model, clock = model_of(), Clock()
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=epochs, learning_rate=1e-3)
    plan = plan.metrics("accuracy").early_stopping(patience=epochs, restore_best=False).cache(True)
    run = plan.fit(model, train, validation_data=test, batch_size=BATCH, seed=SEED, callbacks=[clock], verbose=1)
    if "computed once" not in run.phases[0].frozen:
        raise SystemExit(run.phases[0].frozen)
    return clock.seconds[1:], model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--rows", type=int, nargs="*", default=[2048, 20_480])
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    machine = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count() or 0, "load": list(os.getloadavg())}
    results = [measured(rows, given.epochs, given.turns) for rows in given.rows]
    Path(given.result).write_text(json.dumps({"machine": machine, "results": results}, indent=1))


def measured(rows: int, epochs: int, turns: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    parts = []
    for count in (rows, rows // 10):
        parts.append((random.normal(size=(count, WIDTH)).astype("float32"), random.integers(0, CLASSES, count)))
    seconds: dict[str, list[float]] = {"keras": [], "cached": []}
    for _ in range(turns):
        models = []
        for name, way in (("keras", by_keras), ("cached", by_cache)):
            with contextlib.redirect_stdout(io.StringIO()):
                taken, model = way(*parts, epochs)
            seconds[name] += taken
            models.append(model)
        for a, b in zip(*(model.get_layer("head").weights for model in models), strict=True):
            if not np.array_equal(a, b):
                raise SystemExit("other weights; no times are told of different results")
    steps = rows // BATCH
    told = {name: statistics.median(values) / steps * 1e6 for name, values in seconds.items()}
    times = told["keras"] / told["cached"]
    both = f"{told['keras']:.0f} µs a step by plain fit, {told['cached']:.0f} on cached features"
    print(f"{rows} rows: {both}, {times:.1f} times, to the bit", flush=True)
    return {"rows": rows, "seconds": seconds, "microseconds": told, "times": times}


if __name__ == "__main__":
    main()
