"""What a rate for each variable costs: a training step of MobileNetV2 under plain Adam and under `with_multipliers`.

    python benchmarks/layer_rates.py --out result.json

Step by step in turn, A B B A, in one process, on the same data; the ratio is of the medians, with its 95% interval by resampling
the rounds. First, weights are shown to be equal to the bit with every multiplier 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.storage import write_json
from transferkit.tuning.optimizers import with_multipliers


def network(side: int) -> Any:
    keras.utils.set_random_seed(0)
    return keras.applications.MobileNetV2(input_shape=(side, side, 3), alpha=0.35, weights=None, classes=10)


def steps(model: Any, optimizer: Any) -> Any:
    """A compiled training step, and one that only applies gradients."""
    loss = keras.losses.SparseCategoricalCrossentropy()
    optimizer.build(model.trainable_variables)

    @tf.function
    def whole(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)

    @tf.function
    def apply(gradients: Any) -> None:
        optimizer.apply(gradients, model.trainable_variables)

    return whole, apply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    random = np.random.default_rng(0)
    x = tf.constant(random.normal(size=(32, options.side, options.side, 3)), tf.float32)
    y = tf.constant(random.integers(0, 10, 32))

    plain_model, same_model, ours_model = (network(options.side) for _ in range(3))
    plain = steps(plain_model, keras.optimizers.Adam(1e-3))
    same = steps(same_model, with_multipliers(keras.optimizers.Adam(1e-3), same_model.trainable_variables))
    for _ in range(2):
        plain[0](x, y)
        same[0](x, y)
    if not all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(plain_model.variables, same_model.variables, strict=True)):
        raise SystemExit("weights differ with every multiplier 1: no time is worth taking")

    rates = iter(np.linspace(0.1, 0.9, len(ours_model.trainable_variables)))
    ours = steps(
        ours_model,
        with_multipliers(keras.optimizers.Adam(1e-3), ours_model.trainable_variables, multiplier=lambda _: next(rates)),
    )
    gradients = [tf.random.normal(variable.shape) for variable in plain_model.trainable_variables]
    figures: dict[str, dict[str, float]] = {}
    for name, index, arguments in (("whole step", 0, (x, y)), ("apply alone", 1, (gradients,))):
        taken: dict[str, list[float]] = {"plain": [], "ours": []}
        for pair in (plain, ours):
            pair[index](*arguments)
        order = [("plain", plain), ("ours", ours)]
        for number in range(options.rounds):
            for kind, pair in order if number % 2 else order[::-1]:
                started = time.perf_counter()
                pair[index](*arguments)
                taken[kind].append(time.perf_counter() - started)
        both = np.array([taken["ours"], taken["plain"]])
        again = random.integers(0, options.rounds, (2000, options.rounds))
        ratios = np.median(both[0][again], axis=1) / np.median(both[1][again], axis=1)
        figures[name] = {
            "plain_ms": 1e3 * float(np.median(taken["plain"])),
            "ours_ms": 1e3 * float(np.median(taken["ours"])),
            "ratio": float(np.median(both[0]) / np.median(both[1])),
            "ratio_low": float(np.quantile(ratios, 0.025)),
            "ratio_high": float(np.quantile(ratios, 0.975)),
        }
        print(name, figures[name])
    write_json(
        options.out,
        {
            "claim": "a rate for each of the variables of MobileNetV2 costs at most 3% of a training step",
            "variables": len(gradients),
            "figures": figures,
            "versions": {"keras": keras.__version__, "tensorflow": tf.__version__, "transferkit": tk.__version__},
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        },
    )


if __name__ == "__main__":
    main()
