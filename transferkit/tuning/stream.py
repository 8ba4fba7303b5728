"""Training data as batches that can begin anywhere: in any pass over the data, at any batch of it.

Rows in memory and in folders, and data sets that list their batches, begin at the batch without reading what comes before. A
`tf.data.Dataset` reads and drops it, once the pass is found that gives what it gave. Data of which nobody can tell what a second
pass would give begins with an epoch. May import Keras and the floors below.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.data import Data, is_arrays, row_count
from transferkit.errors import DataError, StorageError
from transferkit.tuning.checking import BatchChecks
from transferkit.tuning.feeding import ListedBatches, epoch_order, ordered_dataset
from transferkit.tuning.marking import Marks

__all__ = ["Stream"]

#: How often a data set may have been gone over beside training, at most, for a pass of it to be found again.
_MORE_PASSES = 32


class Stream:
    """The batches that a phase in full trains on.

    Args:
        data: What `fit` takes, checked.
        batch_size: Rows in a batch of in-memory data.
        seed: Of the run.
        targets: What is done to the batches.
        class_weight: Class → weight, or None.
        steps_per_epoch: Batches in an epoch, where it isn't one pass over the data.
        checks: Looks at each batch; not at rows in memory, which were looked at as a whole.
        kept: Whether the run is kept, so that its place in the data must be told.
        own: Gives the places within a batch that this process computes, where these are not all.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int,
        seed: int,
        targets: Any,
        class_weight: Any = None,
        steps_per_epoch: int | None = None,
        checks: BatchChecks | None = None,
        kept: bool = False,
        own: Callable[[Any], Any] | None = None,
    ) -> None:
        self._data, self._size, self._seed = data, batch_size, seed
        self._targets, self._weight = targets, class_weight
        self._given_steps = steps_per_epoch
        self._checks = checks
        self._own = None if targets.mixing is not None else own  # mixed rows are made of all
        self._first = 0
        self._whole: Any = None
        #: The pass it is in, and how many batches of it were taken.
        self.number, self.seen = 0, 0
        #: How many passes were opened, and how often a `PyDataset` was told that an epoch ended.
        self.opened, self.ended = 0, 0
        self._failure: BaseException | None = None
        self._rows = isinstance(data, Data) or is_arrays(data)
        #: Up to which pass one iterator may go on; None: each pass has one of its own. Opening one takes about as long as a step.
        self.until: int | None = None
        #: Whether it can be gone over once only.
        self.once = hasattr(data, "__next__")
        #: Batches in one pass, or None where that can't be told.
        self.batches = _batches(data, batch_size)
        #: Batches in one epoch, or None where that can't be told.
        self.steps = steps_per_epoch or self.batches
        #: Why a run can go on from the beginning of an epoch only; empty when it can from any batch.
        self.by_epoch = _by_epoch(data)
        #: Whether each pass over it may have another order, which follows from how many there were.
        self.reshuffles = isinstance(data, tf.data.Dataset) and not self.by_epoch and _reshuffles(data)
        #: Whether it is one pass that never ends, which a phase goes on in where the one before left it.
        self.endless = isinstance(data, tf.data.Dataset) and int(data.cardinality()) == tf.data.INFINITE_CARDINALITY
        #: What goes over the pass it is in; None between passes.
        self.iterator: Any = None
        self._marks = Marks() if kept and isinstance(data, tf.data.Dataset) and not self.by_epoch else None
        self._sought: Mapping[str, int] | None = None
        self._tries = 0

    def open(self, number: int, first: int = 0) -> Any:
        """The batches of pass `number` from `first` on, after those to be dropped; to be gone over before the next is opened."""
        self.number, self._first = number, first - self.dropped(first)
        self._failure = None  # what fails is read some batches ahead of the step that asks for it
        self.opened += 1
        if self._whole is None:
            self._whole = self._made()
        return self._whole

    def dropped(self, first: int) -> int:
        """How many batches whoever opens a pass at `first` must read and drop."""
        return first if isinstance(self._data, tf.data.Dataset) else 0

    def state(self) -> dict[str, int]:
        """Where it is, for `load_state`."""
        begun = self.iterator is not None
        found = {"pass": self.number, "seen": self.seen, "opened": self.opened - begun, "ended": self.ended}
        if self._marks is None or not self.opened:
            return found
        return {**found, "first": self._marks.first(), "last": self._marks.at(self.seen - 1) if begun else -1}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Goes to where `state` was taken.

        Raises:
            StorageError: when the pass isn't found, because the data gives other batches.
        """
        if self._marks is not None and "first" in state:
            self._sought, self._tries = state, state["opened"] + _MORE_PASSES
            while state["last"] < 0 and not self.found():  # between two passes: past the first of them
                next(iter(self.open(0)), None)
        self.number, self.seen, self.opened = state["pass"], state["seen"], state["opened"]
        for _ in range(state["ended"]):
            self.begin_epoch()
            self.end_epoch()

    def found(self) -> bool:
        """Whether the pass that was begun last, of which a batch was read, is the one that the run was in.

        Raises:
            StorageError: when so many were tried that none will be.
        """
        if self._sought is None or self._marks is None:
            return True
        if self._marks.first() == self._sought["first"]:
            if self._sought["last"] < 0:
                self._sought = None
            return True
        self._tries -= 1
        if self._tries < 0:
            raise self._differs("no pass over it begins as")
        return False

    def check_place(self) -> None:
        """Looks whether all batches up to here are those that the run was given before.

        Raises:
            StorageError: when they aren't.
        """
        if self._sought is not None and self._marks is not None and self._marks.at(self.seen - 1) != self._sought["last"]:
            raise self._differs("its batches begin as, but are not those of,")
        self._sought = None

    def _differs(self, words: str) -> StorageError:
        return StorageError(
            f"Going on with a run at batch {self.seen} of pass {self.number} over the training data.",
            found=f"a data set that gives other batches than it gave: {words} the one that the run was in",
            cause="its source changed, or it draws at random in a way that isn't the same in each process",
            fix="give what is random in it a seed, and repeat() without a count or not at all; or start anew in another folder",
        )

    def _made(self) -> Any:
        data = self._data
        if self._rows:
            dataset = ordered_dataset(
                data, batch_size=self._size, orders=self._orders, counted=False, failed=self._failed, own=self._own
            )
        elif isinstance(data, tf.data.Dataset):
            dataset = self._looked_at(data)
        else:
            dataset = self._generated()
        dataset = self._targets.training(
            dataset,
            seed=self._seed,
            epoch=lambda: self.number,
            start=lambda: self._first,
            steps=self.batches if self._rows else None,
        )
        return dataset if self._weight is None else _weighted(dataset, self._weight)

    def _orders(self) -> Iterator[Any]:
        rows = row_count(self._data)
        first = self._first * self._size
        for number in range(self.number, self.number + 1 if self.until is None else self.until):
            yield epoch_order(rows, seed=self._seed, epoch=number)[first:]
            first = 0

    def goes_on(self) -> bool:
        """Whether the iterator, at the end of its pass, has the next one too."""
        return self.until is not None and self.seen == self.batches

    def may_go_on(self, together: int, until: int) -> None:
        """Lets one iterator go over all passes before `until`, where nothing but its end could tell where a pass ends.

        Args:
            together: Batches that are taken at once, which must not be of two passes.
            until: One past the last pass.
        """
        alone = self._rows and not tf.distribute.has_strategy()  # replicas ask at each batch whether there is one for all
        self.until = until if alone and self._given_steps is None and self.batches and not self.batches % together else None

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Gives an error of the user's data as it was raised, not as TensorFlow words it."""
        try:
            yield
        except tf.errors.OpError as error:
            told = self._checks.told_by(error, self.number) if self._checks is not None else None
            if self._failure is None and told is None:
                raise
            raise (self._failure or told or error) from None

    def _failed(self, error: BaseException) -> None:
        self._failure = error

    def _looked_at(self, dataset: Any) -> Any:
        """The batches of a data set of TensorFlow's, each looked at as it passes."""
        checks, before = self._checks, dataset

        def passing(number: Any, item: Any) -> Any:
            assert checks is not None
            parts = item if isinstance(item, tuple) else (item,)
            with tf.control_dependencies(checks.in_graph(parts, number)):
                return tf.nest.map_structure(tf.identity, item)

        if self._marks is not None:
            dataset = self._marks.marked(dataset)
        if checks is not None:
            dataset = dataset.enumerate().map(passing)
        # A few ahead of the step, so that it doesn't wait.
        return dataset if dataset is before else dataset.prefetch(tf.data.AUTOTUNE)

    # -- data that Python gives batch by batch

    def _generated(self) -> Any:
        items, self._data = _peeked(self._data)
        spec = _common_spec(items)

        def batches() -> Iterator[Any]:
            try:
                for number, item in enumerate(self._read(), self._first):
                    item = _standard(item)
                    if self._checks is not None:
                        self._checks.batch(item, number, self.number)
                    yield _as_spec(item, spec, number, self.number)
            except BaseException as error:
                self._failure = error
                raise

        dataset = tf.data.Dataset.from_generator(batches, output_signature=spec)
        return dataset if self.once else dataset.prefetch(tf.data.AUTOTUNE)

    def _read(self) -> Iterator[Any]:
        """The batches; an error of the user's code says which one it came from."""
        number = self._first - 1
        try:
            for number, item in enumerate(self._items(), self._first):  # noqa: B007 -- told where reading fails
                yield item
        except Exception as error:
            raise DataError(
                f"Reading batch {number + 1} of pass {self.number} over the training data.",
                found=f"the data raised {type(error).__name__}: {error}",
                fix="mend the data; its own error stands above this one",
            ) from error

    def _items(self) -> Iterator[Any]:
        data = self._data
        if not isinstance(data, keras.utils.PyDataset):
            for item in data:  # `yield from` would close the user's generator at the end of a pass
                yield item
            return
        count = data.num_batches
        if count is None:
            order: Iterator[int] = itertools.count(self._first)
        elif isinstance(data, ListedBatches):
            order = iter(range(self._first, count))
        else:
            order = iter(epoch_order(count, seed=self._seed, epoch=self.number)[self._first :].tolist())
        if data.workers <= 1 and not data.use_multiprocessing:
            yield from (data[index] for index in order)
            return
        # In order, at most `max_queue_size` ahead, as Keras does it; by threads also where processes are asked for, because a
        # process forked from one that runs TensorFlow may hang.
        with ThreadPoolExecutor(max(1, data.workers), "transferkit-data") as pool:
            ahead: collections.deque[Future[Any]] = collections.deque()
            try:
                for index in itertools.islice(order, max(1, data.max_queue_size)):
                    ahead.append(pool.submit(data.__getitem__, index))
                while ahead:
                    item = ahead.popleft().result()
                    following = next(order, None)
                    if following is not None:
                        ahead.append(pool.submit(data.__getitem__, following))
                    yield item
            finally:
                for waiting in ahead:
                    waiting.cancel()

    def begin_epoch(self) -> None:
        """Tells a `PyDataset` that an epoch begins."""
        if isinstance(self._data, keras.utils.PyDataset):
            self._data.on_epoch_begin()

    def end_epoch(self) -> None:
        """Tells a `PyDataset` that an epoch ended."""
        self.ended += 1
        if isinstance(self._data, keras.utils.PyDataset):
            self._data.on_epoch_end()


def _batches(data: Any, batch_size: int) -> int | None:
    if isinstance(data, Data) or is_arrays(data):
        return -(-row_count(data) // batch_size)
    if isinstance(data, keras.utils.PyDataset):
        count: int | None = data.num_batches
        return count
    cardinality = getattr(data, "cardinality", None)
    found = -1 if cardinality is None else int(cardinality())
    return found if found >= 0 else None


def _by_epoch(data: Any) -> str:
    if isinstance(data, (Data, keras.utils.PyDataset)) or is_arrays(data):
        return ""
    if isinstance(data, tf.data.Dataset):
        return _unseeded(data)
    kind = "a generator" if hasattr(data, "__next__") else f"a {type(data).__name__}"
    return f"{kind}, which can't be made to begin within an epoch"


def _unseeded(dataset: Any) -> str:
    """What makes a second pass over a data set give other batches, in words; empty when nothing in it is seen to."""
    graph = _graph(dataset)
    if graph is None:
        return ""  # what it can't write down it can't tell
    nodes = {node.name: node for node in graph.node}
    for node in graph.node:
        if node.op.startswith("ShuffleDataset") and not any(_constant(nodes, name) for name in list(node.input)[2:4]):
            return "a data set that is shuffled without a seed"
    for function in graph.library.function:
        for node in function.node_def:
            if node.op.startswith("Random") and not (node.attr["seed"].i or node.attr["seed2"].i):
                return "a data set that draws at random without a seed"
    return ""


def _reshuffles(dataset: Any) -> bool:
    graph = _graph(dataset)
    return graph is None or any(
        node.op.startswith("ShuffleDataset") and node.attr["reshuffle_each_iteration"].b for node in graph.node
    )


def _graph(dataset: Any) -> Any:
    """The data set as a graph, or None for one that can't be written down."""
    try:
        text = tf.raw_ops.DatasetToGraphV2(
            input_dataset=tf.data.experimental.to_variant(dataset), external_state_policy=1, strip_device_assignment=True
        )
        return tf.compat.v1.GraphDef.FromString(text.numpy())
    except (tf.errors.OpError, ValueError):
        return None


def _constant(nodes: Any, name: str) -> int:
    value = nodes[name.split(":")[0]].attr["value"].tensor
    return int(tf.make_ndarray(value)) if value.dtype == tf.int64.as_datatype_enum else 1


def _peeked(data: Any) -> tuple[list[Any], Any]:
    """The first two batches, by which the shapes are told, and data that still has them."""
    if isinstance(data, keras.utils.PyDataset):
        count = 2 if data.num_batches is None else min(2, data.num_batches)
        return [_standard(data[index]) for index in range(count)], data
    iterator = iter(data)
    items = [_standard(item) for item in itertools.islice(iterator, 2)]
    return items, (_again(items, iterator) if iterator is data else data)


def _again(items: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from items
    yield from rest


def _standard(item: Any) -> Any:
    """A batch as Keras reads it: `(x,)`, `(x, y)`, `(x, y, sample_weight)` or a dict, lists as tuples."""
    item = keras.tree.lists_to_tuples(item)
    return item if isinstance(item, (tuple, dict)) else (item,)


def _is_composite(leaf: Any) -> bool:
    return isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor))


def _common_spec(items: list[Any]) -> Any:
    """The type that the batches share: of any number of rows, and of any size along an axis where they differ."""

    def spec(*leaves: Any) -> Any:
        if leaves[0] is None:
            return tf.OptionalSpec(None)
        if _is_composite(leaves[0]):
            return tf.type_spec_from_value(leaves[0])
        arrays = [leaf if tf.is_tensor(leaf) else np.asarray(leaf) for leaf in leaves]
        rank = {len(array.shape) for array in arrays}
        if len(rank) > 1:
            return tf.TensorSpec(None, arrays[0].dtype)
        sizes = [
            None if axis == 0 or len({array.shape[axis] for array in arrays}) > 1 else arrays[0].shape[axis]
            for axis in range(rank.pop())
        ]
        return tf.TensorSpec(sizes, arrays[0].dtype)

    return keras.tree.map_structure(spec, *items, none_is_leaf=True)


def _as_spec(item: Any, spec: Any, number: int, epoch: int) -> Any:
    """The batch, checked against the type of the first ones, which the compiled step was made for."""
    problems: list[str] = []

    def leaf(array: Any, wanted: Any) -> Any:
        if array is None:
            return tf.experimental.Optional.empty(None)
        if _is_composite(array) or not isinstance(wanted, tf.TensorSpec):
            return array
        array = array if tf.is_tensor(array) else np.asarray(array)
        if not wanted.shape.is_compatible_with(array.shape):
            problems.append(f"an array of shape {tuple(array.shape)}, where the first batches have {tuple(wanted.shape)}")
        if tf.as_dtype(array.dtype) != wanted.dtype:
            problems.append(f"values of type {tf.as_dtype(array.dtype).name}, where the first batches have {wanted.dtype.name}")
        return array

    try:
        made = keras.tree.map_structure(leaf, item, spec, none_is_leaf=True)
    except (TypeError, ValueError) as error:
        problems.append(f"a structure that the first batches don't have: {str(error).splitlines()[0]}")
    if problems:
        raise DataError(
            f"Reading batch {number} of pass {epoch} over the training data.",
            found=problems,
            fix="give batches that differ in their number of rows only",
        )
    return made


def _weighted(dataset: Any, class_weight: Any) -> Any:
    """The weight of each row by its class, as Keras's `fit` adds it."""
    table = tf.constant([class_weight.get(number, 1.0) for number in range(max(class_weight) + 1)])

    def add(*parts: Any) -> Any:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(parts[0] if len(parts) == 1 else parts)
        if weight is not None:
            raise DataError(
                "Weighting the classes.",
                found="class_weight, and rows that have weights of their own",
                fix="give one of the two: multiply the rows' weights by their class's",
            )
        labels = y
        if labels.shape.rank is None or labels.shape.rank >= 2:
            labels = tf.cond(
                tf.shape(y)[-1] > 1,
                lambda: tf.argmax(y, axis=-1, output_type=tf.int32),
                lambda: tf.cast(tf.round(tf.reshape(y, tf.shape(y)[:-1])), tf.int32),
            )
        return x, y, tf.gather(table, tf.cast(tf.round(labels), tf.int32))

    return dataset.map(add).prefetch(tf.data.AUTOTUNE)
