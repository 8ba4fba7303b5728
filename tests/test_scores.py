"""Scores of transferability against other oracles: SciPy's densities, scikit-learn's fits, loops over the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.linear_model import Ridge
from sklearn.metrics import mutual_info_score
from sklearn.model_selection import LeaveOneOut
from sklearn.neighbors import KNeighborsClassifier

from transferkit import errors
from transferkit.selection import scores

Array = np.ndarray[Any, Any]


def problem(n: int = 40, d: int = 5, classes: int = 3, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, n)
    return random.normal(size=(n, d)) + random.normal(size=(classes, d))[y], y


def probabilities(n: int = 40, z: int = 6, seed: int = 0) -> Array:
    return np.random.default_rng(seed).dirichlet(np.ones(z), n)


@pytest.mark.parametrize(("n", "d"), [(40, 5), (30, 18)])
def test_logme_is_the_largest_evidence(n: int, d: int) -> None:
    """The evidence is a normal density of the targets, whose maximum SciPy finds without any of the paper's algebra."""
    f, y = problem(n, d)
    f[:, -1] = f[:, 0]  # a direction without a singular value

    def best(target: Array) -> float:
        def minus(logs: Array) -> float:
            covariance = np.eye(n) / np.exp(logs[1]) + f @ f.T / np.exp(logs[0])
            return -float(stats.multivariate_normal.logpdf(target, cov=covariance))

        found = [optimize.minimize(minus, start, method="Nelder-Mead", options={"fatol": 1e-10}) for start in ([0, 0], [3, 3])]
        return max(-float(one.fun) for one in found)

    theirs = np.mean([best((y == c).astype(float)) for c in range(3)]) / n
    assert scores.logme(f, y) == pytest.approx(theirs, abs=1e-6)


def test_the_h_score_is_the_sum_of_squared_canonical_correlations() -> None:
    f, y = problem()
    centred, onto = f - f.mean(axis=0), np.eye(3)[y] - np.eye(3)[y].mean(axis=0)
    correlations = np.linalg.svd(np.linalg.qr(centred)[0].T @ np.linalg.qr(onto[:, :2])[0], compute_uv=False)
    assert scores.h_score(f, y) == pytest.approx((correlations**2).sum())
    by_definition = np.trace(np.linalg.inv(np.cov(f.T)) @ np.cov(np.stack([f[y == c].mean(axis=0) for c in range(3)])[y].T))
    assert scores.h_score(f, y) == pytest.approx(by_definition)
    assert scores.h_score(np.hstack([f, f[:, :1]]), y) == pytest.approx(scores.h_score(f, y))


def test_leep_by_its_definition() -> None:
    p, (_, y) = probabilities(), problem()
    joint = {(c, z): sum(p[i, z] for i in range(40) if y[i] == c) / 40 for c in range(3) for z in range(6)}
    total = 0.0
    for i in range(40):
        total += np.log(sum(joint[y[i], z] / sum(joint[c, z] for c in range(3)) * p[i, z] for z in range(6)))
    assert scores.leep(p, y) == pytest.approx(total / 40)


def test_nce_by_mutual_information() -> None:
    p, (_, y) = probabilities(), problem()
    entropy = stats.entropy(np.bincount(y) / len(y))
    assert scores.nce(p, y) == pytest.approx(mutual_info_score(y, p.argmax(axis=1)) - entropy)


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_the_other_rows(k: int) -> None:
    f, y = problem()
    near = []
    for train, test in LeaveOneOut().split(f):
        neighbours = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(f[train], y[train])
        near.append(neighbours.predict(f[test])[0] == y[test][0])
    assert scores.nearest_neighbours(f, y, k=k) == pytest.approx(np.mean(near))


def test_the_probe_leaves_each_row_out() -> None:
    f, y = problem()
    squares = np.linalg.svd(f - f.mean(axis=0), compute_uv=False) ** 2
    found = []
    for share in np.logspace(-6, 2, 17):
        # The penalty stays that of all rows, as in the closed form; the rows that are left are centred anew.
        left = [
            Ridge(share * squares.mean()).fit(f[train], 2 * np.eye(3)[y[train]] - 1).predict(f[test])[0]
            for train, test in LeaveOneOut().split(f)
        ]
        error = np.mean((np.array(left) - (2 * np.eye(3)[y] - 1)) ** 2)
        found.append((error, float((np.array(left).argmax(axis=1) == y).mean())))
    probe = min(found)[1]
    assert scores.linear_probe(f, y) == pytest.approx(probe)


def test_each_score_prefers_features_that_tell_the_classes_apart() -> None:
    f, y = problem(120, 8)
    noise = np.random.default_rng(1).normal(size=f.shape)
    for score in (scores.logme, scores.h_score, scores.nearest_neighbours, scores.linear_probe):
        assert score(f * 3, y) > score(noise, y)


def test_what_does_not_fit() -> None:
    f, y = problem()
    with pytest.raises(errors.DataError) as caught:
        scores.leep(f, y)
    assert str(caught.value) == (
        "Computing LEEP.\n"
        f"  found: values between {f.min():.4g} and {f.max():.4g} whose rows don't sum to one\n"
        "  to fix it: give the source model's class probabilities (n, z) and one class index a row (n,)"
    )
    with pytest.raises(errors.DataError) as shapes:
        scores.logme(f, y[:-1])
    assert shapes.value.found == ("values of shape (40, 5) and labels of shape (39,)",)
    with pytest.raises(errors.DataError, match="fewer than two classes"):
        scores.h_score(f, np.zeros(40, int))
    with pytest.raises(errors.DataError, match="k=40 and 40 rows"):
        scores.nearest_neighbours(f, y, k=40)
