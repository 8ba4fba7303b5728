from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferkit.errors import DataError
from transferkit.tasks import Task, TaskKind, task_of

EYE = np.eye(3)


@pytest.mark.parametrize(
    ("labels", "shape", "activation", "kind", "loss", "from_logits"),
    [
        ([0, 1, 1], (1,), "sigmoid", "binary", "BinaryCrossentropy", False),
        ([0.0, 1.0], (1,), "sigmoid", "binary", "BinaryCrossentropy", False),
        ([[0], [1]], (1,), "linear", "binary", "BinaryCrossentropy", True),
        ([True, False], (), "linear", "binary", "BinaryCrossentropy", True),
        ([0, 2, 1], (3,), "softmax", "multiclass-sparse", "SparseCategoricalCrossentropy", False),
        ([[0.0], [2.0]], (3,), "linear", "multiclass-sparse", "SparseCategoricalCrossentropy", True),
        ([0, 1], (2,), "linear", "multiclass-sparse", "SparseCategoricalCrossentropy", True),
        (EYE, (3,), "softmax", "multiclass-onehot", "CategoricalCrossentropy", False),
        (EYE, (3,), "linear", "multiclass-onehot", "CategoricalCrossentropy", True),
        (EYE, (3,), "sigmoid", "multilabel", "BinaryCrossentropy", False),
        ([[1, 1, 0], [0, 0, 0]], (3,), "linear", "multilabel", "BinaryCrossentropy", True),
        ([0.5, 2.0], (1,), "linear", "regression", "MeanSquaredError", False),
        ([[0.5, 2.0]], (2,), "relu", "regression", "MeanSquaredError", False),
        ([-0.5, 2.0], (1,), None, "regression", "MeanSquaredError", False),
        (np.zeros((2, 4, 5), int), (4, 5, 7), "softmax", "multiclass-sparse", "SparseCategoricalCrossentropy", False),
        (np.zeros((2, 4, 5, 1), int), (4, 5, 7), "softmax", "multiclass-sparse", "SparseCategoricalCrossentropy", False),
        (np.zeros((2, 4, 5), int), (None, None, 1), "sigmoid", "binary", "BinaryCrossentropy", False),
    ],
)
def test_the_task_follows_from_labels_and_head(
    labels: object, shape: tuple[int | None, ...], activation: str | None, kind: TaskKind, loss: str, from_logits: bool
) -> None:
    task = task_of(labels, output_shape=shape, activation=activation)  # type: ignore[arg-type]
    assert (task.kind, task.loss, task.from_logits, task.soft) == (kind, loss, from_logits, False)
    assert task.loss_arguments == ({} if kind == "regression" else {"from_logits": from_logits})
    assert task.is_classification == (kind != "regression")


def test_class_probabilities_as_labels_are_soft() -> None:
    task = task_of([[0.2, 0.8], [1.0, 0.0]], output_shape=(2,), activation="softmax")
    assert task == Task("multiclass-onehot", 2, from_logits=False, soft=True)


def test_a_task_reads_as_a_phrase() -> None:
    assert str(Task("binary", 1, from_logits=True)) == "binary, 1 unit from logits"
    assert str(Task("multilabel", 4)) == "multilabel, 4 units from probabilities"
    assert str(Task("regression", 2)) == "regression, 2 units"


def test_float_zeros_and_ones_before_one_linear_unit_are_ambiguous() -> None:
    with pytest.raises(DataError) as caught:
        task_of([0.0, 1.0], output_shape=(1,), activation="linear")
    assert str(caught.value) == (
        "Telling the task from the labels and the head (1 unit, activation 'linear').\n"
        "  found: floats that are only 0.0 and 1.0\n"
        "  likely cause: more than one task fits\n"
        "  to fix it: say which: for two classes, y.astype('int32'); "
        'or for a quantity, the loss "mse"; or give the loss yourself'
    )


def test_labels_from_one_on_name_the_subtraction() -> None:
    with pytest.raises(DataError) as caught:
        task_of([1, 2, 3], output_shape=(3,), activation="softmax", output="species")
    assert str(caught.value) == (
        "Telling the task from the labels and the head of output 'species' (3 units, activation 'softmax').\n"
        "  found: class indices from 1 to 3; 3 units take 0 to 2\n"
        "  likely cause: labels that start at 1\n"
        "  to fix it: y - 1"
    )


def test_an_unknown_activation_is_no_guess() -> None:
    with pytest.raises(DataError) as caught:
        task_of([0, 1], output_shape=(2,), activation=None)
    assert str(caught.value) == (
        "Telling the task from the labels and the head (2 units, an activation that can't be told).\n"
        "  found: class labels, and no layer with an activation at the end, which gives neither probabilities nor plain logits\n"
        "  likely cause: the loss must know whether it is given probabilities or logits\n"
        '  to fix it: end the model with activation "softmax", "sigmoid" or none, or give the loss yourself'
    )


@pytest.mark.parametrize(
    ("labels", "shape", "activation", "found"),
    [
        ([], (3,), "softmax", "no labels (shape (0,))"),
        (5, (3,), "softmax", "no labels (shape ())"),
        (["cat", "dog"], (2,), "softmax", "labels of type <U3"),
        ([0.0, np.nan, np.inf], (1,), "linear", "2 of 3 labels aren't finite, the first in row 1"),
        ([0, 1], (1,), "softmax", "a softmax over one unit, which gives 1.0 whatever the input"),
        ([1, 2], (1,), "sigmoid", "labels between 1 and 2, where one sigmoid unit takes 0 and 1"),
        ([0.3, 1], (1,), "sigmoid", "labels between 0.3 and 1, where one sigmoid unit takes 0 and 1"),
        ([1, 5], (1,), "linear", "integers between 1 and 5 for one unit"),
        ([0.5, 1], (2,), "linear", "one float a row (between 0.5 and 1) for 2 units"),
        ([-1, 1], (2,), "softmax", "class indices from -1 to 1; 2 units take 0 to 1"),
        ([0, 1], (2,), "sigmoid", "one class index a row, and a sigmoid for each unit"),
        ([0, 1], (2,), "tanh", "class labels, and the activation 'tanh', which gives neither probabilities nor plain logits"),
        ([[1, 1, 0], [1, 0, 0]], (3,), "softmax", "rows with 1 to 2 ones (the first that hasn't one is row 0)"),
        ([[1.0, 1, 0]], (3,), "linear", "floats that are only 0.0 and 1.0, several ones a row"),
        ([[2.0, 3.0]], (2,), "softmax", "rows of numbers between 2 and 3 that sum to 5 … 5"),
        ([[2.0, 3.0]], (2,), "sigmoid", "numbers between 2 and 3, where sigmoid units take 0 and 1"),
        ([[2, 3]], (2,), "linear", "integers between 2 and 3, a row of 2"),
        ([[0.2, 0.8]], (2,), "linear", "rows of floats that sum to one, and a linear head"),
        (np.zeros((2, 5)), (3,), "softmax", "labels of shape (2, 5), but the head gives (n, 3)"),
        (np.zeros((2, 2)), (1,), "linear", "labels of shape (2, 2), but the head gives (n, 1)"),
        ([0, 1], (None,), "softmax", "an output whose last axis has no fixed length"),
    ],
)
def test_what_does_not_fit_is_said(labels: object, shape: tuple[int | None, ...], activation: str, found: str) -> None:
    with pytest.raises(DataError) as caught:
        task_of(labels, output_shape=shape, activation=activation)  # type: ignore[arg-type]
    assert caught.value.found == (found,)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.sampled_from(["softmax", "linear"]))
def test_indices_and_their_one_hot_rows_differ_in_the_labels_form_alone(indices: list[int], activation: str) -> None:
    sparse = task_of(indices, output_shape=(5,), activation=activation)
    one_hot = task_of(np.eye(5)[indices], output_shape=(5,), activation=activation)
    assert (sparse.kind, one_hot.kind) == ("multiclass-sparse", "multiclass-onehot")
    assert (sparse.units, sparse.from_logits) == (one_hot.units, one_hot.from_logits)
