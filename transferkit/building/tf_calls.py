"""Functions of TensorFlow by their names and arguments, each written with `keras.ops`: what the tables in `operations` point to.

May import Keras.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transferkit._keras import keras
from transferkit.errors import ModelError

__all__ = [
    "Function",
    "add",
    "clip",
    "concat",
    "depth_to_space",
    "dtype_name",
    "einsum",
    "gather",
    "getitem",
    "index_of",
    "l2_normalize",
    "leaky_relu",
    "lengths",
    "log_softmax",
    "matmul",
    "norm",
    "of_one",
    "of_two",
    "one_hot",
    "pad",
    "reduction",
    "reshape",
    "resize",
    "resize_of_graph",
    "softmax",
    "split",
    "squeeze",
    "stack",
    "transpose",
    "where",
]

ops = keras.ops
Function = Callable[..., Any]
_DTYPES = {"half": "float16", "float": "float32", "double": "float64", "DT_HALF": "float16", "DT_DOUBLE": "float64"}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def dtype_name(value: Any) -> str:
    name = value.get("config", value.get("name")) if isinstance(value, Mapping) else value
    name = _DTYPES.get(str(name), str(name)).removeprefix("DT_").lower()
    return _DTYPES.get(name, name)


def _slices(spec: Any) -> Any:
    """An index as a file writes it: slices as dicts, the ellipsis as a class."""
    if isinstance(spec, list):
        return tuple(_slices(item) for item in spec)
    if isinstance(spec, Mapping):
        if spec.get("class_name") == "__ellipsis__":
            return Ellipsis
        inner = spec.get("config") if spec.get("class_name") == "__slice__" else spec
        if isinstance(inner, Mapping) and {"start", "stop", "step"} <= set(inner):
            return slice(inner["start"], inner["stop"], inner["step"])
        raise ModelError("Rebuilding an index between two layers.", found=f"{str(spec)[:80]!r}, which is none")
    return spec


def getitem(x: Any, slice_spec: Any = None, key: Any = None) -> Any:
    return x[_slices(slice_spec if key is None else key)]


@dataclass(frozen=True)
class Length:
    """A length that isn't known before there are data; a reshape takes it for -1.

    Args:
        axis: Of which axis; 0 is the batch's.
    """

    axis: int


def lengths(x: Any, out_type: Any = None) -> tuple[int | Length, ...]:  # noqa: ARG001 - TensorFlow's argument
    """The shape as far as it is known."""
    return tuple(Length(axis) if length is None else length for axis, length in enumerate(x.shape))


def reshape(x: Any, shape: Any = None, newshape: Any = None) -> Any:
    wanted = shape if newshape is None else newshape
    if _is_tensor(wanted):
        raise ModelError("Rebuilding a reshape between two layers.", found="a shape that is computed by the model")
    lengths = [-1 if length is None or isinstance(length, Length) else int(length) for length in wanted]
    if lengths.count(-1) > 1:
        # `[tf.shape(x)[0], -1, 8]`: the batch stays, where nothing else could be meant.
        batch = wanted[0] == Length(0) and x.shape[0] is None and None not in x.shape[1:]
        if batch and lengths.count(-1) == 2:
            return keras.layers.Reshape(lengths[1:])(x)
        raise ModelError("Rebuilding a reshape between two layers.", found="a shape with more than one length that isn't known")
    return ops.reshape(x, lengths)


def matmul(
    a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, adjoint_a: bool = False, adjoint_b: bool = False
) -> Any:
    a = ops.swapaxes(a, -1, -2) if transpose_a or adjoint_a else a
    return ops.matmul(a, ops.swapaxes(b, -1, -2) if transpose_b or adjoint_b else b)


def transpose(a: Any, perm: Any = None, conjugate: bool = False) -> Any:  # noqa: ARG001 - of real numbers
    return ops.transpose(a, perm)


def split(value: Any, num_or_size_splits: Any, axis: int = 0) -> Any:
    if isinstance(num_or_size_splits, (list, tuple)):
        ends, total = [], 0
        for size in num_or_size_splits[:-1]:
            total += int(size)
            ends.append(total)
        return ops.split(value, ends, axis=axis)
    return ops.split(value, num_or_size_splits, axis=axis)


def concat(values: Any, axis: int) -> Any:
    return ops.concatenate(values if isinstance(values, (list, tuple)) else [values], axis=axis)


def stack(values: Any, axis: int = 0) -> Any:
    if not any(_is_tensor(value) for value in values):
        return list(values)  # the lengths of a shape
    return ops.stack(values, axis=axis)


def squeeze(x: Any, axis: Any = None) -> Any:
    for one in sorted(axis if isinstance(axis, (list, tuple)) else [axis], key=lambda a: 0 if a is None else a % len(x.shape))[
        ::-1
    ]:
        x = ops.squeeze(x, axis=one)
    return x


def pad(tensor: Any, paddings: Any, mode: str = "CONSTANT", constant_values: Any = 0) -> Any:
    if mode.upper() == "CONSTANT":
        return ops.pad(tensor, paddings, mode="constant", constant_values=constant_values or None)
    return ops.pad(tensor, paddings, mode=mode.lower())


def l2_normalize(x: Any, axis: Any = None, epsilon: float = 1e-12, dim: Any = None) -> Any:
    total = ops.sum(ops.square(x), axis=axis if dim is None else dim, keepdims=True)
    return x * ops.rsqrt(ops.maximum(total, epsilon))


def norm(tensor: Any, ord: Any = "euclidean", axis: Any = None, keepdims: Any = None, keep_dims: Any = None) -> Any:
    if ord not in ("euclidean", 2, None):
        return ops.norm(tensor, ord=ord, axis=axis, keepdims=bool(keepdims or keep_dims))
    return ops.sqrt(ops.sum(ops.square(tensor), axis=axis, keepdims=bool(keepdims or keep_dims)))


def gather(params: Any, indices: Any, axis: Any = 0, batch_dims: int = 0, validate_indices: Any = None) -> Any:  # noqa: ARG001
    if batch_dims:
        raise ModelError("Rebuilding a gather between two layers.", found=f"batch_dims={batch_dims}")
    # A table that isn't computed stands in the file as a list.
    return ops.take(ops.convert_to_tensor(params) if isinstance(params, list) else params, indices, axis=axis or 0)


def resize(images: Any, size: Any, method: Any = "bilinear", preserve_aspect_ratio: bool = False, antialias: bool = False) -> Any:
    if preserve_aspect_ratio or _is_tensor(size):
        raise ModelError("Rebuilding a resize between two layers.", found="a size that follows the image")
    kinds = {"area": None, "mitchellcubic": None, "gaussian": None}
    if kinds.get(str(method), method) is None:
        raise ModelError("Rebuilding a resize between two layers.", found=f"the method {method!r}")
    return ops.image.resize(
        images, tuple(size), interpolation=str(method), antialias=bool(antialias), data_format="channels_last"
    )


def resize_of_graph(method: str) -> Function:
    """The kinds of nodes that `tf.image.resize` made of one method; those of TensorFlow 1 place the pixels otherwise."""

    def call(images: Any, size: Any, align_corners: bool = False, half_pixel_centers: bool = False) -> Any:
        if align_corners or not half_pixel_centers:
            raise ModelError(
                "Rebuilding a resize between two layers.",
                found=f"align_corners={align_corners}, half_pixel_centers={half_pixel_centers}: the resize of TensorFlow 1",
            )
        return resize(images, size, method)

    return call


def einsum(equation: str, *inputs: Any) -> Any:
    if not inputs:
        raise ModelError(
            "Rebuilding an Einstein sum between two layers.",
            found=f"{equation!r} without the tensors it is of",
            cause="tf.keras left them out when it wrote the HDF5 file",
            fix="open the model's .keras file, or give the layer's function: custom_objects={'its name': …}",
        )
    return ops.einsum(equation, *inputs)


def one_hot(indices: Any, depth: int, on: float = 1.0, off: float = 0.0, axis: int = -1) -> Any:
    marks = ops.one_hot(indices, depth, axis=axis)
    return marks if (on, off) == (1, 0) else marks * (on - off) + off


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if x is None or y is None:
        raise ModelError("Rebuilding a where between two layers.", found="no values to choose from, so its length is not known")
    return ops.where(condition, x, y)


def softmax(logits: Any, axis: Any = None) -> Any:
    return ops.softmax(logits, axis=-1 if axis is None else axis)


def log_softmax(logits: Any, axis: Any = None) -> Any:
    return ops.log_softmax(logits, axis=-1 if axis is None else axis)


def clip(t: Any, clip_value_min: Any, clip_value_max: Any) -> Any:
    return ops.minimum(ops.maximum(t, clip_value_min), clip_value_max)


def leaky_relu(features: Any, alpha: float = 0.2) -> Any:
    return ops.leaky_relu(features, negative_slope=alpha)


def depth_to_space(input: Any, block_size: int, data_format: str = "NHWC") -> Any:
    if data_format != "NHWC":
        raise ModelError("Rebuilding depth_to_space between two layers.", found=f"the format {data_format}")
    _, h, w, c = input.shape
    if h is None or w is None:
        raise ModelError("Rebuilding depth_to_space between two layers.", found="an image whose size is not known")
    depth = c // block_size**2
    x = ops.reshape(input, (-1, h, w, block_size, block_size, depth))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, h * block_size, w * block_size, depth))


def reduction(function: Function) -> Function:
    def call(input_tensor: Any, axis: Any = None, keepdims: Any = False, keep_dims: Any = None, **old: Any) -> Any:
        axis = old.get("reduction_indices", axis)
        return function(input_tensor, axis=tuple(axis) if isinstance(axis, list) else axis, keepdims=bool(keepdims or keep_dims))

    return call


def of_two(function: Function) -> Function:
    return lambda x, y: function(x, y)


def of_one(function: Function) -> Function:
    """A function of one tensor; TensorFlow calls it x, features, logits, input or tensor."""
    return lambda *values, **named: function(*values, *named.values())


def index_of(function: Function) -> Function:
    def call(input: Any, axis: Any = None, dimension: Any = None, output_type: Any = "int64") -> Any:
        found = function(input, axis=0 if axis is None and dimension is None else axis if dimension is None else dimension)
        return ops.cast(found, dtype_name(output_type))

    return call


def add(x: Any, y: Any) -> Any:
    """x + y; as x - (-y), the same to the bit, where `keras.ops.add` could take y for a bias of another axis (3.15.1)."""
    shape = list(getattr(y, "shape", ()))
    alone = sum(length != 1 for length in shape) == 1
    return ops.subtract(x, ops.negative(y)) if alone and shape[-1] == 1 else ops.add(x, y)
