"""Claim: 10,000 resamples of accuracy and AUC for 10,000 rows take seconds and bounded memory; a loop takes minutes.

The loop is timed on fewer resamples, whose values are asserted to be equal, and multiplied. A B A B, medians.

    python benchmarks/bootstrap_speed.py result.json
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from sklearn.metrics import accuracy_score, roc_auc_score

from transferkit.evaluation.metrics import statistic_of
from transferkit.evaluation.resampling import Sampling, distributions, multiplicities
from transferkit.evaluation.rows import Rows

ROWS, RESAMPLES, LOOP, TIMES = 10_000, 10_000, 200, 3


def main(path: str) -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, ROWS)
    p = 1 / (1 + np.exp(-(generator.normal(size=ROWS) + y)))
    rows = Rows.of(y, p, kind="binary")
    sampling = Sampling(ROWS)
    figures = {name: statistic_of(name, rows) for name in ("accuracy", "auc")}
    # The same draws for both, as indices for the loop.
    times = np.concatenate(list(multiplicities(sampling, resamples=LOOP, seed=0))).astype(int)
    indices = [np.repeat(np.arange(ROWS), t) for t in times]

    def ours(resamples: int) -> dict[str, Any]:
        return distributions(figures, sampling, resamples=resamples, seed=0)

    def loop() -> dict[str, Any]:
        values = [(accuracy_score(y[i], p[i] > 0.5), roc_auc_score(y[i], p[i])) for i in indices]
        return {"accuracy": np.array([v[0] for v in values]), "auc": np.array([v[1] for v in values])}

    mine, theirs = ours(LOOP), loop()
    for name in figures:
        np.testing.assert_allclose(mine[name], theirs[name], atol=1e-12)
    seconds: dict[str, list[float]] = {"transferkit": [], "loop": []}
    for _ in range(TIMES):
        start = time.perf_counter()
        ours(RESAMPLES)
        seconds["transferkit"].append(time.perf_counter() - start)
        start = time.perf_counter()
        loop()
        seconds["loop"].append((time.perf_counter() - start) * RESAMPLES / LOOP)
    tracemalloc.start()
    ours(RESAMPLES)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["loop"] / medians["transferkit"]
    print(f"{RESAMPLES:,} resamples of {ROWS:,} rows, accuracy and AUC")
    for name, values in seconds.items():
        print(f"  {name:12} {medians[name]:8.2f} s   ({min(values):.2f} – {max(values):.2f})")
    print(f"  {ratio:.1f} times as fast; peak memory {peak:.0f} MiB")
    result = {
        "seconds": seconds, "medians": medians, "ratio": ratio, "peak_mib": peak, "rows": ROWS, "resamples": RESAMPLES,
        "loop_resamples_timed": LOOP, "machine": platform.platform(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "sklearn": sklearn.__version__},
    }  # fmt: skip
    Path(path).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
