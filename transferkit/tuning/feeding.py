"""What `fit` is fed: checked before anything changes, split where asked, and shuffled in an order that can be told in advance.

Keras replays one permutation in every epoch once a seed is set, and its `validation_split` takes the last rows, which on data
sorted by class are one class. Arrays are therefore ordered here: epoch `e` of a run with seed `s` takes the rows as
`Generator(Philox(key=[s, e])).permutation(n)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.heads import Head
from transferkit.data import Batch, as_batch, is_arrays, row_count, rows_of
from transferkit.errors import DataError

__all__ = ["check_inputs", "epoch_order", "first_rows", "ordered_dataset", "split"]


def epoch_order(rows: int, *, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of the rows in one epoch, the same for the same numbers on every machine."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def ordered_dataset(parts: Any, *, batch_size: int, order: Callable[[], np.ndarray[Any, Any]]) -> Any:
    """A `tf.data.Dataset` of batches of in-memory data in the order that `order()` gives each time it is gone over anew.

    Args:
        parts: `(x, y)` or `(x, y, sample_weight)` of arrays.
        batch_size: Rows in a batch; the last may be smaller.
        order: Gives all row numbers; called at the start of each pass.
    """
    rows = row_count(parts)
    steps = -(-rows // batch_size)
    tensors = tuple(tf.nest.map_structure(_tensor, part) for part in parts if part is not None)

    def passes() -> Iterator[np.ndarray[Any, Any]]:
        yield order()

    def cut(indices: Any) -> Any:
        return tf.data.Dataset.from_tensor_slices(indices).batch(batch_size)

    def gather(indices: Any, held: Any) -> Any:
        return tf.nest.map_structure(lambda tensor: tf.gather(tensor, indices, axis=0), held)

    indices = tf.data.Dataset.from_generator(passes, output_signature=tf.TensorSpec((None,), tf.int64)).flat_map(cut)
    # The tensors come in as a data set, not as constants of the graph, which would hold them a second time.
    held = tf.data.Dataset.from_tensors(tensors).repeat()
    dataset = tf.data.Dataset.zip((indices, held)).map(gather, num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()
    # Rows must go to replicas as they come, not file by file: there are no files.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.apply(tf.data.experimental.assert_cardinality(steps)).with_options(options).prefetch(tf.data.AUTOTUNE)


def _tensor(array: Any) -> Any:
    """The array as a tensor; float64 becomes Keras's float type, as Keras does it."""
    if str(array.dtype) == "float64":
        return tf.cast(array, keras.config.floatx())
    return tf.convert_to_tensor(array)


def split(data: Any, fraction: float, *, seed: int) -> tuple[Any, Any]:
    """Sets a random share of in-memory data apart, with each class in its proportion where the labels are whole numbers.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)` of arrays.
        fraction: The share set apart, above 0 and under 1.
        seed: Fixes the choice.

    Returns:
        The rest and the share, both as tuples of arrays in the rows' original order.

    Raises:
        DataError: for data that isn't in memory, or a share that leaves either side empty.
    """
    asked = f"Setting {fraction!r} of the data apart for validation."
    if not is_arrays(data):
        raise DataError(
            asked,
            found=f"data of type {type(data).__name__}, whose rows can't be told apart without reading it all",
            fix="give validation_data=(x, y) or a data set of its own",
        )
    rows = row_count(data)
    if not 0 < fraction < 1 or not 0 < round(fraction * rows) < rows:
        raise DataError(asked, found=f"{rows} rows; one side would be empty", fix="give a fraction such as 0.1, and more rows")
    random = np.random.Generator(np.random.Philox(key=[seed, 2**63]))
    labels = np.asarray(data[1]) if len(data) > 1 and hasattr(data[1], "shape") else None
    if labels is not None and labels.size == rows and labels.dtype.kind in "iub":
        groups = [np.flatnonzero(labels.reshape(-1) == label) for label in np.unique(labels)]
    else:
        groups = [np.arange(rows)]
    # Largest remainders, so that the sizes of the shares add up to what was asked.
    wanted = np.array([len(group) * fraction for group in groups])
    counts = np.floor(wanted).astype(int)
    short = round(fraction * rows) - counts.sum()
    for index in np.argsort(counts - wanted, kind="stable")[:short]:
        counts[index] += 1
    chosen = np.concatenate([random.permutation(group)[:count] for group, count in zip(groups, counts, strict=True)])
    mask = np.zeros(rows, bool)
    mask[chosen] = True
    return rows_of(data, np.flatnonzero(~mask)), rows_of(data, np.flatnonzero(mask))


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
    # An iterator can be read once only: what was taken from it is put back in front.
    return as_batch(first), _again(first, iterator) if iterator is data else data


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
    inputs = tf.nest.flatten(batch.x)
    expected = list(getattr(model, "inputs", None) or [])
    if expected and len(expected) != len(inputs):
        problems.append(f"{len(inputs)} inputs, where the model takes {len(expected)}")
    for index, array in enumerate(inputs):
        where = f"input {index}" if len(inputs) > 1 else "the input"
        if array.dtype.kind == "f":
            bad = ~np.isfinite(array)
            if bad.any():
                row = int(np.argwhere(bad)[0][0])
                problems.append(f"{where} has {int(bad.sum()):,} values that are NaN or infinite, the first in row {row}")
        if len(expected) == len(inputs) and not _fits(array.shape[1:], expected[index].shape[1:]):
            wanted = tuple(expected[index].shape[1:])
            problems.append(f"{where} has rows of shape {array.shape[1:]}, where the model takes {wanted}")
    if batch.y is None and heads:
        problems.append("no labels")
    if problems:
        raise DataError(
            f"Checking the {name} against the model {model.name!r}.",
            found=problems,
            fix="fill or drop rows that aren't finite; bring the inputs to the model's shape; give data as (x, y)",
        )


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(found) != len(wanted):
        # Keras adds a last axis of 1 by itself, and takes one away.
        return (found == tuple(wanted[:-1]) and wanted[-1:] == (1,)) or (found[-1:] == (1,) and _fits(found[:-1], wanted))
    return all(size is None or size == here for here, size in zip(found, wanted, strict=True))
