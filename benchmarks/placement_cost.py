"""Claims: a placement on one device costs nothing; two workers share a step that computes much; what half precision does here.

    python benchmarks/placement_cost.py result.json [--turns 3] [--parts cost workers precision]

`cost`: epochs of plain `fit` and of `FineTuner.fit`, with and without `Placement.cpu()`, on the same batches, by turns,
weights equal to the bit.
`workers`: seconds a step by one process on one core and on two, and by two workers on a core each.
`precision`: seconds a step and accuracy on the digits of scikit-learn in float32 and `mixed_bfloat16`, A B A B.
The first epoch of each, which holds the tracing, is left out; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf
from clocks import Clock, settle

import transferkit as tk
from transferkit.cluster import Cluster
from transferkit.meeting import free_ports
from transferkit.tuning.feeding import epoch_order

SEED, BATCH, ROWS, EPOCHS = 1, 64, 1280, 4


def pictures(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(rows, 32, 32, 3)).astype("float32"), random.integers(0, 10, rows)


def convolutions() -> Any:
    keras.utils.set_random_seed(5)
    layers = [keras.layers.Conv2D(width, 3, strides, "same", activation="relu") for width, strides in ((32, 1), (64, 2), (64, 1))]
    return keras.Sequential([keras.Input((32, 32, 3)), *layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)])


def plan() -> tk.FineTuner:
    return tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=EPOCHS, learning_rate=1e-3)


def by_keras(x: Any, y: Any) -> tuple[list[float], Any]:
    """Plain `fit` on a data set of the batches of all epochs, one after the other."""
    model, clock = convolutions(), Clock()
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    order = np.concatenate([epoch_order(len(x), seed=SEED, epoch=epoch) for epoch in range(EPOCHS)])
    data = tf.data.Dataset.from_tensor_slices((x[order], y[order])).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    model.fit(data, epochs=EPOCHS, steps_per_epoch=len(x) // BATCH, callbacks=[clock], verbose=0)
    return clock.seconds[1:], model


def placed(placement: tk.Placement | None, x: Any, y: Any) -> tuple[list[float], Any]:
    clock = Clock()
    with placement.scope() if placement else contextlib.nullcontext():
        model = convolutions()
    plan().fit(model, (x, y), batch_size=BATCH, seed=SEED, callbacks=[clock], placement=placement, verbose=0)
    return clock.seconds[1:], model


def cost(turns: int) -> dict[str, float]:
    x, y = pictures()
    ways = {
        "fit": by_keras,
        "transferkit": functools.partial(placed, None),
        "placed": functools.partial(placed, tk.Placement.cpu()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        weights = {}
        order = list(ways)
        for name in order[turn % 3 :] + order[: turn % 3]:
            settle()
            taken, model = ways[name](x, y)
            seconds[name] += taken
            weights[name] = model.get_weights()
        for found in weights.values():
            assert all(np.array_equal(a, b) for a, b in zip(weights["fit"], found, strict=True)), "the weights differ"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = {name: min(values) for name, values in seconds.items()}
    return {
        **medians,
        "ratio": medians["placed"] / medians["fit"],
        "ratio of the fastest": fastest["placed"] / fastest["fit"],
        "without a placement": medians["transferkit"] / medians["fit"],
    }


def one_worker(out: str, several: bool) -> None:
    placement = tk.Placement.multi_worker() if several else tk.Placement.cpu()
    seconds, _ = placed(placement, *pictures())
    Path(out).write_text(json.dumps(statistics.median(seconds) / (ROWS / BATCH)))


def workers(turns: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"one, one core": [], "one, two cores": [], "two, one core each": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            for name, cores, count in (("one, one core", 1, 1), ("one, two cores", 2, 1), ("two, one core each", 1, 2)):
                addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(count))
                processes = []
                for index in range(count):
                    environ = dict(os.environ)
                    if count > 1:
                        environ["TF_CONFIG"] = Cluster(addresses, index).tf_config()
                    command = [
                        sys.executable,
                        __file__,
                        f"{folder}/{index}",
                        "--worker",
                        str(count),
                        "--core",
                        str(index if cores == 1 else -1),
                    ]
                    processes.append(subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL))
                failed = [process.wait() for process in processes]
                assert not any(failed), name
                found[name].append(json.loads(Path(f"{folder}/0").read_text()))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "speed-up of two workers": medians["one, one core"] / medians["two, one core each"]}


def precision(turns: int) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1400], order[1400:]
    seconds: dict[str, list[float]] = {"float32": [], "mixed_bfloat16": []}
    accuracy: dict[str, list[float]] = {name: [] for name in seconds}
    for turn in range(turns):
        for name in seconds:
            placement, clock = tk.Placement.cpu(precision=name), Clock()
            with placement.scope():
                model = tk.ModelBuilder((64,)).dense(2048, "relu").dense(2048, "relu").classifier(10).build(seed=turn)
            plan().fit(model, (x[train], y[train]), batch_size=256, seed=turn, callbacks=[clock], placement=placement, verbose=0)
            seconds[name] += [taken / (-(-len(train) // 256)) for taken in clock.seconds[1:]]
            accuracy[name].append(float(tk.Evaluator("accuracy").run(model, (x[test], y[test]))["accuracy"]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds a step": medians, "ratio": medians["float32"] / medians["mixed_bfloat16"], "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--parts", nargs="+", default=["cost", "workers", "precision"])
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=-1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.core >= 0:
        os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[given.core]])  # before TensorFlow makes its threads
    if given.worker:
        one_worker(given.result, given.worker > 1)
        return
    parts = {"cost": cost, "workers": workers, "precision": precision}
    found = {name: parts[name](given.turns) for name in given.parts}
    print(json.dumps(found, indent=1))
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    Path(given.result).write_text(json.dumps({"versions": versions, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
