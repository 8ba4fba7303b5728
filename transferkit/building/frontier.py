"""Splits a model at the edge of what is frozen: a prefix that gives the same numbers every epoch, and the suffix that trains.

A call belongs to the prefix when nothing in it can change from epoch to epoch or from batch to batch: it has no weights that
train, moves no state, draws no random number, adds no loss, gives each row the same whatever rows stand beside it, and reads
only from calls of which the same holds. Part of that is known from the phase; the rest is tried out on a few rows. Among the
places to cut that leave every frozen weight in the prefix, the one with the fewest bytes a row is taken: a minimum cut (Ford
and Fulkerson 1956), found by shortest augmenting paths (Edmonds and Karp 1972). May import Keras and the floors below.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit._table import Table, Tabular
from transferkit.building.graph import (
    AttachMask,
    Call,
    Graph,
    GraphModel,
    ReadMask,
    Ref,
    Spec,
    as_declared,
    flat_inputs,
    is_functional,
    run_call,
    trace,
)
from transferkit.building.pca import PCA
from transferkit.errors import ModelError, did_you_mean, shorten

__all__ = ["Boundary", "Split", "split"]

#: How many bytes a value takes where the dtype's name doesn't say it.
_BYTES = {"bool": 1, "bfloat16": 2, "string": 32}
#: Rows of the trial batch. Three, so that another order of them is no mere reversal; more would only cost time.
_TRIAL_ROWS = 3


@dataclass(frozen=True)
class Boundary:
    """A tensor that the prefix hands to the suffix.

    Args:
        name: The path of the layer that gives it.
        shape: Of one row; None where it varies.
        dtype: Its dtype.
        nbytes: Of one row.
        masked: Whether a mask comes with it.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    nbytes: int
    masked: bool


@dataclass(frozen=True)
class Split(Tabular):
    """A model in two parts that share its layers.

    Args:
        prefix: Gives the boundary tensors, in order, then the masks of those that carry one: one tensor, or a list of several.
            None when nothing can be computed once.
        suffix: Takes what the prefix gives, and gives what the model gives. None when the prefix is.
        whole: The model with its frozen part in inference mode, whatever `training` says; what `suffix(prefix(x))` is equal to
            when training. None when the model's graph can't be read.
        boundary: The tensors between the two.
        cached: The paths of the layers in the prefix.
        blocked: For each layer at which the prefix ends, why it is not part of it.
        reason: Why there is no prefix; empty when there is one.
    """

    prefix: Any
    suffix: Any
    whole: Any = field(repr=False)
    boundary: tuple[Boundary, ...]
    cached: tuple[str, ...]
    blocked: tuple[tuple[str, str], ...]
    reason: str

    @property
    def nbytes(self) -> int:
        """Bytes of one row at the boundary."""
        return sum(item.nbytes for item in self.boundary)

    def __bool__(self) -> bool:
        return self.prefix is not None

    def table(self) -> Table:
        """What crosses the boundary, and why the prefix ends there."""
        if self.prefix is None:
            return Table(columns=(), rows=(), title=f"Nothing is computed once: {self.reason}")
        rows = [
            (item.name, "×".join("?" if d is None else str(d) for d in item.shape) or "1", item.dtype, f"{item.nbytes:,}")
            for item in self.boundary
        ]
        return Table(
            columns=("computed once, up to", ">shape of a row", "dtype", ">bytes a row"),
            rows=rows,
            title=f"{len(self.cached)} layers are computed once, {self.nbytes:,} bytes a row",
            notes=tuple(f"ends at {name}: {why}" for name, why in self.blocked),
        )

    def to_dict(self) -> dict[str, Any]:
        """The split as plain values."""
        return {
            "boundary": [vars(item) for item in self.boundary],
            "bytes_per_row": self.nbytes,
            "cached": list(self.cached),
            "blocked": dict(self.blocked),
            "reason": self.reason,
        }


def split(
    model: Any,
    *,
    frozen: Collection[Any] | None = None,
    at: Sequence[str] | None = None,
    sample: Any = None,
    inference: bool = True,
) -> Split:
    """Splits the model at its freeze frontier; the model itself isn't changed.

    Args:
        model: Any Keras model. Functional ones, built Sequential ones, and both nested in each other are split; of another kind
            `reason` says why it is computed in full.
        frozen: The layers (or nested models) that don't train and run in inference mode. None reads the `trainable` flags.
        at: Paths of layers to cut behind, rather than where the most is computed once for the fewest bytes.
        sample: A few rows of the model's input, to try the layers on; without it, rows are made up from the declared shapes.
        inference: Whether dropout and noise between frozen layers are off. False leaves them on, as Keras does, and the prefix
            then ends before the first.

    Raises:
        ModelError: when `at` names a layer that isn't there, or a cut that isn't legal, with the reason for each.

    Example:
        >>> import keras
        >>> x = keras.Input((8,))
        >>> model = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.Dense(4, name="body")(x)))
        >>> model.get_layer("body").trainable = False
        >>> print(split(model))
        1 layers are computed once, 16 bytes a row
        computed once, up to  shape of a row  dtype    bytes a row
        ────────────────────  ──────────────  ───────  ───────────
        body                               4  float32           16
        ends at head: it trains
    """
    graph, why = _graph_of(model)
    if graph is None:
        return _whole_only(None, why, at=at)
    statics = _Statics(graph, frozen=frozen, inference=inference)
    statics.try_out(_trial_rows(graph, sample))
    chosen = _cheapest(graph, statics) if at is None else _behind(graph, statics, at)
    return _assemble(model, graph, statics, chosen)


def _graph_of(model: Any) -> tuple[Graph | None, str]:
    overridden = [name for name in _STEP_METHODS if is_functional(model) and _is_own(model, name)]
    if overridden:
        return None, f"{type(model).__name__} has its own {', '.join(overridden)}, which must see the whole model"
    try:
        return trace(model), ""
    except ModelError as error:
        return None, error.found[0]


#: Methods by which a model's class decides how it trains; a suffix of another class would leave them out.
_STEP_METHODS = ("train_step", "test_step", "compute_loss", "compute_metrics")


def _is_own(model: Any, name: str) -> bool:
    return getattr(type(model), name) is not getattr(keras.Model, name)


def _whole_only(whole: Any, reason: str, *, at: Sequence[str] | None = None) -> Split:
    if at is not None:
        raise ModelError(f"Cutting behind {shorten(at)}.", found=reason)
    return Split(prefix=None, suffix=None, whole=whole, boundary=(), cached=(), blocked=(), reason=reason)


def _trial_rows(graph: Graph, sample: Any) -> dict[int, Any]:
    """A small batch for the model's inputs, by tensor number."""
    if sample is not None:
        flat = flat_inputs(sample, graph.input_structure, graph.specs)
        if len(flat) == len(graph.inputs):
            rows = min(_TRIAL_ROWS, *(len(part) for part in flat))
            return {number: np.asarray(part[:rows]) for number, part in zip(graph.inputs, flat, strict=True)}
    return {number: _made_up(graph.specs[number]) for number in graph.inputs}


class _Statics:
    """Which calls give the same numbers every time, and why the others don't."""

    def __init__(self, graph: Graph, *, frozen: Collection[Any] | None, inference: bool) -> None:
        self.graph = graph
        self.inference = inference
        self._frozen = None if frozen is None else {id(v) for layer in frozen for v in layer.variables}
        self._frozen_layers = None if frozen is None else {id(layer) for layer in frozen}
        #: By index of call: why it isn't constant, apart from what it reads.
        self.own: dict[int, str] = {}
        self.masked: set[int] = set()
        self.nbytes: dict[int, int] = {}
        self._random: set[int] = set()
        self._values: dict[int, Any] = {}
        self._rows = 0
        self._producers = _producers(graph)
        self._read_mask, self._attach_mask = ReadMask(), AttachMask()

    # -- what the phase says

    def is_frozen(self, call: Call) -> bool:
        """Whether the call has weights and the phase keeps all of them."""
        weights = _weights(call)
        if not weights:
            return False
        if self._frozen is None:
            return not call.operation.trainable or not call.operation.trainable_weights
        return all(id(weight) in self._frozen for weight in weights)

    def trains(self, call: Call) -> bool:
        if not _weights(call) or self.is_frozen(call):
            return False
        # A layer whose weights never train (Normalization) is no one's to freeze; whether it moves them is tried out.
        return bool(call.operation.trainable_weights) or not call.operation.trainable

    # -- what only running it shows

    def try_out(self, rows: dict[int, Any]) -> None:
        """Finds what each call does besides computing; those of the user's own code are run on a few rows for it."""
        watched = {id(v): (v, _numpy(v)) for call in self.graph.calls for v in self._watched(call)}
        self._rows = len(next(iter(rows.values()))) if rows else _TRIAL_ROWS
        self._values = {n: as_declared(value, self.graph.specs[n]) for n, value in rows.items()}
        known = set(self.graph.inputs)
        try:
            for index, call in enumerate(self.graph.calls):
                if self.trains(call):
                    self.own[index] = "it trains"
                elif isinstance(call.operation, PCA):
                    self.own[index] = "it learns from each run's own rows, and what comes before it is the same for all runs"
                elif known.issuperset(call.inputs):
                    why = self._try_simple(index, call) if self._is_simple(call) else self._try_other(index, call)
                    if why:
                        self.own[index] = why
                    else:
                        known |= set(call.outputs)
            self._place_randomness()
            self._measure()
        finally:
            self._values = {}
            for variable, value in watched.values():
                if not _same(_numpy(variable), value):
                    variable.assign(value)

    def _value(self, number: int) -> Any:
        """The tensor on the trial rows, computed when it is first asked for."""
        waiting = [number]
        while waiting:
            wanted = waiting[-1]
            if wanted in self._values:
                waiting.pop()
                continue
            call = self.graph.calls[self._producers[wanted]]
            missing = [n for n in call.inputs if n not in self._values]
            if missing:
                waiting.extend(missing)
                continue
            outputs = tf.nest.flatten(run_call(call, self._values, training=False))
            self._values.update(zip(call.outputs, outputs, strict=True))
        return self._values[number]

    def _watched(self, call: Call) -> list[Any]:
        """The variables that the call might write: seeds, statistics, states; any of them in code that isn't Keras's."""
        if not call.is_layer:
            return []
        layer = call.operation
        kept = not layer.weights or (self.is_frozen(call) and (self._frozen is not None or not layer.trainable))
        if kept and self._is_simple(call) and not getattr(layer, "stateful", False):
            weights = {id(v) for v in layer.weights}
            return [v for v in layer.variables if id(v) not in weights]
        trained = {id(v) for v in layer.trainable_variables}
        return [v for v in layer.variables if id(v) not in trained]

    @staticmethod
    def _is_simple(call: Call) -> bool:
        """Whether it is a layer of Keras's own that treats each row for itself, whose ways are known without running it."""
        layer = call.operation
        if not call.is_layer or type(layer).__module__.split(".")[0] != "keras":
            return False
        if isinstance(layer, (keras.layers.Lambda, keras.layers.Wrapper, keras.Model)) or type(layer) is keras.layers.RNN:
            return False  # the user's code may be inside
        if getattr(layer, "sparse", False) or getattr(layer, "ragged", False):
            return False
        axes = [axis for name in ("axis", "axes") for axis in tf.nest.flatten(getattr(layer, name, None)) if axis is not None]
        return all(isinstance(axis, int) and axis != 0 for axis in axes) and (not axes or min(axes) >= -1)

    def _try_simple(self, index: int, call: Call) -> str:
        layer = call.operation
        if layer.activity_regularizer is not None:
            return "it adds a loss, which the suffix would miss"
        watched = self._watched(call)
        if not watched:
            return ""
        # Its input needn't be the real one: only whether it moves a seed or a state is asked.
        before = [_numpy(v) for v in watched]
        tensors = {n: self._values[n] if n in self._values else _made_up(self.graph.specs[n]) for n in call.inputs}
        run_call(call, tensors, training=False)
        if _moved(watched, before):
            return "it changes its state when it is used"
        if call.takes_training and not self._said_frozen(call):
            run_call(call, tensors, training=True)
            return self._judge(index, call, _moved(watched, before), differs=False)
        return ""

    def _try_other(self, index: int, call: Call) -> str:
        for number in call.inputs:
            self._value(number)
        tensors = self._values
        watched = self._watched(call)
        before = [_numpy(v) for v in watched]
        outputs = tf.nest.flatten(run_call(call, tensors, training=False))
        if not all(isinstance(value, tf.Tensor) for value in outputs):
            return "it gives something other than a dense tensor"
        if _losses_added(call):
            return "it adds a loss, which the suffix would miss"
        if _moved(watched, before):
            return "it changes its state when it is used"
        again = tf.nest.flatten(run_call(call, tensors, training=False))
        if not all(_same(_numpy(a), _numpy(b)) for a, b in zip(outputs, again, strict=True)):
            return "it gives another result each time"
        if any(value.shape.rank == 0 or value.shape[0] != self._rows for value in outputs):
            return "its output doesn't have one row for each row of its input"
        some = np.array([self._rows - 1, 0][: self._rows])
        picked = {number: self._pick(tensors[number], some) for number in call.inputs}
        others = tf.nest.flatten(run_call(call, picked, training=False))
        if not all(_close(_numpy(a)[some], _numpy(b)) for a, b in zip(outputs, others, strict=True)):
            return "its output for a row depends on the rows beside it"
        self._values.update(zip(call.outputs, outputs, strict=True))
        if call.takes_training and not self._said_frozen(call):
            trained = tf.nest.flatten(run_call(call, tensors, training=True))
            differs = not all(_same(_numpy(a), _numpy(b)) for a, b in zip(outputs, trained, strict=True))
            return self._judge(index, call, _moved(watched, before), differs=differs)
        return ""

    def _said_frozen(self, call: Call) -> bool:
        """Frozen by the plan, whose flags aren't set yet; run in training mode it would show what it does without them."""
        return self._frozen is not None and self.inference and self.is_frozen(call)

    def _judge(self, index: int, call: Call, moved: list[Any], *, differs: bool) -> str:
        weights = {id(v) for v in _weights(call)}
        if any(id(v) in weights for v in moved):
            return "it moves its statistics in training"
        if (moved or differs) and not (self.inference and self.is_frozen(call)):
            self._random.add(index)
        return ""

    def _pick(self, value: Any, rows: np.ndarray[Any, Any]) -> Any:
        picked = tf.gather(value, rows)
        mask = self._read_mask(value)
        return picked if mask is None else self._attach_mask([picked, tf.gather(mask, rows)])

    def _measure(self) -> None:
        """The bytes of every constant tensor, and which of them carry a mask."""
        constant = self.constant()
        calls = [self.graph.calls[index] for index in sorted(constant)]
        run = any(not self._is_simple(call) or _makes_mask(call) for call in calls)
        for number in (*self.graph.inputs, *(number for call in calls for number in call.outputs)):
            spec = self.graph.specs[number]
            shape = spec.shape[1:]
            if run or any(length is None for length in shape):
                value = self._value(number)
                shape = tuple(value.shape[1:])
                if self._read_mask(value) is not None:
                    self.masked.add(number)
            size = _BYTES.get(spec.dtype) or np.dtype(spec.dtype).itemsize
            self.nbytes[number] = math.prod(length or 1 for length in shape) * size

    def _place_randomness(self) -> None:
        """Keeps dropout and noise on, except where it lies between frozen layers and `inference` is meant."""
        readers = _readers(self.graph)
        for index in sorted(self._random):
            call = self.graph.calls[index]
            if self.inference and self._lies_frozen(index, call, readers):
                continue
            self.own[index] = "it is random in training"

    def _lies_frozen(self, index: int, call: Call, readers: dict[int, list[int]]) -> bool:
        if self._frozen_layers is not None and id(call.operation) in self._frozen_layers and not _weights(call):
            return True
        behind = self._next_weights(index, readers)
        ahead = _ancestors(self.graph, [index]) - {index}
        frozen_before = any(self.is_frozen(self.graph.calls[i]) for i in ahead)
        # Before the first weights it is augmentation, which is never dropped in silence.
        return frozen_before and bool(behind) and all(i is not None and self.is_frozen(self.graph.calls[i]) for i in behind)

    def _next_weights(self, index: int, readers: dict[int, list[int]]) -> set[int | None]:
        """The first calls with weights on every way to the outputs; None where an output comes first."""
        found: set[int | None] = set()
        seen: set[int] = set()
        waiting = [index]
        while waiting:
            call = self.graph.calls[waiting.pop()]
            if set(call.outputs) & set(self.graph.outputs):
                found.add(None)
            for number in call.outputs:
                for reader in readers.get(number, []):
                    if reader in seen:
                        continue
                    seen.add(reader)
                    if _weights(self.graph.calls[reader]):
                        found.add(reader)
                    else:
                        waiting.append(reader)
        return found

    # -- the outcome

    def constant(self) -> set[int]:
        """The calls that give the same numbers every time."""
        tensors = set(self.graph.inputs)
        calls: set[int] = set()
        for index, call in enumerate(self.graph.calls):
            if index not in self.own and tensors.issuperset(call.inputs):
                calls.add(index)
                tensors |= set(call.outputs)
        return calls


def _weights(call: Call) -> list[Any]:
    return list(call.operation.weights) if call.is_layer else []


def _moved(variables: list[Any], before: list[Any]) -> list[Any]:
    return [v for v, old in zip(variables, before, strict=True) if not _same(old, _numpy(v))]


def _numpy(value: Any) -> Any:
    return np.array(value.numpy())


def _made_up(spec: Spec) -> Any:
    """A tensor of the shape and dtype, of values that no layer refuses."""
    shape = (spec.shape[0] or _TRIAL_ROWS, *(length or 32 for length in spec.shape[1:]))
    if spec.dtype == "string":
        return tf.fill(shape, "a")
    if tf.as_dtype(spec.dtype).is_floating:
        return tf.cast(np.random.default_rng(0).uniform(-1, 1, shape), spec.dtype)
    return tf.cast(np.random.default_rng(0).integers(0, 2, shape), spec.dtype)


def _makes_mask(call: Call) -> bool:
    return isinstance(call.operation, keras.layers.Masking) or bool(getattr(call.operation, "mask_zero", False))


def _losses_added(call: Call) -> int:
    if not call.is_layer:
        return 0
    regularized = sum(getattr(v, "regularizer", None) is not None for v in call.operation.trainable_variables)
    return len(call.operation.losses) - regularized


def _same(one: Any, other: Any) -> bool:
    equal_nan = one.dtype.kind in "fc"
    return one.shape == other.shape and bool(np.array_equal(one, other, equal_nan=equal_nan))


def _close(one: Any, other: Any) -> bool:
    """Equal but for the rounding that another batch size brings; the measure is the largest value."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "fcV":
        return bool(np.array_equal(one, other))
    one, other = one.astype("float64"), other.astype("float64")
    scale = np.max(np.abs(one), initial=0.0, where=np.isfinite(one))
    return bool(np.allclose(one, other, rtol=0, atol=1e-2 * scale if one.size else 0, equal_nan=True))


def _readers(graph: Graph) -> dict[int, list[int]]:
    readers: dict[int, list[int]] = collections.defaultdict(list)
    for index, call in enumerate(graph.calls):
        for number in call.inputs:
            readers[number].append(index)
    return readers


def _producers(graph: Graph) -> dict[int, int]:
    return {number: index for index, call in enumerate(graph.calls) for number in call.outputs}


def _ancestors(graph: Graph, indices: Iterable[int]) -> set[int]:
    """The calls and all that they read from."""
    producers = _producers(graph)
    found: set[int] = set()
    waiting = list(indices)
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting.extend(producers[number] for number in graph.calls[index].inputs if number in producers)
    return found


def _behind(graph: Graph, statics: _Statics, at: Sequence[str]) -> set[int]:
    """The calls up to the layers named, if all of them are constant."""
    asked = f"Cutting behind {shorten(at)}."
    paths = [call.path for call in graph.calls]
    missing = [name for name in at if name not in paths]
    if missing:
        raise ModelError(
            asked,
            found=[f"no layer {name!r}{did_you_mean(name, paths)}" for name in missing],
            fix=f"the layers are {shorten(dict.fromkeys(paths))}",
        )
    wanted = _ancestors(graph, (index for index, path in enumerate(paths) if path in at))
    constant, own = statics.constant(), statics.own
    problems = [f"{graph.calls[index].path}: {own[index]}" for index in sorted(wanted - constant) if index in own]
    if problems:
        raise ModelError(
            asked,
            found=problems,
            cause="what lies before the cut is computed once, so it must give the same numbers in every epoch",
            fix="cut earlier, or freeze those layers",
        )
    return wanted


def _cheapest(graph: Graph, statics: _Statics) -> set[int]:
    """The calls of the prefix that keeps every constant call with weights and hands over the fewest bytes.

    Nodes of the flow network: a call is on the source's side when it is in the prefix; a tensor, when all that reads it is.
    """
    constant = statics.constant()
    flow = _Flow()
    readers = _readers(graph)

    def tensor(number: int, giver: Any) -> None:
        # One more than the bytes, in thousandths: of cuts with equal bytes, the one through fewer tensors.
        flow.edge(giver, ("tensor", number), 1000 * statics.nbytes.get(number, 0) + 1)
        for reader in readers.get(number, []):
            flow.edge(("tensor", number), ("call", reader), _Flow.MOST)
            flow.edge(("call", reader), giver, _Flow.MOST)
        if number in graph.outputs:
            flow.edge(("tensor", number), "sink", _Flow.MOST)

    for number in graph.inputs:
        flow.edge("source", ("input", number), _Flow.MOST)
        tensor(number, ("input", number))
    for index, call in enumerate(graph.calls):
        if index not in constant:
            flow.edge(("call", index), "sink", _Flow.MOST)
            continue
        if _weights(call):
            flow.edge("source", ("call", index), _Flow.MOST)
        for number in call.outputs:
            tensor(number, ("call", index))
    sink_side = flow.sink_side()
    return {index for index in constant if ("call", index) not in sink_side}


class _Flow:
    """A network of capacities, whose minimum cut nearest to the sink is asked for."""

    #: More than all bytes together; whole numbers, so that nothing is lost to rounding.
    MOST = 1 << 60

    def __init__(self) -> None:
        self.left: dict[Any, dict[Any, int]] = collections.defaultdict(dict)

    def edge(self, one: Any, other: Any, capacity: int) -> None:
        self.left[one][other] = self.left[one].get(other, 0) + capacity
        self.left[other].setdefault(one, 0)

    def sink_side(self) -> set[Any]:
        """What can still reach the sink once the flow is at its most."""
        while path := self._path():
            amount = min(self.left[a][b] for a, b in itertools.pairwise(path))
            for a, b in itertools.pairwise(path):
                self.left[a][b] -= amount
                self.left[b][a] += amount
        found = {"sink"}
        waiting: list[Any] = ["sink"]
        while waiting:
            node = waiting.pop()
            for other in self.left[node]:
                if other not in found and self.left[other][node] > 0:
                    found.add(other)
                    waiting.append(other)
        return found

    def _path(self) -> list[Any]:
        parents: dict[Any, Any] = {"source": None}
        waiting: collections.deque[Any] = collections.deque(["source"])
        while waiting:
            node = waiting.popleft()
            for other, capacity in self.left[node].items():
                if capacity > 0 and other not in parents:
                    parents[other] = node
                    waiting.append(other)
            if "sink" in parents:
                break
        path: list[Any] = []
        node = "sink" if "sink" in parents else None
        while node is not None:
            path.append(node)
            node = parents[node]
        return path[::-1]


def _assemble(model: Any, graph: Graph, statics: _Statics, chosen: set[int]) -> Split:
    calls = graph.calls
    quiet_all = frozenset(statics.constant()) if statics.inference else frozenset()
    common: dict[str, Any] = {"specs": graph.specs, "order": list(model.variables)}
    whole = GraphModel(
        calls,
        inputs=graph.inputs,
        outputs=graph.output_structure,
        quiet=quiet_all,
        input_structure=graph.input_structure,
        name=f"{model.name}_whole",
        **common,
    )
    _copy_output_names(model, whole)
    prefix_calls = [index for index in range(len(calls)) if index in chosen]
    suffix_calls = [index for index in range(len(calls)) if index not in chosen]
    blocked = _blocked(graph, statics)
    if not prefix_calls:
        why = "; ".join(f"{name}: {reason}" for name, reason in blocked) or "the model has no layers"
        return _whole_only(whole, f"every way from the inputs starts with a layer that isn't constant ({why})")
    if not suffix_calls and not any(_weights(call) for call in calls):
        return _whole_only(whole, "the model has no weights")
    given = [number for index in prefix_calls for number in calls[index].outputs]
    read = {number for index in suffix_calls for number in calls[index].inputs} | set(graph.outputs)
    crossing = [number for number in (*graph.inputs, *given) if number in read]
    masked = [number for number in crossing if number in statics.masked]
    prefix = GraphModel(
        [calls[index] for index in prefix_calls],
        inputs=graph.inputs,
        outputs=[Ref(number) for number in crossing],
        output_masks=masked,
        quiet=frozenset(range(len(prefix_calls))),
        input_structure=graph.input_structure,
        name=f"{model.name}_prefix",
        **common,
    )
    suffix = GraphModel(
        [calls[index] for index in suffix_calls],
        inputs=crossing,
        masked=masked,
        outputs=graph.output_structure,
        quiet=frozenset(place for place, index in enumerate(suffix_calls) if index in quiet_all),
        name=f"{model.name}_suffix",
        **common,
    )
    _copy_output_names(model, suffix)
    names = {number: call.path for call in calls for number in call.outputs}
    boundary = tuple(
        Boundary(
            name=names.get(number, graph.specs[number].name),
            shape=graph.specs[number].shape[1:],
            dtype=graph.specs[number].dtype,
            nbytes=statics.nbytes[number],
            masked=number in statics.masked,
        )
        for number in crossing
    )
    return Split(
        prefix=prefix,
        suffix=suffix,
        whole=whole,
        boundary=boundary,
        cached=tuple(dict.fromkeys(calls[index].path for index in prefix_calls)),
        blocked=blocked,
        reason="",
    )


def _blocked(graph: Graph, statics: _Statics) -> tuple[tuple[str, str], ...]:
    """The calls that could have been constant by what they read, and aren't, each with its reason."""
    constant = statics.constant()
    known = set(graph.inputs) | {number for index in constant for number in graph.calls[index].outputs}
    found = {
        graph.calls[index].path: why for index, why in sorted(statics.own.items()) if known.issuperset(graph.calls[index].inputs)
    }
    return tuple(found.items())


def _copy_output_names(model: Any, part: Any) -> None:
    """Lets `compile` take losses by the names of the outputs, as it does for the whole model."""
    if hasattr(model, "output_names"):
        part.output_names = list(model.output_names)
