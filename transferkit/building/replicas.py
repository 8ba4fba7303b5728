"""A model's passes over a batch whose rows are shared among the replicas of a strategy.

Each replica takes its rows through its own copy of the model. The outputs are brought together, so that whatever is computed of
them (any loss, any metric) is computed of the whole batch, once, as on one device. Its gradients go back to the replicas with the
rows, and what each finds for the weights is summed. Nothing has to be known of the loss: not that it is a mean, not over what.

A process has its variables once, and its replicas read them. So there is one optimizer, whose step is that of one device, and
nothing to be kept alike within a process; several processes stay alike because they begin alike and get the same gradients.

Only public calls of `tf.distribute` are used: `run`, `gather`, `reduce`, `all_reduce` and `merge_call`. May import Keras and the
floors below.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit._keras import tf
from transferkit.building.graph_model import AttachMask, ReadMask
from transferkit.placement import OTHER_ROWS, has_workers, worker_number

__all__ = ["Backward", "Pass", "Replicas", "bytes_of_all", "gathered_rows", "of_all", "of_chief", "own_places"]


@dataclass(frozen=True)
class _Shares:
    """Which rows of a batch each replica has: as many as any other, the first ones one more where they don't come out even.

    Where there are fewer rows than replicas, each takes all of them, because layers aren't made for none, and what comes of them
    counts from the first replica alone. So every row has the same part in what layers exchange, as in the statistics of a batch.

    Args:
        rows: How many the batch has.
        lengths: How many rows each replica takes.
        firsts: Where each one's begin in the batch.
        starts: Where each one's are, when all are put one after the other.
        own: How many of each one's rows count.
    """

    rows: Any
    lengths: Any
    firsts: Any
    starts: Any
    own: Any

    @classmethod
    def of(cls, rows: Any, replicas: int) -> _Shares:
        numbers = tf.range(replicas)
        even = rows // replicas + tf.cast(numbers < rows % replicas, "int32")
        few = rows < replicas
        lengths = tf.where(few, rows, even)
        firsts = tf.where(few, 0, tf.cumsum(even, exclusive=True))
        own = tf.where(few, tf.where(numbers == 0, rows, 0), even)
        return cls(rows, lengths, firsts, tf.cumsum(lengths, exclusive=True), own)

    def places(self, replica: Any) -> Any:
        """The numbers of a replica's rows in the batch."""
        return self.firsts[replica] + tf.range(self.lengths[replica])

    def part(self, replica: Any, dtype: Any) -> Any:
        """Which part of the batch's rows it has, 0 where its rows count from another."""
        return tf.cast(self.own[replica], dtype) / tf.cast(self.rows, dtype)

    def padded(self, part: Any) -> Any:
        """Something of each row, with zeros for those that don't count."""
        if part is None:
            return None
        spare = tf.reduce_sum(self.lengths) - self.rows
        return tf.concat([part, tf.zeros(tf.concat([[spare], tf.shape(part)[1:]], 0), part.dtype)], 0)


@dataclass(frozen=True)
class Pass:
    """What came of a batch.

    Args:
        flat: The outputs, one after the other, of all rows.
        added: The sum of what layers added to the loss when they were called, or None.
        masks: For each output its mask, or None.
        structure: Anything of the structure of the model's outputs.
    """

    flat: Sequence[Any]
    added: Any
    masks: Sequence[Any] = field(repr=False)
    structure: Any = field(repr=False)

    def outputs(self) -> Any:
        """The outputs in the model's structure, with their masks."""
        attach = AttachMask()
        pairs = zip(self.flat, self.masks, strict=True)
        return tf.nest.pack_sequence_as(self.structure, [part if mask is None else attach([part, mask]) for part, mask in pairs])


#: Takes the gradients for the flat outputs and for what was added, and gives those for the trainable variables.
Backward = Callable[[Sequence[Any], Any], list[Any]]


class Replicas:
    """Takes batches through a model, shared among the replicas of a strategy.

    Args:
        model: A built model, with one copy of its variables in each process.
        strategy: The strategy; its scope isn't open when the methods are called.
    """

    def __init__(self, model: Any, strategy: Any) -> None:
        self.model, self.strategy = model, strategy
        #: Whether the replicas are in several processes.
        self.several = has_workers(strategy)
        self._read_mask = ReadMask()

    def forward(self, x: Any, rows: Any = None, beside: Any = None) -> Pass:
        """The outputs of all rows in inference, on every worker.

        Args:
            x: The inputs of the whole batch, or of this worker's rows.
            rows: How many rows the whole batch has, where `x` has this worker's only.
            beside: What each worker has of all rows, labels and weights. It must be the same on all, or the step fails with
                `OTHER_ROWS`: outputs of one worker's rows would be judged by the labels of another's.
        """
        shares = self._shares(x, rows)
        structure: list[Any] = []

        def one(x: Any) -> Any:
            with tf.control_dependencies(self._check_alike(beside)):
                return self._outputs(x, shares, structure, training=False, own=rows is not None)

        with self.strategy.scope():
            flat, masks, added = self.strategy.run(one, args=(x,))
            return self._whole(flat, masks, added, shares, structure[0])

    @contextlib.contextmanager
    def training(self, x: Any, rows: Any = None, beside: Any = None) -> Iterator[tuple[Pass, Backward]]:
        """The outputs of all rows in training, on every worker, and how gradients are taken back from there.

        Layers that exchange something among the replicas must do so backwards in the context in which they did it forwards. So
        the replicas wait in the middle, in a thread of their own, for the gradients to come back.

        Args:
            x: As for `forward`.
            rows: As for `forward`.
            beside: As for `forward`.
        """
        shares = self._shares(x, rows)
        structure: list[Any] = []
        given: queue.SimpleQueue[Any] = queue.SimpleQueue()
        asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()

        def middle(strategy: Any, flat: Any, masks: Any, added: Any) -> Any:
            del strategy
            given.put(self._whole(flat, masks, added, shares, structure[0]))
            back = asked.get()
            if back is None:
                raise _AbandonedError
            return back

        def one(x: Any) -> Any:
            replica = _replica()
            alike = self._check_alike(beside)
            with tf.GradientTape() as tape:
                flat, masks, added = self._outputs(x, shares, structure, training=True, own=rows is not None)
            back, back_added = tf.distribute.get_replica_context().merge_call(middle, args=(flat, masks, added))
            start, length = shares.starts[replica], shares.lengths[replica]
            with tf.device("CPU:0"):
                cut = [None if part is None else part[start : start + length] for part in back]
            pairs = [(target, part) for target, part in zip(flat, cut, strict=True) if part is not None]
            pairs += [] if added is None else [(added, back_added)]
            targets, gradients = [target for target, _ in pairs], [part for _, part in pairs]
            found = tape.gradient(targets, self.model.trainable_variables, output_gradients=gradients)
            with tf.control_dependencies(alike):  # only now: meanwhile the workers can compare what they have
                found = [None if part is None else _same(part) for part in found]
            return _summed(found)

        def work() -> None:
            try:
                with contextlib.nullcontext() if graph is None else graph.as_default():
                    given.put(self.strategy.run(one, args=(x,)))
            except BaseException as error:  # whatever it is, the caller is told
                given.put(error)

        def backward(outputs: Sequence[Any], added: Any) -> list[Any]:
            asked.put(([shares.padded(part) for part in outputs], added))
            local = _raised(given.get())
            return [None if part is None else self.strategy.experimental_local_results(part)[0] for part in local]

        thread = threading.Thread(target=work, name="transferkit-replicas", daemon=True)
        thread.start()
        try:
            yield _raised(given.get()), backward
        finally:
            asked.put(None)  # nobody reads it where the gradients were taken back
            thread.join()

    def penalties(self, values: Sequence[Any] | None = None) -> list[Any]:
        """The penalties on weights, which are the same on every replica.

        Args:
            values: The trainable variables' values, as tensors; read from them where nothing is given.
        """
        variables = self.model.trainable_variables
        values = [tf.convert_to_tensor(variable) for variable in variables] if values is None else values
        pairs = zip(variables, values, strict=True)
        return [variable.regularizer(value) for variable, value in pairs if variable.regularizer is not None]

    # -- parts of a pass

    def _shares(self, x: Any, rows: Any) -> _Shares:
        return _Shares.of(tf.shape(tf.nest.flatten(x)[0])[0] if rows is None else rows, self.strategy.num_replicas_in_sync)

    def _check_alike(self, beside: Any) -> list[Any]:
        """In a replica: what fails where the workers don't have the same beside the inputs."""
        if not self.several:
            return []
        replicas = self.strategy.num_replicas_in_sync
        marks = _summed([tf.one_hot(_replica(), replicas) * _mark(beside)])[0]
        return [tf.debugging.assert_equal(marks, tf.fill([replicas], marks[0]), message=OTHER_ROWS)]

    def _outputs(self, x: Any, shares: _Shares, structure: list[Any], *, training: bool, own: bool) -> tuple[Any, Any, Any]:
        """A replica's own outputs, their masks, and its part of what was added to the loss."""
        replica = _replica()
        if not own:
            with tf.device("CPU:0"):  # where batches are; only the replica's rows go on from there
                x = tf.nest.map_structure(lambda leaf: tf.gather(leaf, shares.places(replica)), x)
        outputs = self.model(x, training=training)
        structure.append(outputs)
        flat = tf.nest.flatten(outputs)
        penalties = sum(variable.regularizer is not None for variable in self.model.trainable_variables)
        losses = self.model.losses
        called = [tf.reduce_sum(loss) for loss in losses[: len(losses) - penalties]]  # Keras puts penalties last
        added = tf.add_n(called) * shares.part(replica, called[0].dtype) if called else None
        masks = [self._read_mask(output) for output in flat]
        # Collectives take no truth values.
        return flat, [None if mask is None else tf.cast(mask, "int32") for mask in masks], added

    def _whole(self, flat: Any, masks: Any, added: Any, shares: _Shares, structure: Any) -> Pass:
        """What the replicas have, together; in the strategy's scope."""

        def gathered(part: Any) -> Any:
            local = self.strategy.experimental_local_results(part)
            # What is in one process needs no collective: those must have the same shape in each turn of a loop.
            whole = self.strategy.gather(part, axis=0) if self.several else tf.concat(local, 0)
            return tf.ensure_shape(whole[: shares.rows], [None, *local[0].shape[1:]])

        return Pass(
            [gathered(part) for part in flat],
            None if added is None else self.strategy.reduce("SUM", added, axis=None),
            [None if mask is None else tf.cast(gathered(mask), "bool") for mask in masks],
            structure,
        )


def of_chief(strategy: Any, values: Sequence[Any]) -> list[Any]:
    """The values that the first replica has, on every worker.

    Args:
        strategy: The strategy.
        values: Tensors of numbers; each worker's own, of the same shapes.
    """

    def one(values: Any) -> Any:
        first = _replica() == 0
        return _summed([tf.where(first, value, tf.zeros_like(value)) for value in values])

    local = strategy.run(tf.function(one, autograph=False), args=([tf.convert_to_tensor(value) for value in values],))
    return [strategy.experimental_local_results(part)[0] for part in local]


def own_places(strategy: Any) -> Callable[[Any], Any] | None:
    """Gives the places within a batch, by how many rows it has, that this process computes; None where it has several replicas,
    or is the only process."""
    if not has_workers(strategy) or len(strategy.extended.worker_devices) > 1:
        return None
    return lambda rows: _Shares.of(rows, strategy.num_replicas_in_sync).places(worker_number(strategy))


def gathered_rows(strategy: Any, array: Any) -> Any:
    """What each worker has of an array, one after the other, on every worker.

    Args:
        strategy: The strategy, with one replica in each process.
        array: The rows of this worker; as many axes as on the others.
    """
    with strategy.scope():
        local = strategy.run(lambda value: value, args=(tf.convert_to_tensor(array),))
        return strategy.gather(local, axis=0)


def _same(gradient: Any) -> Any:
    """The gradient as a result of an operation that is made here. Slices stay slices: optimizers take other steps by them."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.identity(gradient.values), gradient.indices, gradient.dense_shape)
    return tf.identity(gradient)


def _mark(beside: Any) -> Any:
    """A number below 2²⁴, which float32 holds exactly, that almost always differs where values or their order do."""
    with tf.device("CPU:0"):
        total = tf.constant(0)
        for part in tf.nest.flatten(beside):
            if part is None:
                continue
            leaf = tf.convert_to_tensor(part)
            numbers = tf.strings.to_hash_bucket_fast(leaf, 1 << 22) if leaf.dtype == tf.string else leaf
            bits = tf.reshape(tf.bitcast(tf.cast(numbers, "float32"), "int32"), [-1])
            total = total * 31 + tf.reduce_sum(bits * (2 * tf.range(tf.size(bits)) + 1)) + tf.size(bits)
        return tf.cast(tf.math.floormod(total, 16_777_213), "float32")


def of_all(strategy: Any, array: Any) -> Any:
    """What each replica has of an array, one above the other (replicas, …), on every worker.

    Args:
        strategy: The strategy.
        array: Of the same shape on each worker.
    """
    with strategy.scope():
        local = strategy.run(lambda value: value, args=(tf.convert_to_tensor(array)[None],))
        return strategy.gather(local, axis=0).numpy()


def bytes_of_all(strategy: Any, content: bytes) -> list[bytes]:
    """What each replica has of some bytes, on every worker.

    Args:
        strategy: The strategy.
        content: As long as it is on each worker.
    """
    lengths = [int(length) for length in of_all(strategy, np.array([len(content)]))[:, 0]]
    padded = np.zeros(max(lengths) + -max(lengths) % 4, "uint8")  # collectives take whole numbers of four bytes
    padded[: len(content)] = np.frombuffer(content, "uint8")
    every = of_all(strategy, padded.view("int32"))
    return [row.view("uint8")[:length].tobytes() for row, length in zip(every, lengths, strict=True)]


def _replica() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def _summed(values: Sequence[Any]) -> list[Any]:
    """In a replica: the sums over all replicas; None stays."""
    there = [value for value in values if value is not None]
    summed = iter(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, there) if there else [])
    return [None if value is None else next(summed) for value in values]


class _AbandonedError(Exception):
    """Ends what replicas do when nobody asks for gradients any more."""


def _raised(given: Any) -> Any:
    if isinstance(given, BaseException):
        raise given
    return given
