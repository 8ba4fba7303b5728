"""Claim: 95% intervals hold the truth 93–97% of the time, and equally good models raise a false alarm 3–7% of the time.

Scores are drawn from two normal distributions, so that the true accuracy and area under the curve are known in closed form.

    python benchmarks/interval_coverage.py result.json
"""

from __future__ import annotations

import json
import math
import platform
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from transferkit.evaluation.comparing import compare_rows
from transferkit.evaluation.estimating import Uncertainty, estimate
from transferkit.evaluation.metrics import statistic_of
from transferkit.evaluation.rows import Rows

DATA_SETS, ROWS, SHIFT, RESAMPLES = 500, 300, 1.2, 1000


def rows_of(y: np.ndarray[Any, Any], scores: np.ndarray[Any, Any]) -> Rows:
    # The best cut between the two distributions lies halfway; the logistic function puts it at 0.5.
    return Rows.of(y, 1 / (1 + np.exp(-(scores - SHIFT / 2))), kind="binary")


def main(path: str) -> None:
    truth = {"accuracy": NormalDist().cdf(SHIFT / 2), "auc": NormalDist().cdf(SHIFT / math.sqrt(2))}
    ways = {
        "by formula": Uncertainty(),
        "percentile bootstrap": Uncertainty(resamples=RESAMPLES),
        "stratified bootstrap": Uncertainty(resamples=RESAMPLES, stratified=True),
        "BCa bootstrap": Uncertainty(resamples=RESAMPLES, method="bca"),
    }
    held = {way: dict.fromkeys(truth, 0) for way in ways}
    alarms: dict[str, int] = {"accuracy: McNemar": 0, "auc: DeLong": 0, "accuracy: interval": 0, "auc: interval": 0}
    for seed in range(DATA_SETS):
        generator = np.random.default_rng(seed)
        y = generator.integers(0, 2, ROWS)
        scores = generator.normal(size=ROWS) + SHIFT * y
        rows = rows_of(y, scores)
        statistics = {name: statistic_of(name, rows) for name in truth}
        for way, uncertainty in ways.items():
            # Each data set has draws of its own.
            own = Uncertainty(0.95, uncertainty.resamples, uncertainty.method, uncertainty.stratified, seed)
            intervals, _ = estimate(statistics, rows, own)
            for name, true in truth.items():
                held[way][name] += intervals[name].low <= true <= intervals[name].high
        # Two models equally good: they share half of the variance of their noise.
        shared = generator.normal(size=ROWS)
        a, b = (rows_of(y, SHIFT * y + (shared + generator.normal(size=ROWS)) / math.sqrt(2)) for _ in range(2))
        compared = compare_rows(
            {name: statistic_of(name, a) for name in truth},
            {name: statistic_of(name, b) for name in truth},
            (a, b),
            dict.fromkeys(truth, True),
            names=("a", "b"),
            uncertainty=Uncertainty(0.95, RESAMPLES, seed=seed),
        )
        for one in compared.values():
            alarms[f"{one.name}: {one.test}"] += one.p_value < 0.05
            alarms[f"{one.name}: interval"] += one.verdict != "not told apart"
    coverage = {way: {name: count / DATA_SETS for name, count in counts.items()} for way, counts in held.items()}
    false_alarms = {name: count / DATA_SETS for name, count in alarms.items()}
    for way, shares in coverage.items():
        print(f"{way:22}", "  ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    print("false alarms          ", "  ".join(f"{name} {share:.3f}" for name, share in false_alarms.items()))
    result = {
        "data_sets": DATA_SETS, "rows": ROWS, "resamples": RESAMPLES, "coverage": coverage, "false_alarms": false_alarms,
        "versions": {"python": platform.python_version(), "numpy": np.__version__}, "machine": platform.platform(),
    }  # fmt: skip
    Path(path).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
