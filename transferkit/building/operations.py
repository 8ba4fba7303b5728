"""Functions of TensorFlow, and operations of Keras 3, that stand between the layers of a saved model, as calls of `keras.ops`.

tf.keras wrote `a + b` between layers as a layer that names a TensorFlow function (`TFOpLambda`, before 2.4 `TensorFlowOpLayer`);
Keras 3 writes an operation of its own. Each name on the lists here is bound to one function of `keras.ops` by hand: mathematics
and shape work, nothing that reads, writes or calls. Three families: `TF_FUNCTIONS` by TensorFlow's names and arguments,
`GRAPH_OPS` by the kind of a graph's node, `KERAS_OPERATIONS` by class. May import Keras.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transferkit._keras import keras
from transferkit.errors import ModelError

__all__ = ["OPERATIONS", "operation"]

ops = keras.ops
Function = Callable[..., Any]
_DTYPES = {"half": "float16", "float": "float32", "double": "float64", "DT_HALF": "float16", "DT_DOUBLE": "float64"}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _dtype(value: Any) -> str:
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


def _getitem(x: Any, slice_spec: Any = None, key: Any = None) -> Any:
    return x[_slices(slice_spec if key is None else key)]


def _shape(x: Any, out_type: Any = None) -> tuple[int | None, ...]:  # noqa: ARG001 - TensorFlow's argument
    """The static shape; None where the length isn't known, which a reshape takes for -1."""
    return tuple(x.shape)


def _reshape(x: Any, shape: Any = None, newshape: Any = None) -> Any:
    wanted = shape if newshape is None else newshape
    if _is_tensor(wanted):
        raise ModelError("Rebuilding a reshape between two layers.", found="a shape that is computed by the model")
    lengths = [-1 if length is None else int(length) for length in wanted]
    if lengths.count(-1) > 1:
        raise ModelError("Rebuilding a reshape between two layers.", found="a shape with more than one length that isn't known")
    return ops.reshape(x, lengths)


def _matmul(
    a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, adjoint_a: bool = False, adjoint_b: bool = False
) -> Any:
    a = ops.swapaxes(a, -1, -2) if transpose_a or adjoint_a else a
    return ops.matmul(a, ops.swapaxes(b, -1, -2) if transpose_b or adjoint_b else b)


def _transpose(a: Any, perm: Any = None, conjugate: bool = False) -> Any:  # noqa: ARG001 - of real numbers
    return ops.transpose(a, perm)


def _split(value: Any, num_or_size_splits: Any, axis: int = 0) -> Any:
    if isinstance(num_or_size_splits, (list, tuple)):
        ends, total = [], 0
        for size in num_or_size_splits[:-1]:
            total += int(size)
            ends.append(total)
        return ops.split(value, ends, axis=axis)
    return ops.split(value, num_or_size_splits, axis=axis)


def _concat(values: Any, axis: int) -> Any:
    return ops.concatenate(values if isinstance(values, (list, tuple)) else [values], axis=axis)


def _stack(values: Any, axis: int = 0) -> Any:
    if not any(_is_tensor(value) for value in values):
        return list(values)  # the lengths of a shape
    return ops.stack(values, axis=axis)


def _squeeze(x: Any, axis: Any = None) -> Any:
    for one in sorted(axis if isinstance(axis, (list, tuple)) else [axis], key=lambda a: 0 if a is None else a % len(x.shape))[
        ::-1
    ]:
        x = ops.squeeze(x, axis=one)
    return x


def _pad(tensor: Any, paddings: Any, mode: str = "CONSTANT", constant_values: Any = 0) -> Any:
    if mode.upper() == "CONSTANT":
        return ops.pad(tensor, paddings, mode="constant", constant_values=constant_values or None)
    return ops.pad(tensor, paddings, mode=mode.lower())


def _l2_normalize(x: Any, axis: Any = None, epsilon: float = 1e-12, dim: Any = None) -> Any:
    total = ops.sum(ops.square(x), axis=axis if dim is None else dim, keepdims=True)
    return x * ops.rsqrt(ops.maximum(total, epsilon))


def _norm(tensor: Any, ord: Any = "euclidean", axis: Any = None, keepdims: Any = None, keep_dims: Any = None) -> Any:
    if ord not in ("euclidean", 2, None):
        return ops.norm(tensor, ord=ord, axis=axis, keepdims=bool(keepdims or keep_dims))
    return ops.sqrt(ops.sum(ops.square(tensor), axis=axis, keepdims=bool(keepdims or keep_dims)))


def _gather(params: Any, indices: Any, axis: Any = 0, batch_dims: int = 0, validate_indices: Any = None) -> Any:  # noqa: ARG001
    if batch_dims:
        raise ModelError("Rebuilding a gather between two layers.", found=f"batch_dims={batch_dims}")
    return ops.take(params, indices, axis=axis or 0)


def _resize(
    images: Any, size: Any, method: Any = "bilinear", preserve_aspect_ratio: bool = False, antialias: bool = False
) -> Any:
    if preserve_aspect_ratio or _is_tensor(size):
        raise ModelError("Rebuilding a resize between two layers.", found="a size that follows the image")
    kinds = {"area": None, "mitchellcubic": None, "gaussian": None}
    if kinds.get(str(method), method) is None:
        raise ModelError("Rebuilding a resize between two layers.", found=f"the method {method!r}")
    return ops.image.resize(
        images, tuple(size), interpolation=str(method), antialias=bool(antialias), data_format="channels_last"
    )


def _where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if x is None or y is None:
        raise ModelError("Rebuilding a where between two layers.", found="no values to choose from, so its length is not known")
    return ops.where(condition, x, y)


def _softmax(logits: Any, axis: Any = None) -> Any:
    return ops.softmax(logits, axis=-1 if axis is None else axis)


def _log_softmax(logits: Any, axis: Any = None) -> Any:
    return ops.log_softmax(logits, axis=-1 if axis is None else axis)


def _clip(t: Any, clip_value_min: Any, clip_value_max: Any) -> Any:
    return ops.minimum(ops.maximum(t, clip_value_min), clip_value_max)


def _leaky_relu(features: Any, alpha: float = 0.2) -> Any:
    return ops.leaky_relu(features, negative_slope=alpha)


def _depth_to_space(input: Any, block_size: int, data_format: str = "NHWC") -> Any:
    if data_format != "NHWC":
        raise ModelError("Rebuilding depth_to_space between two layers.", found=f"the format {data_format}")
    _, h, w, c = input.shape
    if h is None or w is None:
        raise ModelError("Rebuilding depth_to_space between two layers.", found="an image whose size is not known")
    depth = c // block_size**2
    x = ops.reshape(input, (-1, h, w, block_size, block_size, depth))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, h * block_size, w * block_size, depth))


def _reduce(function: Function) -> Function:
    def call(input_tensor: Any, axis: Any = None, keepdims: Any = False, keep_dims: Any = None, **old: Any) -> Any:
        axis = old.get("reduction_indices", axis)
        return function(input_tensor, axis=tuple(axis) if isinstance(axis, list) else axis, keepdims=bool(keepdims or keep_dims))

    return call


def _two(function: Function) -> Function:
    return lambda x, y: function(x, y)


def _one(function: Function) -> Function:
    """A function of one tensor; TensorFlow calls it x, features, logits, input or tensor."""
    return lambda *values, **named: function(*values, *named.values())


def _arg(function: Function) -> Function:
    def call(input: Any, axis: Any = None, dimension: Any = None, output_type: Any = "int64") -> Any:
        found = function(input, axis=0 if axis is None and dimension is None else axis if dimension is None else dimension)
        return ops.cast(found, _dtype(output_type))

    return call


def _add(x: Any, y: Any) -> Any:
    """x + y; as x - (-y), the same to the bit, where `keras.ops.add` could take y for a bias of another axis (3.15.1)."""
    shape = list(getattr(y, "shape", ()))
    alone = sum(length != 1 for length in shape) == 1
    return ops.subtract(x, ops.negative(y)) if alone and shape[-1] == 1 else ops.add(x, y)


_BINARY: Mapping[str, Function] = {
    "add": _add,
    "sub": ops.subtract,
    "mul": ops.multiply,
    "div": ops.divide,
    "floordiv": ops.floor_divide,
    "mod": ops.mod,
    "pow": ops.power,
    "maximum": ops.maximum,
    "minimum": ops.minimum,
    "squared_difference": lambda x, y: ops.square(ops.subtract(x, y)),
    "equal": ops.equal,
    "not_equal": ops.not_equal,
    "greater": ops.greater,
    "greater_equal": ops.greater_equal,
    "less": ops.less,
    "less_equal": ops.less_equal,
    "logical_and": ops.logical_and,
    "logical_or": ops.logical_or,
    "atan2": ops.arctan2,
}
_UNARY: Mapping[str, Function] = {
    "abs": ops.abs,
    "negative": ops.negative,
    "exp": ops.exp,
    "expm1": ops.expm1,
    "log": ops.log,
    "log1p": ops.log1p,
    "sqrt": ops.sqrt,
    "rsqrt": ops.rsqrt,
    "square": ops.square,
    "reciprocal": ops.reciprocal,
    "sin": ops.sin,
    "cos": ops.cos,
    "tan": ops.tan,
    "tanh": ops.tanh,
    "sinh": ops.sinh,
    "cosh": ops.cosh,
    "asin": ops.arcsin,
    "acos": ops.arccos,
    "atan": ops.arctan,
    "sigmoid": ops.sigmoid,
    "erf": ops.erf,
    "sign": ops.sign,
    "floor": ops.floor,
    "ceil": ops.ceil,
    "round": ops.round,
    "softplus": ops.softplus,
    "logical_not": ops.logical_not,
    "is_nan": ops.isnan,
    "is_finite": ops.isfinite,
}
_REDUCE: Mapping[str, Function] = {
    "sum": _reduce(ops.sum),
    "mean": _reduce(ops.mean),
    "max": _reduce(ops.max),
    "min": _reduce(ops.min),
    "prod": _reduce(ops.prod),
    "std": _reduce(ops.std),
    "variance": _reduce(ops.var),
    "any": _reduce(ops.any),
    "all": _reduce(ops.all),
    "logsumexp": _reduce(ops.logsumexp),
}
_NN: Mapping[str, Function] = {
    "relu": _one(ops.relu),
    "relu6": _one(ops.relu6),
    "elu": _one(ops.elu),
    "selu": _one(ops.selu),
    "silu": _one(ops.silu),
    "swish": _one(ops.silu),
    "softplus": _one(ops.softplus),
    "softsign": _one(ops.softsign),
    "sigmoid": _one(ops.sigmoid),
    "tanh": _one(ops.tanh),
    "gelu": lambda features, approximate=False: ops.gelu(features, approximate=approximate),
    "leaky_relu": _leaky_relu,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "bias_add": lambda value, bias, data_format=None: ops.add(value, bias),  # noqa: ARG005 - checked by TensorFlow when it was written
    "l2_normalize": _l2_normalize,
    "depth_to_space": _depth_to_space,
}
_SHAPES: Mapping[str, Function] = {
    "__operators__.getitem": _getitem,
    "broadcast_to": lambda input, shape: ops.broadcast_to(input, shape),
    "cast": lambda x, dtype: ops.cast(x, _dtype(dtype)),
    "clip_by_value": _clip,
    "concat": _concat,
    "convert_to_tensor": lambda value, dtype=None, dtype_hint=None: value,  # noqa: ARG005 - it is one
    "einsum": lambda equation, *inputs: ops.einsum(equation, *inputs),
    "expand_dims": lambda input, axis=None, dim=None: ops.expand_dims(input, axis if dim is None else dim),
    "flatten": lambda x: ops.reshape(x, (-1,)),
    "gather": _gather,
    "identity": lambda input: input,
    "image.resize": _resize,
    "linalg.matmul": _matmul,
    "matmul": _matmul,
    "norm": _norm,
    "linalg.norm": _norm,
    "one_hot": lambda indices, depth, axis=None, dtype=None, **_: ops.one_hot(
        indices, depth, axis=-1 if axis is None else axis, dtype=_dtype(dtype or "float32")
    ),
    "ones_like": lambda input, dtype=None, **_: ops.ones_like(input, dtype=None if dtype is None else _dtype(dtype)),
    "pad": _pad,
    "repeat": lambda input, repeats, axis=None: ops.repeat(input, repeats, axis=axis),
    "reshape": _reshape,
    "reverse": lambda tensor, axis: ops.flip(tensor, axis=tuple(axis)),
    "roll": lambda input, shift, axis: ops.roll(input, shift, axis=axis),
    "shape": _shape,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "stop_gradient": lambda input: ops.stop_gradient(input),
    "tensordot": lambda a, b, axes: ops.tensordot(a, b, axes=axes),
    "tile": lambda input, multiples: ops.tile(input, multiples),
    "transpose": _transpose,
    "unstack": lambda value, num=None, axis=0: ops.unstack(value, num=num, axis=axis),
    "where": _where,
    "zeros_like": lambda input, dtype=None, **_: ops.zeros_like(input, dtype=None if dtype is None else _dtype(dtype)),
}


def _tf_functions() -> dict[str, Function]:
    binary = {"subtract": "sub", "multiply": "mul", "divide": "div", "truediv": "div", "floormod": "mod"}
    table: dict[str, Function] = {}
    for name, function in _BINARY.items():
        table[f"math.{name}"] = table[f"__operators__.{name}"] = _two(function)
    for name, short in binary.items():
        table[f"math.{name}"] = table[f"__operators__.{name}"] = _two(_BINARY[short])
    table["math.divide_no_nan"] = lambda x, y: ops.where(
        ops.equal(y, 0), ops.zeros_like(x), ops.divide(x, ops.where(ops.equal(y, 0), 1, y))
    )
    table["math.add_n"] = lambda inputs: sum(inputs[1:], start=inputs[0])
    for name, function in _UNARY.items():
        table[f"math.{name}"] = _one(function)
    for name, function in _REDUCE.items():
        table[f"math.reduce_{name}"] = function
    for name, function in _NN.items():
        table[f"nn.{name}"] = table[f"keras.activations.{name}"] = function
    for name in ("l2_normalize", "softmax", "log_softmax"):
        table[f"math.{name}"] = table[f"linalg.{name}"] = _NN[name]
    table["math.argmax"], table["math.argmin"] = _arg(ops.argmax), _arg(ops.argmin)
    table["math.cumsum"] = lambda x, axis=0: ops.cumsum(x, axis=axis)
    table.update(_SHAPES)
    for name in ("math.abs", "math.exp", "math.sqrt", "math.tanh", "math.sigmoid", "math.pow", "math.maximum", "math.minimum"):
        table[name.removeprefix("math.")] = table[name]
    return table | {f"compat.v1.{name}": function for name, function in table.items()}


#: By the kind of a graph's node, as TensorFlow 2.0 to 2.3 wrote it: its inputs, then its attributes.
GRAPH_OPS: Mapping[str, Function] = {
    **dict.fromkeys(("Add", "AddV2", "BiasAdd"), _BINARY["add"]),
    "Sub": _BINARY["sub"],
    "Mul": _BINARY["mul"],
    **dict.fromkeys(("RealDiv", "Div"), _BINARY["div"]),
    "FloorDiv": _BINARY["floordiv"],
    "FloorMod": _BINARY["mod"],
    "Pow": _BINARY["pow"],
    "Maximum": _BINARY["maximum"],
    "Minimum": _BINARY["minimum"],
    "SquaredDifference": _BINARY["squared_difference"],
    "Equal": _BINARY["equal"],
    "NotEqual": _BINARY["not_equal"],
    "Greater": _BINARY["greater"],
    "GreaterEqual": _BINARY["greater_equal"],
    "Less": _BINARY["less"],
    "LessEqual": _BINARY["less_equal"],
    "LogicalAnd": _BINARY["logical_and"],
    "LogicalOr": _BINARY["logical_or"],
    "AddN": lambda *inputs: sum(inputs[1:], start=inputs[0]),
    "Abs": ops.abs,
    "Neg": ops.negative,
    **{kind: _UNARY[kind.lower()] for kind in ("Exp", "Expm1", "Log", "Log1p", "Sqrt", "Rsqrt", "Square", "Reciprocal")},
    **{
        kind: _UNARY[kind.lower()]
        for kind in ("Sin", "Cos", "Tanh", "Sigmoid", "Erf", "Sign", "Floor", "Ceil", "Round", "Softplus")
    },
    "LogicalNot": ops.logical_not,
    "Relu": ops.relu,
    "Relu6": ops.relu6,
    "Elu": ops.elu,
    "Selu": ops.selu,
    "Softsign": ops.softsign,
    "LeakyRelu": lambda x, alpha=0.2: _leaky_relu(x, alpha),
    "Softmax": ops.softmax,
    "LogSoftmax": ops.log_softmax,
    **{kind: _REDUCE[kind.lower()] for kind in ("Sum", "Mean", "Max", "Min", "Prod", "Any", "All")},
    "MatMul": _matmul,
    **{kind: lambda a, b, adj_x=False, adj_y=False: _matmul(a, b, adj_x, adj_y) for kind in ("BatchMatMul", "BatchMatMulV2")},
    "ConcatV2": lambda *inputs: _concat(list(inputs[:-1]), inputs[-1]),
    "Pack": lambda *inputs, axis=0: _stack(list(inputs), axis),
    "Unpack": lambda x, axis=0, num=None: ops.unstack(x, num=num, axis=axis),
    "Reshape": _reshape,
    "ExpandDims": ops.expand_dims,
    "Squeeze": lambda x, squeeze_dims=None: _squeeze(x, squeeze_dims or None),
    "Transpose": _transpose,
    "Tile": ops.tile,
    "Pad": _pad,
    "PadV2": lambda x, paddings, value: _pad(x, paddings, constant_values=value),
    "MirrorPad": lambda x, paddings, mode="REFLECT": _pad(x, paddings, mode),
    "Cast": lambda x, DstT="DT_FLOAT": ops.cast(x, "float32" if DstT == "DT_FLOAT" else _dtype(DstT)),  # noqa: N803 - its name
    "Identity": lambda x: x,
    "StopGradient": ops.stop_gradient,
    "Shape": _shape,
    "Split": lambda axis, x, num_split=1: ops.split(x, num_split, axis=axis),
    "SplitV": lambda x, sizes, axis: _split(x, sizes, axis),
    "ClipByValue": _clip,
    "GatherV2": lambda x, indices, axis=0: ops.take(x, indices, axis=axis),
    "SelectV2": ops.where,
    "Select": ops.where,
    "ZerosLike": ops.zeros_like,
    "OnesLike": ops.ones_like,
    "DepthToSpace": _depth_to_space,
}
_ATTRIBUTES = frozenset(
    """
    keep_dims transpose_a transpose_b adj_x adj_y axis num squeeze_dims alpha DstT num_split mode block_size begin_mask end_mask
    ellipsis_mask new_axis_mask shrink_axis_mask
    """.split()  # noqa: SIM905
)


def _strided_slice(x: Any, begin: Sequence[int], end: Sequence[int], strides: Sequence[int], **masks: Any) -> Any:
    """TensorFlow's StridedSlice: bit i of a mask says what holds for part i of the index."""

    def said(mask: str, i: int) -> bool:
        return bool(int(masks.get(mask, 0)) >> i & 1)

    parts: list[Any] = []
    for i, (first, last, step) in enumerate(zip(begin, end, strides, strict=True)):
        if said("ellipsis_mask", i):
            parts.append(Ellipsis)
        elif said("new_axis_mask", i):
            parts.append(None)
        elif said("shrink_axis_mask", i):
            parts.append(first)
        else:
            parts.append(slice(None if said("begin_mask", i) else first, None if said("end_mask", i) else last, step))
    return x[tuple(parts)] if not isinstance(x, tuple) else x[parts[0]]


def _attribute(value: Any) -> Any:
    """A value of a node's attributes, from the JSON form of its protocol buffer."""
    if not isinstance(value, Mapping):
        return value
    for kind, convert in (("i", int), ("f", float), ("b", bool), ("type", str)):
        if kind in value:
            return convert(value[kind])
    inner = value.get("list")
    if isinstance(inner, Mapping):
        return [int(item) for item in inner.get("i", [])]
    return None


def _graph_operation(config: Mapping[str, Any]) -> Function:
    node = config["node_def"]
    kind = str(node["op"])
    function = _strided_slice if kind == "StridedSlice" else GRAPH_OPS[kind]
    attributes = {k: _attribute(v) for k, v in (node.get("attr") or {}).items() if k in _ATTRIBUTES}
    if kind not in ("Pack", "Unpack"):
        attributes.pop("axis", None)
    constants = {int(i): value for i, value in (config.get("constants") or {}).items()}

    def call(inputs: Any) -> Any:
        values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        for i in sorted(constants):
            values.insert(i, constants[i])
        return function(*values, **attributes)

    return call


#: Classes of Keras 3's own operations -> function, and the argument that a configuration holds under another name.
KERAS_OPERATIONS: Mapping[str, Function] = {
    **{
        name: getattr(ops, function)
        for name, function in {
            "Absolute": "abs", "Add": "add", "All": "all", "Any": "any", "Arccos": "arccos", "Arcsin": "arcsin",
            "Arctan": "arctan", "Arctan2": "arctan2", "Argmax": "argmax", "Argmin": "argmin", "Average": "average",
            "BroadcastTo": "broadcast_to", "Cast": "cast", "Ceil": "ceil", "Clip": "clip", "Concatenate": "concatenate",
            "Cos": "cos", "Cosh": "cosh", "Cumsum": "cumsum", "Divide": "divide", "Dot": "dot", "Einsum": "einsum",
            "Elu": "elu", "Equal": "equal", "Erf": "erf", "Exp": "exp", "ExpandDims": "expand_dims", "Expm1": "expm1",
            "Flip": "flip", "Floor": "floor", "FloorDivide": "floor_divide", "Gelu": "gelu", "Greater": "greater",
            "GreaterEqual": "greater_equal", "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu",
            "LeakyRelu": "leaky_relu", "Less": "less", "LessEqual": "less_equal", "Log": "log", "Log1p": "log1p",
            "LogSigmoid": "log_sigmoid", "LogSoftmax": "log_softmax", "LogicalAnd": "logical_and",
            "LogicalNot": "logical_not", "LogicalOr": "logical_or", "Logsumexp": "logsumexp", "Matmul": "matmul",
            "Max": "max", "Maximum": "maximum", "Mean": "mean", "Min": "min", "Minimum": "minimum", "Mod": "mod",
            "Moveaxis": "moveaxis", "Multiply": "multiply", "Negative": "negative", "Norm": "norm", "NotEqual": "not_equal",
            "OneHot": "one_hot", "OnesLike": "ones_like", "Outer": "outer", "Power": "power", "Prod": "prod",
            "Reciprocal": "reciprocal", "Relu": "relu", "Relu6": "relu6", "Repeat": "repeat", "Roll": "roll",
            "Round": "round", "Rsqrt": "rsqrt", "Selu": "selu", "Sigmoid": "sigmoid", "Sign": "sign", "Silu": "silu",
            "Sin": "sin", "Sinh": "sinh", "Softmax": "softmax", "Softplus": "softplus", "Softsign": "softsign",
            "Split": "split", "Sqrt": "sqrt", "Square": "square", "Stack": "stack", "Std": "std", "Subtract": "subtract",
            "Sum": "sum", "Swapaxes": "swapaxes", "Take": "take", "TakeAlongAxis": "take_along_axis", "Tan": "tan",
            "Tanh": "tanh", "Tensordot": "tensordot", "Tile": "tile", "Transpose": "transpose", "TrueDivide": "true_divide",
            "Unstack": "unstack", "Var": "var", "Where": "where", "ZerosLike": "zeros_like",
        }.items()
    },
    "GetItem": _getitem,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Pad": lambda x, pad_width, mode="constant", constant_values=None: ops.pad(x, pad_width, mode, constant_values),
    "StopGradient": ops.stop_gradient,
    "Identity": lambda x: x,
}  # fmt: skip

TF_FUNCTIONS: Mapping[str, Function] = _tf_functions()

#: Every name that `operation` knows.
OPERATIONS: frozenset[str] = frozenset(
    [*TF_FUNCTIONS, *GRAPH_OPS, "StridedSlice", *(f"keras.{name}" for name in KERAS_OPERATIONS)]
)
_AFTER = frozenset(("Einsum",))


def operation(class_name: str, config: Mapping[str, Any], name: str) -> Function:
    """The function for an operation between layers.

    Args:
        class_name: Of the layer or operation, as the file words it.
        config: Its configuration.
        name: What it calls, one of `OPERATIONS`.

    Returns:
        A function of the node's arguments.
    """
    if (
        name.startswith("keras.")
        and name.removeprefix("keras.") in KERAS_OPERATIONS
        and class_name == name.removeprefix("keras.")
    ):
        function = KERAS_OPERATIONS[class_name]
        settings = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k not in ("name", "dtype", "trainable")
        }
        if class_name == "Cast":
            settings["dtype"] = config["dtype"]
        if class_name in _AFTER:
            return lambda *args: function(settings["subscripts"], *args)
        return lambda *args, **kwargs: function(*args, **settings, **kwargs)
    if class_name == "TensorFlowOpLayer":
        return _graph_operation(config)
    function = TF_FUNCTIONS[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{k: v for k, v in kwargs.items() if k != "name"})

    return call
