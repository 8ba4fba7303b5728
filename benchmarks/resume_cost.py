"""What guards and checkpoints cost training, in the run they are for.

    python benchmarks/resume_cost.py --json cost.json

One run of transferkit goes on in blocks of steps, three kinds by turns in an order drawn anew each time: without guards, with
guards, and with guards and one checkpoint at the block's beginning, whose writing is waited for at its end. What a kind costs is
the difference of its blocks from those without beside them, as a trimmed mean with a 95% bootstrap interval; a checkpoint's cost
in a run is its price over the time between two that the run itself would leave. The weights equal those of plain Keras's `fit`
on the same batches to the bit, or no time is told.
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
from transferkit.tuning.loop import seed_model
from transferkit.tuning.resuming import _SHARE as SHARE
from transferkit.tuning.resuming import Session


def mlp() -> Any:
    x = keras.Input((64,))
    tensor = keras.layers.Dropout(0.2, seed=1)(keras.layers.Dense(256, "relu")(x))
    return keras.Model(x, keras.layers.Dense(10)(keras.layers.Dense(256, "relu")(tensor)))


def mobile() -> Any:
    base = keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, include_top=False, pooling="avg", weights=None)
    return keras.Model(base.input, keras.layers.Dense(10)(base.output))


CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...], int, int]] = {
    # model, shape of a row, rows (32 in a batch), steps in a block
    "MLP, 84,000 parameters": (mlp, (64,), 32000, 200),
    "MobileNetV2 0.35, 96 pixels": (mobile, (96, 96, 3), 1600, 8),
}
KINDS = ("without", "guards", "guards and a checkpoint")
BATCH = 32


def trimmed(values: Any) -> Any:
    """The mean of the middle 80% along the last axis: the machine's own hiccups, longer than a block, are left out."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 10
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


class Blocks:
    """Takes a run's guards and checkpoints away and gives them back, block by block, and keeps the time of each.

    Args:
        steps: In a block.
        rounds: How often each kind comes.
    """

    def __init__(self, steps: int, rounds: int) -> None:
        order = np.random.default_rng(0)
        self.kinds = ["guards", *(KINDS[kind] for _ in range(rounds) for kind in order.permutation(len(KINDS)))]
        self.seconds: list[float] = []
        self.intervals: list[float] = []
        self._steps, self._taken = steps, 0
        self._epoch, self._told, self._sum = -1, 0.0, 0.0
        self._asked = False

    def __enter__(self) -> Blocks:
        self._stepped, self._is_due = Session.stepped, Session._is_due
        blocks = self

        def stepped(session: Any, epoch: int, batch: int, logs: Any) -> None:
            kind = blocks.kinds[min(len(blocks.seconds), len(blocks.kinds) - 1)]
            if blocks._taken == 0:
                blocks._asked = kind == KINDS[2]
            blocks._taken += 1
            if kind != KINDS[0]:
                blocks._stepped(session, epoch, batch, logs)
            full = blocks._taken == blocks._steps
            if full:
                session._folder.settle()
            now = time.perf_counter()
            if epoch == blocks._epoch:  # what goes on between two epochs isn't looked at
                blocks._sum += now - blocks._told
            if full:
                blocks.seconds.append(blocks._sum)
                if kind == KINDS[2]:
                    blocks.intervals.append((session._cost + session._folder.seconds) / SHARE)
                blocks._taken, blocks._sum = 0, 0.0
            blocks._epoch, blocks._told = epoch, time.perf_counter()

        def is_due(session: Any) -> bool:
            del session
            asked, blocks._asked = blocks._asked, False
            return asked

        Session.stepped, Session._is_due = stepped, is_due  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        Session.stepped, Session._is_due = self._stepped, self._is_due  # type: ignore[method-assign]

    def table(self) -> dict[str, Any]:
        """What each kind costs, from the differences within each round."""
        found = np.asarray(self.seconds[1 : len(self.kinds)]).reshape(-1, 3)
        kinds = np.asarray(self.kinds[1:]).reshape(-1, 3)
        column = {kind: found[kinds == kind] for kind in KINDS}
        step = float(trimmed(column["without"])) / self._steps
        interval = statistics.median(self.intervals)

        def share(differences: Any, whole: float) -> dict[str, float]:
            draws = np.random.default_rng(1).choice(differences, (10_000, len(differences)))
            found = 100 / whole * np.array([trimmed(differences), *np.quantile(trimmed(draws), (0.025, 0.975))])
            return dict(zip(("percent", "low", "high"), (round(float(one), 3) for one in found), strict=True))

        guards = (column["guards"] - column["without"]) / self._steps
        saving = column[KINDS[2]] - column["guards"]
        return {
            "rounds": len(found),
            "ms a step without": round(1e3 * step, 3),
            "guards": share(guards, step),
            "checkpoints": share(saving, interval),
            "ms a checkpoint": round(1e3 * float(trimmed(saving)), 2),
            "seconds between checkpoints": round(interval, 2),
        }


def ours(model: Any, x: Any, y: Any, epochs: int, folder: str) -> None:
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=epochs, learning_rate=1e-3).batch_norm("adapt").cache(False)
    plan.fit(model, (x, y), batch_size=BATCH, seed=1, verbose=0, checkpoint_dir=folder)


def plain(model: Any, x: Any, y: Any, epochs: int) -> None:
    keras.utils.set_random_seed(1)
    seed_model(model, 1)
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    for epoch in range(epochs):
        order = epoch_order(len(x), seed=1, epoch=epoch)
        # Batches of a data set, as transferkit has them: given arrays, Keras gets other last bits from the same rows.
        model.fit(tf.data.Dataset.from_tensor_slices((x[order], y[order])).batch(BATCH), verbose=0)


def measure(name: str, rounds: int) -> dict[str, Any]:
    make, shape, count, steps = CASES[name]
    random = np.random.default_rng(0)
    x, y = random.normal(size=(count, *shape)).astype("float32"), random.integers(0, 10, count)
    weights = []
    for length in (1, rounds):  # a short one for plain Keras to equal
        epochs = -(-(3 * length + 1) * steps // (count // BATCH))
        keras.utils.clear_session()
        keras.utils.set_random_seed(5)
        model = make()
        start = model.get_weights()
        with tempfile.TemporaryDirectory() as folder, Blocks(steps, length) as blocks:
            ours(model, x, y, epochs, folder)
        if length == 1:
            weights.append(model.get_weights())
            keras.utils.set_random_seed(5)
            model = make()
            model.set_weights(start)
            plain(model, x, y, epochs)
            weights.append(model.get_weights())
            assert all(np.array_equal(a, b) for a, b in zip(*weights, strict=True)), "other weights than plain Keras"
    return blocks.table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {name: measure(name, arguments.rounds) for name in arguments.cases}
    for name, table in result.items():
        print(f"{name}; weights equal plain Keras's to the bit")
        for key, value in table.items():
            print(f"  {key:28} {value}")
    result["versions"] = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
