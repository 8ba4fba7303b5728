"""Claim: the metrics are scikit-learn's. The largest difference of each over random cases, with ties, weights, missing classes.

python benchmarks/metrics_against_sklearn.py result.json
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import sklearn.metrics as sk
from numpy.typing import NDArray

from transferkit.evaluation.metrics import score

CASES = 200

Array = NDArray[Any]


def case(seed: int, kind: str) -> tuple[Array, Array, Array | None]:
    """Labels, predictions, weights: few different scores in each third case, few rows and weights in each other one."""
    generator = np.random.default_rng(seed)
    n = int(generator.integers(4, 30)) if seed % 2 else int(generator.integers(100, 2000))
    steps = (4, 25, 10**9)[seed % 3]
    w = generator.random(n) + 0.01 if seed % 4 < 2 else None
    k = int(generator.integers(3, 9))
    if kind == "binary":
        y = generator.integers(0, 2, n)
        y[:2] = 0, 1
        return y, generator.integers(0, steps + 1, n) / steps, w
    if kind == "multiclass":
        p = generator.integers(1, steps + 1, (n, k)).astype(float)
        return generator.integers(0, k, n), p / p.sum(axis=1, keepdims=True), w
    if kind == "multilabel":
        return generator.integers(0, 2, (n, k)), generator.integers(0, steps + 1, (n, k)) / steps, w
    y = generator.normal(size=n) * 10.0 ** generator.integers(-3, 4)
    return y, y + generator.normal(size=n), w


def _two(name: str) -> Callable[[Array, Array, Array | None], float]:
    hard: dict[str, Callable[..., float]] = {
        "accuracy": sk.accuracy_score,
        "balanced_accuracy": sk.balanced_accuracy_score,
        "mcc": sk.matthews_corrcoef,
        "kappa": sk.cohen_kappa_score,
    }
    if name in hard:
        return lambda y, p, w: hard[name](y, _decided(p), sample_weight=w)
    if name.startswith("kappa_"):
        return lambda y, p, w: sk.cohen_kappa_score(y, _decided(p), sample_weight=w, weights=name[6:], labels=_all(p))
    part, _, average = name.partition("_")
    f: Callable[..., float] = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}[part]
    return lambda y, p, w: f(y, _decided(p), sample_weight=w, average=average or "binary", zero_division=0)


def _all(p: Array) -> range:
    return range(p.shape[1] if p.ndim == 2 else 2)


def _decided(p: Array) -> Array:
    return p.argmax(axis=1) if p.ndim == 2 and np.allclose(p.sum(axis=1), 1) else (p > 0.5).astype(int)


def _present(y: Array, p: Array) -> list[int]:
    return [c for c in range(p.shape[1]) if 0 < (y == c).sum() < len(y)]


HARD = ("accuracy", "balanced_accuracy", "mcc", "kappa", "kappa_linear", "kappa_quadratic")
AVERAGED = [f"{part}_{average}" for part in ("precision", "recall", "f1") for average in ("macro", "micro", "weighted")]
ORACLES: dict[str, dict[str, Callable[[Array, Array, Array | None], float]]] = {
    "binary": {
        **{n: _two(n) for n in (*HARD, "precision", "recall", "f1")},
        "auc": lambda y, p, w: sk.roc_auc_score(y, p, sample_weight=w),
        "pr_auc": lambda y, p, w: sk.average_precision_score(y, p, sample_weight=w),
        "log_loss": lambda y, p, w: sk.log_loss(y, p, sample_weight=w, labels=[0, 1]),
        "brier": lambda y, p, w: sk.brier_score_loss(y, p, sample_weight=w),
    },
    "multiclass": {
        **{n: _two(n) for n in (*HARD, *AVERAGED)},
        "top_2_accuracy": lambda y, p, w: sk.top_k_accuracy_score(y, p, k=2, sample_weight=w, labels=range(p.shape[1])),
        "log_loss": lambda y, p, w: sk.log_loss(y, p, sample_weight=w, labels=range(p.shape[1])),
        "brier": lambda y, p, w: sk.brier_score_loss(y, p, sample_weight=w, labels=range(p.shape[1])),
        "auc": lambda y, p, w: float(np.mean([sk.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in _present(y, p)])),
        "pr_auc": lambda y, p, w: float(
            np.mean([sk.average_precision_score(y == c, p[:, c], sample_weight=w) for c in range(p.shape[1]) if (y == c).any()])
        ),
        "auc_ovo": lambda y, p, _: _unweighted_ovo(y, p, "macro"),
        "auc_ovo_weighted": lambda y, p, _: _unweighted_ovo(y, p, "weighted"),
    },
    "multilabel": {
        **{n: _two(n) for n in AVERAGED},
        "subset_accuracy": lambda y, p, w: sk.accuracy_score(y, (p > 0.5).astype(int), sample_weight=w),
        "accuracy": lambda y, p, w: 1 - sk.hamming_loss(y, (p > 0.5).astype(int), sample_weight=w),
        "auc": lambda y, p, w: sk.roc_auc_score(y, p, sample_weight=w),
        "pr_auc": lambda y, p, w: sk.average_precision_score(y, p, sample_weight=w),
    },
    "regression": {
        "mae": lambda y, p, w: sk.mean_absolute_error(y, p, sample_weight=w),
        "mse": lambda y, p, w: sk.mean_squared_error(y, p, sample_weight=w),
        "rmse": lambda y, p, w: sk.root_mean_squared_error(y, p, sample_weight=w),
        "mape": lambda y, p, w: sk.mean_absolute_percentage_error(y, p, sample_weight=w),
        "r2": lambda y, p, w: sk.r2_score(y, p, sample_weight=w),
        "explained_variance": lambda y, p, w: sk.explained_variance_score(y, p, sample_weight=w),
        "max_error": lambda y, p, _: sk.max_error(y, p),
    },
}


def _unweighted_ovo(y: Array, p: Array, average: str) -> float:
    """scikit-learn has no weights here, and needs every class."""
    return float("nan") if len(np.unique(y)) < p.shape[1] else float(sk.roc_auc_score(y, p, multi_class="ovo", average=average))


def main(path: str) -> None:
    rows = []
    for kind, oracles in ORACLES.items():
        for name, oracle in oracles.items():
            worst, compared = 0.0, 0
            for seed in range(CASES):
                y, p, w = case(seed, kind)
                if name in ("auc_ovo", "auc_ovo_weighted"):
                    w = None
                if kind == "multilabel" and name in ("auc", "pr_auc") and not ((y.sum(0) > 0) & (y.sum(0) < len(y))).all():
                    continue  # scikit-learn gives NaN for a label that no row has; what we leave out is said in the notes
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    theirs = float(oracle(y, p, w))
                if not np.isfinite(theirs):
                    continue
                ours = score(name, y, p, sample_weight=w, kind=kind)  # type: ignore[arg-type]
                worst, compared = max(worst, abs(ours - theirs) / max(1.0, abs(theirs))), compared + 1
            assert worst < 1e-9, (kind, name, worst)
            rows.append({"kind": kind, "metric": name, "cases": compared, "largest_difference": worst})
            print(f"{kind:11} {name:20} {compared:4} cases  {worst:.1e}")
    versions = {"python": platform.python_version(), "numpy": np.__version__, "sklearn": sklearn.__version__}
    Path(path).write_text(json.dumps({"versions": versions, "machine": platform.platform(), "metrics": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
