"""The Evaluator against `model.evaluate`, and everything an Evaluation can be asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from numpy.typing import NDArray

from transferkit._keras import keras, tf
from transferkit.errors import DataError, EvaluationError, MissingExtraError, PlanError, TransferKitError
from transferkit.evaluation.evaluator import Evaluator
from transferkit.evaluation.report import Evaluation

ROWS = 75  # no multiple of the batch size, so that the last batch is smaller


@pytest.fixture(scope="module")
def x() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(ROWS, 5)).astype("float32")


def network(units: int, activation: str | None, **head: Any) -> Any:
    keras.utils.set_random_seed(units)
    layers = [
        keras.Input((5,)),
        keras.layers.Dense(6, activation="relu"),
        keras.layers.Dense(units, activation=activation, **head),
    ]
    return keras.Sequential(layers)


def labels(kind: str) -> NDArray[Any]:
    generator = np.random.default_rng(1)
    return {
        "binary": generator.integers(0, 2, ROWS),
        "column": generator.integers(0, 2, (ROWS, 1)),
        "sparse": generator.integers(0, 3, ROWS),
        "one-hot": np.eye(3)[generator.integers(0, 3, ROWS)],
        "multilabel": generator.integers(0, 2, (ROWS, 3)),
        "quantity": generator.normal(size=ROWS).astype("float32"),
        "quantities": generator.normal(size=(ROWS, 3)).astype("float32"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "units", "activation", "loss"),
    [
        ("sparse", 3, "softmax", None),
        ("sparse", 3, None, None),
        ("one-hot", 3, "softmax", "categorical_crossentropy"),
        ("one-hot", 3, None, None),
        ("binary", 1, "sigmoid", "binary_crossentropy"),
        ("column", 1, None, None),
        ("multilabel", 3, "sigmoid", "binary_focal_crossentropy"),
        ("quantity", 1, None, "huber"),
        ("quantities", 3, None, None),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_what_keras_gives(
    x: NDArray[np.float32], kind: str, units: int, activation: str | None, loss: str | None, weighted: bool
) -> None:
    model, y = network(units, activation, kernel_regularizer="l2"), labels(kind)
    weight = np.random.default_rng(2).random(ROWS).astype("float32") if weighted else None
    if loss is not None:
        model.compile(loss=loss)
    evaluation = Evaluator("loss").run(model, (x, y) if weight is None else (x, y, weight), batch_size=16)
    if loss is None:
        model.compile(loss=getattr(keras.losses, evaluation.task.loss)(**evaluation.task.loss_arguments))
    theirs = model.evaluate(x, y, sample_weight=weight, batch_size=16, verbose=0)
    assert float(evaluation["loss"]) == pytest.approx(theirs, abs=1e-6)


def test_the_loss_of_a_prediction_that_is_wrong_and_sure() -> None:
    """Keras takes a softmax's logits for the loss, so that nothing is cut off at 1e-7; so must we."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax", kernel_initializer="identity")])
    model.compile(loss="sparse_categorical_crossentropy")
    data = (np.array([[40.0, 0.0], [0.0, 1.0]], "float32"), np.array([1, 1]))
    assert float(Evaluator("loss").run(model, data)["loss"]) == pytest.approx(model.evaluate(*data, verbose=0), rel=1e-6)


def test_figures_equal_scikit_learns(x: NDArray[np.float32]) -> None:
    model, y = network(3, None), labels("sparse")
    p = tf.nn.softmax(tf.cast(model(x), "float64"), axis=-1).numpy()
    evaluation = Evaluator("accuracy", "auc", "log_loss", "f1").run(model, (x, y), batch_size=16)
    assert float(evaluation["accuracy"]) == pytest.approx(sk.accuracy_score(y, p.argmax(1)), abs=1e-12)
    assert float(evaluation["auc"]) == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"), abs=1e-6)
    assert float(evaluation["log_loss"]) == pytest.approx(sk.log_loss(y, p), abs=1e-6)
    assert float(evaluation["f1"]) == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro"), abs=1e-12)
    np.testing.assert_allclose(evaluation.predictions, p, atol=1e-6)
    np.testing.assert_array_equal(evaluation.labels, y)


def test_two_units_with_a_softmax_are_judged_as_one_with_a_sigmoid(x: NDArray[np.float32]) -> None:
    one, two = network(1, "sigmoid"), network(2, "softmax")
    two.layers[0].set_weights(one.layers[0].get_weights())
    kernel, bias = one.layers[1].get_weights()
    two.layers[1].set_weights([np.hstack([0 * kernel, kernel]), np.array([0, bias[0]])])
    plan = Evaluator("accuracy", "auc", "log_loss")
    first, second = plan.run(one, (x, labels("binary"))), plan.run(two, (x, labels("binary")))
    for name in first:
        for of in ("value", "low", "high"):
            assert getattr(second[name], of) == pytest.approx(getattr(first[name], of), abs=1e-6)
        assert second[name].method == first[name].method != ""
    assert first.compare(first)["auc"].test == second.compare(second)["auc"].test == "DeLong"


def test_every_form_of_data_gives_the_same(x: NDArray[np.float32]) -> None:
    model, y = network(3, "softmax"), labels("sparse")

    class Sequence(keras.utils.PyDataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> tuple[Any, Any]:
            return x[i * 16 : i * 16 + 16], y[i * 16 : i * 16 + 16]

    def generator() -> Iterator[tuple[Any, Any]]:
        for start in range(0, ROWS, 9):
            yield x[start : start + 9], y[start : start + 9]

    plan = Evaluator("accuracy", "loss", "auc").bootstrap(100)
    first = plan.run(model, (x, y))
    for data in (tf.data.Dataset.from_tensor_slices((x, y)).batch(20), Sequence(), generator()):
        other = plan.run(model, data)
        for name in first:
            assert float(other[name]) == pytest.approx(float(first[name]), abs=1e-6)
            assert other[name].low == pytest.approx(first[name].low, abs=1e-6)


def test_a_shuffled_data_set_pairs_each_row_with_its_label() -> None:
    """Labels that follow from the inputs are all found again, in whatever order the rows come."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, "softmax", kernel_initializer="identity")])
    y = np.arange(200) % 4
    data = tf.data.Dataset.from_tensor_slices((np.eye(4, dtype="float32")[y], y)).shuffle(200).batch(7)
    assert float(Evaluator("accuracy").run(model, data)["accuracy"]) == 1.0


def test_nothing_about_the_model_changes(x: NDArray[np.float32]) -> None:
    model, y = network(3, "softmax"), labels("sparse")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    before = [w.copy() for w in model.get_weights()]
    loss, optimizer, trained = model.loss, model.optimizer, [w.trainable for w in model.weights]
    Evaluator().bootstrap(100).run(model, (x, y))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert (model.loss, model.optimizer, [w.trainable for w in model.weights]) == (loss, optimizer, trained)


def test_dropout_and_normalisation_rest(x: NDArray[np.float32]) -> None:
    layers = [keras.Input((5,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(3, "softmax")]
    model, y = keras.Sequential(layers), labels("sparse")
    first, second = (Evaluator("log_loss").run(model, (x, y)) for _ in range(2))
    assert float(first["log_loss"]) == float(second["log_loss"])
    np.testing.assert_allclose(first.predictions, model.predict(x, verbose=0), atol=1e-6)


def test_one_output_of_several(x: NDArray[np.float32]) -> None:
    inputs = keras.Input((5,))
    outputs = {
        "kind": keras.layers.Dense(3, activation="softmax", name="kind")(inputs),
        "size": keras.layers.Dense(1, name="size")(inputs),
    }
    model = keras.Model(inputs, outputs)
    y = {"kind": labels("sparse"), "size": labels("quantity")}
    evaluation = Evaluator().run(model, (x, y), output="size")
    assert list(evaluation) == ["loss", "mae", "rmse", "r2"]
    assert float(evaluation["mae"]) == pytest.approx(np.abs(model(x)["size"].numpy()[:, 0] - y["size"]).mean(), abs=1e-6)
    with pytest.raises(EvaluationError) as caught:
        Evaluator().run(model, (x, y))
    assert str(caught.value) == (
        "Evaluating a model of 2 outputs.\n"
        "  found: no word about which one\n"
        "  to fix it: run(..., output=name), with one of 'kind', 'size'"
    )


def test_positions_of_a_picture_are_resampled_together() -> None:
    model = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.Conv2D(3, 1, activation="softmax")])
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(6, 4, 4, 2)).astype("float32"), generator.integers(0, 3, (6, 4, 4))
    evaluation = Evaluator("loss", "accuracy").bootstrap(100).run(model, (x, y), batch_size=4)
    assert (len(evaluation.rows), evaluation.positions, evaluation.rows.groups.max()) == (96, 16, 5)  # type: ignore[union-attr]
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    loss, accuracy = model.evaluate(x, y, verbose=0, batch_size=4)
    assert float(evaluation["loss"]) == pytest.approx(loss, abs=1e-6)
    assert float(evaluation["accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert evaluation.notes == ("16 positions an example, which are resampled together",)


def test_lengths_that_vary_from_batch_to_batch() -> None:
    inner = [keras.layers.Embedding(9, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1, "sigmoid")]
    model = keras.Sequential([keras.Input((None,)), *inner])
    generator = np.random.default_rng(0)
    data = [(generator.integers(0, 9, (4, length)), generator.integers(0, 2, 4)) for length in (3, 7, 5)]
    evaluation = Evaluator("accuracy").run(model, iter(data))
    assert len(evaluation.rows) == 12
    with pytest.raises(DataError) as caught:
        Evaluator("accuracy").run(model, (data[0][0], (data[0][1], data[0][1])))
    assert str(caught.value) == (
        f"Computing accuracy of the model {model.name!r}.\n"
        "  found: labels in 2 parts for one output\n"
        "  likely cause: labels of a model with several outputs\n"
        "  to fix it: give one array of labels"
    )


def test_keras_metrics_beside(x: NDArray[np.float32]) -> None:
    class Sureness(keras.metrics.Mean):
        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            del y_true, sample_weight
            super().update_state(keras.ops.max(y_pred, axis=-1))

    model, y = network(3, "softmax"), labels("sparse")
    metrics = [keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top2"), Sureness(name="sureness")]
    evaluation = Evaluator("accuracy", "top_2_accuracy").run(model, (x, y), metrics=metrics)
    assert float(evaluation["top2"]) == pytest.approx(float(evaluation["top_2_accuracy"]), abs=1e-6)
    assert float(evaluation["sureness"]) == pytest.approx(evaluation.predictions.max(axis=1).mean(), abs=1e-6)
    assert evaluation["sureness"].low is None


def test_a_plan_reads_as_its_chain_and_goes_through_json() -> None:
    plan = Evaluator("accuracy", "top_5_accuracy").bootstrap(500, level=0.9, method="bca", stratified=True, seed=3).threshold(0.3)
    assert repr(plan) == (
        "Evaluator('accuracy', 'top_5_accuracy').bootstrap(500, level=0.9, method='bca', stratified=True, seed=3).threshold(0.3)"
    )
    assert Evaluator.from_json(plan.to_json()) == plan
    assert Evaluator("auc").bootstrap() != Evaluator("auc")


def test_a_plan_names_every_problem() -> None:
    with pytest.raises(PlanError) as caught:
        Evaluator("acc", "loss", "loss", "recal")
    assert caught.value.found == (
        "Computing acc. no metric of that name (the metric 'accuracy' is what is meant)",
        "Computing recal. no metric of that name (did you mean 'recall'?)",
        "'loss' twice",
    )
    with pytest.raises(PlanError) as caught:
        Evaluator().bootstrap(10, level=95, method="basic")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Evaluator.bootstrap.\n"
        "  found 3 problems:\n"
        "    - level=95; it lies between 0 and 1, such as 0.95\n"
        "    - n=10; an interval needs at least 100 resamples\n"
        "    - method='basic'; there are 'percentile' and 'bca'\n"
        "  to fix it: bootstrap(2000, level=0.95)"
    )


@pytest.mark.parametrize(
    ("data", "error", "found"),
    [
        ((np.zeros((0, 5), "float32"), np.zeros(0, int)), DataError, "no rows"),
        ((np.zeros((4, 5), "float32"), None), DataError, "data without labels"),
        ((np.array([[0, 0, 0, 0, np.nan]], "float32"), np.array([1])), DataError,
         "inputs that aren't finite in 1 of 1 rows of a batch, the first in row 0"),
        ((np.zeros((3, 5), "float32"), np.array([1, 2, 3])), DataError, "class indices from 1 to 3; 3 units take 0 to 2"),
        ((np.zeros((3, 5), "float32"), np.array(["a", "b", "c"])), DataError, "labels of type <U1"),
        ((np.zeros((3, 5), "float32"), np.array([0.5, 0.2, 1])), DataError, "one float a row (between 0.2 and 1) for 3 units"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_said(data: Any, error: type[Exception], found: str) -> None:
    with pytest.raises(error) as caught:
        Evaluator("accuracy").run(network(3, "softmax"), data)
    assert caught.value.found == (found,)  # type: ignore[attr-defined]


def test_weights_that_are_not_finite_are_said(x: NDArray[np.float32]) -> None:
    model = network(3, "softmax")
    model.layers[-1].bias.assign([np.nan] * 3)
    with pytest.raises(EvaluationError) as caught:
        Evaluator("accuracy").run(model, (x, labels("sparse")))
    assert str(caught.value) == (
        f"Computing accuracy of the model {model.name!r}.\n"
        "  found: predictions that aren't finite in 32 of 32 rows of a batch, the first in row 0\n"
        "  likely cause: weights that aren't finite, since the inputs are\n"
        "  to fix it: look for NaN in model.get_weights(), or load weights from before the training diverged"
    )


def refusal(metric: str, model: Any, data: Any) -> str:
    with pytest.raises((EvaluationError, DataError)) as caught:
        Evaluator(metric).run(model, data)
    return str(caught.value).replace(repr(model.name), "'net'")


def test_a_compiled_loss_that_takes_logits_for_probabilities() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="identity")])
    model.compile(loss="sparse_categorical_crossentropy")
    assert refusal("auc", model, (np.array([[2.0, -1.0], [0.5, 3.0]], "float32"), np.array([0, 1]))) == (
        "Computing auc of the model 'net'.\n"
        "  found: predictions between -1 and 3, where probabilities lie in 0 … 1\n"
        "  likely cause: logits are taken for probabilities: the head has no softmax or sigmoid\n"
        "  to fix it: compile with a loss of from_logits=True, give the head its activation, or pass probabilities"
    )


def test_sigmoids_where_classes_exclude_each_other() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "sigmoid", kernel_initializer="identity")])
    model.compile(loss="sparse_categorical_crossentropy")
    assert refusal("log_loss", model, (np.tile(np.array([0, 1], "float32"), (3, 1)), np.array([0, 1, 0]))) == (
        "Computing log_loss of the model 'net'.\n"
        "  found: 3 of 3 rows of probabilities don't sum to one (row 0 sums to 1.231)\n"
        "  likely cause: sigmoids instead of a softmax, or probabilities that were cut or changed afterwards\n"
        "  to fix it: use a softmax for classes that exclude each other; give zeros and ones (n, k) as labels where they don't"
    )


def test_one_class_and_a_metric_of_another_task(x: NDArray[np.float32]) -> None:
    assert refusal("auc", network(3, "softmax"), (x, np.zeros(ROWS, int))) == (
        "Computing auc.\n"
        "  found: one class only ('0')\n"
        "  likely cause: a test set sorted by class and cut, or a slice of one class\n"
        "  to fix it: shuffle before splitting, or give rows of at least two classes"
    )
    assert refusal("auc", network(1, None), (x, labels("quantity"))) == (
        "Computing auc.\n"
        "  found: a regression task; auc is for binary and multiclass and multilabel\n"
        "  to fix it: choose among mae, mse, rmse, mape, msle, bias, r2, explained_variance, max_error"
    )
    assert refusal("mae", network(3, "softmax"), (x, labels("sparse"))).startswith(
        "Computing mae.\n  found: a multiclass task; mae is for regression\n  to fix it: choose among accuracy, "
    )


def test_labels_outside_the_head(x: NDArray[np.float32]) -> None:
    model = network(3, "softmax")
    model.compile(loss="sparse_categorical_crossentropy")
    assert refusal("accuracy", model, (x, labels("sparse") + 1)) == (
        "Computing accuracy of the model 'net'.\n"
        f"  found: {int((labels('sparse') == 2).sum())} of 75 labels outside the head (3); 3 units take 0 to 2\n"
        "  likely cause: labels that start at 1, or classes the head wasn't trained for\n"
        "  to fix it: let labels start at 0, and give the head one unit for each class"
    )


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("wrong", ["above", "below", "text", "missing", "wide"])
def test_wrong_labels_are_said_before_the_loss_fails_on_them(x: NDArray[np.float32], wrong: str, compiled: bool) -> None:
    model, y = network(3, "softmax"), labels("sparse")
    if compiled:
        model.compile(loss="sparse_categorical_crossentropy")
    given = {
        "above": y + 1,
        "below": y - 1,
        "text": np.array(["a", "b", "c"])[y],
        "missing": np.where(y == 1, np.nan, y),
        "wide": np.eye(4)[y],
    }[wrong]
    for data in ((x, given), tf.data.Dataset.from_tensor_slices((x, given)).batch(20)):
        with pytest.raises(TransferKitError, match=r"label|class indices"):
            Evaluator("accuracy", "loss").run(model, data)


def test_rows_without_a_batch_and_of_another_shape(x: NDArray[np.float32]) -> None:
    y = labels("sparse")
    assert refusal("accuracy", network(3, "softmax"), tf.data.Dataset.from_tensor_slices((x, y))) == (
        "Computing accuracy of the model 'net'.\n"
        "  found: one row of shape (5,) at a time, without an axis for the batch\n"
        "  to fix it: put rows into batches: dataset.batch(32)"
    )
    assert refusal("accuracy", network(3, "softmax"), (x[:, :4], y)) == (
        "Computing accuracy of the model 'net'.\n"
        "  found: rows of shape (4,), where the model takes (5,)\n"
        "  to fix it: bring the inputs to the model's shape"
    )


def test_inputs_and_labels_by_name_shuffled_and_from_several_workers(x: NDArray[np.float32]) -> None:
    """A dict of inputs, several outputs, weights for each, from tf.data in another order each time and from a PyDataset."""
    given = {"a": keras.Input((5,), name="a"), "b": keras.Input((5,), name="b")}
    both = keras.layers.Concatenate()([given["a"], given["b"]])
    outputs = {
        "kind": keras.layers.Dense(3, activation="softmax", name="kind")(both),
        "size": keras.layers.Dense(1, name="size")(both),
    }
    model = keras.Model(given, outputs)
    inputs = {"a": x, "b": x[::-1].copy()}
    y = {"kind": labels("sparse"), "size": labels("quantity")}
    w = {name: np.random.default_rng(3).random(ROWS).astype("float32") for name in y}

    class Workers(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore]
        def __len__(self) -> int:
            return 5

        def __getitem__(self, i: int) -> Any:
            part = slice(i * 15, i * 15 + 15)
            return tuple({name: value[part] for name, value in one.items()} for one in (inputs, y, w))

    plan = Evaluator("accuracy", "auc", "log_loss")
    first = plan.run(model, (inputs, y, w), output="kind")
    shuffled = tf.data.Dataset.from_tensor_slices((inputs, y, w)).shuffle(ROWS).batch(7)
    for data in (shuffled, shuffled, Workers(workers=2)):
        other = plan.run(model, data, output="kind")
        for name in first:
            assert float(other[name]) == pytest.approx(float(first[name]), abs=1e-6)


def test_a_missing_class_is_said(x: NDArray[np.float32]) -> None:
    y = np.minimum(labels("sparse"), 1)
    evaluation = Evaluator("auc").run(network(3, "softmax"), (x, y), classes=["ant", "bee", "wasp"])
    assert evaluation.notes == ("no row of class: wasp; averages over classes leave out what isn't defined for them",)
    assert "no row of class: wasp" in str(evaluation)


def test_an_unknown_figure_is_a_key_error(x: NDArray[np.float32]) -> None:
    evaluation = Evaluator("accuracy").run(network(3, "softmax"), (x, labels("sparse")))
    assert "auc" not in evaluation
    with pytest.raises(KeyError) as caught:
        evaluation["acuracy"]
    assert str(caught.value) == (
        "Looking up 'acuracy' in an evaluation.\n"
        "  found: figures for 'accuracy' (did you mean 'accuracy'?)\n"
        "  to fix it: Evaluator('accuracy', 'acuracy').run(...)"
    )


# ── asking more ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any, tuple[Any, Any], Evaluation, Evaluation]:
    """A trained model, an untrained one, data neither has seen, and the evaluations of both."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype("float32")
    chosen = y < 4
    x, y = x[chosen], y[chosen]

    def build() -> Any:
        layers = [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(16, "relu"),
            keras.layers.Dense(4, "softmax"),
        ]
        return keras.Sequential(layers)

    keras.utils.set_random_seed(0)
    trained, fresh = build(), build()
    trained.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    trained.fit(x[:300], y[:300], epochs=3, verbose=0)
    held_out = (x[300:], y[300:])
    plan = Evaluator("accuracy", "loss", "auc").bootstrap(200)
    names = ["zero", "one", "two", "three"]
    return trained, fresh, held_out, plan.run(trained, held_out, classes=names), plan.run(fresh, held_out, classes=names)


Digits = tuple[Any, Any, tuple[Any, Any], Evaluation, Evaluation]


def test_comparison_and_negative_transfer(digits: Digits) -> None:
    *_, good, bad = digits
    comparison = good.compare(bad, names=("tuned", "scratch"))
    assert comparison["accuracy"].verdict == "better"
    assert comparison["loss"].verdict == "better"
    assert comparison["accuracy"].test == "McNemar"
    assert float(comparison["accuracy"]) == pytest.approx(float(good["accuracy"]) - float(bad["accuracy"]))
    assert "tuned against scratch on the same" in str(comparison)
    gain = bad.transfer_gain(scratch=good, before=bad)
    assert gain.is_negative
    assert gain.verdict.startswith("negative transfer: accuracy is 0.")
    assert gain.verdict.endswith("no difference shown to before tuning: every interval holds zero")
    assert not good.transfer_gain(scratch=bad).is_negative
    assert good.transfer_gain(scratch=bad).verdict.startswith("gain: accuracy is 0.")


def test_comparison_needs_the_same_rows(digits: Digits) -> None:
    trained, _, (x, y), good, _ = digits
    shifted = Evaluator("accuracy").run(trained, (x, np.roll(y, 1)))
    with pytest.raises(EvaluationError) as caught:
        good.compare(shifted)
    differ = int((y != np.roll(y, 1)).sum())
    assert str(caught.value) == (
        "Comparing first with second.\n"
        f"  found: labels that differ in {differ} of {len(y)} rows\n"
        "  likely cause: the two were evaluated on different data, or on one that comes in another order each time\n"
        "  to fix it: evaluate both on the same arrays, or on a data set without shuffling"
    )


def test_confusion_and_classes(digits: Digits) -> None:
    _, _, (_, y), good, _ = digits
    decided = good.predictions.argmax(axis=1)
    np.testing.assert_array_equal(good.confusion().counts, sk.confusion_matrix(y, decided))
    precision, recall, f1, support = sk.precision_recall_fscore_support(y, decided)
    for c, one in enumerate(good.per_class().values()):
        assert one.values["precision"] == pytest.approx(precision[c])
        assert one.values["recall"] == pytest.approx(recall[c])
        assert one.values["f1"] == pytest.approx(f1[c])
        assert one.rows == support[c]
        assert one.intervals["f1"].low < f1[c] <= one.intervals["f1"].high
        assert one.values["auc"] == pytest.approx(sk.roc_auc_score(y == c, good.predictions[:, c]))


def test_slices(digits: Digits) -> None:
    _, _, (_, y), good, _ = digits
    half = np.arange(len(y)) % 2
    slices = good.slices(half, names=["even", "odd"])
    decided = good.predictions.argmax(axis=1)
    assert float(slices["odd"].estimates["accuracy"]) == pytest.approx(sk.accuracy_score(y[half == 1], decided[half == 1]))
    one_class = good.slices({"only zeros": y == 0})
    assert one_class["only zeros"].refused == {"auc": "one class only ('zero')"}
    assert "only zeros: no auc, one class only ('zero')" in str(one_class)
    with pytest.raises(EvaluationError) as caught:
        good.slices({"none": y == 9, "all": y >= 0})
    assert str(caught.value) == (
        "Evaluating by slices.\n  found: the slice 'none' has no rows\n  to fix it: leave empty slices out"
    )


def test_mistakes_come_with_their_inputs(digits: Digits) -> None:
    _, _, (x, y), _, bad = digits
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    mistakes = bad.mistakes(7, inputs=data)
    assert len(mistakes) == 7
    np.testing.assert_array_equal(mistakes.inputs, x[mistakes.index])
    assert (np.diff(mistakes.confidence) <= 0).all()
    assert all(label == bad.classes[y[i]] for i, label in zip(mistakes.index, mistakes.labels, strict=True))
    with pytest.raises(DataError, match="the data is shuffled anew each time"):
        bad.mistakes(7, inputs=(x, np.roll(y, 1)))


def test_wrong_labels_are_found(digits: Digits) -> None:
    trained, _, (x, y), _, _ = digits
    wrong = np.arange(0, len(y), 20)
    noisy = y.copy()
    noisy[wrong] = (noisy[wrong] + 1) % 4
    suspects = Evaluator("accuracy").run(trained, (x, noisy)).label_suspects(len(wrong))
    assert len(set(suspects.index) & set(wrong)) >= 0.8 * len(wrong)


def test_a_temperature_goes_into_the_model(digits: Digits) -> None:
    trained, _, (x, y), good, _ = digits
    temperature = good.temperature()
    calibrated = temperature.apply(trained)
    after = Evaluator("log_loss").run(calibrated, (x, y))
    assert float(after["log_loss"]) == pytest.approx(temperature.log_loss[1], abs=1e-5)
    assert temperature.log_loss[1] < temperature.log_loss[0] == pytest.approx(sk.log_loss(y, good.predictions))
    np.testing.assert_array_equal(after.predictions.argmax(axis=1), good.predictions.argmax(axis=1))
    # The best temperature by SciPy.
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logits = np.log(good.predictions)
    theirs = minimize_scalar(
        lambda t: -log_softmax(logits / t, axis=1)[np.arange(len(y)), y].mean(), bounds=(0.01, 10), options={"xatol": 1e-9}
    )
    assert float(temperature) == pytest.approx(theirs.x, rel=1e-4)


@pytest.mark.parametrize(("units", "activation"), [(1, "sigmoid"), (1, None), (3, "sigmoid"), (3, None)])
def test_temperatures_for_every_head(x: NDArray[np.float32], units: int, activation: str | None) -> None:
    model = network(units, activation)
    y = labels("binary" if units == 1 else "multilabel")
    y = np.where(
        np.random.default_rng(0).random(y.shape) < 0.7, (np.asarray(model(x)).reshape(y.shape) > (0.5 if activation else 0)), y
    )
    evaluation = Evaluator("log_loss").run(model, (x, y.astype(int)))
    temperature = evaluation.temperature()
    after = Evaluator("log_loss").run(temperature.apply(model), (x, y.astype(int)))
    assert float(after["log_loss"]) == pytest.approx(temperature.log_loss[1], abs=1e-5)


def test_results_go_out_as_json_and_html(digits: Digits, tmp_path: Path) -> None:
    _, _, data, good, bad = digits
    told = json.loads(good.to_json())
    assert told["metrics"]["accuracy"]["value"] == float(good["accuracy"])
    assert told["evaluator"] == "Evaluator('accuracy', 'loss', 'auc').bootstrap(200)"
    for result in (good.per_class(), good.confusion(), good.mistakes(), good.reliability(), good.temperature(), good.compare(bad),
                   good.slices(np.arange(len(good.rows)) % 2), good.transfer_gain(scratch=bad)):  # fmt: skip
        json.dumps(result.to_dict())
        assert result._repr_html_().startswith("<div>")
    bad.save_html(tmp_path / "page.html", title="<Digits>", inputs=data)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;Digits&gt;" in page
    assert "<Digits>" not in page
    # Nothing is fetched: every source is inside the page.
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('src="data:image/svg+xml;base64,') == 5
    assert page.count('src="data:image/png;base64,') == 12


def test_without_matplotlib_the_page_has_no_pictures(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, good, _ = digits
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert "image/svg" not in good.to_html()


def test_without_pandas_the_extra_is_named(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, good, _ = digits
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtraError) as caught:
        good.to_frame()
    assert str(caught.value) == (
        "Evaluation.to_frame needs the package 'pandas'.\n"
        "  found: 'pandas' is not installed here\n"
        '  to fix it: pip install "transferkit[tables]"'
    )


def every_result(good: Evaluation, bad: Evaluation) -> list[Any]:
    return [
        good, good.per_class(), good.confusion(), bad.mistakes(), bad.label_suspects(), good.reliability(), good.temperature(),
        good.compare(bad), good.slices(np.arange(len(good.rows)) % 2), good.transfer_gain(scratch=bad, before=bad),
    ]  # fmt: skip


def test_every_result_is_a_table_a_page_json_and_records(digits: Digits) -> None:
    *_, good, bad = digits
    for result in every_result(good, bad):
        assert str(result) == str(result.table())
        assert result._repr_html_().startswith("<div>")
        assert isinstance(json.loads(result.to_json()), dict)
        records = result.records()
        assert records
        assert all(list(record) == list(records[0]) for record in records)
        json.dumps(records)
    assert good.records()[0]["value"] == float(good["accuracy"])
    assert {record["against"] for record in good.transfer_gain(scratch=bad, before=bad).records()} == {"from scratch", "before"}


def test_pandas_frames(digits: Digits) -> None:
    pytest.importorskip("pandas")
    *_, good, bad = digits
    for result in every_result(good, bad):
        assert len(result.to_frame()) == len(result.records())
    assert good.to_frame().set_index("metric").loc["accuracy", "value"] == float(good["accuracy"])


def test_a_loss_function_that_takes_the_mean_itself_gives_keras_loss_without_an_interval() -> None:
    def mean_loss(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred))

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", mean_loss)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(70, 4)).astype("float32"), random.integers(0, 3, 70)
    for weight in (None, random.uniform(0.5, 2, 70).astype("float32")):
        data = (x, y) if weight is None else (x, y, weight)
        found = Evaluator("loss", "accuracy").run(model, data)
        expected = model.evaluate(*data[:2], sample_weight=weight, verbose=0)
        assert float(found["loss"]) == pytest.approx(expected, abs=1e-6)
        assert found["loss"].low is None
        assert found["accuracy"].low is not None


def test_a_loss_class_that_keras_cannot_find_by_name() -> None:
    class Doubled(keras.losses.Loss):  # type: ignore[misc, unused-ignore]
        def call(self, y_true: Any, y_pred: Any) -> Any:
            return 2 * keras.losses.sparse_categorical_crossentropy(y_true, y_pred)

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", Doubled())
    random = np.random.default_rng(0)
    data = random.normal(size=(70, 4)).astype("float32"), random.integers(0, 3, 70)
    found = Evaluator("loss").run(model, data)
    assert float(found["loss"]) == pytest.approx(model.evaluate(*data, verbose=0), abs=1e-6)
    assert found["loss"].low is not None
