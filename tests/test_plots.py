"""Pictures: what is drawn, on which axes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest

from transferkit.errors import EvaluationError
from transferkit.evaluation import plots
from transferkit.evaluation.estimating import Scored
from transferkit.evaluation.evaluator import Evaluator
from transferkit.evaluation.report import Evaluation
from transferkit.evaluation.rows import Kind, Rows
from transferkit.tasks import Task

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend comes first


@pytest.fixture(autouse=True)
def closed_afterwards() -> Iterator[None]:
    settings = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == settings
    plt.close("all")


def evaluation(kind: Kind, classes: int = 3, n: int = 120) -> Evaluation:
    generator = np.random.default_rng(0)
    if kind == "binary":
        y = generator.integers(0, 2, n)
        rows = Rows.of(y, np.clip(generator.normal(0.4 + 0.2 * y, 0.2), 0, 1), kind=kind, classes=["no", "yes"])
        return Evaluation({}, Scored(rows), Task("binary", 1), Evaluator())
    y = generator.integers(0, classes, n)
    p = generator.dirichlet(np.ones(classes), n) + np.eye(classes)[y]
    rows = Rows.of(y, p / 2, kind=kind, classes=[f"class {i}" for i in range(classes)])
    return Evaluation({}, Scored(rows), Task("multiclass-sparse", classes), Evaluator())


DRAWINGS = [plots.roc, plots.precision_recall, plots.confusion, plots.reliability, plots.per_class]


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize("classes", [2, 3, 20])
def test_each_draws_on_the_axes_it_is_given(draw: Callable[..., Any], classes: int) -> None:
    of = evaluation("binary") if classes == 2 else evaluation("multiclass", classes)
    _, ax = plt.subplots(layout="constrained")
    assert draw(of, ax) is ax
    assert ax.get_xlabel()
    ax.figure.canvas.draw()
    assert draw(of) is not ax


def test_the_roc_line_is_the_curve() -> None:
    from sklearn.metrics import auc, roc_auc_score

    of = evaluation("binary")
    line = plots.roc(of, band=False).lines[0]
    area = roc_auc_score(of.labels, of.predictions)
    assert auc(*line.get_data()) == pytest.approx(area)
    assert line.get_label() == f"yes: {area:.3f}"


def test_a_band_holds_its_curve() -> None:
    ax = plots.roc(evaluation("binary"))
    band = np.asarray(ax.collections[0].get_paths()[0].vertices)
    assert band[:, 1].min() >= 0
    assert band[:, 1].max() <= 1
    assert len(ax.collections) == 1


def test_many_classes_are_thinned_out() -> None:
    ax = plots.roc(evaluation("multiclass", 20))
    legend = ax.get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "area,\n3 lowest and 3 highest of 20"
    assert len(legend.get_texts()) == 6


def test_the_confusion_shows_its_counts() -> None:
    of = evaluation("multiclass")
    shown = [text.get_text() for text in plots.confusion(of).texts]
    assert shown == [f"{count:g}" for count in of.confusion().counts.ravel()]


def test_training_curves_of_phases() -> None:
    phases = [SimpleNamespace(name="head", epochs=2), SimpleNamespace(name="all", epochs=3)]
    run = SimpleNamespace(history={"loss": [3, 2, 2, 1, 1], "val_loss": [3, 3, 2, 2, 2]}, phases=phases)
    ax = plots.training_curves(run)
    assert [line.get_label() for line in ax.lines[:2]] == ["training", "validation"]
    np.testing.assert_array_equal(ax.lines[2].get_xdata(), [2.5, 2.5])
    assert [text.get_text() for text in ax.texts] == ["head", "all"]
    assert len(plots.training_curves({"loss": [1.0]}).lines) == 1
    with pytest.raises(EvaluationError) as caught:
        plots.training_curves(run, metric="auc")
    assert str(caught.value) == (
        "Drawing auc over epochs.\n  found: a history of 'loss', 'val_loss'\n  to fix it: choose one of them"
    )


def test_the_learning_rate_curve_stays_readable_where_training_diverges() -> None:
    ax = plots.learning_rate_curve([1e-4, 1e-3, 1e-2, 1e-1], [2.0, 1.5, 1.0, 1e6], chosen=1e-3)
    assert ax.get_ylim()[1] < 4
    assert ax.get_xscale() == "log"
    with pytest.raises(EvaluationError, match="give one loss for each positive rate"):
        plots.learning_rate_curve([0.0, 1.0], [1.0, 2.0])


def test_what_cannot_be_drawn_is_said() -> None:
    rows = Rows.of([0.5, 1.5], [0.2, 1.0], kind="regression")
    of = Evaluation({}, Scored(rows), Task("regression", 1), Evaluator())
    with pytest.raises(EvaluationError) as caught:
        plots.roc(of)
    assert str(caught.value) == "Drawing a ROC curve.\n  found: a regression task\n  to fix it: evaluate a classifier"
