"""Bootstrap, intervals by formula, folds: against SciPy, NumPy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from transferkit.errors import EvaluationError
from transferkit.evaluation.comparing import delong_test, mcnemar
from transferkit.evaluation.estimating import Uncertainty, estimate
from transferkit.evaluation.folds import folds, nadeau_bengio
from transferkit.evaluation.intervals import delong_interval, mean_interval, t_quantile, wilson
from transferkit.evaluation.means import Mean
from transferkit.evaluation.metrics import statistic_of
from transferkit.evaluation.resampling import (
    Method,
    Sampling,
    bootstrap_interval,
    distributions,
    jackknife,
    multiplicities,
)
from transferkit.evaluation.rows import FloatArray, Rows


def example(n: int = 80, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, n)
    return Rows.of(y, np.clip(generator.normal(0.4 + 0.2 * y, 0.2), 0, 1), kind="binary")


def test_every_resample_has_as_many_rows_as_the_data() -> None:
    drawn = np.concatenate(list(multiplicities(Sampling(50), resamples=300, seed=1)))
    assert drawn.shape == (300, 50)
    np.testing.assert_array_equal(drawn.sum(axis=1), 50)
    # Each count is binomial(50, 1/50); their mean over 15,000 cells lies within 5 standard errors of its variance.
    assert drawn.var() == pytest.approx(0.98, abs=0.06)


def test_pieces_change_nothing_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transferkit.evaluation.resampling.CELLS", 500)
    pieces = list(multiplicities(Sampling(50), resamples=33, seed=1))
    assert [len(p) for p in pieces] == [10, 10, 10, 3]
    np.testing.assert_array_equal(np.concatenate(pieces).sum(axis=1), 50)


def test_strata_keep_their_sizes() -> None:
    strata = np.array([0] * 7 + [1] * 13 + [2])
    drawn = np.concatenate(list(multiplicities(Sampling(21, strata=strata), resamples=100, seed=2)))
    for s, size in ((0, 7), (1, 13), (2, 1)):
        np.testing.assert_array_equal(drawn[:, strata == s].sum(axis=1), size)


def test_groups_are_drawn_whole() -> None:
    groups = np.array([0, 0, 1, 2, 2, 2])
    drawn = np.concatenate(list(multiplicities(Sampling(6, groups=groups), resamples=100, seed=2)))
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 3] == drawn[:, 5]).all()
    np.testing.assert_array_equal(drawn[:, [0, 2, 3]].sum(axis=1), 3)


def test_groups_of_several_classes_have_no_stratum() -> None:
    with pytest.raises(EvaluationError) as caught:
        Sampling(4, strata=np.array([0, 1, 1, 1]), groups=np.array([0, 0, 1, 1]))
    assert str(caught.value) == (
        "Resampling groups within strata.\n"
        "  found: groups with rows of several strata\n"
        "  likely cause: rows of one group have different labels, so a group belongs to no stratum\n"
        "  to fix it: leave `stratified` out; groups are drawn whole either way"
    )


def test_the_distribution_is_that_of_a_plain_loop() -> None:
    rows = example()
    [drawn] = [np.concatenate(list(multiplicities(Sampling(80), resamples=50, seed=3)))]
    found = distributions({"auc": statistic_of("auc", rows)}, Sampling(80), resamples=50, seed=3)["auc"]
    for times, value in zip(drawn.astype(int), found, strict=True):
        index = np.repeat(np.arange(80), times)
        assert value == pytest.approx(roc_auc_score(rows.labels[index], rows.predictions[index]), abs=1e-12)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_agree_with_scipy(method: Method) -> None:
    """SciPy draws its own resamples: 20,000 each leave a difference of a few percent of the interval's width."""
    values = np.random.default_rng(5).exponential(size=40)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method={"bca": "BCa"}.get(method, method), rng=np.random.default_rng(0)
    ).confidence_interval
    statistic = Mean(values, None)
    drawn = statistic(np.concatenate(list(multiplicities(Sampling(40), resamples=20000, seed=0))))
    ours = bootstrap_interval(values.mean(), drawn, method=method, left_out=jackknife(statistic, Sampling(40)))
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_the_jackknife_leaves_out_one_unit_at_a_time() -> None:
    rows = example(20)
    left_out = jackknife(statistic_of("auc", rows), Sampling(20))
    theirs = [roc_auc_score(np.delete(rows.labels, i), np.delete(rows.predictions, i)) for i in range(20)]
    np.testing.assert_allclose(left_out, theirs, atol=1e-12)


def test_a_figure_that_is_mostly_undefined_has_no_interval() -> None:
    with pytest.raises(EvaluationError) as caught:
        bootstrap_interval(0.5, np.array([np.nan] * 6 + [0.5] * 4))
    assert str(caught.value) == (
        "Putting an interval around a figure by resampling.\n"
        "  found: a value that isn't defined in 6 of 10 resamples\n"
        "  likely cause: so few rows of a class that most resamples have none\n"
        "  to fix it: draw within classes: bootstrap(stratified=True); or use more rows"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(n: int, data: st.DataObject, level: float) -> None:
    hits = data.draw(st.integers(0, n))
    theirs = scipy.stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    ours = wilson(hits, n, level=level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.floats(1, 2000), st.floats(0.01, 0.999))
def test_t_quantiles_are_scipys(degrees: float, probability: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(scipy.stats.t.ppf(probability, degrees), rel=1e-8, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemars_mid_p_is_scipys_binomial(a: int, b: int) -> None:
    n, small = a + b, min(a, b)
    tail, at = (getattr(scipy.stats.binom, name)(small, n, 0.5) for name in ("cdf", "pmf"))
    # Near the least number that a double holds SciPy loses digits (its cdf comes out below its pmf).
    assert mcnemar(a, b) == pytest.approx(1.0 if n == 0 else min(1.0, 2 * tail - at), rel=1e-8, abs=1e-290)


def test_delong_by_all_pairs() -> None:
    """The placement values by sorting against the definition, all pairs of rows."""
    generator = np.random.default_rng(2)
    y = generator.random(70) < 0.4
    first, second = (np.round(generator.normal(size=70) + y * shift, 1).astype(np.float64) for shift in (1.0, 0.5))

    def pairs(scores: FloatArray) -> FloatArray:
        ups, downs = scores[y], scores[~y]
        return np.asarray((ups[:, None] > downs) + 0.5 * (ups[:, None] == downs))

    a, b = pairs(first), pairs(second)
    m, n = a.shape
    covariance = np.cov(a.mean(1), b.mean(1)) / m + np.cov(a.mean(0), b.mean(0)) / n
    z = (a.mean() - b.mean()) / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert delong_test(y, first, second) == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-9)
    interval = delong_interval(y, first)
    assert interval is not None
    area, error = a.mean(), np.sqrt(covariance[0, 0])
    half = scipy.stats.norm.ppf(0.975) * error / (area * (1 - area))
    ends = scipy.special.expit(scipy.special.logit(area) + np.array([-half, half]))
    np.testing.assert_allclose([interval.low, interval.high], ends, rtol=1e-9)


def test_equal_scores_are_not_told_apart() -> None:
    y = np.array([True, False, True, False])
    scores = np.array([0.9, 0.1, 0.4, 0.6])
    assert delong_test(y, scores, scores) == 1.0


def test_where_the_data_hold_no_spread_there_is_no_interval() -> None:
    assert delong_interval(np.array([True, True, False, False]), np.array([0.9, 0.8, 0.1, 0.2])) is None
    assert delong_interval(np.array([True, False, False]), np.array([0.9, 0.1, 0.95])) is None
    assert mean_interval(np.array([1.0])) is None


def test_the_normal_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(size=30)
    interval = mean_interval(values)
    assert interval is not None
    low, high = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))
    twice = mean_interval(np.repeat(values, 4), groups=np.repeat(np.arange(30), 4))
    assert twice is not None
    # Four copies of a row in one group are worth one row.
    assert (twice.low, twice.high) == pytest.approx((low, high))


def test_estimates_say_how_they_were_made() -> None:
    rows = example()
    statistics = {name: statistic_of(name, rows) for name in ("accuracy", "auc", "log_loss", "f1")}
    intervals, values = estimate(statistics, rows, Uncertainty())
    assert {name: interval.method for name, interval in intervals.items()} == {
        "accuracy": "Wilson",
        "auc": "DeLong",
        "log_loss": "normal",
    }
    drawn, again = estimate(statistics, rows, Uncertainty(resamples=200))
    assert values == again
    assert all(interval.low <= values[name] <= interval.high for name, interval in drawn.items())
    assert {interval.method for interval in drawn.values()} == {"percentile bootstrap"}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_folds_cover_every_row_once(count: int, repeats: int, stratified: bool, grouped: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    n = 90
    groups = generator.permutation(np.arange(n) // 3) if grouped else None
    labels = generator.permutation(np.arange(n) % 3) if stratified else None
    made = folds(n, count, labels=labels, groups=groups, repeats=repeats, seed=seed)
    assert [(fold.repeat, fold.fold) for fold in made] == [(r, f) for r in range(repeats) for f in range(count)]
    for repeat in range(repeats):
        tests = [fold.test for fold in made if fold.repeat == repeat]
        np.testing.assert_array_equal(np.sort(np.concatenate(tests)), np.arange(n))
        for fold in made:
            np.testing.assert_array_equal(np.sort(np.concatenate([fold.train, fold.test])), np.arange(n))
            if groups is not None:
                assert not set(groups[fold.train]) & set(groups[fold.test])
            if labels is not None:
                counts = np.bincount(labels[fold.test], minlength=3)
                assert counts.max() - counts.min() <= (1 if groups is None else 6)


def test_repetitions_differ_and_seeds_repeat() -> None:
    first, second = folds(30, 3, repeats=2, seed=7)[0], folds(30, 3, repeats=2, seed=7)[3]
    assert set(first.test) != set(second.test)
    np.testing.assert_array_equal(folds(30, 3, seed=7)[0].test, first.test)


def test_folds_that_cannot_be_made_say_every_reason() -> None:
    with pytest.raises(EvaluationError) as caught:
        folds(6, 3, labels=["a", "a", "a", "a", "b", "c"], repeats=0)
    assert str(caught.value) == (
        "Making 3 folds of 6 rows.\n"
        "  found 3 problems:\n"
        "    - class b is in 1 rows, fewer than folds\n"
        "    - class c is in 1 rows, fewer than folds\n"
        "    - 0 repetitions\n"
        "  to fix it: take fewer folds, or leave classes out that are too rare"
    )


def test_nadeau_bengio_by_its_formula() -> None:
    scores = np.random.default_rng(0).random(10)
    interval = nadeau_bengio(scores, train=90, test=10)
    half = scipy.stats.t.ppf(0.975, 9) * np.sqrt((1 / 10 + 10 / 90) * scores.var(ddof=1))
    assert (interval.low, interval.high) == pytest.approx((scores.mean() - half, scores.mean() + half))
