"""What guarding a foreign file costs, and what `inspect` takes.

    python benchmarks/reading.py result.json [--quick]

A file that needs HDF5's library, with the process of its own and without, in turns within one process, the page cache warm; and
`python -m transferkit inspect` on 400 MB in 50 arrays as a legacy `.h5` and a `.keras`, against a bare interpreter. What loading
takes is in `benchmarks/loading.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from transferkit.weights.readers import open_archive

Buffers = dict[str, np.ndarray[Any, Any]]


def write_legacy(file: h5py.File, arrays: Buffers) -> None:
    layers = list(dict.fromkeys(name.split("/")[0] for name in arrays))
    file.attrs["layer_names"] = [layer.encode() for layer in layers]
    for layer in layers:
        group = file.create_group(layer)
        own = [f"{name}:0" for name in arrays if name.startswith(f"{layer}/")]
        group.attrs["weight_names"] = [name.encode() for name in own]
        for name in own:
            group.create_dataset(name, data=arrays[name[:-2]])


def write_all(folder: Path, count: int, nbytes: int) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    rows = nbytes // count // 4 // 16
    arrays = {f"layer_{i // 2:04}/{'kernel' if i % 2 == 0 else 'bias'}": rng.random((rows, 16), np.float32) for i in range(count)}
    paths = {kind: folder / f"a.{kind}" for kind in ("h5", "keras")}
    with h5py.File(paths["h5"], "w") as file:
        write_legacy(file, arrays)
    inner = folder / "a.weights.h5"
    with h5py.File(inner, "w") as file:
        for number, name in enumerate(arrays):
            group = file.require_group(f"layers/dense{f'_{number // 2}' if number > 1 else ''}/vars")
            group.attrs["name"] = name.split("/")[0]
            group.create_dataset(str(number % 2), data=arrays[name])
    with zipfile.ZipFile(paths["keras"], "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": []}}))
        archive.write(inner, "model.weights.h5")
    inner.unlink()
    return paths


def turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Each way's seconds, taken in turns: the median and the extremes."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    return {name: {"median": statistics.median(t), "least": min(t), "most": max(t)} for name, t in times.items()}


def guarding(folder: Path, rounds: int) -> dict[str, Any]:
    path = folder / "new.weights.h5"
    with h5py.File(path, "w", libver="latest") as file:
        data = np.random.default_rng(0).random((1000, 1000), np.float32)
        for i in range(10):
            place = f"layers/dense{f'_{i}' if i else ''}/vars/0"
            file.create_dataset(
                place, data=data, chunks=(100, 1000), maxshape=(None, 1000), compression="gzip", compression_opts=1
            )

    def read(trusted: bool, content: bool) -> None:
        with open_archive(path, trusted=trusted) as archive:
            for name in archive.arrays if content else ():
                archive.read(name)

    ways: dict[str, Callable[[], None]] = {
        "list, in its own process": lambda: read(False, False),
        "list, trusted": lambda: read(True, False),
        "40 MB packed, in its own process": lambda: read(False, True),
        "40 MB packed, trusted": lambda: read(True, True),
    }
    return turns(ways, rounds)


def inspecting(path: Path, rounds: int) -> dict[str, Any]:
    """Seconds and peak MiB of a process: a bare interpreter, NumPy alone, and `inspect`."""
    commands = {"bare": ["-c", "pass"], "numpy": ["-c", "import numpy"], "inspect": ["-m", "transferkit", "inspect", str(path)]}
    measure = (
        "import resource, subprocess, sys, time; b = time.perf_counter(); "
        "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); t = time.perf_counter() - b; "
        "print(t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            done = subprocess.run(
                [sys.executable, "-c", measure, sys.executable, *command],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
                capture_output=True,
                text=True,
                check=True,
            )
            seconds, memory = map(float, done.stdout.split())
            found[name].append((seconds, memory))
    return {
        name: {
            "median": statistics.median(s for s, _ in t),
            "least": min(s for s, _ in t),
            "most": max(s for s, _ in t),
            "peak_MiB": statistics.median(m for _, m in t),
        }
        for name, t in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the sizes, to see that it runs")
    chosen = parser.parse_args()
    rounds = 3 if chosen.quick else 5
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind, path in write_all(folder, 50, 4_000_000 if chosen.quick else 400_000_000).items():
            results[f"inspect, 400 MB .{kind}"] = inspecting(path, rounds)
            path.unlink()
        results["a file for HDF5's library"] = guarding(folder, rounds)
    machine = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    chosen.result.write_text(json.dumps({"machine": machine, "rounds": rounds, "seconds": results}, indent=1) + "\n")
    for title, ways in results.items():
        print(title)
        for name, row in ways.items():
            extra = f", peak {row['peak_MiB']:.0f} MiB" if "peak_MiB" in row else ""
            print(f"  {name:<34}{row['median'] * 1e3:9.1f} ms ({row['least'] * 1e3:.1f}–{row['most'] * 1e3:.1f}){extra}")


if __name__ == "__main__":
    main()
