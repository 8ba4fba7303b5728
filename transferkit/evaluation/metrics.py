"""The metrics by name, each as a function of how often every row counts.

A metric is made once for its rows (sorting, comparing, taking logarithms) and is then a function from multiplicities (b, n) to
values (b,): all ones give the value itself, draws with replacement its bootstrap distribution, ones with a zero its
jackknife. So one definition serves them all, and sample weights are a factor on the way in.

The definitions, zero divisions and averages are scikit-learn's (user guide, "Metrics and scoring"), against which they are
tested, with two exceptions that are said in the result's notes: an average over classes leaves out those without a row where
the metric isn't defined for them, and several labels count each by itself in `accuracy`, as Keras does (`subset_accuracy` is
scikit-learn's).

Imports NumPy and this package's pure files only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from transferkit.errors import EvaluationError, did_you_mean
from transferkit.evaluation.classification import (
    accuracy,
    area,
    balanced_accuracy,
    brier,
    calibration_error,
    f_like,
    kappa,
    log_loss,
    mcc,
    one_against_one,
    plain_f_like,
    subset_accuracy,
    top_k_accuracy,
)
from transferkit.evaluation.ranking import Statistic, auc_statistic, average_precision_statistic
from transferkit.evaluation.regression import error_mean, max_error, relative, rmse, share_explained, squared_log
from transferkit.evaluation.rows import Kind, Rows

__all__ = ["METRICS", "Metric", "metric_named", "score", "statistic_of"]

ALL: tuple[Kind, ...] = ("binary", "multiclass", "multilabel", "regression")
CLASSES: tuple[Kind, ...] = ("binary", "multiclass", "multilabel")
EXCLUSIVE: tuple[Kind, ...] = ("binary", "multiclass")
SEVERAL: tuple[Kind, ...] = ("multiclass",)
QUANTITIES: tuple[Kind, ...] = ("regression",)


@dataclass(frozen=True)
class Metric:
    """One metric by name.

    Args:
        name: As it is written in a plan.
        kinds: The tasks it suits.
        make: From rows to the function of multiplicities.
        greater_is_better: The direction of improvement.
        meaning: One line for tables and pages.
        averages_classes: Whether classes without a row are left out of an average.
    """

    name: str
    kinds: tuple[Kind, ...]
    make: Callable[[Rows], Statistic]
    greater_is_better: bool
    meaning: str
    averages_classes: bool = False


def _table() -> dict[str, Metric]:
    roc, pr = auc_statistic, average_precision_statistic
    metrics = [
        Metric("accuracy", CLASSES, accuracy, True, "share of rows (or of labels) that are right"),
        Metric("subset_accuracy", ("multilabel",), subset_accuracy, True, "share of rows with all labels right"),
        Metric("balanced_accuracy", EXCLUSIVE, balanced_accuracy, True,
               "mean over classes of the share that is right", averages_classes=True),
        Metric("log_loss", CLASSES, log_loss, False, "mean negative log-probability of the label, natural logarithm"),
        Metric("brier", CLASSES, brier, False, "mean squared distance of the probabilities from the label"),
        Metric("auc", CLASSES, partial(area, average="macro", make=roc, name="auc"), True,
               "area under the ROC curve; each class against the rest, then the mean", averages_classes=True),
        Metric("auc_weighted", CLASSES, partial(area, average="weighted", make=roc, name="auc_weighted"), True,
               "the same, classes weighted by their rows", averages_classes=True),
        Metric("auc_ovo", SEVERAL, partial(one_against_one, average="macro"), True,
               "area under the ROC curve, mean over pairs of classes", averages_classes=True),
        Metric("auc_ovo_weighted", SEVERAL, partial(one_against_one, average="weighted"), True,
               "the same, pairs weighted by their rows", averages_classes=True),
        Metric("pr_auc", CLASSES, partial(area, average="macro", make=pr, name="pr_auc"), True,
               "average precision; each class against the rest, then the mean", averages_classes=True),
        Metric("pr_auc_weighted", CLASSES, partial(area, average="weighted", make=pr, name="pr_auc_weighted"), True,
               "the same, classes weighted by their rows", averages_classes=True),
        Metric("kappa", EXCLUSIVE, kappa, True, "Cohen's kappa: agreement beyond chance"),
        Metric("kappa_linear", EXCLUSIVE, partial(kappa, power=1), True, "Cohen's kappa, costs by distance of the classes"),
        Metric("kappa_quadratic", EXCLUSIVE, partial(kappa, power=2), True, "Cohen's kappa, costs by squared distance"),
        Metric("mcc", EXCLUSIVE, mcc, True, "Matthews' correlation of labels and predictions"),
        Metric("ece", CLASSES, partial(calibration_error, equal_mass=False), False,
               "expected calibration error, 15 bins of equal width"),
        Metric("ece_mass", CLASSES, partial(calibration_error, equal_mass=True), False,
               "expected calibration error, 15 bins of equally many rows"),
        Metric("mae", QUANTITIES, partial(error_mean, of=lambda y, p: np.abs(y - p)), False, "mean absolute error"),
        Metric("mse", QUANTITIES, partial(error_mean, of=lambda y, p: (y - p) ** 2), False, "mean squared error"),
        Metric("rmse", QUANTITIES, rmse, False, "root of the mean squared error"),
        Metric("mape", QUANTITIES, partial(error_mean, of=relative), False, "mean absolute error, as a share of the target"),
        Metric("msle", QUANTITIES, partial(error_mean, of=squared_log), False, "mean squared error of log(1 + x)"),
        Metric("bias", QUANTITIES, partial(error_mean, of=lambda y, p: p - y), False, "mean of prediction minus target"),
        Metric("r2", QUANTITIES, partial(share_explained, centred=False), True, "share of the target's variance explained"),
        Metric("explained_variance", QUANTITIES, partial(share_explained, centred=True), True,
               "the same, a constant error forgiven"),
        Metric("max_error", QUANTITIES, max_error, False, "largest absolute error"),
    ]  # fmt: skip
    for part in ("precision", "recall", "f1"):
        metrics.append(
            Metric(part, CLASSES, partial(plain_f_like, part=part), True, f"{part} of class 1, or the mean over several classes")
        )
        for average in ("macro", "micro", "weighted"):
            metrics.append(
                Metric(
                    f"{part}_{average}", CLASSES, partial(f_like, part=part, average=average), True, f"{part}, {average} average"
                )
            )
    return {metric.name: metric for metric in metrics}


#: Every metric by name; `top_k_accuracy` is written with its k, as in `top_5_accuracy`.
METRICS: Mapping[str, Metric] = _table()

#: What others call the same.
SYNONYMS: Mapping[str, str] = {
    "acc": "accuracy", "roc_auc": "auc", "auroc": "auc", "auc_ovr": "auc", "average_precision": "pr_auc", "ap": "pr_auc",
    "cross_entropy": "log_loss", "brier_score": "brier", "cohen_kappa": "kappa", "matthews": "mcc", "f1_score": "f1",
    "mean_absolute_error": "mae", "mean_squared_error": "mse", "root_mean_squared_error": "rmse", "r2_score": "r2",
}  # fmt: skip


def metric_named(name: str) -> Metric:
    """The metric of that name.

    Raises:
        EvaluationError: when there is none, with near names.
    """
    if name in METRICS:
        return METRICS[name]
    top = re.fullmatch(r"top_([1-9]\d*)_accuracy", name)
    if top:
        k = int(top[1])
        return Metric(
            name,
            SEVERAL,
            partial(top_k_accuracy, k=k),
            True,
            f"share of rows whose class is among the {k} most probable",
        )
    near = f" (the metric {SYNONYMS[name]!r} is what is meant)" if name in SYNONYMS else did_you_mean(name, [*METRICS, "loss"])
    raise EvaluationError(
        f"Computing {name}.",
        found=f"no metric of that name{near}",
        fix="choose among " + ", ".join(["loss", *METRICS]) + ", top_<k>_accuracy; or give a Keras metric to `run(metrics=[…])`",
    )


def statistic_of(name: str, rows: Rows) -> Statistic:
    """The metric on these rows as a function from multiplicities (b, n) to values (b,).

    Raises:
        EvaluationError: when the metric doesn't suit the task, or isn't defined on the rows.
    """
    metric = metric_named(name)
    if rows.kind not in metric.kinds:
        suits = [other.name for other in METRICS.values() if rows.kind in other.kinds]
        raise EvaluationError(
            f"Computing {name}.",
            found=f"a {rows.kind} task; {name} is for {' and '.join(metric.kinds)}",
            fix="choose among " + ", ".join(suits),
        )
    return metric.make(rows)


def score(
    name: str,
    labels: ArrayLike,
    predictions: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    kind: Kind | None = None,
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
) -> float:
    """Computes one metric from labels and predictions in memory.

    Args:
        name: The metric, such as `"auc"`; `METRICS` lists them.
        labels: Class indices (n,), one-hot rows or zeros and ones (n, k), or quantities (n,) or (n, d).
        predictions: Probabilities (n,) or (n, k), or quantities.
        sample_weight: One weight a row (n,).
        kind: The task, told from the values when left out.
        threshold: The probability above which class 1 or a label is predicted.
        classes: Class names, for messages.

    Returns:
        The value; NaN where it isn't defined for these rows.

    Raises:
        EvaluationError: when labels, predictions and metric don't fit together.

    Example:
        >>> score("auc", [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    rows = Rows.of(
        labels,
        predictions,
        kind=kind,
        sample_weight=sample_weight,
        threshold=threshold,
        classes=classes,
        asked=f"Computing {name}.",
    )
    return float(statistic_of(name, rows)(np.ones((1, len(rows))))[0])
