"""Phases on features: the same run as in full, to the bit; and the reasons when a phase is computed in full."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import transferkit as tk
from transferkit.building.frontier import split
from transferkit.errors import ModelError, PlanError
from transferkit.tuning.epoch import same_kernels
from transferkit.tuning.features import compute

ROWS = 70


def _warned(text: str) -> Any:
    """Expects the warning that ends so."""
    return pytest.warns(UserWarning, match=f"{re.escape(text)}$")


def _problem(seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.normal(size=(ROWS, 8, 8, 3)).astype("float32"), random.integers(0, 3, ROWS)


def _residual() -> Any:
    x = keras.Input((8, 8, 3), name="pixels")
    a = layers.Conv2D(6, 3, padding="same", activation="relu", name="a")(x)
    b = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, padding="same", name="b")(a))
    c = layers.Dropout(0.3, seed=1, name="inner")(layers.Add(name="sum")([a, b]))
    d = layers.Conv2D(6, 3, padding="same", activation="relu", name="c")(c)
    e = layers.Add(name="sum2")([c, d])
    f = layers.Dropout(0.3, seed=2, name="outer")(layers.GlobalAveragePooling2D(name="pool")(e))
    return keras.Model(x, layers.Dense(3, activation="softmax", name="head")(f))


def _nested() -> Any:
    inner = _residual()
    base = keras.Model(inner.input, inner.get_layer("pool").output, name="base")
    x = keras.Input((8, 8, 3))
    return keras.Model(x, layers.Dense(3, activation="softmax", name="head")(layers.Dropout(0.3, seed=3)(base(x))))


def _stacked() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(5, 3, activation="relu", name="a"),
            layers.Conv2D(5, 3, activation="relu", name="b"),
            layers.Flatten(),
            layers.Dropout(0.3, seed=3),
            layers.Dense(3, activation="softmax", name="head"),
        ]
    )


def _sharing() -> Any:
    x = keras.Input((8, 8, 3))
    shared = layers.Conv2D(3, 3, padding="same", activation="relu", name="shared")
    b = layers.Conv2D(3, 3, padding="same", activation="relu", name="b")(shared(x))
    return keras.Model(x, layers.Dense(3, activation="softmax", name="head")(layers.GlobalMaxPooling2D()(shared(b))))


_MODELS = {"residual": _residual, "nested": _nested, "sequential": _stacked, "shared": _sharing}


def _started(kind: str) -> Any:
    keras.utils.set_random_seed(11)
    model = _MODELS[kind]()
    for index, weight in enumerate(model.weights):
        if "moving" in weight.path:  # statistics that are no longer the initial ones, and so are kept
            weight.assign(np.random.default_rng(index).uniform(0.5, 1.5, weight.shape).astype("float32"))
    return model


def _state(model: Any) -> list[Any]:
    return [variable.numpy() for variable in model.variables]


def _both(kind: str, plan: tk.FineTuner, data: Any, **arguments: Any) -> tuple[Any, Any]:
    runs = []
    for setting in (True, False):
        model = _started(kind)
        run = plan.cache(setting).fit(model, data, seed=3, verbose=0, batch_size=16, **arguments)
        runs.append((run, _state(model), [v.numpy() for v in model.optimizer.variables]))
    (cached, weights, slots), (full, expected, expected_slots) = runs
    assert cached.history == full.history
    assert all(np.array_equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(slots, expected_slots, strict=True))
    assert all(phase.frozen == "computed in full, as the plan says" for phase in full.phases)
    return cached, full


#: What the others show too.
_LONG = {"nested", "sequential", "ema", "l2_sp", "smoothing", "stopping"}


def _cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in _LONG else name for name in names]


@pytest.mark.parametrize("kind", _cases(_MODELS))
def test_a_cached_run_is_the_run_in_full_to_the_bit(kind: str) -> None:
    plan = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2)
        .phase("more", train=tk.Layers.head() | tk.Layers.named("b"), epochs=2)
    )
    x, y = _problem()
    with same_kernels():
        cached, _ = _both(kind, plan, (x, y), validation_data=(x[:20], y[:20]), class_weight={0: 2.0, 1: 1.0, 2: 0.5})
    assert "layers computed once, up to" in cached.phases[0].frozen
    assert "70 rows computed in" in cached.phases[0].frozen


@pytest.mark.parametrize("extra", _cases(["several", "ema", "swa", "l2_sp", "smoothing", "stopping"]))
def test_what_else_a_plan_does_is_done_on_features_too(extra: str) -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3, learning_rate=1e-2)
    plan = {
        "several": lambda: plan.ema(0.9).l2_sp(1e-2).label_smoothing(0.1).early_stopping(0),
        "ema": lambda: plan.ema(0.9),
        "swa": lambda: plan.swa(0.5),
        "l2_sp": lambda: plan.l2_sp(1e-2),
        "smoothing": lambda: plan.label_smoothing(0.1),
        "stopping": lambda: plan.early_stopping(0),
    }[extra]()
    _both("residual", plan, _problem(), validation_data=0.2)


def test_callbacks_and_validation_data_in_batches() -> None:
    told: list[Any] = []

    class Ear(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            told.append((batch, sorted(logs)))

    x, y = _problem()
    validation = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    _both(
        "residual",
        tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2),
        (x, y),
        callbacks=[Ear()],
        validation_data=validation,
    )
    half = len(told) // 2
    assert told[:half] == told[half:]
    assert half == 2 * 5


def test_features_are_kept_in_the_folder_of_the_plan(tmp_path: Path) -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2).cache(tmp_path / "features")
    runs = [plan.fit(_started("residual"), _problem(), validation_data=0.2, seed=seed, verbose=0) for seed in (1, 1)]
    assert "rows computed in" in runs[0].phases[0].frozen
    assert "rows found in" in runs[1].phases[0].frozen
    assert runs[0].history == runs[1].history


def test_data_in_batches_is_cached_when_the_plan_says_so() -> None:
    x, y = _problem()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2)
    one, other = _started("residual"), _started("residual")
    run = plan.cache(True).fit(one, dataset, seed=3, verbose=0)
    said = "; trained in batches of 16 like the data's own, their rows in an order of each epoch"
    assert run.phases[0].frozen.endswith(said)
    plan.cache(False).fit(other, (x, y), seed=3, batch_size=16, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(_state(one), _state(other), strict=True))
    run = plan.fit(_started("residual"), dataset, seed=3, verbose=0)
    assert (
        run.phases[0].frozen == "computed in full: the data comes in batches of its own; .cache(True) takes its rows one by one"
    )


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1), "computed in full: every layer trains"),
        (
            tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1).mixup().cache(True),
            "computed in full: the inputs of each batch are mixed, which features of single rows can't be",
        ),
        (
            tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1),
            "computed in full: one epoch computes everything once anyway",
        ),
        (
            tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2),
            "computed in full: so few rows and layers that computing them once saves nothing",
        ),
        (
            tk.FineTuner().phase("ends", train=tk.Layers.head() | tk.Layers.named("a"), epochs=2).cache(True),
            "computed in full: every way from the inputs starts with a layer that isn't constant (a: it trains)",
        ),
    ],
)
def test_a_phase_in_full_says_why(plan: tk.FineTuner, why: str) -> None:
    asked = "mixup" in repr(plan)  # what trains from the first layer on leaves nothing that could be computed once
    with _warned(f"{why}. The plan's .cache(True) can't be followed in it.") if asked else contextlib.nullcontext():
        run = plan.fit(_started("residual"), _problem(), seed=0, verbose=0)
    assert run.phases[0].frozen == why
    assert f"{why}." in str(run)


def test_describe_says_what_can_be_computed_once() -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2).phase("all", train=tk.Layers.all(), epochs=1)
    description = plan.describe(_started("residual"))
    lines = str(description).splitlines()
    assert "8 layers can be computed once, up to pool: 24 bytes a row." in lines
    assert lines[-1] == "Every layer is computed in every epoch."
    phases = description.to_dict()["phases"]
    assert phases[0]["computed_once"] == ["a", "b", "norm", "sum", "inner", "c", "sum2", "pool"]
    assert phases[1]["computed_once"] == []
    assert str(plan.cache(False).describe(_started("residual"))).endswith("as the plan says.")


def test_a_setting_that_is_none_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        tk.FineTuner().cache(3)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "Planning the feature cache.\n  found: 3, which is neither True, False nor a folder\n"
        '  to fix it: .cache(True), .cache(False) or .cache("folder", dtype="float16")'
    )


def test_the_setting_is_kept_as_text(tmp_path: Path) -> None:
    plan = tk.FineTuner().cache(tmp_path)
    assert tk.FineTuner.from_json(plan.to_json()) == plan == tk.FineTuner().cache(str(tmp_path))


def _augmented() -> Any:
    keras.utils.set_random_seed(11)
    x = keras.Input((8, 8, 3))
    a = layers.Conv2D(6, 3, activation="relu", name="a")(layers.RandomFlip(name="flip", seed=4)(x))
    return keras.Model(x, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D(name="pool")(a)))


def test_augmentation_before_the_frozen_part_is_said_and_views_are_offered() -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=4, learning_rate=1e-2)
    why = (
        "every way from the inputs starts with a layer that isn't constant (flip: it is random in training)"
        "; .cache(True, views=4) computes four versions of each row once"
    )
    model = _augmented()
    said = str(plan.cache(True).describe(model))
    assert said.endswith(f"Every layer is computed in every epoch, though the plan says .cache(True): {why}.")
    before: list[Any] = []

    class Begun(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            del logs
            before.extend(warning for warning in told if "can't be followed" in str(warning.message))

    with _warned(f"Phase 'head' is computed in full: {why}. The plan's .cache(True) can't be followed in it.") as told:
        run = plan.cache(True).fit(_augmented(), _problem(), seed=0, verbose=0, callbacks=[Begun()])
    assert run.phases[0].frozen == f"computed in full: {why}"
    assert [warning.filename for warning in before] == [__file__]
    plan = plan.cache(True, views=2)
    said = str(plan.describe(model))
    assert "can be computed once, up to pool: 24 bytes a row. For training in 2 views; the run says how far" in said
    run = plan.fit(model, _problem(), validation_data=0.2, seed=0, verbose=0)
    assert "56 rows × 2 views computed in" in run.phases[0].frozen
    # Validation is on rows as they are.
    again = plan.fit(_augmented(), _problem(), validation_data=0.2, seed=0, verbose=0)
    assert again.history == run.history


def test_noise_on_features_is_augmentation_of_training_alone() -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3, learning_rate=1e-2).cache(True)
    plain, none, some, again = (
        one.fit(_started("residual"), _problem(), validation_data=0.2, seed=0, verbose=0)
        for one in (plan, plan.cache(True, noise=0), plan.cache(True, noise=0.5), plan.cache(True, noise=0.5))
    )
    assert none.history == plain.history
    assert some.history != plain.history
    assert again.history == some.history
    assert some.phases[0].frozen.endswith("; trained with noise of 0.5 of each feature's standard deviation")


@pytest.mark.parametrize("setting", [{"dtype": "int8"}, {"dtype": "bfloat16"}, {"extraction": "folded"}])
def test_what_changes_the_numbers_is_told(setting: dict[str, Any]) -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3, learning_rate=1e-2)
    exact = plan.cache(True).fit(_started("residual"), _problem(), seed=0, verbose=0)
    near = plan.cache(True, **setting).fit(_started("residual"), _problem(), seed=0, verbose=0)
    assert np.allclose(near.history["loss"], exact.history["loss"], rtol=2e-2)
    words = "rounded by up to" if "dtype" in setting else "computed to within"
    assert words in near.phases[0].frozen or near.history == exact.history
    assert "of the largest" not in exact.phases[0].frozen


def test_what_has_no_part_in_a_phase_in_full_is_told() -> None:
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).cache(True, views=2, noise=0.1)
    run = plan.fit(_started("residual"), _problem(), seed=0, verbose=0)
    assert run.phases[0].frozen == (
        "computed in full: every layer trains; the plan's views and noise of features have no part in it"
    )


def test_dropout_of_frozen_layers_can_stay_on_as_keras_has_it() -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2).frozen_dropout()
    model = _started("residual")
    assert "up to sum" in str(plan.describe(model))
    with same_kernels():
        cached, _ = _both("residual", plan, _problem())
    assert "5 layers computed once" not in cached.phases[0].frozen
    assert "up to sum" in cached.phases[0].frozen
    off = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2).cache(True)
    assert off.fit(_started("residual"), _problem(), seed=3, batch_size=16, verbose=0).history != cached.history


def test_weights_that_train_in_between_are_computed_anew() -> None:
    head, low = tk.Layers.head(), tk.Layers.named("a") | tk.Layers.named("b") | tk.Layers.named("c")
    plan = (
        tk.FineTuner()
        .phase("one", train=head, epochs=1, learning_rate=1e-2)
        .phase("two", train=head, epochs=1, learning_rate=1e-2)
        .phase("all", train=head | low, epochs=1, learning_rate=1e-1)
        .phase("again", train=head, epochs=1, learning_rate=1e-2)
    )
    with same_kernels():
        _both("residual", plan, _problem())


class _OfLargeBatches(layers.Layer):
    """Takes something over the rows of a batch, but not of a small one."""

    def __init__(self, what: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.what = what

    def call(self, x: Any) -> Any:
        many = keras.ops.shape(x)[0] > 8
        return keras.ops.where(many, x - getattr(keras.ops, self.what)(x, axis=0, keepdims=True), x)


def _mixing(what: str) -> Any:
    keras.utils.set_random_seed(4)
    x = keras.Input((8, 8, 3))
    a = layers.Conv2D(6, 3, activation="relu", name="a")(x)
    b = _OfLargeBatches(what, name="odd")(layers.GlobalAveragePooling2D(name="pool")(a))
    return keras.Model(x, layers.Dense(3, name="head")(layers.Dropout(0.2, seed=3)(b)))


@pytest.mark.parametrize("what", ["mean", "max", "min", "median"])
def test_a_layer_that_takes_something_over_large_batches_only_is_found_out(what: str) -> None:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3, learning_rate=1e-2)
    model, wanted = _mixing(what), _mixing(what)
    full = plan.cache(False).fit(wanted, _problem(), seed=0, verbose=0)
    why = "what the frozen part gives for a row depends on the rows beside it, in a block of 80"
    with _warned(f"Phase 'head' is computed in full: {why}. The plan's .cache(True) can't be followed in it."):
        run = plan.cache(True).fit(model, _problem(), seed=0, verbose=0)
    assert run.phases[0].frozen == f"computed in full: {why}"
    assert run.history == full.history
    for one, other in zip(model.weights, wanted.weights, strict=True):
        assert np.array_equal(one, other)


def test_features_of_rows_that_depend_on_each_other_are_refused() -> None:
    model = _mixing("mean")
    model.get_layer("a").trainable = False
    made = split(model)
    with pytest.raises(ModelError) as caught:
        compute(made.prefix, _problem())
    assert str(caught.value) == (
        "Computing the frozen part of a model once for every row.\n"
        "  found: what the frozen part gives for a row depends on the rows beside it, in a block of 80\n"
        "  likely cause: a layer takes something over its whole batch, which in training is another in each epoch\n"
        "  to fix it: .cache(False), or a layer that treats each row for itself"
    )


def test_rows_of_a_layer_of_the_users_that_are_each_for_themselves_stay_so(tmp_path: Path) -> None:
    x = keras.Input((8, 8, 3))
    a = layers.Lambda(lambda t: keras.ops.tanh(t) * 2.0, output_shape=(8, 8, 3), name="mine")(x)
    b = layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(6, 3, name="a")(a))
    model = keras.Model(x, layers.Dense(3, name="head")(b))
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2)
    assert "computed once, up to pool" in plan.cache(True).fit(model, _problem(), seed=0, verbose=0).phases[0].frozen
    said = plan.cache(tmp_path).fit(model, _problem(), seed=0, verbose=0).phases[0].frozen
    assert said.endswith("; not kept in the folder, because code that isn't Keras's can't be told by its content")
    assert not list(tmp_path.iterdir())


def _by_place(t: Any) -> Any:
    return keras.ops.where(keras.ops.arange(keras.ops.shape(t)[0])[:, None] == 31, t * 2.0, t)


#: What layers do with rows, found out by batches like training's alone: 80 rows are a block, of 200 the last batch has 8.
_ODD: dict[str, Any] = {
    "batches of 32": lambda t: tf.cond(tf.equal(tf.shape(t)[0], 32), lambda: t - tf.reduce_mean(t, 0, keepdims=True), lambda: t),
    "the last batch": lambda t: tf.cond(tf.equal(tf.shape(t)[0], 8), lambda: t * 2.0, lambda: t),
    "one place": _by_place,
    "places from 64 on": lambda t: tf.concat([t[:64], t[64:] * 2.0], 0),
    "groups of 32": lambda t: tf.reshape(tf.reshape(t, (-1, 32, 6)) * 2.0, (-1, 6)),
}


class _Odd(layers.Layer):
    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind

    def call(self, x: Any) -> Any:
        return _ODD[self.kind](x)

    def compute_output_spec(self, x: Any) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)


@pytest.mark.parametrize("kind", _ODD)
def test_a_layer_that_minds_the_size_of_its_batch_or_a_rows_place_is_computed_in_full(kind: str) -> None:
    rows = 192 if kind == "groups of 32" else 200
    random = np.random.default_rng(0)
    data = random.normal(size=(rows, 8, 8, 3)).astype("float32"), random.integers(0, 3, rows)
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=3, learning_rate=1e-2)
    runs, models = [], []
    for cache in (False, True):
        keras.utils.set_random_seed(4)
        x = keras.Input((8, 8, 3))
        a = layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(6, 3, name="a")(x))
        b = layers.Dense(5, name="b")(_Odd(kind, name="odd")(a))
        models.append(keras.Model(x, layers.Dense(3, name="head")(b)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            runs.append(plan.cache(cache).fit(models[-1], data, seed=0, verbose=0))
    if kind == "groups of 32":  # found out on three rows, so what lies before it is computed once
        assert "computed once, up to pool" in runs[1].phases[0].frozen
    else:
        assert runs[1].phases[0].frozen.startswith("computed in full: what the frozen part gives for a row")
    for one, other in zip(*(model.get_layer("head").get_weights() for model in models), strict=True):
        assert np.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_layer_that_cant_take_a_block_is_computed_in_full() -> None:
    def groups(t: Any) -> Any:
        return tf.reshape(tf.reshape(t, (-1, 32, 6)) * 2.0, (-1, 6)) if t.shape[0] != 3 and t.shape[0] != 2 else t * 2.0

    x = keras.Input((8, 8, 3))
    a = layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(6, 3, name="a")(x))
    b = layers.Lambda(groups, output_shape=(6,), name="odd")(a)
    model = keras.Model(x, layers.Dense(3, name="head")(layers.Dense(4, name="b")(b)))
    random = np.random.default_rng(0)
    data = random.normal(size=(160, 8, 8, 3)).astype("float32"), random.integers(0, 3, 160)
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2).cache(True)
    why = "computed in full: the frozen part can't be computed in blocks of 80 rows (ValueError)"
    with _warned(f"{why}. The plan's .cache(True) can't be followed in it."):
        run = plan.fit(model, data, seed=0, verbose=0)
    assert run.phases[0].frozen == why


@pytest.mark.parametrize("cache", [True, False])
def test_several_inputs_may_come_in_a_list(cache: bool) -> None:
    random = np.random.default_rng(0)
    given = [random.normal(size=(40, 8, 8, 3)).astype("float32"), random.normal(size=(40, 5)).astype("float32")]
    found = []
    for x in (given, tuple(given)):
        keras.utils.set_random_seed(4)
        one, other = keras.Input((8, 8, 3)), keras.Input((5,))
        a = layers.Concatenate()([layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3)(one)), other])
        model = keras.Model([one, other], layers.Dense(3, name="head")(a))
        plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2).cache(cache)
        found.append(plan.fit(model, (x, np.arange(40) % 3), validation_data=0.2, seed=0, verbose=0).history)
    assert found[0] == found[1]
