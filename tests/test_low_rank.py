"""LoRA: training moves kernels within a low rank, from the loaded weights, and leaves a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit import errors

LAYERS = keras.layers
BODY = tk.Layers.all() - tk.Layers.head()


def network() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            LAYERS.Conv2D(6, 3, activation="relu", name="conv"),
            LAYERS.Flatten(),
            LAYERS.Dense(12, "relu", name="body"),
            LAYERS.Dense(3, name="head"),
        ]
    )


def attentive() -> Any:
    keras.utils.set_random_seed(0)
    words = keras.Input((6,), dtype="int32")
    x = LAYERS.Embedding(20, 16, name="words")(words)
    x = LAYERS.MultiHeadAttention(2, 8, name="attention")(x, x)
    x = LAYERS.EinsumDense("abc,cd->abd", (None, 10), bias_axes="d", name="einsum")(x)
    return keras.Model(words, LAYERS.Dense(3, name="head")(LAYERS.GlobalAveragePooling1D()(x)))


def data(model: Any) -> Any:
    random = np.random.default_rng(0)
    y = np.arange(48) % 3
    if len(model.input_shape) == 2:
        return (random.integers(0, 20, (48, 6)) // 3 + 6 * y[:, None]).astype("int32"), y
    return (random.normal(size=(48, 8, 8, 3)) + y[:, None, None, None]).astype("float32"), y


def plan(**arguments: Any) -> tk.FineTuner:
    return tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=4, learning_rate=1e-2).lora(**arguments)


def moved_rank(before: Any, after: Any) -> int:
    change = np.asarray(after, "float64") - np.asarray(before, "float64")
    values = np.linalg.svd(change.reshape(-1, change.shape[-1]), compute_uv=False)
    return int(np.sum(values > 1e-5 * values[0])) if values[0] > 0 else 0


@pytest.mark.parametrize("make", [network, attentive])
def test_kernels_move_within_the_rank_and_the_model_is_plain_again(make: Any, tmp_path: Path) -> None:
    model = make()
    rows, y = data(model)
    before = {weight.path: np.array(weight) for weight in model.weights}
    names = [weight.path for weight in model.weights]
    run = plan(rank=2).fit(model, (rows, y), seed=0, verbose=0)
    assert run.history["loss"][-1] < run.history["loss"][0]
    assert [weight.path for weight in model.weights] == names
    assert [weight.path for weight in model.trainable_weights] == names
    kernels = [w for w in model.weights if len(w.shape) > 1 and "bias" not in w.name and "head" not in w.path]
    assert len(kernels) > 1
    for kernel in kernels:
        assert moved_rank(before[kernel.path], kernel) == 2, kernel.path
    assert moved_rank(before[model.layers[-1].kernel.path], model.layers[-1].kernel) > 2, "the head trains in full"
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(rows, verbose=0), model.predict(rows, verbose=0))
    assert not any(layer.get_config().get("lora_rank") for layer in again.layers)
    assert model.fit(rows, y, verbose=0).history["loss"][0] < run.history["loss"][0], "plain Keras goes on with it"


def test_it_trains_as_keras_own_lora_does() -> None:
    ours, theirs = network(), network()
    rows, y = data(ours)
    seed = 3
    train = tk.Layers.named("body")
    tuner = tk.FineTuner().phase("body", train=train, epochs=1, learning_rate=0.05).optimizer("sgd").lora(2, layers=train)
    tuner.cache(False).fit(ours, (rows, y), batch_size=48, seed=seed, verbose=0)
    body = theirs.get_layer("body")
    for layer in theirs.layers:
        layer.trainable = layer is body
    keras.utils.set_random_seed(seed)
    body.enable_lora(2)
    theirs.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    theirs.fit(rows, y, batch_size=48, shuffle=False, verbose=0)
    np.testing.assert_allclose(ours.predict(rows, verbose=0), theirs.predict(rows, verbose=0), rtol=1e-5, atol=1e-6)


def test_factors_have_a_rate_of_their_own_and_each_phase_its_own_factors() -> None:
    model = network()
    before = np.array(model.get_layer("body").kernel)
    still = plan(rank=2, times=1e-9)
    still.fit(model, data(model), seed=0, verbose=0)
    np.testing.assert_allclose(model.get_layer("body").kernel, before, atol=1e-6)
    assert np.abs(np.array(model.get_layer("body").bias)).max() > 1e-3, "what has no factors trains at the full rate"
    two = plan(rank=1).phase("more", train=tk.Layers.all(), epochs=2, learning_rate=1e-2)
    start = np.array(model.get_layer("body").kernel)
    two.fit(model, data(model), seed=0, verbose=0)
    assert moved_rank(start, model.get_layer("body").kernel) == 2, "one of each phase"


def test_describe_counts_the_factors() -> None:
    model = network()
    description = plan(rank=2).describe(model)
    body = next(row for row in description.phases[0].layers if row.path == "body")
    assert body.trained_parameters == 2 * (216 + 12) + 12
    assert "trained by factors of rank 2" in str(description)
    assert not model.get_layer("body").lora_enabled


def test_a_kernel_below_its_factors_must_not_move() -> None:
    class Meddler(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            del epoch, logs
            frozen = next(w for w in self.model.get_layer("body").weights if w.path.endswith("kernel"))
            frozen.assign(frozen + 1.0)

    model = network()
    with pytest.raises(errors.TrainingError) as caught:
        plan(rank=2).fit(model, data(model), callbacks=[Meddler()], seed=0, verbose=0)
    assert "the weights of 'body (below its factors)' changed all the same" in str(caught.value)
    assert not model.get_layer("body").lora_enabled, "the model is plain all the same"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: plan(rank=0), "rank=0; it must be a whole number above 0"),
        (lambda: plan(rank=2, times=0.0), "times=0.0; it must be a number above 0"),
        (lambda: plan(rank=2).l2_sp(0.1), "LoRA in the same plan, whose kernels don't move"),
        (lambda: tk.FineTuner().l2_sp(0.1).lora(2), "L2-SP in the same plan"),
    ],
)
def test_plans_that_make_no_sense_are_refused(make: Any, found: str) -> None:
    with pytest.raises(errors.PlanError) as caught:
        make()
    assert found in str(caught.value)


def test_a_model_without_a_layer_for_it_is_told() -> None:
    model = keras.Sequential([keras.Input((4,)), LAYERS.Dense(3, name="head")])
    with pytest.raises(errors.ModelError) as caught:
        plan(rank=2).describe(model)
    assert "no layer that trains, is meant and can" in str(caught.value)


def test_the_plan_is_a_value() -> None:
    one = plan(rank=2, layers=tk.Layers.named("body"))
    assert tk.FineTuner.from_json(one.to_json()) == one
    assert "LoRA, Hu et al. 2022" in str(one.explain())
