"""A convolution and the BatchNorm after it as one kernel, with the bits of the two.

TensorFlow's graph rewriter makes one operation of a `Conv2D` and a `FusedBatchNormV3`, which works on the sums while they are in
registers. Keras's BatchNorm in inference mode is a product and a sum instead, two more passes over memory: on a small backbone a
third of all the time. With a mean of 0 and a variance of 1 the fused one computes that very product and that very sum, each
rounded. A depthwise convolution is one of as many groups as channels.

Nothing in TensorFlow promises any of this, so one convolution of each kind is tried out, once in a process, and the kind left
alone where a single bit differs. May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit.building.batch_norms import Shape, apply_norm, spread
from transferkit.building.graph import Call, Spec

__all__ = ["Fusion", "fusions", "holding"]

#: So many rows are tried out; only a batch of 1 is computed in a way of its own.
_ROWS = 8
#: What a processor takes at once of a vector; kernels treat channels beyond a multiple of it in a way of their own.
_AT_ONCE = 16
#: What has been tried out: settings and kind → whether it has the bits.
_holds: dict[tuple[str, str], bool] = {}


@dataclass(frozen=True)
class Fusion:
    """A convolution that a BatchNorm follows.

    Args:
        layer: The convolution.
        call: The index of its call.
        shape: Of a row of its input.
    """

    layer: Any
    call: int
    shape: tuple[int, ...]

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved for itself."""
        return type(self.layer) is keras.layers.DepthwiseConv2D

    @property
    def kind(self) -> str:
        """What kernels tell convolutions apart by, but for the sizes of images."""
        height, width, *channels = self.layer.kernel.shape
        aligned = [not number % _AT_ONCE for number in channels]
        return repr((self.depthwise, height, width, aligned, tuple(self.layer.strides), self.layer.padding, self.layer.use_bias))

    def convolve(self, x: Any) -> Any:
        """What the convolution gives without its bias."""
        kernel = self._as_groups(keras.ops.convert_to_tensor(self.layer.kernel))
        return tf.nn.conv2d(x, kernel, strides=self.layer.strides, padding=self.layer.padding.upper())

    def norm(self, x: Any, constants: tuple[Any, Any]) -> Any:
        """What the bias of the convolution, a factor and an offset make of what `convolve` gives."""
        factor, offset = constants
        zeros, ones = (tf.constant(number, tf.float32, factor.shape) for number in (0.0, 1.0))
        # Subtracting what is the opposite of a number is adding it, to the bit.
        mean = -keras.ops.convert_to_tensor(self.layer.bias) if self.layer.use_bias else zeros
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=factor, offset=offset, mean=mean, variance=ones, epsilon=0.0, is_training=False
        )
        return _undrawn(y)

    def folded(self, constants: tuple[Any, Any], *, grouped: bool) -> Callable[[Any], Any]:
        """The convolution with a factor in its kernel and an offset as its bias, as they are now; nearly the same numbers.

        Args:
            constants: The factor and the offset of each channel.
            grouped: Whether a depthwise one is computed as one of as many groups as channels, which is faster.
        """
        layer, padding = self.layer, self.layer.padding.upper()
        factor, offset = (np.asarray(constant) for constant in constants)
        kernel = layer.kernel.numpy() * (factor[:, None] if self.depthwise else factor)
        bias = offset + layer.bias.numpy() * factor if layer.use_bias else offset

        def run(x: Any) -> Any:
            if self.depthwise and not grouped:
                y = tf.nn.depthwise_conv2d(x, kernel, strides=(1, *layer.strides, 1), padding=padding)
            else:
                y = tf.nn.conv2d(x, self._as_groups(kernel), strides=layer.strides, padding=padding)
            return _undrawn(tf.nn.bias_add(y, bias))

        return run

    def _as_groups(self, kernel: Any) -> Any:
        return tf.reshape(kernel, (*kernel.shape[:2], 1, kernel.shape[2])) if self.depthwise else kernel


def fusions(
    calls: Sequence[Call], norms: Mapping[int, Shape], specs: dict[int, Spec], *, kept: Collection[int]
) -> dict[int, Fusion]:
    """The BatchNorms that could be computed with the convolution before them, by index of call.

    Args:
        calls: Of the graph.
        norms: Those BatchNorms that are a factor and an offset for each channel, with the shapes of their inputs.
        specs: Of all tensors.
        kept: The tensors that are read from outside.
    """
    makers = {number: index for index, call in enumerate(calls) for number in call.outputs}
    readers: dict[int, int] = dict.fromkeys(kept, 1)
    for call in calls:
        for number in call.inputs:
            readers[number] = readers.get(number, 0) + 1
    found = {}
    for index, shape in norms.items():
        (number,) = calls[index].inputs
        if number in makers and readers[number] == 1 and spread(calls[index].operation, shape) is None:
            fusion = _fusion(makers[number], calls[makers[number]], specs)
            if fusion is not None:
                found[index] = fusion
    return found


def _fusion(index: int, call: Call, specs: dict[int, Spec]) -> Fusion | None:
    layer = call.operation
    depthwise = type(layer) is keras.layers.DepthwiseConv2D
    if not depthwise and type(layer) is not keras.layers.Conv2D:
        return None
    if len(call.args) != 1 or call.kwargs or layer.data_format != "channels_last" or set(layer.dilation_rate) != {1}:
        return None
    if (layer.depth_multiplier if depthwise else layer.groups) != 1 or layer.activation is not keras.activations.linear:
        return None
    if (
        layer.activity_regularizer is not None
        or getattr(layer, "quantization_mode", None)
        or getattr(layer, "lora_enabled", False)
    ):
        return None
    (number,) = call.inputs
    shape = specs[number].shape[1:]
    sizes = tuple(size for size in shape if size is not None)
    if {layer.compute_dtype, layer.variable_dtype, specs[number].dtype} != {"float32"} or sizes != shape:
        return None
    return Fusion(layer, index, sizes)


def _undrawn(y: Any) -> Any:
    """The same, kept out of one kernel with an activation: there NaN becomes 0, and a model gone wrong looks sound."""
    return tf.ensure_shape(y, y.shape)


def holding(found: dict[int, Fusion]) -> dict[int, Fusion]:
    """Those that have, with the settings of now, the bits of the convolution and the BatchNorm one after the other."""
    device = tf.identity(0.0).device
    if "CPU" not in device or tf.config.functions_run_eagerly():
        return {}
    optimizer = tf.config.optimizer
    settings = repr((device, optimizer.get_jit(), sorted(optimizer.get_experimental_options().items())))
    kinds = {fusion.kind: fusion for fusion in found.values()}
    new = {kind: fusion for kind, fusion in kinds.items() if (settings, kind) not in _holds}
    _holds.update(((settings, kind), same) for kind, same in zip(new, _same_bits(list(new.values())), strict=True))
    return {index: fusion for index, fusion in found.items() if _holds[settings, fusion.kind]}


def _same_bits(found: Sequence[Fusion]) -> list[bool]:
    """Whether each gives the same bits, on rows of which one isn't finite."""
    if not found:
        return []
    some = np.random.default_rng(0).normal(size=10_007).astype("float32")
    given = []
    for fusion in found:
        kernel = fusion.layer.kernel.shape
        channels = kernel[2 if fusion.depthwise else 3]
        x = np.resize(some, (_ROWS, *fusion.shape))
        x[0, 0, 0, 0] = np.nan
        bias, factor, offset = np.resize(some[1:], (3, channels))
        weights = [np.resize(some, kernel), bias][: 1 + fusion.layer.use_bias]
        given.append(tf.nest.map_structure(tf.constant, (x, weights, (factor, offset))))

    def fused(given: Any) -> Any:
        def one(fusion: Fusion, x: Any, pair: Any) -> Any:
            return tf.nn.relu(fusion.norm(fusion.convolve(x), pair))

        return [_with(weights, one, fusion, x, pair) for fusion, (x, weights, pair) in zip(found, given, strict=True)]

    def apart(fusion: Fusion, x: Any, pair: Any) -> Any:
        return tf.nn.relu(apply_norm(fusion.layer.call(x), pair))

    try:
        ours = tf.function(fused, autograph=False).get_concrete_function(given)(given)
    except tf.errors.OpError:  # without oneDNN, TensorFlow has no kernel for groups
        return [same for fusion in found for same in _same_bits([fusion])] if len(found) > 1 else [False]
    wanted = [_with(weights, apart, fusion, x, pair) for fusion, (x, weights, pair) in zip(found, given, strict=True)]
    return [np.array_equal(one, other, equal_nan=True) for one, other in zip(ours, wanted, strict=True)]


def _with(weights: Sequence[Any], run: Callable[..., Any], fusion: Fusion, *args: Any) -> Any:
    """What `run` gives where the convolution had these weights."""
    own = [fusion.layer.kernel, fusion.layer.bias][: len(weights)]
    with keras.StatelessScope(state_mapping=list(zip(own, weights, strict=True))):
        return run(fusion, *args)
