"""Every metric against scikit-learn, over cases drawn by hypothesis: ties, weights, missing classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transferkit.errors import EvaluationError
from transferkit.evaluation.metrics import METRICS, score, statistic_of
from transferkit.evaluation.ranking import precision_recall_curve, roc_curve
from transferkit.evaluation.rows import Kind, Rows

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]
TOLERANCE = 1e-9


@st.composite
def cases(draw: st.DrawFn, kind: Kind, *, weights: bool = True) -> Arrays:
    """Labels, predictions and sample weights; few different scores for ties, few rows for missing classes."""
    n = draw(st.integers(2, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = draw(st.sampled_from([3, 10, 10**6]))
    k = draw(st.integers(3, 6))
    w = None
    if weights and draw(st.booleans()):
        w = generator.choice([0.0, 0.5, 1.0, 2.7], size=n) if draw(st.booleans()) else generator.random(n) + 0.01
        assume(w.sum() > 0)
    if kind == "binary":
        return generator.integers(0, 2, n), generator.integers(0, steps + 1, n) / steps, w
    if kind == "multilabel":
        return generator.integers(0, 2, (n, k)), generator.integers(0, steps + 1, (n, k)) / steps, w
    if kind == "regression":
        d = draw(st.integers(1, 3))
        y = np.round(generator.normal(size=(n, d)) * 3, draw(st.integers(0, 6)))
        return y, y + np.round(generator.normal(size=(n, d)), 3), w
    p = generator.integers(1, steps + 1, (n, k)).astype(float)
    return generator.integers(0, k, n), p / p.sum(axis=1, keepdims=True), w


def oracle(function: Callable[..., float], *args: Any, **kwargs: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where a class is missing
        return float(function(*args, **kwargs))


def same(ours: float, theirs: float) -> None:
    assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=TOLERANCE)


def _f(part: str) -> Callable[..., float]:
    chosen: Callable[..., float] = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}[part]
    return chosen


@settings(max_examples=50, deadline=None)
@given(cases("binary"))
def test_two_classes(case: Arrays) -> None:
    y, p, w = case
    decided = (p > 0.5).astype(int)

    def ours(name: str) -> float:
        return score(name, y, p, sample_weight=w, kind="binary")

    same(ours("accuracy"), oracle(sk.accuracy_score, y, decided, sample_weight=w))
    same(ours("balanced_accuracy"), _balanced(y, decided, w))
    same(ours("log_loss"), oracle(sk.log_loss, y, p, sample_weight=w, labels=[0, 1]))
    same(ours("brier"), oracle(sk.brier_score_loss, y, p, sample_weight=w, pos_label=1))
    same(ours("mcc"), oracle(sk.matthews_corrcoef, y, decided, sample_weight=w))
    for part in ("precision", "recall", "f1"):
        same(ours(part), oracle(_f(part), y, decided, sample_weight=w, zero_division=0))
        for average in ("micro", "weighted"):
            same(ours(f"{part}_{average}"), oracle(_f(part), y, decided, sample_weight=w, average=average, zero_division=0))
    kept = np.ones(len(y), bool) if w is None else w > 0
    if len(np.unique(y[kept])) == 2:
        same(ours("auc"), oracle(sk.roc_auc_score, y, p, sample_weight=w))
        same(ours("pr_auc"), oracle(sk.average_precision_score, y, p, sample_weight=w))
    if len(np.unique([y[kept], decided[kept]])) == 2:
        for name, weights in (("kappa", None), ("kappa_linear", "linear"), ("kappa_quadratic", "quadratic")):
            same(ours(name), oracle(sk.cohen_kappa_score, y, decided, sample_weight=w, weights=weights))


def _balanced(y: NDArray[Any], decided: NDArray[Any], w: NDArray[Any] | None) -> float:
    kept, predicted, weights = _weighted(y, decided, w)
    return oracle(sk.balanced_accuracy_score, kept, predicted, sample_weight=weights)


def _weighted(y: NDArray[Any], decided: NDArray[Any], w: NDArray[Any] | None) -> Arrays:
    """scikit-learn's balanced accuracy counts a class whose rows have no weight as 0/0 with a warning: they are taken out."""
    kept = np.ones(len(y), bool) if w is None else w > 0
    return y[kept], decided[kept], None if w is None else w[kept]


@settings(max_examples=50, deadline=None)
@given(cases("multiclass"))
def test_several_classes(case: Arrays) -> None:
    y, p, w = case
    k = p.shape[1]
    decided, labels = p.argmax(axis=1), list(range(p.shape[1]))

    def ours(name: str) -> float:
        return score(name, y, p, sample_weight=w, kind="multiclass")

    same(ours("accuracy"), oracle(sk.accuracy_score, y, decided, sample_weight=w))
    same(ours("balanced_accuracy"), _balanced(y, decided, w))
    same(ours("log_loss"), oracle(sk.log_loss, y, p, sample_weight=w, labels=labels))
    same(ours("brier"), oracle(sk.brier_score_loss, y, p, sample_weight=w, labels=labels))
    same(ours("mcc"), oracle(sk.matthews_corrcoef, y, decided, sample_weight=w))
    same(ours("top_2_accuracy"), oracle(sk.top_k_accuracy_score, y, p, k=2, sample_weight=w, labels=labels))
    y_kept, decided_kept, w_kept = _weighted(y, decided, w)
    for part in ("precision", "recall", "f1"):
        for average in ("macro", "micro", "weighted"):
            theirs = oracle(_f(part), y_kept, decided_kept, sample_weight=w_kept, average=average, zero_division=0)
            same(ours(f"{part}_{average}"), theirs)
        same(ours(part), ours(f"{part}_macro"))
    if len(np.unique([y_kept, decided_kept])) > 1:
        for name, weights in (("kappa", None), ("kappa_linear", "linear"), ("kappa_quadratic", "quadratic")):
            theirs = oracle(sk.cohen_kappa_score, y, decided, sample_weight=w, weights=weights, labels=labels)
            same(ours(name), theirs)
    if len(np.unique(y_kept)) == k:
        for name, average in (("auc", "macro"), ("auc_weighted", "weighted")):
            same(ours(name), oracle(sk.roc_auc_score, y, p, sample_weight=w, multi_class="ovr", average=average))
        one_hot = np.eye(k)[y]
        same(ours("pr_auc"), oracle(sk.average_precision_score, one_hot, p, sample_weight=w, average="macro"))
        same(ours("pr_auc_weighted"), oracle(sk.average_precision_score, one_hot, p, sample_weight=w, average="weighted"))
        if w is None:
            for name, average in (("auc_ovo", "macro"), ("auc_ovo_weighted", "weighted")):
                same(ours(name), oracle(sk.roc_auc_score, y, p, multi_class="ovo", average=average))


@settings(max_examples=30, deadline=None)
@given(cases("multiclass", weights=False))
def test_an_average_leaves_out_classes_without_rows(case: Arrays) -> None:
    y, p, _ = case
    present = [c for c in range(p.shape[1]) if 0 < (y == c).sum() < len(y)]
    assume(present)
    each = [oracle(sk.roc_auc_score, y == c, p[:, c]) for c in present]
    same(score("auc", y, p, kind="multiclass"), float(np.mean(each)))


@settings(max_examples=50, deadline=None)
@given(cases("multilabel"))
def test_several_labels(case: Arrays) -> None:
    y, p, w = case
    decided = (p > 0.5).astype(int)

    def ours(name: str) -> float:
        return score(name, y, p, sample_weight=w, kind="multilabel")

    same(ours("subset_accuracy"), oracle(sk.accuracy_score, y, decided, sample_weight=w))
    same(ours("accuracy"), 1 - oracle(sk.hamming_loss, y, decided, sample_weight=w))
    flat_weight = None if w is None else np.repeat(w, y.shape[1])
    same(ours("brier"), oracle(sk.brier_score_loss, y.ravel(), p.ravel(), sample_weight=flat_weight, pos_label=1))
    same(ours("log_loss"), oracle(sk.log_loss, y.ravel(), p.ravel(), sample_weight=flat_weight, labels=[0, 1]))
    for part in ("precision", "recall", "f1"):
        for average in ("macro", "micro", "weighted"):
            theirs = oracle(_f(part), y, decided, sample_weight=w, average=average, zero_division=0)
            same(ours(f"{part}_{average}"), theirs)
    kept = y if w is None else y[w > 0]
    if ((kept.sum(axis=0) > 0) & (kept.sum(axis=0) < len(kept))).all():
        for name, average in (("auc", "macro"), ("auc_weighted", "weighted")):
            same(ours(name), oracle(sk.roc_auc_score, y, p, sample_weight=w, average=average))
        same(ours("pr_auc"), oracle(sk.average_precision_score, y, p, sample_weight=w, average="macro"))


@settings(max_examples=50, deadline=None)
@given(cases("regression"))
def test_quantities(case: Arrays) -> None:
    y, p, w = case

    def ours(name: str) -> float:
        return score(name, y, p, sample_weight=w, kind="regression")

    same(ours("mae"), oracle(sk.mean_absolute_error, y, p, sample_weight=w))
    same(ours("mse"), oracle(sk.mean_squared_error, y, p, sample_weight=w))
    same(ours("rmse"), oracle(sk.root_mean_squared_error, y, p, sample_weight=w))
    same(ours("mape"), oracle(sk.mean_absolute_percentage_error, y, p, sample_weight=w))
    msle = oracle(sk.mean_squared_log_error, abs(y), abs(p), sample_weight=w)
    same(score("msle", abs(y), abs(p), sample_weight=w, kind="regression"), msle)
    kept = y if w is None else y[w > 0]
    # Where a target is constant the difference of the rounded means decides between 0 and 1: see the test below.
    assume((kept.std(axis=0) > 0).all())
    same(ours("r2"), oracle(sk.r2_score, y, p, sample_weight=w))
    same(ours("explained_variance"), oracle(sk.explained_variance_score, y, p, sample_weight=w))
    same(ours("bias"), float(np.average(p - y, axis=0, weights=w).mean()))
    if y.shape[1] == 1 and w is None:
        same(ours("max_error"), oracle(sk.max_error, y, p))


@pytest.mark.parametrize(("p", "r2", "explained"), [([3.0, 3.0], 1.0, 1.0), ([4.0, 4.0], 0.0, 1.0), ([2.0, 4.0], 0.0, 0.0)])
def test_a_constant_target(p: list[float], r2: float, explained: float) -> None:
    y = [3.0, 3.0]
    assert score("r2", y, p) == sk.r2_score(y, p) == r2
    assert score("explained_variance", y, p) == sk.explained_variance_score(y, p) == explained


@settings(max_examples=30, deadline=None)
@given(cases("binary"))
def test_curves_pass_through_scikit_learns_points(case: Arrays) -> None:
    y, p, w = case
    kept = y if w is None else y[w > 0]
    assume(len(np.unique(kept)) == 2)
    x, up, thresholds = sk.roc_curve(y, p, sample_weight=w, drop_intermediate=False)
    ours = roc_curve(y == 1, p, w)
    np.testing.assert_allclose([ours.x, ours.y], [x, up], atol=1e-12)
    np.testing.assert_array_equal(ours.thresholds, thresholds)
    precision, recall, _ = sk.precision_recall_curve(y, p, sample_weight=w)
    curve = precision_recall_curve(y == 1, p, w)
    np.testing.assert_allclose(curve.x, recall[::-1], atol=1e-12)
    np.testing.assert_allclose(curve.y, precision[::-1], atol=1e-12)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "regression"])
def test_multiplicities_equal_repeated_rows(kind: Kind) -> None:
    """The law that every interval rests on: counting a row m times is the same as writing it m times."""
    generator = np.random.default_rng(4)
    n, k = 60, 4
    y: NDArray[Any] = generator.integers(0, {"binary": 2}.get(kind, k), n)
    p: NDArray[Any] = generator.random(n)
    if kind == "multiclass":
        p = generator.dirichlet(np.ones(k), n).round(2)
        p /= p.sum(axis=1, keepdims=True)
    elif kind == "multilabel":
        y, p = generator.integers(0, 2, (n, k)), generator.random((n, k)).round(1)
    elif kind == "regression":
        y, p = generator.normal(size=n), generator.normal(size=n)
    w = generator.random(n)
    times = generator.integers(0, 4, (3, n))
    rows = Rows.of(y, p, kind=kind, sample_weight=w)
    names = [name for name, metric in METRICS.items() if kind in metric.kinds and name not in ("msle", "ece_mass")]
    for name in names:
        at_once = statistic_of(name, rows)(times.astype(float))
        for m, value in zip(times, at_once, strict=True):
            index = np.repeat(np.arange(n), m)
            assert value == pytest.approx(score(name, y[index], p[index], sample_weight=w[index], kind=kind), abs=1e-12), name


def test_many_classes_take_the_sorted_way() -> None:
    generator = np.random.default_rng(0)
    y, p = generator.integers(0, 200, 900), generator.dirichlet(np.ones(200), 900)
    same(score("f1_macro", y, p), oracle(sk.f1_score, y, p.argmax(axis=1), average="macro", zero_division=0))
    same(score("balanced_accuracy", y, p), oracle(sk.balanced_accuracy_score, y, p.argmax(axis=1)))


def test_calibration_error_by_hand() -> None:
    # Bins of width 1/15: 0.62 and 0.64 share one, 0.9 has its own; errors 0.63 - 0.5 over two rows, 0.9 - 1 over one.
    p = [0.62, 0.64, 0.9]
    assert score("ece", [1, 0, 1], p) == pytest.approx((2 * abs(0.63 - 0.5) + 0.1) / 3)


def message(name: str, y: Any, p: Any, **kwargs: Any) -> str:
    with pytest.raises(EvaluationError) as caught:
        score(name, y, p, **kwargs)
    return str(caught.value)


def test_logits_taken_for_probabilities() -> None:
    assert message("auc", [0, 1], [[2.0, -1.0], [0.5, 3.0]], kind="multiclass") == (
        "Computing auc.\n"
        "  found: predictions between -1 and 3, where probabilities lie in 0 … 1\n"
        "  likely cause: logits are taken for probabilities: the head has no softmax or sigmoid\n"
        "  to fix it: compile with a loss of from_logits=True, give the head its activation, or pass probabilities"
    )


def test_probabilities_that_do_not_sum_to_one() -> None:
    assert message("log_loss", [0, 1], [[0.9, 0.9], [0.2, 0.8]]) == (
        "Computing log_loss.\n"
        "  found: 1 of 2 rows of probabilities don't sum to one (row 0 sums to 1.8)\n"
        "  likely cause: sigmoids instead of a softmax, or probabilities that were cut or changed afterwards\n"
        "  to fix it: use a softmax for classes that exclude each other; give zeros and ones (n, k) as labels where they don't"
    )


def test_one_class_only() -> None:
    assert message("auc", [1, 1, 1], [0.1, 0.5, 0.9], classes=["ant", "bee"]) == (
        "Computing auc.\n"
        "  found: one class only ('bee')\n"
        "  likely cause: a test set sorted by class and cut, or a slice of one class\n"
        "  to fix it: shuffle before splitting, or give rows of at least two classes"
    )


def test_a_metric_of_another_task() -> None:
    assert message("auc", [0.5, 2.5], [0.1, 3.0]) == (
        "Computing auc.\n"
        "  found: a regression task; auc is for binary and multiclass and multilabel\n"
        "  to fix it: choose among mae, mse, rmse, mape, msle, bias, r2, explained_variance, max_error"
    )


def test_an_unknown_metric_names_the_known_one() -> None:
    first = message("roc_auc", [0, 1], [0.1, 0.9]).splitlines()[:2]
    assert first == ["Computing roc_auc.", "  found: no metric of that name (the metric 'auc' is what is meant)"]
    assert "(did you mean 'accuracy' or 'subset_accuracy' or 'auc'?)" in message("acuracy", [0, 1], [0.1, 0.9])


@pytest.mark.parametrize(
    ("y", "p", "kwargs", "found"),
    [
        ([], [], {}, "no rows"),
        ([0, 1], [0.5], {}, "2 labels and 1 predictions"),
        ([0, 1], [0.5, np.nan], {}, "predictions that aren't finite in 1 of 2 rows, the first in row 1"),
        ([0, np.inf], [0.5, 0.5], {}, "labels that aren't finite in 1 of 2 rows, the first in row 1"),
        ([0, 3], [[0.5, 0.5], [0.5, 0.5]], {}, "1 of 2 labels outside the head (3); 2 units take 0 to 1"),
        ([0, 0.5], [[0.5, 0.5], [0.5, 0.5]], {}, "labels that aren't whole numbers, between 0 and 0.5"),
        ([0, 2], [0.5, 0.5], {"kind": "binary"}, "labels between 0 and 2, where one unit takes 0 and 1"),
        (["a", "b"], [0.5, 0.5], {}, "labels of type <U1 and predictions of type float64, where both must be numbers"),
        ([0, 1], [0.5, 0.5], {"sample_weight": [1, -1]}, "1 negative sample weights"),
        ([0, 1], [0.5, 0.5], {"sample_weight": [0, 0]}, "sample weights that are all zero"),
        ([0, 1], [0.5, 0.5], {"sample_weight": [1, 2, 3]}, "sample weights of shape (3,) for 2 rows"),
        ([0, 1], [0.5, 0.5], {"classes": ["a", "a"]}, "2 class names (1 of them different) for 2 classes"),
        ([[1, 2]], [[0.5, 0.9]], {"kind": "multilabel"}, "labels between 1 and 2, where each is 0 or 1"),
        ([[1, 1]], [[0.5, 0.5]], {"kind": "multiclass"}, "label rows that don't sum to one"),
    ],
)
def test_bad_input_is_said(y: Any, p: Any, kwargs: dict[str, Any], found: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        score("accuracy", y, p, **kwargs)
    assert caught.value.asked == "Computing accuracy."
    assert caught.value.found == (found,)
