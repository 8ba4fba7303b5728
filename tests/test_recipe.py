"""A recipe replays: the same seed, the same model, from nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from scipy import stats
from sklearn import decomposition

import transferkit as tk
from transferkit import errors
from transferkit.evaluation.folds import folds
from transferkit.selection.cross_validation import CrossValidation, fold_seed
from transferkit.tuning import sharing
from transferkit.tuning.features import compute

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


def features_of(model: Any, x: Array) -> Array:
    pca = model.get_layer("pca")
    return np.asarray(keras.Model(model.input, pca.input)(x))


BEHIND = tk.ModelBuilder((4,)).layer(keras.layers.Normalization(name="scale")).dense(8, "relu", name="body").pca(3).classifier(3)
HEAD_ONLY = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2)


def test_components_are_those_of_the_features_of_the_training_rows() -> None:
    x, y = problem()
    model, _ = tk.Recipe(BEHIND, tuner=HEAD_ONLY).adapt("scale", "pca").make((x[:70], y[:70]), seed=0)
    theirs = decomposition.PCA(3, svd_solver="full").fit(features_of(model, x[:70]).astype(np.float64))
    np.testing.assert_allclose(np.abs(np.asarray(model.get_layer("pca").directions).T), np.abs(theirs.components_), atol=1e-5)
    np.testing.assert_allclose(model.get_layer("pca").mean, theirs.mean_, rtol=1e-6)


def test_no_row_that_a_fold_is_judged_on_is_learned_from() -> None:
    """Half of a fold's test rows changed beyond recognition: what is said of the other half stays as it was, to the bit."""
    x, y = problem()
    recipe = tk.Recipe(BEHIND, tuner=HEAD_ONLY, evaluator=tk.Evaluator("accuracy")).adapt("scale", "pca")
    fold, other_fold = folds(len(x), 2, labels=y, seed=0)
    kept, changed = fold.test[::2], fold.test[1::2]
    other = x.copy()
    other[changed] = 1e3 * np.random.default_rng(1).normal(size=other[changed].shape)
    first, second = (tk.cross_validate(recipe, (rows, y), folds=2, seed=0).predictions[0] for rows in (x, other))
    np.testing.assert_array_equal(first[kept], second[kept])
    assert not np.array_equal(first[changed], second[changed])
    # The other fold trains on the changed rows, so what it says must change.
    assert not np.array_equal(first[other_fold.test], second[other_fold.test])


@pytest.mark.parametrize("pca", [False, True])
def test_folds_compute_what_is_frozen_once_and_come_out_the_same(pca: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).normal(size=(48, 8, 8, 3)).astype("float32"), np.arange(48) % 2
    body = tk.ModelBuilder((8, 8, 3)).conv(6, activation="relu").pool().dropout(0.2)
    model = (body.pca(3, whiten=True) if pca else body).classifier(2).build(seed=0)
    recipe = tk.Recipe(model, tuner=HEAD_ONLY.cache(True), evaluator=tk.Evaluator("loss"))
    recipe = recipe.adapt("pca") if pca else recipe
    computed: list[int] = []
    real = compute

    def told(prefix: Any, data: Any, **settings: Any) -> Any:
        computed.append(len(data))
        return real(prefix, data, **settings)

    monkeypatch.setattr(sharing, "compute", told)
    found = tk.cross_validate(recipe, (x, y), folds=3, seed=0)
    assert computed == [48]
    data = tk.Data.arrays(x, y)
    for fold, loss in zip(folds(48, 3, labels=y, seed=0), found.scores["loss"], strict=True):
        alone = recipe.run(data.take(fold.train), test_data=data.take(fold.test), seed=fold_seed(0, fold), verbose=0)
        assert alone.evaluation is not None
        assert loss == float(alone.evaluation["loss"])
        np.testing.assert_array_equal(found.predictions[0, fold.test], alone.evaluation.predictions)


def test_a_layer_learns_only_from_what_stays_frozen() -> None:
    with pytest.raises(errors.ModelError) as caught:
        tk.Recipe(BEHIND, tuner=TUNER).adapt("scale", "pca").make(problem(), seed=0)
    assert str(caught.value) == (
        "Adapting the layer 'pca' of the model 'model'.\n"
        "  found: layers before it that train: 'body'\n"
        "  likely cause: it would learn from values that training then changes\n"
        "  to fix it: freeze them in every phase, as in .phase(..., train=tk.Layers.head()); or put it directly behind an input"
    )
    with pytest.raises(errors.ModelError) as forgotten:
        tk.Recipe(BEHIND, tuner=HEAD_ONLY).adapt("scale").make(problem(), seed=0)
    assert str(forgotten.value) == (
        "Making the model 'model' of a recipe.\n"
        "  found: the layer 'pca', a PCA that has learned no directions\n"
        "  to fix it: Recipe(…).adapt('pca')"
    )
    nested = tk.ModelBuilder((4,)).backbone(tk.ModelBuilder((4,)).dense(5).pca(2).build()).classifier(3)
    with pytest.raises(errors.ModelError) as inside:
        tk.Recipe(nested, tuner=HEAD_ONLY).adapt("pca").make(problem(), seed=0)
    assert inside.value.found == ("no way from the model's inputs to this layer that could be followed",)


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


@pytest.fixture(scope="module")
def found() -> CrossValidation:
    return tk.cross_validate(RECIPE, problem(), folds=3, repeats=2, seed=0)


def test_cross_validation_gives_every_row_one_prediction_by_a_model_that_had_not_seen_it(found: CrossValidation) -> None:
    x, y = problem()
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
    recipe = tk.Recipe(BUILDER, tuner=HEAD_ONLY, evaluator=tk.Evaluator("loss")).adapt("scale")
    whole = tk.cross_validate(recipe, data, folds=3, seed=0, folder=tmp_path)
    kept = sorted(tmp_path.glob("*.npz"))
    assert len(kept) == 3
    kept[1].unlink()
    again = tk.cross_validate(recipe, data, folds=3, seed=0, folder=tmp_path)
    assert again.scores == whole.scores
    assert [second > 0 for second in again.seconds] == [False, True, False]
    np.testing.assert_array_equal(again.predictions, whole.predictions)
    assert len(list(tmp_path.glob("*.npz"))) == 3
    tk.cross_validate(recipe, data, folds=2, seed=1, folder=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 5


def test_groups_are_never_on_both_sides_and_data_must_be_dealable() -> None:
    x, y = problem()
    groups = np.arange(len(x)) // 4
    found = tk.cross_validate(RECIPE, tk.Data.arrays(x, y), folds=2, groups=groups, stratified=False)
    assert len(found.scores["loss"]) == 2
    one = found["accuracy"]
    assert one.low is not None
    assert one.high is not None
    assert 0 <= one.low <= one.high <= 1  # Student's t of two scores knows of no such limits
    assert "2 scores say little of their spread" in str(found)
    with pytest.raises(errors.DataError) as caught:
        tk.cross_validate(RECIPE, iter([(x, y)]))
    assert caught.value.fix == "give (x, y) of arrays, tk.Data.arrays(x, y) or tk.Data.image_folder(…)"


def test_two_recipes_are_compared_fold_by_fold(found: CrossValidation) -> None:
    same = found.compare(replace(found, estimates={"loss": found["loss"]}))
    assert list(same) == ["loss"]
    assert (same["loss"].value, same["loss"].p_value, same["loss"].verdict) == (0, 1, "not told apart")
    shifts = (1, 2, 3, 1, 2, 3)
    worse = replace(found, scores={"loss": tuple(np.add(found.scores["loss"], shifts)), "accuracy": found.scores["accuracy"]})
    one = found.compare(worse, names=("a", "b"))["loss"]
    # Nadeau and Bengio's t by hand: six differences of mean 2 and variance 4/5, 80 rows to train on and 40 to test on.
    error = np.sqrt((1 / 6 + 40 / 80) * 4 / 5)
    assert one.p_value == pytest.approx(2 * stats.t.sf(2 / error, 5))
    half = stats.t.ppf(0.975, 5) * error
    assert (one.low, one.high) == pytest.approx((-2 - half, -2 + half))
    assert not one.greater_is_better
    assert one.verdict == "better"
    with pytest.raises(errors.EvaluationError) as caught:
        found.compare(replace(found, folds=found.folds[::-1]))
    assert str(caught.value) == (
        "Comparing first with second.\n"
        "  found: other folds\n"
        "  to fix it: cross-validate both on the same data with the same folds=, repeats=, groups=, stratified= and seed="
    )


def test_rows_of_one_class_are_not_cross_validated() -> None:
    data = tk.Data.arrays(np.zeros((20, 4), "float32"), np.repeat([0, 1], 10))
    with pytest.raises(errors.DataError, match="6 rows of one class"):
        tk.cross_validate(tk.Recipe(tk.ModelBuilder((4,)).classifier(2)), data.take(np.arange(6)))
