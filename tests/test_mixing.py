"""Mixup and CutMix: labels in proportion to what was blended, the same batch for the same numbers, any kind of data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from transferkit._keras import keras, tf
from transferkit.errors import DataError
from transferkit.tuning.mixing import mix_batch, mixed, one_hot_labels

Array = Any


def images(rows: int = 8, classes: int = 8) -> tuple[Array, Array]:
    """One colour and one class for each row, so that what was blended can be read off."""
    x = np.arange(rows, dtype="float32")[:, None, None, None] * np.ones((1, 12, 10, 3), "float32")
    return x, np.eye(classes, dtype="float32")[np.arange(rows) % classes]


@pytest.mark.parametrize("batch", range(5))
def test_mixup_blends_labels_as_it_blends_rows(batch: int) -> None:
    x, y = images()
    new_x, new_y = (np.asarray(part) for part in mix_batch((x, y), kind="mixup", alpha=0.7, seed=1, epoch=0, batch=batch))
    np.testing.assert_allclose(new_y.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(new_x[:, 0, 0, 0], new_y @ np.arange(8), rtol=1e-5, atol=1e-6)
    shares = new_y[np.arange(8), np.arange(8)]
    mixed_rows = shares < 1 - 1e-6
    assert len(np.unique(np.round(shares[mixed_rows], 5))) <= 1, "one λ for the batch"


@pytest.mark.parametrize("batch", range(5))
def test_cutmix_labels_are_the_shares_of_pixels(batch: int) -> None:
    x, y = images()
    new_x, new_y = (np.asarray(part) for part in mix_batch((x, y), kind="cutmix", alpha=1.0, seed=3, epoch=1, batch=batch))
    assert set(np.unique(new_x)) <= set(range(8)), "pixels are pasted, never blended"
    shares = np.stack([(new_x[:, :, :, 0] == value).mean((1, 2)) for value in range(8)], axis=1)
    np.testing.assert_allclose(new_y, shares, atol=1e-6)


def test_lambda_is_beta_distributed() -> None:
    x, y = np.array([[0.0], [1.0]], "float32"), np.eye(2, dtype="float32")
    drawn = []
    for batch in range(400):
        new_x = np.asarray(mix_batch((x, y), kind="mixup", alpha=0.4, seed=0, epoch=0, batch=batch)[0])
        if new_x[0, 0] != 0.0:  # the rows were paired with each other
            drawn.append(float(new_x[1, 0]))
    assert stats.kstest(drawn, stats.beta(0.4, 0.4).cdf).pvalue > 0.001


def test_the_same_numbers_give_the_same_batch_and_others_another() -> None:
    x, y = images()

    def at(**numbers: int) -> Array:
        settings = {"seed": 5, "epoch": 2, "batch": 3, **numbers}
        return np.asarray(mix_batch((x, y), kind="mixup", alpha=1.0, **settings)[0])

    assert np.array_equal(at(), at())
    for change in ({"seed": 6}, {"epoch": 3}, {"batch": 4}, {"seed": 5 + 2**40}):
        assert not np.array_equal(at(), at(**change)), change


class Sequence(keras.utils.PyDataset):
    def __init__(self, x: Array, y: Array) -> None:
        super().__init__()
        self.x, self.y = x, y

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        rows = slice(4 * index, 4 * index + 4)
        return self.x[rows], self.y[rows]


def test_every_kind_of_data_is_mixed_alike_and_anew_in_each_epoch() -> None:
    x, y = images()
    epoch = 0
    kinds = {
        "tf.data": tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
        "PyDataset": Sequence(x, y),
        "list": [(x[:4], y[:4]), (x[4:], y[4:])],
    }
    seen: dict[str, list[Array]] = {}
    sources = {name: mixed(data, kind="mixup", alpha=1.0, seed=9, epoch=lambda: epoch) for name, data in kinds.items()}
    for number in (0, 1):
        epoch = number
        for name, source in sources.items():
            passes = [source[i] for i in range(2)] if name == "PyDataset" else list(source)
            seen.setdefault(name, []).append(np.concatenate([np.asarray(batch[0]) for batch in passes]))
    assert int(sources["tf.data"].cardinality()) == 2
    for number in (0, 1):
        np.testing.assert_allclose(seen["tf.data"][number], seen["list"][number], rtol=1e-6)
        np.testing.assert_allclose(seen["PyDataset"][number], seen["list"][number], rtol=1e-6)
    assert not np.allclose(seen["list"][0], seen["list"][1])


def test_sample_weights_and_several_inputs_go_along() -> None:
    x, y = images()
    weights = np.arange(8, dtype="float32")
    new_x, new_y, new_w = mix_batch(({"a": x, "b": 2 * x}, y, weights), kind="mixup", alpha=1.0, seed=0, epoch=0, batch=0)
    np.testing.assert_allclose(2 * np.asarray(new_x["a"]), np.asarray(new_x["b"]), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(new_w), np.asarray(new_y) @ weights, rtol=1e-5, atol=1e-6)


def test_labels_become_one_hot_in_any_kind_of_data() -> None:
    x = np.zeros((4, 2), "float32")
    for labels in (np.array([0, 2, 1, 2]), np.array([[0], [2], [1], [2]])):
        for data in ((x, labels), iter([(x, labels)]), tf.data.Dataset.from_tensors((x, labels))):
            out = one_hot_labels(data, 3)
            parts = out if isinstance(out, tuple) else next(iter(out))
            assert np.array_equal(np.asarray(parts[1]), np.eye(3)[[0, 2, 1, 2]])


def test_what_cannot_be_mixed_is_an_error() -> None:
    tokens, y = np.zeros((4, 5), "int32"), np.eye(4, dtype="float32")
    with pytest.raises(DataError) as caught:
        mix_batch((tokens, y), kind="mixup", alpha=1.0, seed=0, epoch=0, batch=0)
    assert str(caught.value) == (
        "Mixing batches by mixup.\n"
        "  found: inputs of type int32, which can't be blended\n"
        "  likely cause: mixup blends numbers, CutMix pastes parts of images; token numbers and categories are neither\n"
        "  to fix it: leave it out of the plan, or give float inputs"
    )
    with pytest.raises(DataError, match=r"inputs of shape \(4, 5\); images have \(rows, height, width, channels\)"):
        mix_batch((tokens, y), kind="cutmix", alpha=1.0, seed=0, epoch=0, batch=0)
