"""What looking at each batch costs beside the training step it is for, and looking at a folder's headers beside decoding it.

    python benchmarks/data_checks.py result.json

A training over a list of batches and over a `tf.data.Dataset` with the checks and without: the weights of both are compared to
the bit before a time is told. Then the batches are gone over by themselves, with the checks and without in turns, and the
difference is put beside the step. At the end a folder of pictures.
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
from transferkit.building.heads import heads_of
from transferkit.tuning.checking import BatchChecks
from transferkit.tuning.feeding import first_rows
from transferkit.tuning.objectives import Objective
from transferkit.tuning.settings import Targets
from transferkit.tuning.stream import Stream

SIZE, BATCH, BATCHES, TURNS = 96, 32, 8, 41


def model_of() -> Any:
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2((SIZE, SIZE, 3), alpha=0.35, include_top=False, pooling="avg", weights=None)
    return keras.Sequential([keras.Input((SIZE, SIZE, 3)), base, keras.layers.Dense(10, name="head")])


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def trained(data: Any, *, checked: bool) -> tuple[float, list[Any]]:
    """Seconds of an epoch, the first one apart, and the weights."""
    model = model_of()
    ends: list[float] = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    look, graph = BatchChecks.batch, BatchChecks.in_graph
    if not checked:
        BatchChecks.batch = lambda *_: None  # type: ignore[method-assign]
        BatchChecks.in_graph = lambda *_: []  # type: ignore[method-assign]
    try:
        plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=3).cache(False)
        plan.fit(model, data, callbacks=[watch], seed=0, verbose=0)
    finally:
        BatchChecks.batch, BatchChecks.in_graph = look, graph  # type: ignore[method-assign]
    return (ends[-1] - ends[0]) / (len(ends) - 1), model.get_weights()


def reading(data: Any, *, checked: bool) -> Callable[[], None]:
    """What goes over the batches as training does, and trains nothing."""
    objective = Objective("sparse_categorical_crossentropy", None, None, "")
    checks = BatchChecks(objective, heads_of(model_of())) if checked else None
    stream = Stream(
        first_rows(data, name="training data")[1], batch_size=BATCH, seed=0, targets=Targets(objective), checks=checks
    )

    def run() -> None:
        for _ in stream.open(0):
            pass

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result")
    given = parser.parse_args()
    random = np.random.default_rng(0)
    items = [
        (random.normal(size=(BATCH, SIZE, SIZE, 3)).astype("float32"), random.integers(0, 10, BATCH)) for _ in range(BATCHES)
    ]
    results: dict[str, Any] = {}
    whole = tf.data.Dataset.from_tensor_slices(tuple(np.stack(part) for part in zip(*items, strict=True)))
    for name, data in (("list of batches", items), ("tf.data", whole)):
        ended, steps = {}, {}
        for checked in (False, True):
            steps[checked], ended[checked] = trained(data, checked=checked)
        if not all(np.array_equal(a, b) for a, b in zip(ended[True], ended[False], strict=True)):
            raise SystemExit(f"{name}: the weights differ; no times are told of different results")
        step = steps[False] / BATCHES
        passes = {checked: reading(data, checked=checked) for checked in (False, True)}
        differences = [(seconds(passes[True]) - seconds(passes[False])) / BATCHES for _ in range(TURNS)]
        added = statistics.median(differences)
        results[name] = {"a step": step, "added by checks": differences, "median share of a step": added / step}
        print(f"{name}: {1e3 * step:.1f} ms a step; checks add {1e3 * added:.3f} ms, {added / step:.2%} of it", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for number in range(1000):
            path = Path(name, f"{number % 4}", f"{number}.jpg")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(tf.io.encode_jpeg(random.integers(0, 256, (240, 320, 3), dtype=np.uint8)).numpy())
        made: list[Any] = []
        headers = seconds(lambda: made.append(tk.Data.image_folder(name, size=(96, 96))))
        decoding = seconds(lambda: made[0].rows(np.arange(1000)))
    results["1,000 pictures"] = {"headers": headers, "decoding once": decoding}
    print(f"1,000 pictures of 320 × 240: headers {headers:.3f} s, decoding them once {decoding:.2f} s")
    machine = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    machine |= {"machine": platform.machine(), "cores": os.cpu_count() or 0, "load": list(os.getloadavg())}
    Path(given.result).write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
