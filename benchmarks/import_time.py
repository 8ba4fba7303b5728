"""Claim: `import transferkit` costs milliseconds, because TensorFlow is loaded on first use.

Whole processes, A B A B: the bare interpreter, and the interpreter with `import transferkit`; then what TensorFlow takes.

    python benchmarks/import_time.py result.json
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

TIMES = 15
CODES = {"interpreter": "pass", "transferkit": "import transferkit, sys; assert 'tensorflow' not in sys.modules"}


def seconds_of(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main(target: str) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CODES}
    for _ in range(TIMES):
        for name, code in CODES.items():
            seconds[name].append(seconds_of(code))
    extra = [b - a for a, b in zip(seconds["interpreter"], seconds["transferkit"], strict=True)]
    tensorflow = seconds_of("import tensorflow")
    base, on_top = statistics.median(seconds["interpreter"]), statistics.median(extra)
    print(f"interpreter: {1000 * base:.0f} ms")
    print(f"import transferkit, on top: {1000 * on_top:.0f} ms ({1000 * min(extra):.0f} – {1000 * max(extra):.0f})")
    print(f"import tensorflow, once, all in all: {1000 * tensorflow:.0f} ms")
    result = {
        "seconds": seconds,
        "on top, median": on_top,
        "tensorflow": tensorflow,
        "machine": platform.platform(),
    }
    Path(target).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
