"""Claim: 100,000 pictures of 96×96 are trained on under a memory limit of 4 GiB, their features streamed to the disk.

    python benchmarks/large_data.py result.json [--rows 100000] [--limit 4] [--folder features]

The pictures are made from their numbers when they are asked for; as float32 they would take 11 GB. The features, 24×24×16, take
3.7 GB, in a temporary folder or in the one that is named. The limit is the system's on this process's data (`RLIMIT_DATA`); what
is told beside it is the most memory that was resident and not a mapped file. Afterwards features of 200,000 × 1,280 go to memory,
and what they take beyond their own size is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.building.frontier import split
from transferkit.data import Batch
from transferkit.tuning.features import compute


def resident() -> int:
    """Bytes of this process in memory that are no mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """The most memory so far, in the list's first place."""
    most, ended = [resident()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def pictures(rows: int) -> tk.Data:
    """Pictures of 96×96 whose brightness tells their class."""
    noise = np.random.default_rng(0).integers(0, 200, (64, 96, 96, 3)).astype("uint8")
    labels = (np.arange(rows) * 7919 % 10).astype("int64")

    def read(index: Any) -> Batch:
        x = noise[index % 64] + (labels[index] * 5).astype("uint8")[:, None, None, None]
        return Batch(x.astype("float32") / 255, labels[index], None)

    return tk.Data(read=read, labels=labels, size=rows, class_names=(), source="pictures")


def convolutional() -> Any:
    keras.utils.set_random_seed(0)
    x = keras.Input((96, 96, 3))
    a = keras.layers.Conv2D(16, 4, strides=4, activation="relu", name="frozen")(x)
    b = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, strides=4, activation="relu", name="top")(a))
    return keras.Model(x, keras.layers.Dense(10, name="head")(b))


def wide() -> Any:
    x = keras.Input((16,))
    model = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.Dense(1280, activation="relu", name="frozen")(x)))
    model.get_layer("frozen").trainable = False
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--limit", type=float, default=4.0)
    parser.add_argument("--folder")
    given = parser.parse_args()
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (int(given.limit * 2**30),) * 2)
    model, data = convolutional(), pictures(given.rows)
    plan = tk.FineTuner().phase("top", train=tk.Layers.head() | tk.Layers.named("top"), epochs=2, learning_rate=1e-2)
    plan = plan.metrics("accuracy").cache(given.folder or True)
    with watched() as most:
        begun = time.perf_counter()
        run = plan.fit(model, data, batch_size=256, seed=0, verbose=0)
        seconds = time.perf_counter() - begun
    print(f"{given.rows:,} pictures under {given.limit:g} GiB: {seconds:.0f} s, at most {most[0] / 2**30:.2f} GiB resident")
    print(f"  {run.phases[0].frozen}; accuracy {run.history['accuracy'][-1]:.3f}")
    random = np.random.default_rng(0)
    x = random.normal(size=(200_000, 16)).astype("float32")
    prefix = split(wide()).prefix
    compute(prefix, (x[:256], np.zeros(256)))
    before = resident()
    with watched() as beside:
        made = compute(prefix, (x, np.zeros(len(x))), memory_limit=8 << 30)
    beyond = (beside[0] - before) / made.nbytes - 1
    print(f"{made.nbytes / 2**20:,.0f} MiB of features in {made.where}: {beyond:+.1%} of memory beyond their own size")
    machine = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count() or 0, "load": list(os.getloadavg())}
    content = {"rows": given.rows, "folder": bool(given.folder), "seconds": seconds, "resident": most[0], "beyond": beyond}
    content |= {"machine": machine}
    Path(given.result).write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
