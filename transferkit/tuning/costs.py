"""What a phase costs: floating-point operations for a row of data, and the memory of a training step.

Counted layer by layer from its weights and the shape of its output. A multiplication and an addition are two operations, as
TensorFlow's profiler counts them; the papers' MobileNetV2 of 300 million multiply-adds is 0.6 GFLOPs here. Elementwise layers
count one operation for each number they give, normalisation two. The backward pass of a layer costs its forward pass once for the
gradient of its weights, where they train, and once more for that of its inputs, where a layer before it trains.

May import Keras and the floors below.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transferkit._keras import is_kerass_own, keras
from transferkit.building.parts import parts_of
from transferkit.tuning.phases import PhasePlan, ResolvedLayer

__all__ = ["PhaseCost", "cost_of", "forward_flops", "slots_of"]


@dataclass(frozen=True)
class PhaseCost:
    """What a phase costs.

    Args:
        flops: For each layer, in the model's order, the operations of a forward pass for a row.
        once: Operations for a row that are done once, for the features of what is frozen.
        forward: Operations for a row in every epoch, forward.
        backward: The same, backward.
        weights: Bytes of the model's weights.
        gradients: Bytes of the gradients.
        slots: Bytes of the optimizer's state.
        activations: Bytes of what a step keeps for its backward pass, for a batch.
        batch_size: Rows in that batch.
        features: Bytes of the features, for a row, or for all rows where their number is known.
        rows: How many rows there are; None where it isn't known.
        guessed: Paths of the layers of a kind whose operations are guessed.
        unsized: Whether lengths that aren't fixed were counted as 1.
    """

    flops: tuple[int, ...]
    once: int
    forward: int
    backward: int
    weights: int
    gradients: int
    slots: int
    activations: int
    batch_size: int
    features: int
    rows: int | None
    guessed: tuple[str, ...]
    unsized: bool

    @property
    def memory(self) -> int:
        """Bytes that a training step needs beside the data."""
        return self.weights + self.gradients + self.slots + self.activations

    def notes(self) -> tuple[str, ...]:
        """The costs in words."""
        once = f", after {count_of(self.once)} once" if self.once else ""
        found = [
            f"A row costs {count_of(self.forward)} operations forward and {count_of(self.backward)} backward an epoch{once}.",
            f"A step of {self.batch_size} rows holds about {bytes_of(self.memory)}: weights {bytes_of(self.weights)}, gradients "
            f"{bytes_of(self.gradients)}, optimizer {bytes_of(self.slots)}, activations {bytes_of(self.activations)}.",
        ]
        if self.features and self.rows is not None:
            found.append(f"The features of {self.rows:,} rows take {bytes_of(self.features)}.")
        if self.guessed:
            found.append(f"Operations are guessed from their weights for {', '.join(self.guessed)}.")
        if self.unsized:
            found.append("Lengths that aren't fixed (None) count as 1.")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The figures."""
        return {**{name: value for name, value in vars(self).items() if name not in ("flops", "guessed")}, "memory": self.memory}


def count_of(number: float) -> str:
    """A large count, in thousands, millions or thousands of millions."""
    for size, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f}"


def bytes_of(number: float) -> str:
    """A number of bytes, with a unit that suits it."""
    for size, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:.0f} bytes"


def cost_of(
    plan: PhasePlan,
    *,
    once: Collection[str] = (),
    row_bytes: int = 0,
    optimizer: Any,
    own_slots: int = 0,
    batch_size: int = 32,
    rows: int | None = None,
) -> PhaseCost:
    """What a phase costs for a model; changes nothing.

    Args:
        plan: The phase.
        once: Paths of the layers that are computed once.
        row_bytes: Bytes of the features of a row.
        optimizer: One like that of the phase, unbuilt.
        own_slots: Numbers that the library keeps beside each trained one (an average, the loaded value).
        batch_size: Rows in a batch.
        rows: How many rows there are, where it is known.
    """
    counted = [forward_flops(row.layer) for row in plan.layers]
    # Backward goes as far as the first layer that trains, in the model's order: in a branch beside it a little less.
    trained = [index for index, row in enumerate(plan.layers) if row.trained]
    first = trained[0] if trained else len(plan.layers)
    total_once = forward = backward = activations = 0
    for index, (row, (flops, _)) in enumerate(zip(plan.layers, counted, strict=True)):
        if row.path in once:
            total_once += flops
            continue
        forward += flops
        backward += flops * (int(row.trained) + int(index > first))
        if index >= first:
            activations += batch_size * sum(_bytes_of_output(row.layer))
    learning = sum(
        4 * row.trained_parameters if row.low_rank is not None else _bytes(_trained(row)) for row in plan.layers if row.trained
    )
    if plan.phase.train.is_everything:
        learning += _bytes(plan.own_weights)
    return PhaseCost(
        flops=tuple(flops for flops, _ in counted),
        once=total_once,
        forward=forward,
        backward=backward,
        weights=sum(_bytes(row.layer.weights) for row in plan.layers) + _bytes(plan.own_weights),
        gradients=learning,
        slots=round((slots_of(optimizer) + own_slots) * learning),
        activations=activations,
        batch_size=batch_size,
        features=row_bytes * (1 if rows is None else rows),
        rows=rows,
        guessed=tuple(row.path for row, (_, sure) in zip(plan.layers, counted, strict=True) if not sure),
        unsized=any(None in shape[1:] for row in plan.layers for shape in _shapes(row.layer)),
    )


def slots_of(optimizer: Any) -> float:
    """How many numbers an optimizer keeps for each number it trains, told by building a copy on one matrix."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    probe = type(inner).from_config(inner.get_config())
    side = 128
    common = len(probe.variables)
    variable = keras.Variable(keras.ops.zeros((side, side)))
    probe.build([variable])
    return float(sum(math.prod(slot.shape) for slot in probe.variables[common:]) / side**2)


def _bytes(weights: Sequence[Any]) -> int:
    return int(sum(math.prod(weight.shape) * _itemsize(weight.dtype) for weight in weights))


def _trained(row: ResolvedLayer) -> list[Any]:
    """The weights of a layer that trains which get gradients: no statistics, nothing of what stays frozen within it."""
    never = {id(weight) for part in row.frozen_parts for weight in part.weights}
    for part in parts_of(row.layer):
        if isinstance(part, keras.layers.BatchNormalization):
            never |= {id(part.moving_mean), id(part.moving_variance)}
    return [weight for weight in row.layer.weights if id(weight) not in never and "float" in str(weight.dtype)]


def _itemsize(dtype: Any) -> int:
    return {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "bool": 1}.get(str(dtype), 4)


def _shapes(layer: Any) -> list[tuple[int | None, ...]]:
    """The shapes of a layer's outputs, batch axis first; none where they are unknown."""
    try:
        return [tuple(tensor.shape) for tensor in keras.tree.flatten(layer.output)]
    except (AttributeError, ValueError):  # shared layers and those of a subclassed model
        return []


def _input_shape(layer: Any) -> tuple[int | None, ...]:
    try:
        return tuple(keras.tree.flatten(layer.input)[0].shape)
    except (AttributeError, ValueError, IndexError):
        return ()


def _steps(layer: Any) -> int:
    """How long the sequence is that a recurrent layer goes over."""
    shape = _input_shape(layer)
    return (shape[1] or 1) if len(shape) > 1 else 1


def _size(shape: Sequence[int | None]) -> int:
    """How many numbers a row of that shape has."""
    return math.prod(length or 1 for length in shape[1:])


def _bytes_of_output(layer: Any) -> list[int]:
    return [_size(shape) * _itemsize(getattr(layer, "compute_dtype", "float32")) for shape in _shapes(layer)]


def _places(layer: Any, shape: Sequence[int | None]) -> int:
    """How many positions of an image or a sequence there are, its channels apart."""
    axes = list(shape[1:])
    if axes:
        axes.pop(0 if getattr(layer, "data_format", None) == "channels_first" else -1)
    return math.prod(length or 1 for length in axes)


def forward_flops(layer: Any) -> tuple[int, bool]:
    """Operations of a layer's forward pass for one row, and whether its kind is known.

    Args:
        layer: A built layer that is no model.
    """
    layers = keras.layers
    shapes = _shapes(layer)
    shape = shapes[0] if shapes else ()
    size = sum(_size(each) for each in shapes)
    bias = size if getattr(layer, "bias", None) is not None and getattr(layer, "use_bias", True) else 0
    if isinstance(layer, (layers.Wrapper, layers.Bidirectional)):
        return _wrapped(layer, size)
    if isinstance(layer, (layers.Embedding, layers.InputLayer, layers.Reshape, layers.Flatten, layers.Permute)):
        return 0, True
    if isinstance(layer, layers.RNN):
        steps = _steps(layer)
        return 2 * steps * _kernel_numbers(layer.cell), is_kerass_own(layer.cell)
    if isinstance(layer, layers.MultiHeadAttention):
        return _attention(layer, shape), True
    if isinstance(layer, layers.EinsumDense):
        return _einsum(layer, shape) + bias, True
    if _transposed(layer):
        return 2 * _places(layer, _input_shape(layer)) * _kernel_numbers(layer) + bias, True
    if isinstance(layer, (layers.BatchNormalization, layers.LayerNormalization, layers.GroupNormalization)):
        return 2 * size, True
    if hasattr(layer, "pool_size"):
        return size * math.prod(layer.pool_size), True
    if type(layer).__name__.startswith("Global") and is_kerass_own(layer):
        return _size(_input_shape(layer)), True
    if not layer.weights:
        return (0 if isinstance(layer, _FREE) else size), True
    known = is_kerass_own(layer)
    return 2 * _places(layer, shape) * _kernel_numbers(layer) + bias, known


#: Layers that move numbers or nothing, and those that only training knows.
_FREE = tuple(
    getattr(keras.layers, name)
    for name in ("Dropout", "SpatialDropout2D", "Identity", "ZeroPadding2D", "ZeroPadding1D", "Cropping2D", "Concatenate")
    if hasattr(keras.layers, name)
)


def _transposed(layer: Any) -> bool:
    return any(isinstance(layer, getattr(keras.layers, f"Conv{rank}DTranspose")) for rank in (1, 2, 3))


def _kernel_numbers(layer: Any) -> int:
    """Numbers of all weights that stand in products: all with more than one axis but biases (a head's, a GRU's)."""
    kernels = (weight for weight in layer.weights if len(weight.shape) > 1 and "bias" not in weight.name)
    return int(sum(math.prod(kernel.shape) for kernel in kernels))


def _wrapped(layer: Any, size: int) -> tuple[int, bool]:
    """Of a layer around another: all its kernels at each step of a sequence."""
    sequence = isinstance(layer, (keras.layers.TimeDistributed, keras.layers.Bidirectional))
    bias = size if getattr(getattr(layer, "layer", None), "bias", None) is not None else 0
    known = sequence and (not isinstance(layer, keras.layers.TimeDistributed) or isinstance(layer.layer, keras.layers.Dense))
    return 2 * (_steps(layer) if sequence else 1) * _kernel_numbers(layer) + bias, known


def _einsum(layer: Any, shape: Sequence[int | None]) -> int:
    """Each number of the output is a sum over the kernel's axes that the output lacks."""
    kernel = layer.equation.replace(" ", "").split(",")[1].split("->")
    summed = math.prod(
        length for label, length in zip(kernel[0].replace("...", ""), layer.kernel.shape, strict=True) if label not in kernel[1]
    )
    return 2 * _size(shape) * int(summed)


def _attention(layer: Any, shape: Sequence[int | None]) -> int:
    """The four projections, and for every pair of positions the scores and the sums; keys as many as queries."""
    places = math.prod(length or 1 for length in shape[1:-1])
    settings = layer.get_config()
    wide = settings["num_heads"] * (settings["key_dim"] + (settings["value_dim"] or settings["key_dim"]))
    return 2 * places * _kernel_numbers(layer) + 2 * places * places * int(wide)
