"""FineTuner on plain Keras models: freezing that holds, phases on one axis, bad input that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk
from transferkit import errors
from transferkit.data import split
from transferkit.tuning.feeding import epoch_order, ordered_dataset

Array = np.ndarray[Any, Any]


def problem(rows: int = 96, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    y = np.sort(random.integers(0, 3, rows))
    return (random.normal(size=(rows, 8)) + y[:, None]).astype("float32"), y


def network(seed: int = 0) -> Any:
    return tk.ModelBuilder((8,)).dense(16, "relu").dropout(0.2).dense(8, "relu").dropout(0.1).classifier(3).build(seed=seed)


def with_batch_norm() -> Any:
    """A backbone whose BatchNorm has statistics of its own, and a head."""
    base = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(6, name="d"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dropout(0.5, name="drop"),
            keras.layers.Dense(5, activation="relu", name="e"),
        ],
        name="base",
    )
    base.get_layer("bn").set_weights([np.ones(6), np.zeros(6), np.full(6, 0.5), np.full(6, 2.0)])
    return tk.ModelBuilder((8,)).backbone(base).dropout(0.1).classifier(3).build(seed=0)


def snapshot(model: Any) -> list[Array]:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.variables if "seed" not in variable.path]


def assert_unchanged(model: Any, before: list[Array]) -> None:
    for now, then in zip(snapshot(model), before, strict=True):
        np.testing.assert_array_equal(now, then)


TWO = (
    tk.FineTuner()
    .phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2)
    .phase("all", train=tk.Layers.all(), epochs=3, learning_rate=1e-3)
)


def test_one_history_over_all_phases() -> None:
    run = TWO.fit(network(), problem(), validation_data=0.25, seed=1, verbose=0)
    assert {name: len(values) for name, values in run.history.items()} == dict.fromkeys(
        ("accuracy", "loss", "val_accuracy", "val_loss"), 5
    )
    assert [(phase.name, phase.epochs, phase.planned) for phase in run.phases] == [("head", 2, 2), ("all", 3, 3)]
    assert run.epochs == 5
    assert run.notes == ("Loss: follows from head and labels (multiclass-sparse, 3 units from probabilities).",)
    assert str(run).startswith("Fine-tuned for 5 epochs on one device, seed 1\nphase  epochs")
    assert "<table>" in run._repr_html_()
    assert run.to_dict()["history"] == run.history


def test_a_seed_replays_a_run_to_the_bit_and_another_does_not() -> None:
    models = [network() for _ in range(3)]
    runs = [TWO.fit(model, problem(), seed=seed, verbose=0) for model, seed in zip(models, (5, 5, 6), strict=True)]
    assert runs[0].history == runs[1].history != runs[2].history
    for left, right in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_drawn_seed_stands_in_the_run_and_replays_it() -> None:
    first, second = network(), network()
    run = TWO.fit(first, problem(), verbose=0)
    TWO.fit(second, problem(), seed=run.seed, verbose=0)
    for left, right in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_equal_to_plain_keras_given_the_same_batches() -> None:
    """No dropout, one phase: plain Keras's fit on the rows in the order we say is the oracle, to the bit."""
    plan = tk.ModelBuilder((8,)).dense(16, "relu").classifier(3)
    ours, plain = plan.build(seed=0), plan.build(seed=0)
    x, y = problem()
    tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=3, learning_rate=1e-2).fit(ours, (x, y), seed=4, verbose=0)
    plain.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy())
    for epoch in range(3):
        order = epoch_order(len(x), seed=4, epoch=epoch)
        plain.fit(x[order], y[order], batch_size=32, shuffle=False, verbose=0)
    for left, right in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_what_is_frozen_stays_as_it_was_batch_norm_statistics_too() -> None:
    model = with_batch_norm()
    base = model.get_layer("base")
    before = base.get_weights()
    tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3).fit(model, problem(), seed=0, verbose=0)
    for now, then in zip(base.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    # Plain Keras with `training=False` doesn't hold its promise: the statistics move once the model trains.
    inputs = keras.Input((8,))
    again = with_batch_norm().get_layer("base")
    outputs = keras.layers.Dense(3, activation="softmax")(again(inputs, training=False))
    plain = keras.Model(inputs, outputs)
    plain.compile("adam", "sparse_categorical_crossentropy")
    x, y = problem()
    plain.fit(x, y, epochs=1, verbose=0)
    if np.array_equal(again.get_layer("bn").get_weights()[2], np.full(6, 0.5)):
        pytest.fail("this Keras holds training=False: the note in phases.py is out of date")


def test_batch_norm_keeps_its_statistics_when_its_neighbours_train_unless_told() -> None:
    kept, adapted = with_batch_norm(), with_batch_norm()
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2)
    plan.fit(kept, problem(), seed=0, verbose=0)
    plan.batch_norm("adapt").fit(adapted, problem(), seed=0, verbose=0)
    statistics = [model.get_layer("base").get_layer("bn").get_weights()[2] for model in (kept, adapted)]
    np.testing.assert_array_equal(statistics[0], np.full(6, 0.5))
    assert not np.array_equal(statistics[1], np.full(6, 0.5))


def test_fresh_batch_norm_adapts_in_every_phase() -> None:
    model = tk.ModelBuilder((8,)).dense(6).layer(keras.layers.BatchNormalization(name="bn")).classifier(3).build(seed=0)
    description = TWO.describe(model)
    assert [row.batch_norm for plan in description.phases for row in plan.layers if row.batch_norm] == ["frozen", "adapts"]
    TWO.fit(model, problem(), seed=0, verbose=0)
    assert not np.array_equal(model.get_layer("bn").get_weights()[2], np.zeros(6))


def test_dropout_in_the_frozen_part_is_off_and_comes_back() -> None:
    model = with_batch_norm()
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1)
    rows = {row.path: row.silenced for row in plan.describe(model).phases[0].layers}
    assert rows == {
        "input": False,
        "base/d": False,
        "base/bn": False,
        "base/drop": True,
        "base/e": False,
        "dropout": False,
        "head": False,
    }
    seen: list[float] = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(model.get_layer("base").get_layer("drop").rate))
    plan.fit(model, problem(), seed=0, callbacks=[watch], verbose=0)
    assert seen == [0.0]
    assert model.get_layer("base").get_layer("drop").rate == 0.5


def test_a_frozen_weight_that_moves_is_an_error() -> None:
    model = network()
    nudge = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: model.get_layer("dense").set_weights([w + 1 for w in model.get_layer("dense").get_weights()])
    )
    with pytest.raises(errors.TrainingError) as caught:
        TWO.fit(model, problem(), callbacks=[nudge], verbose=0)
    assert str(caught.value) == (
        "Training the phase 'head' with 2 layers frozen.\n"
        "  found: the weights of 'dense' changed all the same\n"
        "  likely cause: a callback, a custom train_step or a layer that writes its own weights changed them\n"
        "  to fix it: select them in the phase's train=, or leave them alone in the code that wrote them"
    )


def test_weights_beside_the_layers_of_a_subclassed_model_follow_the_phase() -> None:
    class Net(keras.Model):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.scale = self.add_weight(shape=(8,), initializer="ones", name="scale")
            self.top = keras.layers.Dense(3, activation="softmax", name="top")

        def call(self, x: Any) -> Any:
            return self.top(x * self.scale)

    model = Net()
    x, y = problem()
    model(x[:1])
    tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1).fit(model, (x, y), seed=0, verbose=0)
    np.testing.assert_array_equal(model.scale, np.ones(8))
    tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).fit(model, (x, y), seed=0, verbose=0)
    assert not np.array_equal(model.scale, np.ones(8))


def test_callbacks_see_one_training() -> None:
    seen: list[str] = []

    diary = keras.callbacks.LambdaCallback(
        on_train_begin=lambda _: seen.append("begin"),
        on_train_end=lambda _: seen.append("end"),
        on_epoch_end=lambda epoch, _: seen.append(str(epoch)),
    )
    TWO.fit(network(), problem(), callbacks=[diary], seed=0, verbose=0)
    assert seen == ["begin", "0", "1", "2", "3", "4", "end"]


def test_early_stopping_ends_a_phase_and_goes_on() -> None:
    plan = (
        tk.FineTuner()
        .phase("a", train=tk.Layers.head(), epochs=20, learning_rate=1e-9)
        .phase("b", train=tk.Layers.all(), epochs=2, learning_rate=1e-2)
        .early_stopping(0, monitor="val_accuracy")
    )
    run = plan.fit(network(), problem(), validation_data=0.25, seed=0, verbose=0)
    assert run.phases[0].epochs < 20
    assert run.phases[1].epochs >= 1
    assert len(run.history["loss"]) == run.epochs


def test_a_loss_that_stops_being_finite_is_an_error() -> None:
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=3, learning_rate=1e30).optimizer("sgd").loss("mse")
    model = tk.ModelBuilder((8,)).dense(4).regression().build(seed=0)
    x, y = problem()
    with pytest.raises(errors.TrainingError) as caught:
        plan.fit(model, (x, y.astype("float32")), seed=0, verbose=0)
    assert str(caught.value).startswith("Training the phase 'all': step ")
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def generator(x: Array, y: Array) -> Iterator[tuple[Array, Array]]:
    while True:
        yield x[:32], y[:32]


class Batches(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore]
    def __init__(self, x: Array, y: Array) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        return self.x[32 * index : 32 * index + 32], self.y[32 * index : 32 * index + 32]


def test_data_of_every_kind_that_fit_takes() -> None:
    x, y = problem()
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2)
    kinds: list[Any] = [
        (x, y),
        (x, y, np.ones(len(x), "float32")),
        (tf.constant(x), tf.constant(y)),
        tk.Data.arrays(x, y),
        tf.data.Dataset.from_tensor_slices((x, y)).batch(32),
        Batches(x, y),
        [(x[:32], y[:32]), (x[32:], y[32:])],
    ]
    for data in kinds:
        assert len(plan.fit(network(), data, seed=0, verbose=0).history["loss"]) == 2
    run = plan.fit(network(), generator(x, y), steps_per_epoch=3, seed=0, verbose=0)
    assert len(run.history["loss"]) == 2


def test_several_inputs_and_outputs_by_name() -> None:
    plan = tk.ModelBuilder({"a": (8,), "b": (8,)}).dense(4, name="left").at("b").dense(4).merge("add", "left", name="both")
    model = plan.classifier(3, name="kind").at("both").regression(name="size").build(seed=0)
    x, y = problem()
    labels = {"kind": y, "size": y.astype("float32") + 0.5}
    run = TWO.fit(model, ({"a": x, "b": x}, labels), seed=0, validation_data=0.25, verbose=0)
    assert {"kind_loss", "size_loss", "kind_accuracy", "size_mae", "val_loss"} <= set(run.history)
    with pytest.raises(errors.DataError) as caught:
        TWO.fit(model, ({"a": x, "b": x}, {"kind": y}), verbose=0)
    assert str(caught.value) == (
        "Matching labels to the 2 outputs of a model.\n"
        "  found: no labels for the output 'size'\n"
        "  to fix it: give a dict of labels by output name: {'kind': …, 'size': …}"
    )


def test_class_weights_need_one_output() -> None:
    model = tk.ModelBuilder((8,)).dense(4, name="d").classifier(3, name="a").at("d").regression(name="b").build(seed=0)
    before = snapshot(model)
    x, y = problem()
    with pytest.raises(errors.DataError) as caught:
        TWO.fit(model, (x, {"a": y, "b": y.astype("float32")}), class_weight={0: 2.0}, verbose=0)
    assert "a model with 2 outputs, whose classes aren't the same" in str(caught.value)
    assert_unchanged(model, before)
    assert not model.compiled


def test_the_models_own_loss_is_kept() -> None:
    model = network()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(), metrics=["sparse_top_k_categorical_accuracy"])
    run = TWO.fit(model, problem(), seed=0, verbose=0)
    assert run.notes == ("Loss: the model's own.",)
    assert "sparse_top_k_categorical_accuracy" in run.history


def test_class_weights_change_the_run() -> None:
    runs = [
        TWO.fit(network(), problem(), seed=0, class_weight=weights, verbose=0).history["loss"]
        for weights in (None, {0: 1.0}, {0: 5.0, 1: 1.0, 2: 1.0}, {0: 5.0})
    ]
    assert runs[0] == runs[1] != runs[2] == runs[3]
    with pytest.raises(errors.DataError) as caught:
        TWO.fit(network(), problem(), class_weight={3: 1.0, 0: -1.0}, verbose=0)
    assert str(caught.value) == (
        "Weighting the classes.\n"
        "  found 2 problems:\n"
        "    - the class 3, where the head has the classes 0 to 2\n"
        "    - the weight -1.0 for the class 0\n"
        "  to fix it: give each class's number and a weight of at least 0: {0: 1.0, 1: 5.0}"
    )


X, Y = problem()


@pytest.mark.parametrize(
    ("data", "arguments", "kind", "message"),
    [
        (
            (X[:0], Y[:0]),
            {},
            errors.DataError,
            "Reading the training data.\n  found: no rows at all\n"
            "  likely cause: an empty folder, a filter that keeps nothing, or an iterator that was used up before",
        ),
        (
            (np.where(np.arange(len(X))[:, None] == 7, np.nan, X), Y),
            {},
            errors.DataError,
            "Checking the training data against the model 'model'.\n"
            "  found: the input has 8 values that are NaN or infinite, the first in row 7\n"
            "  to fix it: fill or drop rows that aren't finite",
        ),
        (
            (X[:, :5], Y),
            {},
            errors.DataError,
            "Checking the training data against the model 'model'.\n"
            "  found: the input has rows of shape (5,), where the model takes (8,)\n"
            "  to fix it: bring the inputs to the model's shape",
        ),
        (
            (X, Y + 1),
            {},
            errors.DataError,
            "Telling the task from the labels and the head (3 units, activation 'softmax').\n"
            "  found: class indices from 1 to 3; 3 units take 0 to 2\n"
            "  likely cause: labels that start at 1\n"
            "  to fix it: y - 1",
        ),
        (
            X,
            {},
            errors.DataError,
            "Reading the training data.\n  found: a ndarray\n"
            "  likely cause: data comes as (x, y) of arrays, a tf.data.Dataset, a PyDataset or an iterable of batches\n"
            "  to fix it: for arrays, put inputs and labels into one tuple: (x, y)",
        ),
        (
            tf.data.Dataset.from_tensor_slices((X, Y)),
            {},
            errors.DataError,
            "Checking the training data against the model 'model'.\n"
            "  found: the input is one row of shape (8,), without an axis for the batch\n"
            "  to fix it: put rows into batches: dataset.batch(32)",
        ),
        (
            iter([(X, Y)]),
            {},
            errors.DataError,
            "Training for 5 epochs.\n"
            "  found: a generator that can be gone over once, and no steps_per_epoch\n"
            "  to fix it: give a list of batches, a tf.data.Dataset, or a generator without an end and steps_per_epoch=…",
        ),
        (
            tf.data.Dataset.from_tensor_slices((X, Y)).batch(32).repeat(),
            {},
            errors.DataError,
            "Training for 5 epochs.\n"
            "  found: a data set without an end, and no steps_per_epoch\n"
            "  to fix it: say how many batches an epoch has, steps_per_epoch=…, or leave .repeat() out of the data set",
        ),
        (
            (X, Y),
            {"class_weight": "balanced"},
            errors.DataError,
            "Weighting the classes.\n  found: 'balanced'\n"
            "  to fix it: give a dict of class and weight, {0: 1.0, 1: 5.0}; "
            "tk.Data.arrays(x, y).class_weights() balances the classes",
        ),
        (
            (X, Y[:-1]),
            {},
            errors.DataError,
            "Reading arrays as data.\n  found: first dimensions that differ: (96, 8), (95,)\n"
            "  likely cause: inputs, labels and sample weights must have one row for each example\n"
            "  to fix it: give as many of each",
        ),
        (
            (X, Y),
            {"batch_size": 0, "seed": -1},
            errors.PlanError,
            "Fitting a model.\n  found 2 problems:\n    - batch_size=0; it must be a whole number above 0\n"
            "    - seed=-1; it must be a whole number from 0 to 2**63 - 1",
        ),
        (
            (X, Y),
            {"validation_data": 1.5},
            errors.DataError,
            "Setting 1.5 of the data apart.\n  found: 96 rows; one side would be empty\n"
            "  to fix it: give a fraction such as 0.1, and more rows",
        ),
        (
            (X, Y),
            {"placement": tk.Placement.gpu(7)},
            errors.PlacementError,
            "Placing a model by Placement.gpu(7).\n  found: no device GPU:7\n  likely cause: TensorFlow sees CPU:0\n"
            "  to fix it: Placement.auto() takes what is there; for a GPU, install tensorflow[and-cuda] and a driver",
        ),
    ],
)
def test_bad_input_is_told_and_changes_nothing(data: Any, arguments: Any, kind: type[Exception], message: str) -> None:
    model = network()
    before = snapshot(model)
    flags = [variable.trainable for variable in model.variables]
    with pytest.raises(kind) as caught:
        TWO.fit(model, data, verbose=0, **arguments)
    assert str(caught.value) == message
    assert_unchanged(model, before)
    assert [variable.trainable for variable in model.variables] == flags
    assert not model.compiled


@pytest.mark.parametrize("loss", ["mse", "binary_crossentropy", "categorical_crossentropy", keras.losses.MeanSquaredError()])
def test_a_loss_that_cannot_compare_labels_and_outputs_is_told_before_anything_changes(loss: Any) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(errors.DataError) as caught:
        TWO.loss(loss).fit(model, (X, Y), verbose=0)
    name = loss if isinstance(loss, str) else "MeanSquaredError"
    assert str(caught.value) == (
        f"Training with the loss {name!r}.\n"
        "  found: labels of shape ('n',) and outputs of shape ('n', 3), which it can't compare\n"
        "  to fix it: leave .loss() out of the plan for SparseCategoricalCrossentropy"
    )
    assert_unchanged(model, before)
    assert not model.compiled


def test_a_builder_is_no_model_yet() -> None:
    with pytest.raises(errors.ModelError) as caught:
        TWO.fit(tk.ModelBuilder((8,)).classifier(3), (X, Y), verbose=0)
    assert str(caught.value) == (
        "Looking for the head of a model.\n  found: a ModelBuilder\n"
        "  to fix it: give a Keras model; a ModelBuilder makes one by .build()"
    )


class Rows(keras.metrics.Metric):  # type: ignore[misc, unused-ignore]
    """Counts rows; its result is its own variable, which a test of the same metric goes on with."""

    def __init__(self, name: str = "rows", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.seen = self.add_variable((), "zeros", name="seen")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        del y_pred, sample_weight
        self.seen.assign_add(keras.ops.cast(keras.ops.shape(y_true)[0], "float32"))

    def result(self) -> Any:
        return self.seen


@pytest.mark.parametrize("cache", [False, True])
def test_a_metric_that_gives_its_variable_keeps_training_and_validation_apart(cache: bool) -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2).metrics(Rows()).cache(cache)
    history = plan.fit(network(), (X[:60], Y[:60]), validation_data=(X[60:], Y[60:]), seed=0, verbose=0).history
    assert list(history["rows"]) == [60.0, 60.0]
    assert list(history["val_rows"]) == [36.0, 36.0]


def test_plans_that_make_no_sense_are_refused() -> None:
    with pytest.raises(errors.PlanError) as caught:
        TWO.phase("all", train="head", epochs=0, learning_rate=-1)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Planning the phase 'all'.\n"
        "  found 4 problems:\n"
        "    - train='head', which is no selection of layers; Layers.head() and Layers.all() are\n"
        "    - epochs=0; it must be a whole number above 0\n"
        "    - learning_rate=-1; it must be a number above 0\n"
        "    - a second phase named 'all'"
    )
    with pytest.raises(errors.ModelError) as caught_model:
        tk.FineTuner().phase("x", train=tk.Layers.of(keras.layers.Dropout), epochs=1).describe(network())
    assert str(caught_model.value) == (
        "Planning to fine-tune the model 'model'.\n"
        "  found: the phase 'x' would train nothing\n"
        "  likely cause: it selects only layers without weights, or only BatchNorm, which keeps its weights\n"
        '  to fix it: select layers with weights, or .batch_norm("adapt")'
    )
    with pytest.raises(errors.PlanError) as caught:
        TWO.early_stopping(2).fit(network(), problem(), verbose=0)
    assert str(caught.value) == (
        "Stopping early by 'val_loss'.\n"
        "  found: no validation data to measure it on\n"
        "  to fix it: fit(…, validation_data=0.1) sets a tenth of the rows apart"
    )


def test_a_figure_that_will_not_be_there_is_an_error() -> None:
    with pytest.raises(errors.PlanError) as caught:
        TWO.early_stopping(2, monitor="val_acuracy").fit(network(), problem(), validation_data=0.2, verbose=0)
    assert str(caught.value) == (
        "Stopping early by 'val_acuracy'.\n"
        "  found: no figure of that name (did you mean 'val_accuracy' or 'accuracy'?)\n"
        "  to fix it: one of 'loss', 'val_loss', 'accuracy', 'val_accuracy'"
    )
    plateau = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2, schedule="plateau")
    with pytest.raises(errors.PlanError) as caught:
        plateau.fit(network(), problem(), verbose=0)
    assert str(caught.value).startswith("Lowering the rate in the phase 'all' on a plateau by 'val_loss'.")


def test_describe_is_a_table_and_changes_nothing() -> None:
    model = network()
    before = snapshot(model)
    text = str(TWO.describe(model))
    assert text.splitlines()[:6] == [
        "Phase 'head': 2 epochs, trains Layers.head()",
        "layer    class    output  parameters  in this phase  learning rate  operations a row  computed",
        "───────  ───────  ──────  ──────────  ─────────────  ─────────────  ────────────────  ──────────",
        "dense    Dense    (16,)          144  frozen                     –               272  once",
        "dropout  Dropout  (16,)            0  off                        –                 0  once",
        "dense_1  Dense    (8,)           136  frozen                     –               264  once",
    ]
    assert_unchanged(model, before)
    assert all(layer.trainable for layer in model.layers)


def test_a_fraction_is_set_apart_by_class_whatever_the_order() -> None:
    x = np.arange(100)
    y = np.repeat([0, 1], [80, 20])  # sorted by class: the last rows are one class
    (rest, rest_y), (part, part_y) = split((x, y), 0.25, seed=0)
    assert np.bincount(part_y).tolist() == [20, 5]
    assert np.bincount(rest_y).tolist() == [60, 15]
    assert sorted([*rest, *part]) == x.tolist()
    assert split((x, y), 0.25, seed=0)[1][0].tolist() == part.tolist() != split((x, y), 0.25, seed=1)[1][0].tolist()


def test_every_epoch_has_an_order_of_its_own_and_each_row_once() -> None:
    orders = [epoch_order(50, seed=1, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    dataset = ordered_dataset((np.arange(50), np.arange(50)), batch_size=16, orders=lambda: orders[:1])
    assert [len(x) for x, _ in dataset] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in dataset]), orders[0])


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: tk.FineTuner().loss("mean_squared_eror"), "(did you mean 'mean_squared_error'"),
        (lambda: tk.FineTuner().loss({"a": "mse", "b": "categorical_crossentrpy"}), "'categorical_crossentropy'"),
        (lambda: tk.FineTuner().metrics("acuracy"), "no metric named 'acuracy' (did you mean 'accuracy'"),
        (lambda: tk.FineTuner().metrics({"a": ["mae", "AUCC"]}), "no metric named 'AUCC' (did you mean 'AUC'"),
    ],
)
def test_names_keras_does_not_know_are_told_with_near_ones(make: Any, found: str) -> None:
    with pytest.raises(errors.PlanError) as caught:
        make()
    assert found in str(caught.value)
