"""Splits a model at the edge of what is frozen: a prefix that gives the same numbers every epoch, and the suffix that trains.

A call belongs to the prefix when nothing in it can change from epoch to epoch or from batch to batch: it has no weights that
train, moves no state, draws no random number, adds no loss, gives each row the same whatever rows stand beside it, and reads
only from calls of which the same holds (`constancy`). Among the places to cut that leave every frozen weight in the prefix, the
one with the fewest bytes a row is taken (`min_cut`). May import Keras and the floors below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from transferkit._keras import keras
from transferkit._table import Table, Tabular
from transferkit.building.constancy import Constancy, ancestors, readers_of, trial_rows, weights_of
from transferkit.building.graph import Graph, Ref, is_functional, trace
from transferkit.building.graph_model import GraphModel
from transferkit.building.min_cut import Flow
from transferkit.errors import ModelError, did_you_mean, shorten

__all__ = ["Boundary", "Split", "split"]


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
        boundary: The tensors between the two.
        cached: The paths of the layers in the prefix.
        blocked: For each layer at which the prefix ends, why it is not part of it.
        reason: Why there is no prefix; empty when there is one.
    """

    prefix: Any
    suffix: Any
    boundary: tuple[Boundary, ...]
    cached: tuple[str, ...]
    blocked: tuple[tuple[str, str], ...]
    reason: str
    _still: Callable[[], Any] = field(repr=False, compare=False)
    _whole: Callable[[], Any] = field(repr=False, compare=False)

    @functools.cached_property
    def still(self) -> Any:
        """The prefix without the random augmentation that `views` lets into it."""
        return self._still()

    @functools.cached_property
    def whole(self) -> Any:
        """The model with its frozen part in inference mode, whatever `training` says; what `suffix(prefix(x))` is equal to when
        training. None when the model's graph can't be read."""
        return self._whole()

    @property
    def nbytes(self) -> int:
        """Bytes of one row at the boundary."""
        return sum(item.nbytes for item in self.boundary)

    @property
    def useful(self) -> bool:
        """Whether something with weights is computed once."""
        return self.prefix is not None and any(layer.weights for layer in self.prefix.layers)

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
        count = len(self.cached)
        return Table(
            columns=("computed once, up to", ">shape of a row", "dtype", ">bytes a row"),
            rows=rows,
            title=f"{count} layer{'s are' if count != 1 else ' is'} computed once, {self.nbytes:,} bytes a row",
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
    views: bool = False,
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
        views: Whether random augmentation in front of what is frozen belongs to the prefix, which then gives another view of
            each row each time.

    Raises:
        ModelError: when `at` names a layer that isn't there, or a cut that isn't legal, with the reason for each.

    Example:
        >>> import keras
        >>> x = keras.Input((8,))
        >>> model = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.Dense(4, name="body")(x)))
        >>> model.get_layer("body").trainable = False
        >>> print(split(model))
        1 layer is computed once, 16 bytes a row
        computed once, up to  shape of a row  dtype    bytes a row
        ────────────────────  ──────────────  ───────  ───────────
        body                               4  float32           16
        ends at head: it trains
    """
    graph, why = _graph_of(model)
    if graph is None:
        return _whole_only(lambda: None, why, at=at)
    statics = Constancy(graph, frozen=frozen, inference=inference, views=views)
    statics.try_out(trial_rows(graph, sample))
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


def _whole_only(
    whole: Callable[[], Any], reason: str, *, at: Sequence[str] | None = None, blocked: tuple[tuple[str, str], ...] = ()
) -> Split:
    if at is not None:
        raise ModelError(f"Cutting behind {shorten(at)}.", found=reason)
    return Split(None, None, boundary=(), cached=(), blocked=blocked, reason=reason, _still=lambda: None, _whole=whole)


def _behind(graph: Graph, statics: Constancy, at: Sequence[str]) -> set[int]:
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
    wanted = ancestors(graph, (index for index, path in enumerate(paths) if path in at))
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


def _cheapest(graph: Graph, statics: Constancy) -> set[int]:
    """The calls of the prefix that keeps every constant call with weights and hands over the fewest bytes.

    Nodes of the flow network: a call is on the source's side when it is in the prefix; a tensor, when all that reads it is.
    """
    constant = statics.constant()
    flow = Flow()
    readers = readers_of(graph)

    def tensor(number: int, giver: Any) -> None:
        # One more than the bytes, in thousandths: of cuts with equal bytes, the one through fewer tensors.
        flow.edge(giver, ("tensor", number), 1000 * statics.nbytes.get(number, 0) + 1)
        for reader in readers.get(number, []):
            flow.edge(("tensor", number), ("call", reader), Flow.MOST)
            flow.edge(("call", reader), giver, Flow.MOST)
        if number in graph.outputs:
            flow.edge(("tensor", number), "sink", Flow.MOST)

    for number in graph.inputs:
        flow.edge("source", ("input", number), Flow.MOST)
        tensor(number, ("input", number))
    for index, call in enumerate(graph.calls):
        if index not in constant:
            flow.edge(("call", index), "sink", Flow.MOST)
            continue
        if weights_of(call):
            flow.edge("source", ("call", index), Flow.MOST)
        for number in call.outputs:
            tensor(number, ("call", index))
    sink_side = flow.sink_side()
    return {index for index in constant if ("call", index) not in sink_side}


def _assemble(model: Any, graph: Graph, statics: Constancy, chosen: set[int]) -> Split:
    calls = graph.calls
    quiet_all = frozenset(statics.constant() - statics.loud) if statics.inference else frozenset()
    common: dict[str, Any] = {"specs": graph.specs, "order": list(model.variables)}
    name, output_names = model.name, list(getattr(model, "output_names", ()))

    def whole() -> Any:
        made = GraphModel(
            calls,
            inputs=graph.inputs,
            outputs=graph.output_structure,
            quiet=quiet_all,
            input_structure=graph.input_structure,
            name=f"{name}_whole",
            **common,
        )
        return _named_outputs(made, output_names)

    prefix_calls = [index for index in range(len(calls)) if index in chosen]
    suffix_calls = [index for index in range(len(calls)) if index not in chosen]
    blocked = _blocked(graph, statics)
    if not prefix_calls:
        why = "; ".join(f"{name}: {reason}" for name, reason in blocked) or "the model has no layers"
        return _whole_only(whole, f"every way from the inputs starts with a layer that isn't constant ({why})", blocked=blocked)
    if not suffix_calls and not any(weights_of(call) for call in calls):
        return _whole_only(whole, "the model has no weights")
    given = [number for index in prefix_calls for number in calls[index].outputs]
    read = {number for index in suffix_calls for number in calls[index].inputs} | set(graph.outputs)
    crossing = [number for number in (*graph.inputs, *given) if number in read]
    masked = [number for number in crossing if number in statics.masked]
    loud = frozenset(place for place, index in enumerate(prefix_calls) if index in statics.loud)

    def before(random: frozenset[int]) -> Any:
        return GraphModel(
            [calls[index] for index in prefix_calls],
            inputs=graph.inputs,
            outputs=[Ref(number) for number in crossing],
            output_masks=masked,
            quiet=frozenset(range(len(prefix_calls))) - random,
            loud=random,
            input_structure=graph.input_structure,
            name=f"{name}_prefix",
            **common,
        )

    prefix = before(loud)
    suffix = GraphModel(
        [calls[index] for index in suffix_calls],
        inputs=crossing,
        masked=masked,
        outputs=graph.output_structure,
        quiet=frozenset(place for place, index in enumerate(suffix_calls) if index in quiet_all),
        name=f"{name}_suffix",
        **common,
    )
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
        suffix=_named_outputs(suffix, output_names),
        boundary=boundary,
        cached=tuple(dict.fromkeys(calls[index].path for index in prefix_calls)),
        blocked=blocked,
        reason="",
        _still=lambda: before(frozenset()) if loud else prefix,
        _whole=whole,
    )


def _blocked(graph: Graph, statics: Constancy) -> tuple[tuple[str, str], ...]:
    """The calls that could have been constant by what they read, and aren't, each with its reason."""
    constant = statics.constant()
    known = set(graph.inputs) | {number for index in constant for number in graph.calls[index].outputs}
    found = {
        graph.calls[index].path: why for index, why in sorted(statics.own.items()) if known.issuperset(graph.calls[index].inputs)
    }
    return tuple(found.items())


def _named_outputs(part: Any, names: list[str]) -> Any:
    """Lets `compile` take losses by the names of the outputs, as it does for the whole model."""
    if names:
        part.output_names = names
    return part
