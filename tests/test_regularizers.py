"""Label smoothing against Keras's own on one-hot labels; losses for soft labels; which variable L2-SP pulls where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transferkit._keras import keras
from transferkit.errors import DataError
from transferkit.tuning.optimizers import Penalty
from transferkit.tuning.regularizers import SmoothedSparseCrossentropy, l2_sp_penalty, smoothed, soft_loss

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, 16)
LOGITS = RNG.normal(size=(16, 4)).astype("float32")
WEIGHTS = RNG.random(16).astype("float32")


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("column", [True, False])
def test_smoothed_sparse_labels_are_keras_smoothed_one_hot_labels(from_logits: bool, column: bool) -> None:
    predictions = LOGITS if from_logits else np.asarray(keras.ops.softmax(LOGITS))
    keras_own = keras.losses.CategoricalCrossentropy(from_logits=from_logits, label_smoothing=0.2)
    expected = float(keras_own(np.eye(4)[LABELS], predictions, sample_weight=WEIGHTS))
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    ours = smoothed(sparse, 0.2)
    assert isinstance(ours, SmoothedSparseCrossentropy)
    assert float(ours(LABELS[:, None] if column else LABELS, predictions, sample_weight=WEIGHTS)) == pytest.approx(
        expected, rel=1e-6
    )
    none = float(smoothed(sparse, 0.0)(LABELS, predictions))
    assert none == pytest.approx(float(sparse(LABELS, predictions)), rel=1e-5)


def test_one_hot_and_binary_losses_take_keras_own_smoothing() -> None:
    categorical = smoothed("categorical_crossentropy", 0.1)
    assert (type(categorical), categorical.label_smoothing) == (keras.losses.CategoricalCrossentropy, 0.1)
    binary = smoothed({"a": keras.losses.BinaryCrossentropy(from_logits=True)}, 0.1)["a"]
    assert (binary.from_logits, binary.label_smoothing) == (True, 0.1)


def test_a_soft_loss_is_the_sparse_one_on_one_hot_labels() -> None:
    for sparse in (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        SmoothedSparseCrossentropy(0.1, from_logits=True),
    ):
        soft = soft_loss(sparse)
        assert float(soft(np.eye(4)[LABELS], LOGITS)) == pytest.approx(float(sparse(LABELS, LOGITS)), rel=1e-6)


def test_the_smoothed_loss_is_saved_with_its_model(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    model.compile("sgd", SmoothedSparseCrossentropy(0.3, from_logits=True))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate(LOGITS, LABELS, verbose=0) == pytest.approx(model.evaluate(LOGITS, LABELS, verbose=0))
    assert again.loss.smoothing == 0.3


def test_a_loss_without_classes_cannot_be_smoothed() -> None:
    with pytest.raises(DataError) as caught:
        smoothed("mse", 0.1)
    assert str(caught.value) == (
        "Training with label smoothing.\n"
        "  found: the loss 'mse', which is no cross-entropy over classes\n"
        "  likely cause: it needs labels that are probabilities of classes\n"
        "  to fix it: leave it out of the plan, or give a cross-entropy of Keras's as loss"
    )

    def own(y: Any, p: Any) -> Any:
        return keras.ops.mean(keras.ops.abs(y - p))

    with pytest.raises(DataError, match="found: the loss 'own'"):
        soft_loss(own)


def test_l2_sp_pulls_the_head_to_zero_and_the_rest_to_the_start() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2), keras.layers.Softmax()])
    penalty = l2_sp_penalty(model, strength=0.1, head=0.01)
    assert [penalty(variable) for variable in model.trainable_variables] == [Penalty(0.1, to_start=True)] * 2 + [
        Penalty(0.01)
    ] * 2
