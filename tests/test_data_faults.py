"""Data that is wrong somewhere in the middle: the error says where, whatever form the data has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import transferkit as tk
from transferkit import errors

RANDOM = np.random.default_rng(0)
Change = Callable[[Any, Any], Any]


def network() -> Any:
    keras.utils.clear_session()
    return keras.Sequential([keras.Input((4,), name="in"), keras.layers.Dense(3, "softmax", name="head")])


def rows(count: int = 8) -> tuple[Any, Any]:
    return RANDOM.normal(size=(count, 4)).astype("float32"), np.arange(count) % 3


def wrong_in_batch_5(change: Change) -> list[Any]:
    """Eight batches, the one numbered 5 changed."""
    return [change(*rows()) if number == 5 else rows() for number in range(8)]


class Listed(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore]
    """A data set of the user's, which may fail as a disk does."""

    def __init__(self, items: list[Any], **options: Any) -> None:
        super().__init__(**options)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def generator(items: list[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def of_tensorflow(items: list[Any]) -> Any:
    spec = (tf.TensorSpec((None, 4), tf.float32), tf.TensorSpec((None,), tf.int64))
    return tf.data.Dataset.from_generator(lambda: iter(items), output_signature=spec)


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda items: items,
    "generator": generator,
    "PyDataset": lambda items: Listed(items, workers=2),
    "tf.data": of_tensorflow,
}


def fitted(data: Any, loss: Any = None, **options: Any) -> str:
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=options.pop("epochs", 1))
    model = network()
    with pytest.raises(errors.DataError) as caught:
        (plan.loss(loss) if loss else plan).fit(model, data, verbose=0, seed=3, **options)
    return str(caught.value)


def put(where: Any, value: Any, *, labels: bool = False) -> Change:
    def change(x: Any, y: Any) -> Any:
        (y if labels else x)[where] = value
        return x, y

    return change


def raised(x: Any, y: Any) -> Any:
    del x, y
    return OSError("the share went away")


#: The fault → how a batch is changed, what is said, how to mend it, and the forms of data that can have it.
FAULTS: dict[str, tuple[Change, str, str, str]] = {
    "NaN in the inputs": (
        put((6, 2), np.nan),
        "the input has 1 values that are NaN or infinite, the first in row 6",
        "fill or drop rows that aren't finite",
        "list generator PyDataset tf.data",
    ),
    "a label too large": (
        put(4, 3, labels=True),
        "the labels hold 3 in row 4, where 3 classes are numbered 0 to 2",
        "give labels from 0 on, and the head one unit for each class",
        "list generator PyDataset tf.data",
    ),
    "a label below 0": (
        put(1, -1, labels=True),
        "the labels hold -1 in row 1, where 3 classes are numbered 0 to 2",
        "give labels from 0 on, and the head one unit for each class",
        "list generator PyDataset tf.data",
    ),
    "fewer labels than rows": (
        lambda x, y: (x, y[:-1]),
        "inputs of 8 rows and labels of 7 rows",
        "give one label, and one weight, for each row",
        "list generator PyDataset",
    ),
    "an empty batch": (
        lambda x, y: (x[:0], y[:0]),
        "no rows",
        "leave empty batches out",
        "list generator PyDataset",
    ),
    "another shape": (
        lambda x, y: (x[:, :3], y),
        "an array of shape (8, 3), where the first batches have (None, 4)",
        "give batches that differ in their number of rows only",
        "list generator PyDataset",
    ),
    "another type": (
        lambda x, y: (x.astype("float64"), y),
        "values of type float64, where the first batches have float32",
        "give batches that differ in their number of rows only",
        "list generator PyDataset",
    ),
    "a part too many": (
        lambda x, y: (x, y, np.ones(8, "float32")),
        "a structure that the first batches don't have: ",
        "give batches that differ in their number of rows only",
        "list generator PyDataset",
    ),
    "data that raises": (
        raised,
        "the data raised OSError: the share went away",
        "mend the data; its own error stands above this one",
        "generator PyDataset",
    ),
}


@pytest.mark.parametrize(("fault", "form"), [(fault, form) for fault in FAULTS for form in FAULTS[fault][3].split()])
def test_a_fault_in_a_later_batch_names_the_batch(fault: str, form: str) -> None:
    change, found, fix, _ = FAULTS[fault]
    said = fitted(FORMS[form](wrong_in_batch_5(change)))
    first, second, *rest = said.splitlines()
    number = int(first.removeprefix("Reading batch ").split()[0])
    assert first == f"Reading batch {number} of pass 0 over the training data."
    assert form == "PyDataset" or number == 5  # batches of a PyDataset come in an order of their own
    assert second.startswith(f"  found: {found}")
    assert second == f"  found: {found}" or found.endswith(": ")
    assert rest == [f"  to fix it: {fix}"]


def test_a_later_pass_is_named() -> None:
    class Turns(Listed):
        passes = 0

        def on_epoch_end(self) -> None:
            self.passes += 1
            if self.passes > 2:  # once before training
                self.items[3][0][0, 0] = np.inf

    said = fitted(Turns([rows() for _ in range(4)]), epochs=3)
    assert "of pass 2 over the training data." in said
    assert "NaN or infinite, the first in row 0" in said


def test_weights_of_rows_are_looked_at() -> None:
    good = [(*rows(), np.ones(8, "float32")) for _ in range(4)]
    good[2][2][5] = -1
    assert "  found: the weights hold -1 in row 5\n" in fitted(good)
    good[2][2][5] = np.nan
    assert "  found: the weights have 1 values that are NaN or infinite, the first in row 5\n" in fitted(good)


SPARSE = "sparse_categorical_crossentropy"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            lambda x, y, _: (x, np.where(np.arange(40) == 33, 3, y)),
            "the labels hold 3 in row 33, where 3 classes are numbered 0 to 2",
        ),
        (
            lambda x, y, _: (x, np.where(np.arange(40) == 7, 0.5, y)),
            "the labels hold 0.5 in row 7, where numbers of classes are whole",
        ),
        (
            lambda x, y, _: (x, np.where(np.arange(40) == 7, np.nan, y)),
            "the labels have 1 values that are NaN or infinite, the first in row 7",
        ),
        (lambda x, y, w: (x, y, np.where(np.arange(40) == 9, -2.0, w)), "the weights hold -2 in row 9"),
    ],
    ids=["out of range", "fraction", "NaN", "weight"],
)
@pytest.mark.parametrize("validation", [False, True])
def test_arrays_are_looked_at_as_a_whole(change: Any, found: str, validation: bool) -> None:
    x, y = rows(40)
    wrong = change(x, y, np.ones(40))
    said = fitted((x, y), SPARSE, validation_data=wrong) if validation else fitted(wrong, SPARSE)
    assert said.splitlines()[:2] == [
        f"Checking the labels of the {'validation' if validation else 'training'} data.",
        f"  found: {found}",
    ]


def test_nan_in_a_late_row_of_data_in_memory() -> None:
    x, y = rows(100)
    x[77, 1] = np.nan
    said = "the input has 1 values that are NaN or infinite, the first in row 77"
    assert said in fitted((x, y))
    assert said in fitted(tk.Data.arrays(x, y))


def test_arrays_of_different_lengths() -> None:
    x, y = rows(10)
    said = fitted((x, y[:9]))
    assert "first dimensions that differ: (10, 4), (9,)" in said


def test_a_generator_that_ends_early_names_the_batch() -> None:
    said = fitted(generator([rows() for _ in range(7)]), epochs=3, steps_per_epoch=5)
    assert said == (
        "Training on 5 batches in each epoch.\n"
        "  found: a generator that ended after 2 batches of epoch 2\n"
        "  to fix it: give one without an end, or fewer epochs or steps_per_epoch"
    )


def test_classes_that_mean_something_else_in_the_validation_data() -> None:
    x, y = rows(12)
    ours = tk.Data.arrays(x, y, class_names=["ant", "bee", "cat"])
    theirs = tk.Data.arrays(x, y, class_names=["ant", "cat", "dog"])
    assert fitted(ours, validation_data=theirs) == (
        "Checking the validation data against the training data.\n"
        "  found 2 problems:\n"
        "    - no class 'bee' in the validation data\n"
        "    - no class 'dog' in the training data\n"
        "  likely cause: classes are numbered in the order of their folders, so one number would mean two classes\n"
        "  to fix it: give both the same folders, or set a share of the training data apart: validation_data=0.1"
    )
    turned = tk.Data.arrays(x, y, class_names=["bee", "ant", "cat"])
    assert "  found: the same classes in another order\n" in fitted(ours, validation_data=turned)


def test_classes_that_the_model_numbers_otherwise() -> None:
    x, y = rows(12)
    model = tk.ModelBuilder(x.shape[1:]).flatten().classifier(["bee", "ant", "cat"]).build(seed=0)
    data = tk.Data.arrays(x, y, class_names=["ant", "bee", "cat"])
    before = model.get_weights()
    with pytest.raises(errors.DataError) as training:
        tk.FineTuner().fit(model, data, seed=0, verbose=0)
    with pytest.raises(errors.DataError) as testing:
        tk.Evaluator("accuracy").run(model, data)
    for caught in (training, testing):
        assert str(caught.value).partition("\n")[2] == (
            "  found: the same classes in another order: 'bee', 'ant', 'cat' in the model, 'ant', 'bee', 'cat' in the data\n"
            "  likely cause: label 0 would stand for 'ant' in the data and for 'bee' in the model\n"
            "  to fix it: give the head the data's order, .classifier(['ant', 'bee', 'cat']), or the data the model's"
        )
    with pytest.raises(errors.DataError, match="Checking the validation data against the model"):
        tk.FineTuner().fit(model, (x, y), validation_data=data, seed=0, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert tk.Evaluator("accuracy").run(model, (x, y)).scored.rows.classes == ("bee", "ant", "cat")


def test_pixels_that_were_divided_twice_are_said() -> None:
    y = np.arange(12) % 3
    pixels = np.random.default_rng(0).uniform(0, 255, (12, 8, 8, 3)).astype("float32")
    model = tk.ModelBuilder((8, 8, 3)).layer(keras.layers.Rescaling(1 / 127.5, offset=-1.0)).flatten().classifier(3).build(seed=0)
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1)
    with pytest.warns(UserWarning, match=r"The pixels go from 0\.0.* to 0\.9.*'.*' makes nearly one grey"):
        run = plan.fit(model, (pixels / 255, y), seed=0, verbose=0)
    assert any("nearly one grey" in note for note in run.notes)
    assert not any("nearly one grey" in note for note in plan.fit(model, (pixels, y), seed=0, verbose=0).notes)
    with pytest.warns(UserWarning, match="Validation data: The pixels go from"):
        plan.fit(model, (pixels, y), validation_data=(pixels / 255, y), seed=0, verbose=0)
    with pytest.warns(UserWarning, match="nearly one grey"):
        result = tk.Evaluator("accuracy").run(model, (pixels / 255, y))
    assert any("nearly one grey" in note for note in result.notes)


def test_classes_without_a_row_or_a_name() -> None:
    x, y = rows(12)
    with pytest.warns(UserWarning, match="No row is of the class 'dog': a model can't learn it from these"):
        tk.Data.arrays(x, y, class_names=["ant", "bee", "cat", "dog"])
    with pytest.raises(errors.DataError, match="4 labels outside 0 to 1, the first 2 in row 2"):
        tk.Data.arrays(x, y, class_names=["ant", "bee"])


def test_what_is_looked_at_comes_through_as_it_was() -> None:
    """Training on a data set of each form, checks and all, ends with the same weights as on the arrays in that order."""
    batches = [rows() for _ in range(4)]
    ended = []
    for form in ("list", "generator", "tf.data"):
        model = network()
        model.set_weights([np.ones((4, 3)) / 7, np.zeros(3)])
        tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).fit(model, FORMS[form](batches), verbose=0, seed=0)
        ended.append(model.get_weights())
    for weights in ended[1:]:
        for one, other in zip(ended[0], weights, strict=True):
            np.testing.assert_array_equal(one, other)
