"""What checkpoints and guards cost a run: transferkit with and without them, and plain Keras `fit`, on the same batches.

    python benchmarks/resume_cost.py --json cost.json

A B C D A B C D in one process; the weights of all are compared to the bit before a time is told. Times are of a step; the first
epoch, which holds the compilation, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.tuning.feeding import epoch_order
from transferkit.tuning.resuming import Session


class Clock(keras.callbacks.Callback):
    """The time from the end of the first epoch to the end of the last step, for each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self._begun = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        if epoch:
            self.seconds.append(time.perf_counter() - self._begun)


class Ordered(keras.utils.PyDataset):
    """The rows in the order transferkit takes them."""

    def __init__(self, x: Any, y: Any, batch: int) -> None:
        super().__init__()
        self.x, self.y, self.batch, self.epoch = x, y, batch, 0

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch)

    def __getitem__(self, index: int) -> Any:
        part = epoch_order(len(self.x), seed=1, epoch=self.epoch)[index * self.batch : (index + 1) * self.batch]
        return self.x[part], self.y[part]


def mlp() -> Any:
    x = keras.Input((64,))
    tensor = keras.layers.Dropout(0.2, seed=1)(keras.layers.Dense(256, "relu")(x))
    return keras.Model(x, keras.layers.Dense(10)(keras.layers.Dense(256, "relu")(tensor)))


def mobile() -> Any:
    base = keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, include_top=False, pooling="avg", weights=None)
    return keras.Model(base.input, keras.layers.Dense(10)(base.output))


CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...], int, int, int]] = {
    # model, shape of a row, rows, batch, epochs
    "MLP, 84,000 parameters": (mlp, (64,), 32000, 32, 5),
    "MobileNetV2 0.35, 96 pixels": (mobile, (96, 96, 3), 320, 32, 5),
}


def unwatched() -> Callable[[], None]:
    """Takes the guards away for a while; gives what puts them back."""
    kept = Session.stepped
    Session.stepped = lambda *_: None  # type: ignore[method-assign, assignment]

    def back() -> None:
        Session.stepped = kept  # type: ignore[method-assign]

    return back


def ours(model: Any, x: Any, y: Any, batch: int, epochs: int, **more: Any) -> list[float]:
    clock = Clock()
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=epochs, learning_rate=1e-3).batch_norm("adapt").cache(False)
    plan.fit(model, (x, y), batch_size=batch, seed=1, verbose=0, callbacks=[clock], **more)
    return clock.seconds


def plain(model: Any, x: Any, y: Any, batch: int, epochs: int) -> list[float]:
    from transferkit.tuning.loop import seed_model

    keras.utils.set_random_seed(1)
    seed_model(model, 1)
    clock, order = Clock(), {"epoch": 0}
    steps = -(-len(x) // batch)

    def passes() -> Any:
        yield epoch_order(len(x), seed=1, epoch=order["epoch"])

    indices = tf.data.Dataset.from_generator(passes, output_signature=tf.TensorSpec((None,), tf.int64))
    indices = indices.flat_map(lambda numbers: tf.data.Dataset.from_tensor_slices(numbers).batch(batch))
    held = tf.data.Dataset.from_tensors((x, y)).repeat()
    data = tf.data.Dataset.zip((indices, held)).map(lambda index, both: (tf.gather(both[0], index), tf.gather(both[1], index)))
    data = data.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(tf.data.AUTOTUNE)
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    told = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: order.update(epoch=epoch))
    model.fit(data, epochs=epochs, callbacks=[told, clock], verbose=0)
    return clock.seconds


def measure(name: str, turns: int) -> dict[str, Any]:
    make, shape, count, batch, epochs = CASES[name]
    random = np.random.default_rng(0)
    x, y = random.normal(size=(count, *shape)).astype("float32"), random.integers(0, 10, count)
    keras.utils.set_random_seed(5)
    start = make().get_weights()
    times: dict[str, list[float]] = {"plain fit": [], "without": [], "guards": [], "guards and checkpoints": []}
    weights: dict[str, Any] = {}
    for _ in range(turns):
        for way in times:
            keras.utils.clear_session()
            keras.utils.set_random_seed(5)
            model = make()
            model.set_weights(start)
            if way == "plain fit":
                seconds = plain(model, x, y, batch, epochs)
            elif way == "without":
                back = unwatched()
                seconds = ours(model, x, y, batch, epochs)
                back()
            elif way == "guards":
                seconds = ours(model, x, y, batch, epochs)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    seconds = ours(model, x, y, batch, epochs, checkpoint_dir=folder)
            times[way] += seconds
            weights[way] = model.get_weights()
    for way, found in weights.items():
        assert all(np.array_equal(a, b) for a, b in zip(weights["plain fit"], found, strict=True)), way
    steps = -(-count // batch)
    table = {
        way: {
            "median ms a step": 1e3 * statistics.median(seconds) / steps,
            "fastest ms a step": 1e3 * min(seconds) / steps,
            "epochs timed": len(seconds),
        }
        for way, seconds in times.items()
    }
    for way in times:
        for kind in ("median", "fastest"):
            ratio = table[way][f"{kind} ms a step"] / table["without"][f"{kind} ms a step"]
            table[way][f"{kind} against without"] = round(ratio, 4)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {name: measure(name, arguments.turns) for name in CASES}
    for name, table in result.items():
        print(f"{name}; all weights equal to the bit")
        for way, row in table.items():
            print(f"  {way:24}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    result["versions"] = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
