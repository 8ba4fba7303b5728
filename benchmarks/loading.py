"""Loading weights: transferkit against plain Keras and against the floor, one copy out of a mapped file.

Run: `python benchmarks/loading.py [out.json] [--quick]`. Each row takes turns (A B A B …) in one process with the files warm in
the page cache; equal weights are asserted before any time is printed. Memory is the peak of anonymous memory over the model.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import mmap
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import h5py
import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.weights.saving import save_weights


def wide(arrays: int, rows: int, columns: int) -> Any:
    start = keras.Input((rows,))
    ends = [keras.layers.Dense(columns, use_bias=False, name=f"layer_{i:03d}")(start) for i in range(arrays)]
    return keras.Model(start, keras.layers.Add()(ends))


def anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def peak(action: Callable[[], object]) -> float:
    """MiB of anonymous memory over where it began."""
    gc.collect()
    start, highest, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return (highest - start) / 2**20


def timed(action: Callable[[], object]) -> float:
    gc.collect()
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e3


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length, json.loads(file.read(length))


def unsigned(source: Path, target: Path) -> None:
    """The file as other writers make it: without digests of the tensors, whose check is a row of its own."""
    length, header = header_of(source)
    header["__metadata__"] = {"format": "keras"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)
    target.write_bytes(len(text).to_bytes(8, "little") + text + source.read_bytes()[8 + length :])


def floor(path: Path) -> None:
    """One copy of every array out of the mapped file."""
    length, header = header_of(path)
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        kept = [np.frombuffer(mapped, np.uint8, b - a, 8 + length + a).copy() for a, b in spans]
        del kept


def measured(name: str, build: Callable[[], Any], folder: Path, rounds: int) -> list[dict[str, Any]]:
    saved = build()
    for variable in saved.weights:
        variable.assign(np.random.default_rng(0).uniform(0.1, 1, variable.shape))
    files = {kind: folder / f"{name}{kind}" for kind in (".weights.h5", ".h5", ".keras", ".signed.safetensors", ".safetensors")}
    saved.save_weights(files[".weights.h5"])
    saved.save(files[".h5"])
    saved.save(files[".keras"])
    save_weights(saved, files[".signed.safetensors"])
    unsigned(files[".signed.safetensors"], files[".safetensors"])
    model = build()
    expected = [v.numpy() for v in saved.weights]
    found = []
    for kind, path in files.items():
        other = "floor" if "safetensors" in kind else "keras"
        contenders: dict[str, Callable[[], object]] = {
            "transferkit": functools.partial(tk.WeightLoader(str(path)).by_order().load, model),
            other: functools.partial(floor, path) if other == "floor" else functools.partial(model.load_weights, path),
        }
        for who, action in contenders.items():
            for variable in model.weights:
                variable.assign(np.zeros(variable.shape))
            action()
            same = all(np.array_equal(a, b.numpy()) for a, b in zip(expected, model.weights, strict=True))
            assert same or who == "floor", (name, kind, who)
        times: dict[str, list[float]] = {who: [] for who in contenders}
        for _ in range(2 if kind == ".keras" else rounds):
            for who, action in contenders.items():
                times[who].append(timed(action))
        medians = {who: statistics.median(values) for who, values in times.items()}
        row = {
            "model": name,
            "file": kind,
            "ms": {who: [round(t, 1) for t in values] for who, values in times.items()},
            "median_ms": {who: round(value, 1) for who, value in medians.items()},
            "ratio": round(medians["transferkit"] / medians[other], 3),
            "against": other,
            "peak_mib_over_the_model": {
                who: round(peak(action), 1)
                for who, action in contenders.items()
                if who == "transferkit" or kind in (".weights.h5", ".h5")
            },
        }
        found.append(row)
        spread = f"{min(times['transferkit']):.0f}–{max(times['transferkit']):.0f}"
        print(
            f"{name:12} {kind:20} transferkit {medians['transferkit']:8.1f} ms ({spread}), {other} {medians[other]:8.1f} ms, "
            f"ratio {row['ratio']:.2f}, peak {row['peak_mib_over_the_model']}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        if arguments.quick:
            found += measured("4 in 8", lambda: wide(8, 128, 1024), folder, rounds)
        else:
            found += measured("400 in 50", lambda: wide(50, 2048, 1024), folder, rounds)
            found += measured("ResNet152", lambda: keras.applications.ResNet152(weights=None), folder, rounds)
            found += measured("MobileNetV2", lambda: keras.applications.MobileNetV2(weights=None), folder, rounds)
    about = {
        "rows": found,
        "python": sys.version.split()[0],
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
