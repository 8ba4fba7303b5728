"""Claim: the pass that computes features is faster than Keras's `predict` at its best batch size, and gives the same bits.

    python benchmarks/extraction.py result.json [--network MobileNetV2-0.35 MobileNet-0.75] [--rows 1024] [--turns 5]

ImageNet weights come from Keras's own folder (`KERAS_HOME`). All ways take turns in one process; medians and the fastest turn.
`folded` and `bfloat16` are other numbers by choice: how far they are off is printed beside their times.
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

from transferkit.building.frontier import split
from transferkit.tuning.cache_settings import EXTRACTIONS, CacheSettings
from transferkit.tuning.features import compute

SIZE, BATCHES = 96, (32, 64, 128, 256)


def model_of(network: str) -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    name, alpha = network.split("-")
    make = getattr(keras.applications, name)
    base = make((SIZE, SIZE, 3), alpha=float(alpha), include_top=False, pooling="avg", weights=None)
    # The weights were trained at 224 pixels, and fit any size; of random ones the error would say nothing.
    base.set_weights(make((224, 224, 3), alpha=float(alpha), include_top=False, weights="imagenet").get_weights())
    base.trainable = False
    pixels = keras.Input((SIZE, SIZE, 3))
    return base, keras.Model(pixels, keras.layers.Dense(10)(base(pixels)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--network", nargs="*", default=["MobileNetV2-0.35", "MobileNet-0.75"])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    x = np.random.default_rng(0).uniform(-1, 1, (given.rows, SIZE, SIZE, 3)).astype("float32")
    results = []
    for network in given.network:
        base, model = model_of(network)
        prefix = split(model).prefix
        ways: dict[str, Any] = {
            f"predict {size}": (lambda size=size, base=base: base.predict(x, batch_size=size, verbose=0)) for size in BATCHES
        }
        for how in EXTRACTIONS:
            settings = CacheSettings(True, extraction=how)
            ways[how] = lambda settings=settings, prefix=prefix: compute(prefix, (x,), settings=settings).arrays[0]
        wanted = base.predict(x, batch_size=32, verbose=0)
        off = {name: float(np.abs(way() - wanted).max() / np.abs(wanted).max()) for name, way in ways.items()}
        if off["exact"] or any(off[f"predict {size}"] for size in BATCHES):
            raise SystemExit(f"other bits: {off}; no times are told of different results")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.turns):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - begun)
        for pick in (statistics.median, min):
            told = {name: pick(values) for name, values in seconds.items()}
            best = min((name for name in told if name.startswith("predict")), key=lambda name: told[name])
            print(f"{network}, {pick.__name__} of {given.turns}: {best} {told[best] * 1e3 / given.rows:.3f} ms a row; ", end="")
            print(", ".join(f"{how} {told[best] / told[how]:.2f} times as fast" for how in EXTRACTIONS), flush=True)
        print("  off by, of the largest value: " + ", ".join(f"{how} {off[how]:.1e}" for how in EXTRACTIONS), flush=True)
        results.append({"network": network, "seconds": seconds, "off": off})
    machine = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count() or 0, "load": list(os.getloadavg())}
    Path(given.result).write_text(json.dumps({"rows": given.rows, "machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
