"""Claim: every metric is scikit-learn's. The largest difference of each over 200 random cases: ties, weights, missing classes.

Cases are drawn by hypothesis. Where scikit-learn has no such metric, or none with weights or for a missing class, the oracle
puts it together from scikit-learn's parts: pairs of classes from its two-class areas, calibration errors from the bins of its
`calibration_curve`.

    python benchmarks/metrics_against_sklearn.py result.json
"""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import scipy
import sklearn
import sklearn.metrics as sk
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve

from transferkit.evaluation.metrics import METRICS, score
from transferkit.evaluation.rows import Kind

CASES, BINS = 200, 15
KINDS: tuple[Kind, ...] = ("binary", "multiclass", "multilabel", "regression")

Array = NDArray[Any]
Case = tuple[Array, Array, "Array | None"]
Oracle = Callable[[Array, Array, Any], float]


@st.composite
def cases(draw: st.DrawFn, kind: Kind) -> Case:
    """Labels, predictions, weights: few different scores, few rows, weights, classes that are missing."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.sampled_from((5, 12, 30, 200, 1000)))
    steps = draw(st.sampled_from((4, 23, 10**9)))
    k = draw(st.integers(3, 8))
    w = (
        (generator.random(n) + 0.01 if draw(st.booleans()) else generator.choice([0.5, 1, 2.7], n))
        if draw(st.booleans())
        else None
    )
    present = generator.permutation(k)[: draw(st.integers(2, k - 1))] if draw(st.booleans()) else np.arange(k)
    if kind == "binary":
        return generator.integers(0, 2, n), generator.integers(0, steps + 1, n) / steps, w
    if kind == "multiclass":
        p = generator.integers(1, steps + 1, (n, k)).astype(float)
        return generator.choice(present, n), p / p.sum(axis=1, keepdims=True), w
    if kind == "multilabel":
        y = generator.integers(0, 2, (n, k)) * np.isin(np.arange(k), present)
        return y, generator.integers(0, steps + 1, (n, k)) / steps, w
    y = np.round(generator.normal(size=(n, k - 2)) * 10.0 ** generator.integers(-3, 4), draw(st.sampled_from((1, 9))))
    return y, y + generator.normal(size=y.shape), w


def decided(p: Array, kind: str) -> Array:
    return p.argmax(axis=1) if kind == "multiclass" else (p > 0.5).astype(int)


def one_column(p: Array) -> Array:
    """Scores of each class against the rest; of class 1 where there are two."""
    return p[:, None] if p.ndim == 1 else p


def each_against_rest(area: Callable[..., float], *, both: bool, weighted: bool) -> Oracle:
    """A two-class area of scikit-learn's for each class or label for which it is defined, and their mean."""

    def oracle(y: Array, p: Array, w: Any) -> float:
        scores = one_column(p)
        up = y if y.ndim == 2 else y[:, None] == (np.arange(scores.shape[1]) if p.ndim == 2 else [1])
        chosen = [c for c in range(scores.shape[1]) if up[:, c].any() and not (both and up[:, c].all())]
        if not chosen:
            return math.nan
        areas = [area(up[:, c], scores[:, c], sample_weight=w) for c in chosen]
        share = np.average(up[:, chosen], axis=0, weights=w)
        return float(np.average(areas, weights=share if weighted else None))

    return oracle


def pairs(*, weighted: bool) -> Oracle:
    """Hand and Till's mean over pairs, from scikit-learn's two-class areas; equal to its own where that is defined."""

    def oracle(y: Array, p: Array, w: Any) -> float:
        present = np.unique(y)
        areas, sizes = [], []
        for i, a in enumerate(present):
            for b in present[i + 1 :]:
                inside = (y == a) | (y == b)
                of = None if w is None else w[inside]
                both = [sk.roc_auc_score(y[inside] == c, p[inside, c], sample_weight=of) for c in (a, b)]
                areas.append(np.mean(both))
                sizes.append(inside.sum() if w is None else of.sum())
        if not areas:
            return math.nan
        value = float(np.average(areas, weights=sizes if weighted else None))
        if w is None and len(present) == p.shape[1]:
            theirs = sk.roc_auc_score(y, p, multi_class="ovo", average="weighted" if weighted else "macro")
            assert abs(theirs - value) < 1e-12
        return value

    return oracle


def calibration(kind: str, *, strategy: str) -> Oracle:
    """The calibration error over the bins of scikit-learn's `calibration_curve`, whose means must be the same."""

    def oracle(y: Array, p: Array, w: Any) -> float:
        if kind == "multilabel":
            confidence, right = p.ravel(), y.ravel() == 1
            weight = np.ones(y.size) if w is None else np.repeat(w, y.shape[1])
        else:
            every = np.stack([1 - p, p], axis=1) if p.ndim == 1 else p
            confidence, right = every[np.arange(len(y)), decided(p, kind)], decided(p, kind) == y
            weight = np.ones(len(y)) if w is None else w
        shares = np.linspace(0, 1, BINS + 1)
        edges = (np.percentile(confidence, shares * 100) if strategy == "quantile" else shares)[1:-1]
        where = np.searchsorted(edges, confidence)
        near = np.abs(confidence[:, None] - edges) < 1e-9
        if strategy == "uniform" and near.any():
            return math.nan  # on which side of 1/3 a third lies is a matter of rounding
        filled = [where == b for b in range(BINS) if (where == b).any()]
        theirs = calibration_curve(right, confidence, n_bins=BINS, strategy=strategy)
        np.testing.assert_allclose(theirs, [[right[m].mean() for m in filled], [confidence[m].mean() for m in filled]])
        gaps = [weight[m].sum() * abs(np.average(right[m], weights=weight[m]) - np.average(confidence[m], weights=weight[m]))
                for m in filled]  # fmt: skip
        return float(sum(gaps) / weight.sum())

    return oracle


def flat(function: Callable[..., float], **settings: Any) -> Oracle:
    """Every label by itself."""
    return lambda y, p, w: function(
        y.ravel(), p.ravel(), sample_weight=None if w is None else np.repeat(w, y.shape[1]), **settings
    )


def by_decision(function: Callable[..., float], kind: str, **settings: Any) -> Oracle:
    return lambda y, p, w: function(y, decided(p, kind), sample_weight=w, **settings)


def classes_of(kind: str) -> dict[str, Oracle]:
    """The oracles of a classification task."""
    found: dict[str, Oracle] = {
        "auc": each_against_rest(sk.roc_auc_score, both=True, weighted=False),
        "auc_weighted": each_against_rest(sk.roc_auc_score, both=True, weighted=True),
        "pr_auc": each_against_rest(sk.average_precision_score, both=False, weighted=False),
        "pr_auc_weighted": each_against_rest(sk.average_precision_score, both=False, weighted=True),
        "ece": calibration(kind, strategy="uniform"),
        "ece_mass": calibration(kind, strategy="quantile"),
    }
    for part, f in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        for average in ("macro", "micro", "weighted"):
            found[f"{part}_{average}"] = by_decision(f, kind, average=average, zero_division=0)
        found[part] = by_decision(f, kind, average="binary" if kind == "binary" else "macro", zero_division=0)
    if kind == "multilabel":
        found |= {
            "accuracy": lambda y, p, w: 1 - sk.hamming_loss(y, decided(p, kind), sample_weight=w),
            "subset_accuracy": by_decision(sk.accuracy_score, kind),
            "log_loss": flat(sk.log_loss, labels=[0, 1]),
            "brier": flat(sk.brier_score_loss, pos_label=1),
        }
        return found

    def known(p: Array) -> range:
        return range(p.shape[1] if p.ndim == 2 else 2)

    return found | {
        "accuracy": by_decision(sk.accuracy_score, kind),
        "balanced_accuracy": by_decision(sk.balanced_accuracy_score, kind),
        "mcc": by_decision(sk.matthews_corrcoef, kind),
        "kappa": by_decision(sk.cohen_kappa_score, kind),
        **{
            f"kappa_{how}": lambda y, p, w, how=how: sk.cohen_kappa_score(
                y, decided(p, kind), sample_weight=w, weights=how, labels=known(p)
            )
            for how in ("linear", "quadratic")
        },
        "log_loss": lambda y, p, w: sk.log_loss(y, p, sample_weight=w, labels=known(p)),
        "brier": lambda y, p, w: sk.brier_score_loss(
            y, p, sample_weight=w, **({"labels": known(p)} if kind == "multiclass" else {"pos_label": 1})
        ),
    }


ORACLES: dict[Kind, dict[str, Oracle]] = {
    "binary": classes_of("binary"),
    "multiclass": {
        **classes_of("multiclass"),
        "auc_ovo": pairs(weighted=False),
        "auc_ovo_weighted": pairs(weighted=True),
        **{
            f"top_{k}_accuracy": lambda y, p, w, k=k: sk.top_k_accuracy_score(
                y, p, k=k, sample_weight=w, labels=range(p.shape[1])
            )
            for k in (1, 2)
        },
    },
    "multilabel": classes_of("multilabel"),
    "regression": {
        "mae": lambda y, p, w: sk.mean_absolute_error(y, p, sample_weight=w),
        "mse": lambda y, p, w: sk.mean_squared_error(y, p, sample_weight=w),
        "rmse": lambda y, p, w: sk.root_mean_squared_error(y, p, sample_weight=w),
        "mape": lambda y, p, w: sk.mean_absolute_percentage_error(y, p, sample_weight=w),
        "msle": lambda y, p, w: sk.mean_squared_log_error(abs(y), abs(p), sample_weight=w),
        "bias": lambda y, p, w: float(np.average(p - y, axis=0, weights=w).mean()),
        "r2": lambda y, p, w: sk.r2_score(y, p, sample_weight=w),
        "explained_variance": lambda y, p, w: sk.explained_variance_score(y, p, sample_weight=w),
        "max_error": lambda y, p, _: sk.max_error(y.ravel(), p.ravel()),
    },
}


def compare(kind: Kind, name: str, oracle: Oracle) -> tuple[int, float]:
    """How many cases were compared, and the largest difference, relative where values are above 1."""
    found: list[float] = []

    @hypothesis.settings(
        max_examples=4 * CASES, derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(cases(kind))
    def run(case: Case) -> None:
        y, p, w = case
        if len(found) >= CASES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of classes that are missing
            theirs = float(oracle(y, p, w)) if kind == "regression" or len(np.unique(y)) > 1 else math.nan
        if not np.isfinite(theirs):
            return
        if name == "msle":
            y, p = abs(y), abs(p)
        ours = score(name, y, p, sample_weight=w, kind=kind)
        found.append(abs(ours - theirs) / max(1.0, abs(theirs)))
        assert found[-1] < 1e-9, (kind, name, ours, theirs)

    run()
    return len(found), max(found)


def main(path: str) -> None:
    rows = []
    for kind in KINDS:
        missing = {name for name, metric in METRICS.items() if kind in metric.kinds} - set(ORACLES[kind])
        assert not missing, (kind, missing)
        for name, oracle in ORACLES[kind].items():
            compared, worst = compare(kind, name, oracle)
            assert compared >= CASES, (kind, name, compared)
            rows.append({"kind": kind, "metric": name, "cases": compared, "largest_difference": worst})
            print(f"{kind:11} {name:20} {compared:4} cases  {worst:.1e}", flush=True)
    print(f"{len(rows)} metrics, largest difference {max(row['largest_difference'] for row in rows):.1e}")
    versions = {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__,
                "sklearn": sklearn.__version__, "hypothesis": hypothesis.__version__}  # fmt: skip
    Path(path).write_text(json.dumps({"versions": versions, "machine": platform.platform(), "metrics": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
