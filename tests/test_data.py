"""Data of every form, in order; Keras's own reading of image folders is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk
from transferkit import errors
from transferkit.data import Batch, batches


def pictures(root: Path) -> Path:
    random = np.random.default_rng(0)
    for name, count in (("bees", 3), ("ants", 4)):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
            (root / name / f"{index}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    return root


def rows_seen(data: Any) -> list[int]:
    return [int(row) for batch in batches(data, batch_size=4) for row in np.asarray(batch.x)[:, 0]]


class Three(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore]
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return np.arange(4 * index, min(4 * index + 4, 10))[:, None], np.zeros(min(4, 10 - 4 * index))


X = np.arange(10)[:, None]


@pytest.mark.parametrize(
    "data",
    [
        (X, np.zeros(10)),
        [tf.constant(X), tf.zeros(10)],
        (X,),
        tf.data.Dataset.from_tensor_slices((X, np.zeros(10))).batch(3),
        Three(),
        [(X[:6], np.zeros(6)), (X[6:], np.zeros(4))],
        tk.Data.arrays(X, np.zeros(10)),
    ],
    ids=["tuple", "tensors", "x only", "tf.data", "PyDataset", "list of batches", "Data"],
)
def test_every_row_once_and_in_order(data: Any) -> None:
    assert rows_seen(data) == list(range(10))


def test_inputs_stay_beside_their_labels_in_a_shuffled_data_set() -> None:
    shuffled = tf.data.Dataset.from_tensor_slices((X, X[:, 0] * 10)).shuffle(10).batch(3)
    for batch in batches(shuffled):
        np.testing.assert_array_equal(batch.x[:, 0] * 10, batch.y)


def test_nested_inputs_and_weights() -> None:
    data = ({"a": X, "b": (X, X)}, X[:, 0], np.ones(10))
    first = next(batches(data, batch_size=3))
    assert isinstance(first, Batch)
    assert first.x["b"][1].shape == (3, 1)
    assert first.sample_weight.tolist() == [1, 1, 1]


def test_an_image_folder_is_what_keras_reads(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos")
    data = tk.Data.image_folder(folder, size=(16, 12))
    assert data.class_names == ("ants", "bees")
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    expected = keras.utils.image_dataset_from_directory(folder, image_size=(16, 12), shuffle=False, verbose=False)
    x = np.concatenate([batch.x for batch in batches(data, batch_size=2)])
    np.testing.assert_array_equal(x, np.concatenate([images for images, _ in expected]))
    assert repr(data) == f"<Data.image_folder({str(folder)!r}): 7 rows, 2 classes>"


def test_a_folder_of_pictures_trains_and_is_evaluated(tmp_path: Path) -> None:
    data = tk.Data.image_folder(pictures(tmp_path / "photos"), size=(16, 16))
    model = tk.ModelBuilder((16, 16, 3)).conv(2).pool().classifier(data.class_names).build(seed=0)
    run = (
        tk.FineTuner()
        .phase("all", train=tk.Layers.all(), epochs=2)
        .fit(model, data, validation_data=0.3, batch_size=2, verbose=0)
    )
    assert len(run.history["val_loss"]) == 2
    result = tk.Evaluator("accuracy").run(model, data)
    assert 0 <= float(result["accuracy"]) <= 1
    mistakes = result.mistakes(inputs=data)
    assert mistakes.files == tuple(data.files[row] for row in mistakes.index)
    assert all(Path(path).parent.name == label for path, label in zip(mistakes.files, mistakes.labels, strict=True))
    assert [row["files"] for row in mistakes.records()] == mistakes.to_dict().get("files", []) == list(mistakes.files)
    assert all(path in str(mistakes) for path in mistakes.files)


@pytest.mark.parametrize("entry", ["fit", "run", "arrays"])
def test_lists_and_tables_are_told_what_they_are(entry: str) -> None:
    class DataFrame:
        """As far as a table of pandas is asked."""

        shape = (2, 3)

        def to_numpy(self) -> Any:
            return np.zeros((2, 3))

    model = tk.ModelBuilder((3,)).classifier(2).build(seed=0)
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1)
    entries: dict[str, Callable[[Any], Any]] = {
        "fit": lambda data: plan.fit(model, data, verbose=0),
        "run": lambda data: tk.Evaluator("accuracy").run(model, data),
        "arrays": lambda data: tk.Data.arrays(*data),
    }
    take = entries[entry]
    with pytest.raises(errors.DataError) as caught:
        take((DataFrame(), [0, 1]))
    assert caught.value.found == ("x as a DataFrame", "y as a list of int")
    assert caught.value.fix == 'x.to_numpy("float32"); np.asarray(y)'
    with pytest.raises(errors.DataError, match="x as a list of float"):
        take(([[0.0, 1.0, 2.0]], np.array([0])))
    with pytest.raises(errors.DataError, match="x as an array of objects") as caught:
        take((np.array([[1, 2.0, True]], dtype=object), np.array([0])))
    assert caught.value.fix == 'x.astype("float32")'
    with pytest.raises(errors.DataError) as caught:
        take((np.zeros(3, "float32"), np.array(0)))
    assert caught.value.fix == "put it into a batch of one: x[None], y[None]"


def test_files_stay_with_their_rows(tmp_path: Path) -> None:
    data = tk.Data.image_folder(pictures(tmp_path / "photos"), size=(8, 8))
    assert [Path(path).parent.name for path in data.files] == [data.class_names[label] for label in data.labels]
    chosen = data.take(np.array([5, 0, 5]))
    assert chosen.files == tuple(data.files[row] for row in (5, 0, 5))
    assert tk.Data.concat(chosen, data).map(lambda x: x).files == chosen.files + data.files
    arrays = tk.Data.arrays(np.zeros((2, 8, 8, 3)), np.array([0, 1]), class_names=data.class_names)
    assert arrays.files == tk.Data.concat(arrays, data).files == ()


def test_take_and_split_say_which_rows_they_give() -> None:
    data = tk.Data.arrays(X, np.repeat([0, 1], 5), class_names=["a", "b"])
    assert rows_seen(data.take(np.array([3, 1, 8]))) == [3, 1, 8]
    rest, part = data.split(0.4, seed=0)
    assert np.bincount(part.labels).tolist() == [2, 2]
    assert sorted(rows_seen(rest) + rows_seen(part)) == list(range(10))
    assert rest.class_names == ("a", "b")


def test_a_fingerprint_follows_content_and_order() -> None:
    prints = [
        tk.Data.arrays(x, y).fingerprint()
        for x, y in ((X, X), (X.copy(), X.copy()), (X[::-1], X[::-1]), (X.astype("float32"), X), (X, None))
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_damaged_pictures_are_all_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos")
    (folder / "ants" / "1.png").write_bytes(b"")
    (folder / "bees" / "0.png").write_bytes((folder / "bees" / "0.png").read_bytes()[:40])
    with pytest.raises(errors.DataError) as caught:
        list(batches(tk.Data.image_folder(folder, size=(8, 8)), batch_size=8))
    assert str(folder / "ants" / "1.png") in str(caught.value)
    assert str(folder / "bees" / "0.png") in str(caught.value)
    assert len(caught.value.found) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "none", "no such folder"),
        (lambda root: root, "no folder in it"),
        (lambda root: ((root / "p" / "empty").mkdir(parents=True), root / "p")[1], "no picture in 'empty'"),
    ],
)
def test_folders_that_hold_no_pictures(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(errors.DataError) as caught:
        tk.Data.image_folder(make(tmp_path), size=(8, 8))
    assert caught.value.found == (message,)


@pytest.mark.parametrize("data", [X, "text", 3, {"x": X}])
def test_what_is_no_data_is_told(data: Any) -> None:
    with pytest.raises(errors.DataError) as caught:
        list(batches(data))
    assert "data comes as (x, y) of arrays, a tf.data.Dataset, a PyDataset or an iterable of batches" in str(caught.value)


def test_data_sets_are_put_together_by_the_names_of_their_classes() -> None:
    mine = tk.Data.arrays(X[:4], np.array([0, 1, 0, 1]), class_names=["cat", "dog"])
    theirs = tk.Data.arrays(X[4:7], np.array([0, 1, 1]), class_names=["dog", "fox"])
    both = tk.Data.concat(mine, theirs, mine)
    assert both.class_names == ("cat", "dog", "fox")
    assert both.labels.tolist() == [0, 1, 0, 1, 1, 2, 2, 0, 1, 0, 1]
    assert rows_seen(both) == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    mixed = both.rows(np.array([9, 5, 0, 4, 5]))
    assert (mixed.x[:, 0].tolist(), mixed.y.tolist()) == ([2, 5, 0, 4, 5], [0, 2, 0, 1, 2])
    assert len(both) == 11
    rest, part = both.split(0.3, seed=0)
    assert sorted(rows_seen(rest) + rows_seen(part)) == sorted(rows_seen(both))


def test_data_sets_that_do_not_go_together() -> None:
    with pytest.raises(errors.DataError) as caught:
        tk.Data.concat(
            tk.Data.arrays(X, X[:, 0] % 2, class_names=["a", "b"]), tk.Data.arrays(np.zeros((3, 2)), sample_weight=np.ones(3))
        )
    assert caught.value.found == (
        "class names on some and not on others",
        "labels on some and not on others",
        "sample weights on some and not on others",
        "rows of different shapes: [(1,)], [(2,)]",
    )


def test_balanced_data_has_every_row_and_every_class_alike() -> None:
    data = tk.Data.arrays(X, np.array([0] * 6 + [1] * 3 + [2]))
    even = data.balanced(seed=0)
    assert np.bincount(even.labels).tolist() == [6, 6, 6]
    assert set(rows_seen(even)) == set(range(10))
    assert rows_seen(even) == rows_seen(data.balanced(seed=0))
    assert np.bincount(data.balanced(seed=0, each=4).labels).tolist() == [4, 4, 4]
    weights = data.class_weights()
    assert weights == {0: 10 / 18, 1: 10 / 9, 2: 10 / 3}
    assert sum(weights[label] for label in data.labels.tolist()) == pytest.approx(10)
    with pytest.raises(errors.DataError, match="rows without one class each"):
        tk.Data.arrays(X, X[:, 0] / 3).balanced(seed=0)
    with pytest.raises(errors.PlanError, match="each=0"):
        data.balanced(seed=0, each=0)


def test_mapped_data_is_read_through_the_function() -> None:
    data = tk.Data.arrays(X, X[:, 0] % 2, sample_weight=np.ones(10)).map(lambda x: x * 10)
    batch = data.take(np.array([2, 5])).rows(np.array([1, 0]))
    assert (batch.x.tolist(), batch.y.tolist(), batch.sample_weight.tolist()) == ([[50], [20]], [1, 0], [1, 1])
    assert data.fingerprint() != tk.Data.arrays(X, X[:, 0] % 2, sample_weight=np.ones(10)).fingerprint()
