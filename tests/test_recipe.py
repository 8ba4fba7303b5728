"""A recipe replays: the same seed, the same model, from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit import errors
from transferkit.evaluation.folds import folds

Array = np.ndarray[Any, Any]


def problem(rows: int = 120, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    y = np.sort(random.integers(0, 3, rows))
    return (3 * random.normal(size=(rows, 4)) + 5 * y[:, None] + 7).astype("float32"), y


BUILDER = tk.ModelBuilder((4,)).layer(keras.layers.Normalization(name="scale")).dense(8, "relu").dropout(0.1).classifier(3)
TUNER = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=3, learning_rate=1e-2)
RECIPE = tk.Recipe(BUILDER, tuner=TUNER, evaluator=tk.Evaluator("accuracy", "loss")).adapt("scale")


def test_a_recipe_is_a_value() -> None:
    assert tk.Recipe.from_json(RECIPE.to_json()) == RECIPE
    assert repr(RECIPE).endswith("evaluator=Evaluator('accuracy', 'loss')).adapt('scale')")


def test_a_recipe_replays_to_the_bit() -> None:
    data = problem()
    first, second = (RECIPE.run(data, test_data=data, seed=3, verbose=0) for _ in range(2))
    for left, right in zip(first.model.get_weights(), second.model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert first.evaluation is not None
    assert second.evaluation is not None
    assert first.evaluation.to_dict() == second.evaluation.to_dict()
    assert first.model is not second.model
    assert "Fine-tuned for 3 epochs" in str(first)
    assert set(first.to_dict()) == {"load", "run", "evaluation"}


def test_layers_adapt_to_the_training_rows_alone() -> None:
    x, y = problem()
    model, _ = RECIPE.make((x, y), seed=0)
    np.testing.assert_allclose(np.ravel(model.get_layer("scale").mean), x.mean(axis=0), rtol=1e-5)


def test_weights_are_loaded_before_training(tmp_path: Path) -> None:
    builder = tk.ModelBuilder((4,)).dense(8, "relu", name="body").classifier(3)
    source = builder.build(seed=9)
    source.save_weights(tmp_path / "w.weights.h5")
    result = tk.Recipe(
        builder, tk.WeightLoader(tmp_path / "w.weights.h5"), tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1)
    ).run(problem(), seed=0, verbose=0)
    assert result.load is not None
    assert result.evaluation is None
    np.testing.assert_array_equal(result.model.get_layer("body").kernel, source.get_layer("body").kernel)


def test_a_model_or_a_function_in_place_of_a_builder() -> None:
    model = BUILDER.build(seed=0)
    before = model.get_weights()
    tk.Recipe(model, tuner=TUNER).run(problem(), seed=0, verbose=0)
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    result = tk.Recipe(lambda: BUILDER.build(), tuner=TUNER).run(problem(), seed=0, verbose=0)
    assert result.run.epochs == 3


def test_what_a_recipe_cannot_hold() -> None:
    with pytest.raises(errors.PlanError) as caught:
        tk.Recipe("net.h5", TUNER)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Writing a Recipe.\n"
        "  found 2 problems:\n"
        "    - model='net.h5', which is not a ModelBuilder, a Keras model or a function that makes one\n"
        f"    - loader={TUNER!r}, which is not a WeightLoader\n"
        "  to fix it: Recipe(builder, loader, tuner, evaluator)"
    )
    with pytest.raises(errors.ModelError) as caught_model:
        tk.Recipe(BUILDER, tuner=TUNER).adapt("scal").run(problem(), seed=0, verbose=0)
    assert str(caught_model.value) == (
        "Adapting the layer 'scal' of the model 'model'.\n"
        "  found: no layer of that name (did you mean 'scale'?)\n"
        "  to fix it: the layers that adapt are 'scale'"
    )


def test_cross_validation_gives_every_row_one_prediction_by_a_model_that_had_not_seen_it() -> None:
    x, y = problem()
    found = tk.cross_validate(RECIPE, (x, y), folds=3, repeats=2, seed=0)
    assert found.predictions.shape == (2, len(x), 3)
    assert np.isfinite(found.predictions).all()
    np.testing.assert_array_equal(found.labels, y)
    # The scores are those of plain Keras on the same folds: the predictions kept are what they are computed from.
    for fold, score in zip(folds(len(x), 3, labels=y, repeats=2, seed=0), found.scores["accuracy"], strict=True):
        assert score == pytest.approx((found.predictions[fold.repeat, fold.test].argmax(1) == y[fold.test]).mean())
    one = found["accuracy"]
    assert one.low is not None
    assert one.high is not None
    assert one.low <= float(one) <= one.high
    assert float(one) == pytest.approx(np.mean(found.scores["accuracy"]))
    assert str(found).startswith("3-fold cross-validation, 2 times of 120 rows\nmetric")


def test_cross_validation_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    data = problem()
    whole = tk.cross_validate(RECIPE, data, folds=3, seed=0, folder=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    kept[1].unlink()
    again = tk.cross_validate(RECIPE, data, folds=3, seed=0, folder=tmp_path)
    assert again.scores == whole.scores
    assert [second > 0 for second in again.seconds] == [False, True, False]
    np.testing.assert_array_equal(again.predictions, whole.predictions)
    assert len(list(tmp_path.iterdir())) == 3
    tk.cross_validate(RECIPE, data, folds=3, seed=1, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_an_interval_stays_within_what_the_figure_can_be() -> None:
    found = tk.cross_validate(RECIPE, problem(), folds=2, seed=0)
    one = found["accuracy"]
    assert one.low is not None
    assert one.high is not None
    assert 0 <= one.low <= one.high <= 1
    assert "2 scores say little of their spread" in str(found)


def test_groups_are_never_on_both_sides_and_data_must_be_dealable() -> None:
    x, y = problem()
    groups = np.arange(len(x)) // 4
    found = tk.cross_validate(RECIPE, tk.Data.arrays(x, y), folds=2, groups=groups, stratified=False)
    assert len(found.scores["loss"]) == 2
    with pytest.raises(errors.DataError) as caught:
        tk.cross_validate(RECIPE, iter([(x, y)]))
    assert caught.value.fix == "give (x, y) of arrays, tk.Data.arrays(x, y) or tk.Data.image_folder(…)"
