"""How an array of a file becomes a variable of another shape: another layout, other channels, classes, grids or vocabularies.

Each adaptation is decided from shapes and rules alone, has a sentence that names it in the report, and leaves to the variable's
present values what the file can't give (the rows of new classes).
Pure: NumPy only. Resizing follows Keys, "Cubic convolution interpolation for digital image processing", 1981, with a = −1/2, and
half-pixel centres; relative position tables as in Liu et al., "Swin Transformer", 2021.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit.weights.mapping import FileArray, ModelVariable
from transferkit.weights.names import covers, kind_of

__all__ = ["Adaptation", "Channels", "Classes", "Positions", "Settings", "Vocabulary", "adaptation", "resize_grid"]

Array = np.ndarray[Any, Any]
Step = Callable[[Array, Callable[[], Array]], Array]

_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_TRANSPOSED = frozenset({"conv1dtranspose", "conv2dtranspose", "conv3dtranspose"})
_DEPTHWISE = frozenset({"depthwiseconv1d", "depthwiseconv2d"})
_SEPARABLE = frozenset({"separableconv1d", "separableconv2d"})


@dataclass(frozen=True)
class Channels:
    """Another number of input channels: `how` is `auto`, `sum`, `repeat` or `zero`; for the layers that match `patterns`."""

    how: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Classes:
    """Another set of classes: their names in the file's and in the model's order, for the layers that match `patterns`."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class Positions:
    """Another grid of positions.

    Args:
        patterns: The variables it is for.
        relative: Whether they are tables of relative offsets, `(2h−1)(2w−1)` rows, rather than one row for each position.
        extra: Rows before the grid that aren't positions (class tokens); kept as they are.
        source: Rows and columns of the file's grid; None for a square one.
        target: Of the model's.
        method: `bicubic` or `bilinear`.
    """

    patterns: tuple[str, ...]
    relative: bool = False
    extra: int = 0
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    method: str = "bicubic"


@dataclass(frozen=True)
class Vocabulary:
    """Another vocabulary: the words in the file's and in the model's order; both empty to keep the first rows both have."""

    patterns: tuple[str, ...]
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Every adaptation that was asked for.

    Args:
        layout: `keras` or `torch`: how the file stores kernels.
        flattened: For Dense layers whose rows the file has in channels-first order, by path: the shape `(height, width,
            channels)` in whose order the model has them.
        channels: For other input channels.
        classes: For other classes.
        positions: For other position grids.
        vocabularies: For other vocabularies.
    """

    layout: str = "keras"
    flattened: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    channels: tuple[Channels, ...] = ()
    classes: tuple[Classes, ...] = ()
    positions: tuple[Positions, ...] = ()
    vocabularies: tuple[Vocabulary, ...] = ()

    @functools.cached_property
    def plain(self) -> bool:
        """Whether nothing was asked for, so that an array fits where the shapes are equal."""
        return self == Settings()


@dataclass(frozen=True)
class Adaptation:
    """What makes an array fit.

    Args:
        text: What is done, for the report; empty where the array is taken as it stands.
        apply: Takes the file's array and a function that gives the variable's present values; gives the new ones.
        problem: Why nothing makes it fit, where a rule was asked for and can't be followed.
    """

    text: str
    apply: Step
    problem: str = ""


def _as_it_is(array: Array, current: Callable[[], Array]) -> Array:
    del current
    return array


_PLAIN = Adaptation("", _as_it_is)


def _refused(problem: str) -> Adaptation:
    return Adaptation("", _as_it_is, problem)


def adaptation(source: FileArray, target: ModelVariable, settings: Settings) -> Adaptation | None:
    """What makes `source` fit `target` under the settings, or None when nothing does."""
    if settings.plain and source.shape == target.shape:
        return _PLAIN
    texts: list[str] = []
    steps: list[Step] = []
    shape = source.shape
    if settings.layout == "torch":
        relaid = _from_torch(shape, target, settings.flattened.get(target.path, ()))
        if relaid is None:
            return None
        shape, text, step = relaid
        if text:
            texts.append(text)
            steps.append(step)
    elif settings.flattened and target.variable == "kernel" and kind_of(target.kind) == "dense":
        rows = settings.flattened.get(target.path, ())
        if len(shape) == 2 and math.prod(rows) == shape[0]:
            texts.append(f"rows {_from_first_to_last(rows)}")
            steps.append(lambda array, _: _rows_channels_last(array.T, rows))
    for chosen in (_by_class, _by_word, _by_channel, _by_position):
        found = chosen(shape, target, settings)
        if found is not None:
            if found.problem:
                return found
            texts.append(found.text)
            steps.append(found.apply)
            shape = target.shape
            break
    if shape != target.shape and kind_of(target.kind) == "prelu" and _without_ones(shape) in ((), _without_ones(target.shape)):
        alone = math.prod(shape) == 1 and math.prod(target.shape) != 1  # PyTorch's one slope for all channels
        texts.append("one slope for all" if alone else f"reshaped from {shape}")
        steps.append(lambda array, _: np.full(target.shape, array) if alone else array.reshape(target.shape))
        shape = target.shape
    if shape != target.shape:
        return None

    def apply(array: Array, current: Callable[[], Array]) -> Array:
        for step in steps:
            array = step(array, current)
        return array

    return Adaptation("; ".join(texts), apply if steps else _as_it_is)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


# PyTorch's layout


def _from_torch(
    shape: tuple[int, ...], target: ModelVariable, flattened: tuple[int, ...]
) -> tuple[tuple[int, ...], str, Step] | None:
    """Shape, words and step that bring a PyTorch tensor into Keras's layout; None where the kind of layer isn't known."""
    kind, variable, rank = kind_of(target.kind), target.variable, len(shape)
    if variable == "kernel" and kind == "dense" and rank == 2:
        units, features = shape
        if flattened and math.prod(flattened) == features:
            words = f"transposed, rows {_from_first_to_last(flattened)}"
            return (features, units), words, lambda array, _: _rows_channels_last(array, flattened)
        return (features, units), "transposed", lambda array, _: array.T
    if variable == "kernel" and (kind in _CONVOLUTIONS or kind in _TRANSPOSED) and rank >= 3:
        # Of a transposed convolution PyTorch keeps (in, out, …), Keras (…, out, in): the same permutation.
        order = (*range(2, rank), 1, 0)
        return tuple(shape[i] for i in order), f"axes {order}", lambda array, _: array.transpose(order)
    if variable == "pointwise_kernel" and kind in _SEPARABLE and rank >= 3:
        order = (*range(2, rank), 1, 0)
        return tuple(shape[i] for i in order), f"axes {order}", lambda array, _: array.transpose(order)
    if variable in ("kernel", "depthwise_kernel") and kind in _DEPTHWISE | _SEPARABLE and rank >= 3 and shape[1] == 1:
        order = (*range(2, rank), 1, 0)
        inputs = target.shape[-2]
        if not inputs or shape[0] % inputs:
            return None
        new = (*shape[2:], inputs, shape[0] // inputs)
        return new, f"axes {order}, then {new}", lambda array, _: array.transpose(order).reshape(new)
    if variable == "kernel" and kind in ("lstm", "gru", "simplernn"):
        return shape, "", _as_it_is  # `torch_layouts` has made it
    if kind == "einsumdense" and (split := _heads(variable, shape, target.shape)) is not None:
        return split
    if rank <= 1 or variable in ("embeddings", "recurrent_kernel"):
        return shape, "", _as_it_is
    if variable in ("kernel", "depthwise_kernel", "pointwise_kernel"):
        return None
    return shape, "", _as_it_is


def _heads(variable: str, shape: tuple[int, ...], to: tuple[int, ...]) -> tuple[tuple[int, ...], str, Step] | None:
    """A projection of attention: PyTorch's (outputs, inputs) as Keras's (inputs, heads, width) or (heads, width, outputs)."""
    if variable == "bias" and len(shape) == 1 and math.prod(to) == shape[0]:
        return to, "" if to == shape else f"{shape} as {to}", lambda array, _: array.reshape(to)
    if (
        variable != "kernel"
        or len(shape) != 2
        or not any(math.prod(to[:split]) == shape[1] and math.prod(to[split:]) == shape[0] for split in range(1, len(to)))
    ):
        return None
    return to, "transposed" if len(to) == 2 else f"transposed, {shape[::-1]} as {to}", lambda array, _: array.T.reshape(to)


def _from_first_to_last(flattened: Sequence[int]) -> str:
    return f"from channels-first to channels-last order of {tuple(flattened)}"


def _rows_channels_last(weight: Array, flattened: Sequence[int]) -> Array:
    """A weight `(units, features)` whose features were flattened channels first, as `(features, units)` channels last."""
    *space, channels = flattened
    units, features = weight.shape
    axes = (*range(2, 2 + len(space)), 1, 0)
    return weight.reshape(units, channels, *space).transpose(axes).reshape(features, units)


# Classes and vocabularies


def _by_class(shape: tuple[int, ...], target: ModelVariable, settings: Settings) -> Adaptation | None:
    for rule in settings.classes:
        if not any(covers(pattern, target.name) for pattern in rule.patterns) or not shape or not target.shape:
            continue
        if shape[-1] != len(rule.source) or target.shape[-1] != len(rule.target):
            return _refused(
                f"{len(rule.source)} source and {len(rule.target)} target classes were given, "
                f"the file has {shape[-1]} and the model {target.shape[-1]}"
            )
        if shape[:-1] != target.shape[:-1]:
            return None
        return _rows(rule.source, rule.target, axis=-1, what="classes")
    return None


def _by_word(shape: tuple[int, ...], target: ModelVariable, settings: Settings) -> Adaptation | None:
    for rule in settings.vocabularies:
        if not any(covers(pattern, target.name) for pattern in rule.patterns) or not shape or not target.shape:
            continue
        if shape[1:] != target.shape[1:]:
            return None
        if not rule.source:
            shared = min(shape[0], target.shape[0])
            return Adaptation(f"the first {shared} of {target.shape[0]} rows", _first_rows(shared))
        if shape[0] != len(rule.source) or target.shape[0] != len(rule.target):
            return _refused(
                f"{len(rule.source)} source and {len(rule.target)} target words were given, "
                f"the file has {shape[0]} rows and the model {target.shape[0]}"
            )
        return _rows(rule.source, rule.target, axis=0, what="words")
    return None


def _first_rows(shared: int) -> Step:
    def apply(array: Array, current: Callable[[], Array]) -> Array:
        new = current().astype(array.dtype)
        new[:shared] = array[:shared]
        return new

    return apply


def _rows(source: Sequence[str], target: Sequence[str], *, axis: int, what: str) -> Adaptation | None:
    if tuple(source) == tuple(target):
        return None
    places = {name: i for i, name in enumerate(source)}
    known = [(i, places[name]) for i, name in enumerate(target) if name in places]
    if not known:
        return _refused(f"none of the model's {what} is among the file's")
    to, of = [i for i, _ in known], [i for _, i in known]
    new = [name for name in target if name not in places]

    def apply(array: Array, current: Callable[[], Array]) -> Array:
        result = current().astype(array.dtype)
        if axis == 0:
            result[to] = array[of]
        else:
            result[..., to] = array[..., of]
        return result

    words = f"{len(known)} of {len(target)} {what} by name"
    if new:
        listed = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        words += f"; {listed} keep{'s' if len(new) == 1 else ''} the model's own values"
    return Adaptation(words, apply)


# Input channels


def _by_channel(shape: tuple[int, ...], target: ModelVariable, settings: Settings) -> Adaptation | None:
    to = target.shape
    differs = len(shape) == len(to) >= 3 and shape[:-2] == to[:-2] and shape[-1] == to[-1] and shape[-2] != to[-2]
    if not differs or target.variable != "kernel" or kind_of(target.kind) not in _CONVOLUTIONS:
        return None
    for rule in settings.channels:
        if not any(covers(pattern, target.name) for pattern in rule.patterns):
            continue
        have, want = shape[-2], to[-2]
        how = rule.how if rule.how != "auto" else "repeat" if want > have else "sum"
        if how in ("repeat", "zero") and want < have:
            return _refused(f".channels({how!r}) can't make {want} channels of {have}; .channels('sum') can")
        return Adaptation(f"{have} → {want} input channels by {how}", _channel_step(how, have, want))
    return None


def _channel_step(how: str, have: int, want: int) -> Step:
    def apply(array: Array, current: Callable[[], Array]) -> Array:
        del current
        if how == "sum":
            # Every channel gets the mean weight's share, so that equal channels give what they gave before.
            total = array.sum(axis=-2, keepdims=True, dtype=np.float64) / want
            return np.repeat(total, want, axis=-2).astype(array.dtype)
        if how == "zero":
            new = np.zeros((*array.shape[:-2], want, array.shape[-1]), array.dtype)
            new[..., :have, :] = array
            return new
        places = np.arange(want) % have
        counts = np.bincount(places, minlength=have).astype(np.float64)
        return (array[..., places, :] / counts[places][:, None]).astype(array.dtype)

    return apply


# Position grids


def _by_position(shape: tuple[int, ...], target: ModelVariable, settings: Settings) -> Adaptation | None:
    to = target.shape
    for rule in settings.positions:
        if not any(covers(pattern, target.name) for pattern in rule.patterns) or shape == to:
            continue
        if len(shape) != len(to) or len(shape) < 2 or shape[:-2] != to[:-2] or shape[-1] != to[-1]:
            return None
        grids = []
        for rows, given, whose in ((shape[-2], rule.source, "file"), (to[-2], rule.target, "model")):
            inner = rows - rule.extra
            if given is None:
                side = math.isqrt(max(inner, 0))
                if side * side != inner:
                    return _refused(f"the {whose}'s {inner} positions are no square grid; give its rows and columns")
                grids.append((side, side))
            elif rule.relative and (2 * given[0] - 1) * (2 * given[1] - 1) == inner:
                grids.append((2 * given[0] - 1, 2 * given[1] - 1))
            elif not rule.relative and given[0] * given[1] == inner:
                grids.append((given[0], given[1]))
            else:
                return _refused(f"a {given[0]}×{given[1]} grid was given for the {whose}, which has {inner} rows")
        (h, w), (new_h, new_w) = grids
        return Adaptation(
            f"{h}×{w} → {new_h}×{new_w} positions, {rule.method}", _grid_step(rule.extra, grids[0], grids[1], rule.method)
        )
    return None


def _grid_step(extra: int, have: tuple[int, int], want: tuple[int, int], method: str) -> Step:
    def apply(array: Array, current: Callable[[], Array]) -> Array:
        del current
        around, features = array.shape[:-2], array.shape[-1]
        kept, grid = array[..., :extra, :], array[..., extra:, :]
        resized = resize_grid(grid.reshape(*around, *have, features), want, method=method)
        return np.concatenate([kept, resized.reshape(*around, want[0] * want[1], features)], axis=-2)

    return apply


def _weights(have: int, want: int, method: str) -> Array:
    """The matrix that resizes one axis from `have` to `want` points."""
    matrix = np.zeros((want, have))
    for i in range(want):
        centre = (i + 0.5) * have / want - 0.5
        low = math.floor(centre)
        if method == "bilinear":
            taps = {low: 1 - (centre - low), low + 1: centre - low}
        else:
            taps = {low + k: _cubic(centre - (low + k)) for k in (-1, 0, 1, 2)}
            # At the border the taps that lie outside are left out, and the rest sum to one.
            taps = {k: w for k, w in taps.items() if 0 <= k < have}
            total = sum(taps.values())
            taps = {k: w / total for k, w in taps.items()}
        for k, weight in taps.items():
            matrix[i, min(max(k, 0), have - 1)] += weight
    return matrix


def _cubic(x: float, a: float = -0.5) -> float:
    """Keys's kernel (1981, equation 15)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resize_grid(grid: Array, size: tuple[int, int], *, method: str = "bicubic") -> Array:
    """A grid of vectors resized.

    Args:
        grid: `(…, height, width, features)`.
        size: The new height and width.
        method: `bicubic` or `bilinear`.

    Returns:
        `(…, new height, new width, features)` in the grid's dtype; the grid itself where the size is the same.

    Example:
        >>> resize_grid(np.arange(4.0).reshape(2, 2, 1), (1, 1), method="bilinear").item()
        1.5
    """
    h, w = grid.shape[-3:-1]
    if (h, w) == tuple(size):
        return grid
    rows, columns = _weights(h, size[0], method), _weights(w, size[1], method)
    resized: Array = np.einsum("ai,bj,...ijf->...abf", rows, columns, grid.astype(np.float64), optimize=True)
    return resized.astype(grid.dtype)
