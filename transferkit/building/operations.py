"""Functions of TensorFlow, and operations of Keras 3, that stand between the layers of a saved model, as calls of `keras.ops`.

tf.keras wrote `a + b` between layers as a layer that names a TensorFlow function (`TFOpLambda`, before 2.4 `TensorFlowOpLayer`);
Keras 3 writes an operation of its own. Each name on the lists here is bound to one function of `keras.ops` by hand: mathematics
and shape work, nothing that reads, writes or calls. Three families: `TF_FUNCTIONS` by TensorFlow's names and arguments,
`GRAPH_OPS` by the kind of a graph's node, `KERAS_OPERATIONS` by class. May import Keras.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from transferkit._keras import keras
from transferkit.building import tf_calls
from transferkit.building.tf_calls import Function

__all__ = ["OPERATIONS", "operation"]

ops = keras.ops
_BINARY: Mapping[str, Function] = {
    "add": tf_calls.add,
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
    "sum": tf_calls.reduction(ops.sum),
    "mean": tf_calls.reduction(ops.mean),
    "max": tf_calls.reduction(ops.max),
    "min": tf_calls.reduction(ops.min),
    "prod": tf_calls.reduction(ops.prod),
    "std": tf_calls.reduction(ops.std),
    "variance": tf_calls.reduction(ops.var),
    "any": tf_calls.reduction(ops.any),
    "all": tf_calls.reduction(ops.all),
    "logsumexp": tf_calls.reduction(ops.logsumexp),
}
_NN: Mapping[str, Function] = {
    "relu": tf_calls.of_one(ops.relu),
    "relu6": tf_calls.of_one(ops.relu6),
    "elu": tf_calls.of_one(ops.elu),
    "selu": tf_calls.of_one(ops.selu),
    "silu": tf_calls.of_one(ops.silu),
    "swish": tf_calls.of_one(ops.silu),
    "softplus": tf_calls.of_one(ops.softplus),
    "softsign": tf_calls.of_one(ops.softsign),
    "sigmoid": tf_calls.of_one(ops.sigmoid),
    "tanh": tf_calls.of_one(ops.tanh),
    "gelu": lambda features, approximate=False: ops.gelu(features, approximate=approximate),
    "leaky_relu": tf_calls.leaky_relu,
    "softmax": tf_calls.softmax,
    "log_softmax": tf_calls.log_softmax,
    "bias_add": lambda value, bias, data_format=None: ops.add(value, bias),  # noqa: ARG005 - checked by TensorFlow when it was written
    "l2_normalize": tf_calls.l2_normalize,
    "depth_to_space": tf_calls.depth_to_space,
}
_SHAPES: Mapping[str, Function] = {
    "__operators__.getitem": tf_calls.getitem,
    "broadcast_to": lambda input, shape: ops.broadcast_to(input, shape),
    "cast": lambda x, dtype: ops.cast(x, tf_calls.dtype_name(dtype)),
    "clip_by_value": tf_calls.clip,
    "concat": tf_calls.concat,
    "convert_to_tensor": lambda value, dtype=None, dtype_hint=None: value,  # noqa: ARG005 - it is one
    "einsum": tf_calls.einsum,
    "expand_dims": lambda input, axis=None, dim=None: ops.expand_dims(input, axis if dim is None else dim),
    "flatten": lambda x: ops.reshape(x, (-1,)),
    "gather": tf_calls.gather,
    "identity": lambda input: input,
    "image.resize": tf_calls.resize,
    "linalg.matmul": tf_calls.matmul,
    "matmul": tf_calls.matmul,
    "norm": tf_calls.norm,
    "linalg.norm": tf_calls.norm,
    "one_hot": lambda indices, depth, axis=None, dtype=None, **_: ops.one_hot(
        indices, depth, axis=-1 if axis is None else axis, dtype=tf_calls.dtype_name(dtype or "float32")
    ),
    "ones_like": lambda input, dtype=None, **_: ops.ones_like(input, dtype=None if dtype is None else tf_calls.dtype_name(dtype)),
    "pad": tf_calls.pad,
    "repeat": lambda input, repeats, axis=None: ops.repeat(input, repeats, axis=axis),
    "reshape": tf_calls.reshape,
    "reverse": lambda tensor, axis: ops.flip(tensor, axis=tuple(axis)),
    "roll": lambda input, shift, axis: ops.roll(input, shift, axis=axis),
    "shape": tf_calls.lengths,
    "split": tf_calls.split,
    "squeeze": tf_calls.squeeze,
    "stack": tf_calls.stack,
    "stop_gradient": lambda input: ops.stop_gradient(input),
    "tensordot": lambda a, b, axes: ops.tensordot(a, b, axes=axes),
    "tile": lambda input, multiples: ops.tile(input, multiples),
    "transpose": tf_calls.transpose,
    "unstack": lambda value, num=None, axis=0: ops.unstack(value, num=num, axis=axis),
    "where": tf_calls.where,
    "zeros_like": lambda input, dtype=None, **_: ops.zeros_like(
        input, dtype=None if dtype is None else tf_calls.dtype_name(dtype)
    ),
}


def _tf_functions() -> dict[str, Function]:
    binary = {"subtract": "sub", "multiply": "mul", "divide": "div", "truediv": "div", "floormod": "mod"}
    table: dict[str, Function] = {}
    for name, function in _BINARY.items():
        table[f"math.{name}"] = table[f"__operators__.{name}"] = tf_calls.of_two(function)
    for name, short in binary.items():
        table[f"math.{name}"] = table[f"__operators__.{name}"] = tf_calls.of_two(_BINARY[short])
    table["math.divide_no_nan"] = lambda x, y: ops.where(
        ops.equal(y, 0), ops.zeros_like(x), ops.divide(x, ops.where(ops.equal(y, 0), 1, y))
    )
    table["math.add_n"] = lambda inputs: sum(inputs[1:], start=inputs[0])
    for name, function in _UNARY.items():
        table[f"math.{name}"] = tf_calls.of_one(function)
    for name, function in _REDUCE.items():
        table[f"math.reduce_{name}"] = function
    for name, function in _NN.items():
        table[f"nn.{name}"] = table[f"keras.activations.{name}"] = function
    for name in ("l2_normalize", "softmax", "log_softmax"):
        table[f"math.{name}"] = table[f"linalg.{name}"] = _NN[name]
    table["math.argmax"], table["math.argmin"] = tf_calls.index_of(ops.argmax), tf_calls.index_of(ops.argmin)
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
    "LeakyRelu": lambda x, alpha=0.2: tf_calls.leaky_relu(x, alpha),
    "Softmax": ops.softmax,
    "LogSoftmax": ops.log_softmax,
    **{kind: _REDUCE[kind.lower()] for kind in ("Sum", "Mean", "Max", "Min", "Prod", "Any", "All")},
    "MatMul": tf_calls.matmul,
    **{
        kind: lambda a, b, adj_x=False, adj_y=False: tf_calls.matmul(a, b, adj_x, adj_y)
        for kind in ("BatchMatMul", "BatchMatMulV2")
    },
    "ConcatV2": lambda *inputs: tf_calls.concat(list(inputs[:-1]), inputs[-1]),
    "Pack": lambda *inputs, axis=0: tf_calls.stack(list(inputs), axis),
    "Unpack": lambda x, axis=0, num=None: ops.unstack(x, num=num, axis=axis),
    "Reshape": tf_calls.reshape,
    "ExpandDims": ops.expand_dims,
    "Squeeze": lambda x, squeeze_dims=None: tf_calls.squeeze(x, squeeze_dims or None),
    "Transpose": tf_calls.transpose,
    "Tile": ops.tile,
    "Pad": tf_calls.pad,
    "PadV2": lambda x, paddings, value: tf_calls.pad(x, paddings, constant_values=value),
    "MirrorPad": lambda x, paddings, mode="REFLECT": tf_calls.pad(x, paddings, mode),
    "Cast": lambda x, DstT="DT_FLOAT": ops.cast(x, "float32" if DstT == "DT_FLOAT" else tf_calls.dtype_name(DstT)),  # noqa: N803 - its name
    "Identity": lambda x: x,
    "StopGradient": ops.stop_gradient,
    "Shape": tf_calls.lengths,
    "Split": lambda axis, x, num_split=1: ops.split(x, num_split, axis=axis),
    "SplitV": lambda x, sizes, axis: tf_calls.split(x, sizes, axis),
    "ClipByValue": tf_calls.clip,
    "GatherV2": tf_calls.gather,
    "SelectV2": ops.where,
    "Select": ops.where,
    "ZerosLike": ops.zeros_like,
    "OnesLike": ops.ones_like,
    "DepthToSpace": tf_calls.depth_to_space,
    "OneHot": tf_calls.one_hot,
    "ArgMax": tf_calls.index_of(ops.argmax),
    "ArgMin": tf_calls.index_of(ops.argmin),
    "Einsum": lambda *inputs, equation: tf_calls.einsum(equation, *inputs),
    "ResizeBilinear": tf_calls.resize_of_graph("bilinear"),
    "ResizeNearestNeighbor": tf_calls.resize_of_graph("nearest"),
}
_ATTRIBUTES = frozenset(
    """
    keep_dims transpose_a transpose_b adj_x adj_y axis num squeeze_dims alpha DstT num_split mode block_size begin_mask end_mask
    ellipsis_mask new_axis_mask shrink_axis_mask output_type equation align_corners half_pixel_centers
    batch_dims
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


def _text(value: Any) -> str:
    return base64.b64decode(str(value)).decode()


def _attribute(value: Any) -> Any:
    """A value of a node's attributes, from the JSON form of its protocol buffer."""
    if not isinstance(value, Mapping):
        return value
    for kind, convert in (("i", int), ("f", float), ("b", bool), ("type", str), ("s", _text)):
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
    if kind not in ("Pack", "Unpack", "OneHot"):
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
    "GetItem": tf_calls.getitem,
    "Reshape": tf_calls.reshape,
    "Squeeze": tf_calls.squeeze,
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
