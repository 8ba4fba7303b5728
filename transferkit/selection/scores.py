"""How much a pretrained network's features or predictions promise for a task, before anything is trained.

Each score takes features (n, d) or the source model's class probabilities (n, z), and the class indices (n,) of the new task.
Higher is better. They rank networks on one data set; their values mean little across data sets, and none is best everywhere.

- `logme`: You, Liu, Wang and Long, "LogME" (ICML 2021), the maximum of the evidence of a linear model, by the fixed-point
  iteration of You et al., "Ranking and Tuning Pre-trained Models" (JMLR 2022, algorithm 3).
- `h_score`: Bao et al., "An Information-Theoretic Approach to Transferability" (ICIP 2019), equation 5.
- `leep`: Nguyen, Hassner, Seeger and Archambeau, "LEEP" (ICML 2020), equation 2.
- `nce`: Tran, Nguyen and Hassner, "Transferability and Hardness of Supervised Classification Tasks" (ICCV 2019), section 3.
- `nearest_neighbours`: the share of rows whose nearest other rows agree with them, by cosine (Renggli et al., "Which Model to
  Transfer?", CVPR 2022, use it as a proxy).
- `linear_probe`: accuracy of a ridge classifier on rows left out one by one, exactly and in one go (Allen, Technometrics 1974).

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transferkit.errors import DataError

__all__ = ["h_score", "leep", "linear_probe", "logme", "nce", "nearest_neighbours"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Rows whose similarities to all others are computed at a time.
_PIECE = 512


def _checked(values: ArrayLike, labels: ArrayLike, asked: str, *, probabilities: bool = False) -> tuple[FloatArray, IntArray]:
    """Features or probabilities in float64, and labels as indices 0 … k-1 of the classes that there are."""
    x, y = np.asarray(values, dtype=np.float64), np.asarray(labels)
    problems = []
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        problems.append(f"values of shape {x.shape} and labels of shape {y.shape}")
    else:
        if not np.isfinite(x).all():
            problems.append(f"values that aren't finite in {int((~np.isfinite(x)).any(axis=1).sum())} of {len(x)} rows")
        if len(np.unique(y)) < 2:
            problems.append("fewer than two classes")
        if probabilities and not problems and (x.min() < 0 or np.abs(x.sum(axis=1) - 1).max() > 1e-3):
            problems.append(f"values between {x.min():.4g} and {x.max():.4g} whose rows don't sum to one")
    if problems:
        what = "the source model's class probabilities (n, z)" if probabilities else "features (n, d)"
        raise DataError(asked, found=problems, fix=f"give {what} and one class index a row (n,)")
    return x, np.unique(y, return_inverse=True)[1].astype(np.int64)


def _indicator(y: IntArray) -> FloatArray:
    return np.eye(int(y.max()) + 1)[y]


def logme(features: ArrayLike, labels: ArrayLike) -> float:
    """The log evidence a row of a Bayesian linear model from the features to each class, at its best precisions.

    Args:
        features: (n, d).
        labels: Class indices (n,).

    Raises:
        DataError: when they don't fit together.

    Example:
        >>> y = np.arange(40) % 2
        >>> noise = np.random.default_rng(0).normal(size=(40, 3))
        >>> logme(noise + 3 * y[:, None], y) > logme(noise, y)
        True
    """
    f, y = _checked(features, labels, "Computing LogME.")
    n, d = f.shape
    u, singular, _ = np.linalg.svd(f, full_matrices=False)
    targets = _indicator(y)
    # Directions without a singular value belong to the model all the same. All classes at once: (d, classes).
    squares = np.zeros((d, 1))
    squares[: len(singular), 0] = singular**2
    along = np.zeros((d, targets.shape[1]))
    along[: len(singular)] = (u.T @ targets) ** 2
    beyond = np.maximum(targets.sum(axis=0) - along.sum(axis=0), 0.0)

    def size_and_error(ratio: FloatArray) -> tuple[FloatArray, FloatArray]:
        left = along / (squares + ratio) ** 2
        return (squares * left).sum(axis=0), (left * ratio**2).sum(axis=0) + beyond

    alpha, beta = np.ones(targets.shape[1]), np.ones(targets.shape[1])
    for _ in range(200):
        ratio = alpha / beta
        effective = (squares / (squares + ratio)).sum(axis=0)
        size, error = size_and_error(ratio)
        # The paper's guard against a division by zero, small enough not to be seen in the evidence.
        alpha, beta = effective / (size + 1e-12), (n - effective) / (error + 1e-12)
        # The evidence is level at its maximum, so what is left changes it by the square of this.
        if (np.abs(alpha / beta - ratio) <= 1e-6 * ratio).all():
            break
    size, error = size_and_error(alpha / beta)
    log = d * np.log(alpha) + n * np.log(beta) - np.log(alpha + beta * squares).sum(axis=0) - n * math.log(2 * math.pi)
    return float(((log - beta * error - alpha * size) / (2 * n)).mean())


def h_score(features: ArrayLike, labels: ArrayLike) -> float:
    """How much of the features' variance lies between classes, direction by direction: 0 up to the number of classes less one.

    Args:
        features: (n, d).
        labels: Class indices (n,).

    Raises:
        DataError: when they don't fit together.

    Example:
        >>> round(h_score([[1, 0], [1, 0], [0, 1], [0, 1]], [0, 0, 1, 1]), 6)
        1.0
    """
    f, y = _checked(features, labels, "Computing the H-score.")
    f = f - f.mean(axis=0)
    onto = _indicator(y)
    means = (onto / onto.sum(axis=0)).T @ f
    between = means[y]
    # cov(f)⁻¹ cov(E[f|y]) has the trace that whitened features give.
    _, singular, vt = np.linalg.svd(f, full_matrices=False)
    kept = singular > singular.max(initial=0.0) * max(f.shape) * np.finfo(np.float64).eps
    whitened = between @ vt[kept].T / singular[kept]
    return float((whitened**2).sum())


def leep(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The mean log-probability of the label when it is drawn by way of the source model's classes; at most 0.

    Args:
        probabilities: Of the source model's classes (n, z).
        labels: Class indices (n,).

    Raises:
        DataError: when they don't fit together.

    Example:
        >>> round(leep([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]], [0, 0, 1, 1]), 3)
        -0.295
    """
    p, y = _checked(probabilities, labels, "Computing LEEP.", probabilities=True)
    joint = _indicator(y).T @ p / len(p)
    marginal = joint.sum(axis=0)
    given = np.divide(joint, marginal, out=np.zeros_like(joint), where=marginal > 0)
    return float(np.log((given[y] * p).sum(axis=1)).mean())


def nce(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Minus the entropy of the label once the source model's prediction is known; at most 0.

    Args:
        probabilities: Of the source model's classes (n, z); the most probable one counts.
        labels: Class indices (n,).

    Raises:
        DataError: when they don't fit together.

    Example:
        >>> nce([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]], [0, 0, 1, 1])
        0.0
    """
    p, y = _checked(probabilities, labels, "Computing NCE.", probabilities=True)
    z = p.argmax(axis=1)
    joint = np.zeros((p.shape[1], int(y.max()) + 1))
    np.add.at(joint, (z, y), 1 / len(y))
    marginal = joint.sum(axis=1, keepdims=True)
    share = np.divide(joint, marginal, out=np.ones_like(joint), where=joint > 0)
    return float((joint * np.log(share)).sum())


def nearest_neighbours(features: ArrayLike, labels: ArrayLike, *, k: int = 5) -> float:
    """The share of rows that the vote of their k nearest other rows, by cosine, puts into their class.

    Args:
        features: (n, d).
        labels: Class indices (n,).
        k: How many neighbours vote. Of classes with equal votes the lowest wins.

    Raises:
        DataError: when they don't fit together, or there are no k other rows.

    Example:
        >>> nearest_neighbours([[1, 0], [2, 0.1], [0, 1], [0.1, 2]], [0, 0, 1, 1], k=1)
        1.0
    """
    return float(nearest_neighbour_hits(features, labels, k=k).mean())


def nearest_neighbour_hits(features: ArrayLike, labels: ArrayLike, *, k: int = 5) -> FloatArray:
    """`nearest_neighbours` row by row (n,): 1 where the vote is right."""
    f, y = _checked(features, labels, "Asking the nearest neighbours.")
    if not 1 <= k < len(f):
        raise DataError(
            "Asking the nearest neighbours.", found=f"k={k} and {len(f)} rows", fix="give k from 1 to the rows less one"
        )
    f = f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    onto = _indicator(y)
    hits = np.empty(len(f))
    for start in range(0, len(f), _PIECE):
        own = np.arange(start, min(start + _PIECE, len(f)))
        near = f[own] @ f.T
        near[np.arange(len(own)), own] = -np.inf
        best = np.argpartition(-near, k - 1, axis=1)[:, :k]
        hits[own] = onto[best].sum(axis=1).argmax(axis=1) == y[own]
    return hits


def linear_probe(features: ArrayLike, labels: ArrayLike) -> float:
    """Accuracy of a ridge classifier on rows left out one by one, at the best of its penalties.

    Args:
        features: (n, d).
        labels: Class indices (n,).

    Raises:
        DataError: when they don't fit together.

    Example:
        >>> y = np.arange(40) % 2
        >>> noise = np.random.default_rng(0).normal(size=(40, 3))
        >>> linear_probe(noise + 9 * y[:, None], y)
        1.0
    """
    return float(linear_probe_hits(features, labels).mean())


def linear_probe_hits(features: ArrayLike, labels: ArrayLike) -> FloatArray:
    """`linear_probe` row by row (n,): 1 where the row left out is right."""
    f, y = _checked(features, labels, "Probing the features.")
    targets = 2 * _indicator(y) - 1
    means = f.mean(axis=0)
    u, singular, _ = np.linalg.svd(f - means, full_matrices=False)
    centred = targets - targets.mean(axis=0)
    best: tuple[float, FloatArray] | None = None
    for share in np.logspace(-6, 2, 17):
        shrink = singular**2 / (singular**2 + share * float((singular**2).mean()))
        fitted = u @ (shrink[:, None] * (u.T @ centred))
        # Leaving a row out divides its residual by one less its leverage, the mean's 1/n among it.
        leverage = (u**2 * shrink).sum(axis=1) + 1 / len(f)
        residual = (centred - fitted) / np.maximum(1 - leverage, 1e-12)[:, None]
        # The penalty by its squared error, which is smoother than the accuracy and favours no lucky one.
        error = float((residual**2).mean())
        if best is None or error < best[0]:
            best = error, ((targets - residual).argmax(axis=1) == y).astype(np.float64)
    assert best is not None
    return best[1]
