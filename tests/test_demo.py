"""The demo: what it says of wins, losses and draws, that it splits and draws fairly, and that it runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import transferkit as tk
from transferkit import demo

SCRATCH = (0.70, 0.76, 0.67, 0.74, 0.64)


def comparison(*gains: float) -> demo.Comparison:
    transfer = tuple(a + gain for a, gain in zip(SCRATCH, gains, strict=True))
    return demo.Comparison(
        names=("from scratch", "transfer"), rates=(1e-2, 1e-3), seeds=(0, 1, 2, 3, 4), accuracies=(SCRATCH, transfer)
    )


def test_the_interval_is_scipys() -> None:
    result = comparison(0.10, 0.07, 0.06, 0.05, 0.11)
    expected = stats.ttest_rel(result.accuracies[1], result.accuracies[0]).confidence_interval(0.95)
    mean, low, high = result.difference
    assert mean == pytest.approx(0.078)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_win_is_called_one() -> None:
    assert str(comparison(0.10, 0.07, 0.06, 0.05, 0.11)) == (
        "Accuracy on 500 test images\n"
        "seed  from scratch  transfer  difference\n"
        "────  ────────────  ────────  ──────────\n"
        "   0         0.700     0.800      +0.100\n"
        "   1         0.760     0.830      +0.070\n"
        "   2         0.670     0.730      +0.060\n"
        "   3         0.740     0.790      +0.050\n"
        "   4         0.640     0.750      +0.110\n"
        "mean         0.702     0.780      +0.078\n"
        "Transfer helped: it is better by 0.078 (95% interval +0.046 to +0.110, 5 pairs, Student's t)."
    )


def test_a_loss_is_called_one() -> None:
    lost = comparison(-0.10, -0.07, -0.06, -0.05, -0.11)
    assert lost.verdict == "hurts"
    assert str(lost).splitlines()[-1] == (
        "Transfer LOST: it is worse than from scratch by 0.078 (95% interval -0.110 to -0.046, 5 pairs, Student's t)."
    )
    assert lost.to_dict()["verdict"] == "transfer hurts"


def test_what_cannot_be_told_is_left_open() -> None:
    open_ = comparison(0.10, -0.07, 0.06, -0.05, 0.0)
    assert open_.verdict == "can't be told"
    assert str(open_).splitlines()[-1] == (
        "No winner: the mean difference is +0.008, and its interval holds zero "
        "(95% interval -0.081 to +0.097, 5 pairs, Student's t)."
    )


def test_the_four_parts_of_the_data_share_no_image() -> None:
    images = demo.load_images()
    parts = (images.source, images.pool, images.validation, images.test)
    assert [len(x) for x, _ in parts] == [1000, 197, 100, 500]
    rows = np.concatenate([x for x, _ in parts])
    assert rows.min() == 0
    assert rows.max() == 1
    assert len(np.unique(rows, axis=0)) == 1797  # no two digits of the set are alike, so none is in two parts


def test_a_draw_has_two_of_each_digit_and_follows_its_seed() -> None:
    images = demo.load_images()
    x, y = demo.draw(images, 3)
    assert x.shape == (20, 64)
    assert np.bincount(y).tolist() == [6, 4, 4, 6]  # 0 2 4 · 6 8 · 1 3 · 5 7 9
    assert (demo.draw(images, 3)[0] == x).all()
    assert (demo.draw(images, 4)[0] != x).any()


def test_both_ways_have_the_same_budget(tmp_path: Path) -> None:
    scratch, transfer = demo.ways(tmp_path / "weights.h5", epochs=21)
    assert scratch.weights is None
    for way in (scratch, transfer):
        assert len(way.rates) == 3
        assert sum(phase.epochs for phase in way.tuner(1e-3).phases()) == 21


def test_the_rate_chosen_is_the_best_on_the_trial_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def accuracy(_: demo.Way, rate: float, *, train: object, on: tuple[demo.Array, demo.Array], seed: int) -> float:
        del train
        asked.append((rate, seed, len(on[0])))
        return {1e-3: 0.6, 3e-3: 0.8, 1e-2: 0.7}[rate]

    monkeypatch.setattr(demo.Way, "accuracy", accuracy)
    scratch, _ = demo.ways(Path("weights.h5"), epochs=2)
    assert demo.choose_rate(scratch, demo.load_images()) == 3e-3
    assert {seed for _, seed, _ in asked} == set(demo.TRIAL_SEEDS)
    assert {rows for _, _, rows in asked} == {100}
    assert not set(demo.TRIAL_SEEDS) & set(range(100))


def test_it_runs_and_writes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "choose_rate", lambda way, _: way.rates[0])
    said: list[str] = []
    result = demo.run(tmp_path / "out", seeds=2, epochs=2, say=said.append)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["demo.json", "demo.png", "pretrained_model.h5"]
    assert str(result) in said
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert written["ways"]["transfer"]["accuracies"] == list(result.accuracies[1])
    assert written["difference"]["mean"] == result.difference[0]
    assert written["epochs"] == 2


def test_one_seed_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(tk.errors.PlanError) as caught:
        demo.run(tmp_path / "out", seeds=1)
    assert str(caught.value) == "Running the demo.\n  found: seeds=1; an interval needs two pairs at least"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_transfer_helps_where_features_are_shared(tmp_path: Path) -> None:
    result = demo.run(tmp_path, seeds=5)
    assert result.verdict == "helps"
    assert statistics.mean(result.accuracies[1]) > 0.74
