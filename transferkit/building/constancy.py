"""Which calls of a model give the same numbers in every epoch and every batch, and why the others don't.

Part of that is known from the phase, part from the class of the layer; code of the user's is tried out on a few rows: run twice,
in inference and in training mode, with its rows in another order. May import Keras and the floors below.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from transferkit._keras import is_kerass_own, keras, tf
from transferkit.building.graph import Call, Graph, Spec, makes_mask
from transferkit.building.graph_model import AttachMask, ReadMask, as_declared, flat_inputs, run_call
from transferkit.building.pca import PCA

__all__ = ["RANDOM", "TRAINS", "Constancy", "ancestors", "nearly", "readers_of", "trial_rows", "weights_of"]

#: Why a call that is random in training isn't constant.
RANDOM = "it is random in training"
#: Why a call whose weights the phase trains isn't constant.
TRAINS = "it trains"
#: How many bytes a value takes where the dtype's name doesn't say it.
_BYTES = {"bool": 1, "bfloat16": 2, "string": 32}
#: Rows of the trial batch. Three, so that another order of them is no mere reversal; more would only cost time.
_TRIAL_ROWS = 3


def trial_rows(graph: Graph, sample: Any) -> dict[int, Any]:
    """A small batch for the model's inputs, by tensor number."""
    if sample is not None:
        flat = flat_inputs(sample, graph.input_structure, graph.specs)
        if len(flat) == len(graph.inputs):
            rows = min(_TRIAL_ROWS, *(len(part) for part in flat))
            return {number: np.asarray(part[:rows]) for number, part in zip(graph.inputs, flat, strict=True)}
    return {number: _made_up(graph.specs[number]) for number in graph.inputs}


class Constancy:
    """Which calls give the same numbers every time, and why the others don't."""

    def __init__(self, graph: Graph, *, frozen: Collection[Any] | None, inference: bool, views: bool) -> None:
        self.graph = graph
        self.inference = inference
        self._views = views
        #: Calls that are random in front of what is frozen, and stay so: each view draws anew.
        self.loud: set[int] = set()
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
        weights = weights_of(call)
        if not weights:
            return False
        if self._frozen is None:
            return not call.operation.trainable or not call.operation.trainable_weights
        return all(id(weight) in self._frozen for weight in weights)

    def trains(self, call: Call) -> bool:
        if not weights_of(call) or self.is_frozen(call):
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
                    self.own[index] = TRAINS
                elif isinstance(call.operation, PCA):
                    self.own[index] = "it learns from each run's own rows, and what comes before it is the same for all runs"
                elif known.issuperset(call.inputs):
                    why = self._try_simple(index, call) if self._is_simple(call) else self._try_guarded(index, call)
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
        if not call.is_layer or not is_kerass_own(layer):
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

    def _try_guarded(self, index: int, call: Call) -> str:
        try:
            return self._try_other(index, call)
        except Exception as error:  # the user's code: it may take batches of certain sizes only, which training in full gives it
            return f"it can't be run on {self._rows} rows ({type(error).__name__})"

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
        # Another size of batch brings other rounding.
        if not all(nearly(_numpy(a)[some], _numpy(b), within=1e-2) for a, b in zip(outputs, others, strict=True)):
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
        weights = {id(v) for v in weights_of(call)}
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
        run = any(not self._is_simple(call) or makes_mask(call.operation) for call in calls)
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
        readers = readers_of(self.graph)
        for index in sorted(self._random):
            call = self.graph.calls[index]
            if self.inference and self._lies_frozen(index, call, readers):
                continue
            behind = self._next_weights(index, readers)
            if self._views and behind and all(i is not None and self.is_frozen(self.graph.calls[i]) for i in behind):
                self.loud.add(index)
                continue
            self.own[index] = RANDOM

    def _lies_frozen(self, index: int, call: Call, readers: dict[int, list[int]]) -> bool:
        if self._frozen_layers is not None and id(call.operation) in self._frozen_layers and not weights_of(call):
            return True
        behind = self._next_weights(index, readers)
        ahead = ancestors(self.graph, [index]) - {index}
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
                    if weights_of(self.graph.calls[reader]):
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


def weights_of(call: Call) -> list[Any]:
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


def _losses_added(call: Call) -> int:
    if not call.is_layer:
        return 0
    regularized = sum(getattr(v, "regularizer", None) is not None for v in call.operation.trainable_variables)
    return len(call.operation.losses) - regularized


def _same(one: Any, other: Any) -> bool:
    equal_nan = one.dtype.kind in "fc"
    return one.shape == other.shape and bool(np.array_equal(one, other, equal_nan=equal_nan))


def nearly(one: Any, other: Any, *, within: float) -> bool:
    """Equal but for rounding: floating values to within a share of the largest."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "fcV":
        return bool(np.array_equal(one, other))
    one, other = one.astype("float64"), other.astype("float64")
    scale = np.max(np.abs(one), initial=0.0, where=np.isfinite(one))
    return bool(np.allclose(one, other, rtol=0, atol=within * scale if one.size else 0, equal_nan=True))


def readers_of(graph: Graph) -> dict[int, list[int]]:
    readers: dict[int, list[int]] = collections.defaultdict(list)
    for index, call in enumerate(graph.calls):
        for number in call.inputs:
            readers[number].append(index)
    return readers


def _producers(graph: Graph) -> dict[int, int]:
    return {number: index for index, call in enumerate(graph.calls) for number in call.outputs}


def ancestors(graph: Graph, indices: Iterable[int]) -> set[int]:
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
