"""What `fit` is fed: checked before anything changes, split where asked, and shuffled in an order that can be told in advance.

Keras replays one permutation in every epoch once a seed is set, and its `validation_split` takes the last rows, which on data
sorted by class are one class. Arrays are therefore ordered here: epoch `e` of a run with seed `s` takes the rows as
`Generator(Philox(key=[s, e])).permutation(n)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.heads import Head
from transferkit.data import Batch, Data, as_batch, is_arrays, row_count
from transferkit.errors import DataError
from transferkit.weights.values import is_finite

__all__ = [
    "OWN_ROWS",
    "ListedBatches",
    "as_tensor",
    "check_inputs",
    "complete_class_weights",
    "epoch_order",
    "first_rows",
    "ordered_dataset",
]


#: The name under which inputs stand that are of this worker's rows only.
OWN_ROWS = "transferkit/own_rows"


def epoch_order(rows: int, *, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of the rows in one epoch, the same for the same numbers on every machine."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def ordered_dataset(
    data: Any,
    *,
    batch_size: int,
    orders: Callable[[], Iterable[np.ndarray[Any, Any]]],
    counted: bool = True,
    failed: Callable[[BaseException], None] | None = None,
    own: Callable[[Any], Any] | None = None,
) -> Any:
    """A `tf.data.Dataset` of batches, in one order of the rows after the other.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays, or a `Data`.
        batch_size: Rows in a batch; the last may be smaller.
        orders: Gives the row numbers of each pass over the rows; called each time the data set is gone over anew. No batch has
            rows of two passes.
        counted: Whether it is one pass that takes all rows, so that the data set can tell how many batches it has.
        failed: Told of an error in reading rows, which TensorFlow puts into words of its own.
        own: Gives the places within a batch of so many rows that this process needs the inputs of. What must be read is then
            read of these only, and the inputs stand under `OWN_ROWS`; labels are always of the whole batch.
    """
    rows = row_count(data)
    steps = -(-rows // batch_size)
    # As `fit` has it on arrays: a size that is the same for all batches is known to the graph of a step, which is faster by 5%.
    full = rows % batch_size == 0 and not tf.distribute.has_strategy()

    def cut(indices: Any) -> Any:
        return tf.data.Dataset.from_tensor_slices(indices).batch(batch_size, drop_remainder=full)

    indices = tf.data.Dataset.from_generator(orders, output_signature=tf.TensorSpec((None,), tf.int64)).flat_map(cut)
    dataset = _read_rows(indices, data, failed, own) if isinstance(data, Data) else _gather_rows(indices, data)
    options = tf.data.Options()
    # Rows must go to replicas as they come, not file by file: there are no files.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    if counted:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def _gather_rows(indices: Any, parts: Any) -> Any:
    """Batches of arrays that are in memory."""
    tensors = tuple(tf.nest.map_structure(as_tensor, _tuples(part)) for part in parts if part is not None)

    def gather(index: Any, held: Any) -> Any:
        return tf.nest.map_structure(lambda tensor: tf.gather(tensor, index, axis=0), held)

    # The tensors come in as a data set, not as constants of the graph, which would hold them a second time.
    held = tf.data.Dataset.from_tensors(tensors).repeat()
    return tf.data.Dataset.zip((indices, held)).map(gather, num_parallel_calls=tf.data.AUTOTUNE)


def _read_rows(indices: Any, data: Data, failed: Callable[[BaseException], None] | None, own: Callable[[Any], Any] | None) -> Any:
    """Batches that `data` reads when they are asked for."""
    first = data.rows(np.arange(1))
    example = [_tuples(part) for part in first if part is not None]
    if own is not None and not data.in_memory and data.labels is not None and first.sample_weight is None:
        labels, places = tf.nest.map_structure(as_tensor, data.labels), own
        inputs = _read_rows(indices.map(lambda index: tf.gather(index, places(tf.shape(index)[0]))), data, failed, None)
        targets = indices.map(lambda index: tf.nest.map_structure(lambda leaf: tf.gather(leaf, index), labels))
        return tf.data.Dataset.zip((inputs.map(lambda x, _: {OWN_ROWS: x}), targets))
    leaves = [as_tensor(leaf) for leaf in tf.nest.flatten(example)]

    def read(index: np.ndarray[Any, Any]) -> list[Any]:
        try:
            parts = [part for part in data.rows(index) if part is not None]
        except BaseException as error:
            if failed is not None:
                failed(error)
            raise
        return [as_tensor(leaf) for leaf in tf.nest.flatten(parts)]

    def shaped(index: Any) -> Any:
        found = tf.py_function(lambda tensor: read(tensor.numpy()), [index], [leaf.dtype for leaf in leaves])
        for tensor, leaf in zip(found, leaves, strict=True):
            tensor.set_shape((index.shape[0], *leaf.shape[1:]))
        return tuple(tf.nest.pack_sequence_as(example, found))

    return indices.map(shaped, num_parallel_calls=2)


def _tuples(structure: Any) -> Any:
    """The structure with tuples for lists, of which a data set would make one tensor."""
    if isinstance(structure, dict):
        return {name: _tuples(part) for name, part in structure.items()}
    return tuple(map(_tuples, structure)) if isinstance(structure, (list, tuple)) else structure


def as_tensor(array: Any) -> Any:
    """The array as a tensor; float64 becomes Keras's float type, as Keras does it."""
    if str(array.dtype) == "float64":
        return tf.cast(array, keras.config.floatx())
    return tf.convert_to_tensor(array)


def first_rows(data: Any, *, name: str) -> tuple[Batch, Any]:
    """All rows of in-memory data, or the first batch of a data set, and data that still has what was read.

    Args:
        data: Anything `fit` takes.
        name: What it is, for the error.

    Raises:
        DataError: when there is none.
    """
    empty = DataError(
        f"Reading the {name}.",
        found="no rows at all",
        cause="an empty folder, a filter that keeps nothing, or an iterator that was used up before",
    )
    if is_arrays(data):
        if row_count(data) == 0:
            raise empty
        return as_batch(tuple(data)), data
    if isinstance(data, Data):
        if len(data) == 0:
            raise empty
        if data.in_memory:
            return data.rows(np.arange(len(data))), data
        # The first rows stand for the inputs, which have to be read from files; the labels are all there.
        return data.rows(np.arange(min(32, len(data))))._replace(y=data.labels), data
    if isinstance(data, keras.utils.PyDataset):
        if data.num_batches == 0:
            raise empty
        return as_batch(data[0]), data
    if not hasattr(data, "__iter__") or hasattr(data, "shape") or isinstance(data, (str, bytes, dict)):
        raise DataError(
            f"Reading the {name}.",
            found=f"a {type(data).__name__}",
            cause="data comes as (x, y) of arrays, a tf.data.Dataset, a PyDataset or an iterable of batches",
            fix="for arrays, put inputs and labels into one tuple: (x, y)",
        )
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise empty
    if isinstance(data, list):
        return as_batch(first), ListedBatches(data)
    # An iterator can be read once only: what was taken from it is put back in front.
    return as_batch(first), _again(first, iterator) if iterator is data else data


class ListedBatches(keras.utils.PyDataset):
    """A list of batches in its own order; Keras's `fit` would take the list for several inputs."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__()
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index]


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    """A generator, because Keras takes no other kind of iterator."""
    yield first
    yield from rest


def check_inputs(batch: Batch, model: Any, heads: list[Head], *, name: str) -> None:
    """Checks rows against the model before anything changes.

    Args:
        batch: Rows with their labels.
        model: A built model.
        heads: Its heads.
        name: What the data is, for the error.

    Raises:
        DataError: with every problem found: inputs that aren't finite or whose shapes aren't the model's, labels that are
            missing.
    """
    problems: list[str] = []
    fixes: list[str] = []
    inputs = tf.nest.flatten(batch.x)
    expected = list(getattr(model, "inputs", None) or [])
    if expected and len(expected) != len(inputs):
        problems.append(f"{len(inputs)} inputs, where the model takes {len(expected)}")
        fixes.append("give the inputs as one tuple or dict: ((a, b), y)")
    for index, array in enumerate(inputs):
        where = f"input {index}" if len(inputs) > 1 else "the input"
        if array.dtype.kind == "f" and not is_finite(array):
            bad = ~np.isfinite(array)
            row = int(np.argwhere(bad)[0][0])
            problems.append(f"{where} has {int(bad.sum()):,} values that are NaN or infinite, the first in row {row}")
            fixes.append("fill or drop rows that aren't finite")
        if len(expected) == len(inputs) and not _fits(array.shape[1:], expected[index].shape[1:]):
            wanted = tuple(expected[index].shape[1:])
            if array.shape == wanted:
                problems.append(f"{where} is one row of shape {array.shape}, without an axis for the batch")
                fixes.append("put rows into batches: dataset.batch(32)")
            else:
                problems.append(f"{where} has rows of shape {array.shape[1:]}, where the model takes {wanted}")
                fixes.append("bring the inputs to the model's shape")
    if batch.y is None and heads:
        problems.append("no labels")
        fixes.append("give data as (x, y)")
    if problems:
        raise DataError(
            f"Checking the {name} against the model {model.name!r}.",
            found=problems,
            fix="; ".join(dict.fromkeys(fixes)),
        )


def complete_class_weights(weights: Mapping[int, float] | None, heads: list[Head]) -> dict[int, float] | None:
    """A weight for every class of the head: 1 for those not named. Keras takes the classes of a data set from the highest named.

    Args:
        weights: Class → weight, or None.
        heads: The model's heads.

    Raises:
        DataError: for a class the head hasn't got, or a weight that is no number of at least 0.
    """
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise DataError(
            "Weighting the classes.",
            found=f"{weights!r}",
            fix="give a dict of class and weight, {0: 1.0, 1: 5.0}; tk.Data.arrays(x, y).class_weights() balances the classes",
        )
    if len(heads) > 1:
        raise DataError(
            "Weighting the classes.",
            found=f"a model with {len(heads)} outputs, whose classes aren't the same",
            fix="give the rows weights instead, for each output: data=(x, y, {'output': weights})",
        )
    units = heads[0].shape[-1] if heads and heads[0].shape else None
    classes = max(2, units) if units else max(weights, default=0) + 1
    problems = [
        f"the class {key!r}, where the head has the classes 0 to {classes - 1}" for key in weights if key not in range(classes)
    ]
    problems += [f"the weight {value!r} for the class {key!r}" for key, value in weights.items() if not 0 <= value < float("inf")]
    if problems:
        raise DataError(
            "Weighting the classes.", found=problems, fix="give each class's number and a weight of at least 0: {0: 1.0, 1: 5.0}"
        )
    return {number: float(weights.get(number, 1.0)) for number in range(classes)}


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(found) != len(wanted):
        # Keras adds a last axis of 1 by itself, and takes one away.
        return (found == tuple(wanted[:-1]) and wanted[-1:] == (1,)) or (found[-1:] == (1,) and _fits(found[:-1], wanted))
    return all(size is None or size == here for here, size in zip(found, wanted, strict=True))
