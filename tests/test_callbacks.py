"""What a run tells: the lines of `Progress`, TensorBoard's figures on one axis, the live curve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transferkit as tk
from transferkit._keras import keras
from transferkit.tuning.callbacks import LiveCurve, Progress, TensorBoardLogs

X = np.random.default_rng(0).normal(size=(24, 2)).astype("float32")
Y = X[:, :1]


def fit_two_phases(*callbacks: Any, progress: Progress | None = None) -> Any:
    """Two `fit` calls as the phases of one training: epochs 0–1, then 2–4."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    histories = []
    for index, (first, last, rate) in enumerate([(0, 2, 0.1), (2, 5, 0.01)]):
        if progress is not None:
            progress.begin_phase(index, epoch=first)
        model.compile(keras.optimizers.SGD(rate), "mse")
        histories.append(
            model.fit(
                X,
                Y,
                batch_size=8,
                initial_epoch=first,
                epochs=last,
                verbose=0,
                callbacks=list(callbacks),
                validation_data=(X, Y),
            ).history
        )
    return {key: histories[0][key] + histories[1][key] for key in histories[0]}


def test_a_line_an_epoch_with_phase_rate_figures_and_time_left() -> None:
    lines: list[str] = []
    progress = Progress([("head", 2), ("all", 3)], write=lines.append)
    history = fit_two_phases(progress, progress=progress)
    assert len(lines) == 5
    shape = re.compile(r"(head|all) (\d)/(\d)  rate ([\d.e-]+)  loss ([\d.e+-]+)  val_loss ([\d.e+-]+)(  at most \d+ s left)?$")
    found = [shape.match(line) for line in lines]
    assert all(found), lines
    read = [match.groups() for match in found if match]
    assert [(name, done, planned, rate) for name, done, planned, rate, *_ in read] == [
        ("head", "1", "2", "0.1"),
        ("head", "2", "2", "0.1"),
        ("all", "1", "3", "0.01"),
        ("all", "2", "3", "0.01"),
        ("all", "3", "3", "0.01"),
    ]
    assert [row[4] for row in read] == [f"{value:.4g}" for value in history["loss"]]
    assert [row[6] is None for row in read] == [False, False, False, False, True]


def test_tensorboard_has_one_axis_of_steps_over_all_phases(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = fit_two_phases(TensorBoardLogs(tmp_path))
    read = {}
    for part in ("train", "validation"):
        events = event_accumulator.EventAccumulator(str(tmp_path / part))
        events.Reload()
        for tag in events.Tags()["tensors"]:
            read[f"{part}/{tag}"] = [
                (event.step, float(np.frombuffer(event.tensor_proto.tensor_content, "float32")[0]))
                # Files are read in the order of their names, in which the tenth of a process comes before its ninth.
                for event in sorted(events.Tensors(tag), key=lambda event: event.wall_time)
            ]
    steps = [3, 6, 9, 12, 15]
    assert [step for step, _ in read["train/loss"]] == steps
    np.testing.assert_allclose([value for _, value in read["train/loss"]], history["loss"], rtol=1e-6)
    np.testing.assert_allclose([value for _, value in read["validation/loss"]], history["val_loss"], rtol=1e-6)
    assert [step for step, _ in read["validation/loss"]] == steps
    np.testing.assert_allclose([value for _, value in read["train/learning_rate"]], [0.1, 0.1, 0.01, 0.01, 0.01], rtol=1e-6)


def test_the_live_curve_grows_by_a_point_an_epoch() -> None:
    shown: list[Any] = []
    history = fit_two_phases(LiveCurve(show=shown.append))
    assert [len(figure.axes[0].lines[0].get_ydata()) for figure in shown] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(shown[-1].axes[0].lines[0].get_ydata(), history["loss"])
    assert [line.get_label() for line in shown[-1].axes[0].lines] == ["loss", "val_loss"]


@pytest.mark.parametrize("cache", [True, False])
def test_a_metric_may_give_a_figure_for_each_class(cache: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(3, "softmax")])
    labels = np.eye(3, dtype="float32")[np.arange(24) % 3]
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2).loss("categorical_crossentropy").cache(cache)
    plan = plan.metrics(keras.metrics.F1Score(average=None))
    shown: list[Any] = []
    curve = LiveCurve("f1_score", "val_f1_score", show=shown.append)
    given: dict[str, Any] = {
        "validation_data": (X, labels),
        "batch_size": 8,
        "callbacks": [curve],
        "tensorboard": tmp_path / "logs",
    }
    run = plan.fit(model, (X, labels), verbose=2, checkpoint_dir=tmp_path / "run", **given)
    expected = model.evaluate(X, labels, batch_size=8, verbose=0, return_dict=True)["f1_score"]
    assert [np.shape(value) for value in run.history["val_f1_score"]] == [(3,), (3,)]
    np.testing.assert_allclose(run.history["val_f1_score"][-1], expected, rtol=1e-6)
    assert len(shown) == 2
    assert "val_f1_score" in str(run)
    again = plan.fit(model, (X, labels), verbose=1, checkpoint_dir=tmp_path / "run", resume=True, **given)
    assert again.history == run.history
    plan.fit(model, (X, labels), verbose=1, batch_size=8)
    assert "f1_score" in capsys.readouterr().out
