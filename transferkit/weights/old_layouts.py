"""The arrays of a layer as Keras 1, Keras 2, Theano or CuDNN laid them out, in the layout of Keras 3.

One function per layout, NumPy only, and `convert_layer`, which picks them by the layer's class and what the file says of itself.
What there was:
- Keras 1 kept Theano's kernels (filters, channels, rows, columns), a gate of a recurrent layer in three arrays of its own, and a
  1-D kernel as a 2-D one. `Deconvolution2D` had inputs and outputs in the places of a convolution.
- The backend Theano convolves with the kernel turned round; TensorFlow correlates.
- CuDNN has each gate's matrices transposed and two biases.
The orders are those that Keras 2's own loader (`preprocess_weights_for_loading`, 2.0 to 2.3) converts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit.errors import WeightsError

__all__ = ["Converted", "convert_layer", "cudnn_gru", "cudnn_lstm", "gates_joined", "kernel_from_theano", "turned_round"]

Array = np.ndarray[Any, Any]

_CONVOLUTIONS = frozenset(("Conv1D", "Conv2D", "Conv3D", "Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"))
_DEPTHWISE = frozenset(("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"))
_CONV_LSTM = frozenset(("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"))


@dataclass(frozen=True)
class Converted:
    """The arrays of a layer in the layout of Keras 3.

    Args:
        arrays: In the order of Keras 3's layer.
        changes: What was done, in words; empty where the arrays are as the file has them.
    """

    arrays: list[Array]
    changes: tuple[str, ...] = ()


def turned_round(kernel: Array) -> Array:
    """A convolution's kernel for correlation, or the other way: every axis but the last two (channels, filters) reversed.

    Args:
        kernel: (lengths…, channels, filters).

    Example:
        >>> turned_round(np.arange(3.0).reshape(3, 1, 1)).ravel().tolist()
        [2.0, 1.0, 0.0]
    """
    return kernel[(slice(None, None, -1),) * (kernel.ndim - 2)]


def kernel_from_theano(kernel: Array) -> Array:
    """A kernel (filters, channels, lengths…) as (lengths…, channels, filters).

    Args:
        kernel: With Theano's order of the axes.

    Example:
        >>> kernel_from_theano(np.zeros((8, 3, 5, 7))).shape
        (5, 7, 3, 8)
    """
    return np.transpose(kernel, (*range(2, kernel.ndim), 1, 0))


def gates_joined(arrays: Sequence[Array], order: Sequence[int]) -> list[Array]:
    """Gates kept as three arrays each (kernel, recurrent kernel, bias) joined into three arrays.

    Args:
        arrays: Three for each gate, in the order of the file.
        order: Which gate of the file comes first, second …
    """
    return [np.concatenate([arrays[3 * gate + part] for gate in order], axis=-1) for part in range(3)]


def _by_gate(kernel: Array, gates: int) -> list[Array]:
    return list(np.split(kernel, gates, axis=1))


def cudnn_lstm(kernel: Array, recurrent: Array, bias: Array) -> list[Array]:
    """CuDNN's LSTM as Keras's: each gate's matrices transposed in memory, the two biases added.

    Args:
        kernel: (inputs, 4 · units).
        recurrent: (units, 4 · units).
        bias: (8 · units,).
    """
    return [*_cudnn_kernels(kernel, recurrent, 4), bias.reshape(2, -1).sum(axis=0)]


def cudnn_gru(kernel: Array, recurrent: Array, bias: Array) -> list[Array]:
    """CuDNN's GRU as Keras's with `reset_after`: each gate's matrices transposed in memory, the two biases one above the other.

    Args:
        kernel: (inputs, 3 · units).
        recurrent: (units, 3 · units).
        bias: (6 · units,).
    """
    return [*_cudnn_kernels(kernel, recurrent, 3), bias.reshape(2, -1)]


def _cudnn_kernels(kernel: Array, recurrent: Array, gates: int) -> list[Array]:
    # A gate's input kernel keeps its shape while its memory is read in Fortran's order.
    kernels = [gate.T.reshape(gate.shape, order="F") for gate in _by_gate(kernel, gates)]
    return [np.hstack(kernels), np.hstack([gate.T for gate in _by_gate(recurrent, gates)])]


def convert_layer(
    class_name: str,
    config: Mapping[str, Any],
    arrays: Sequence[Array],
    *,
    generation: int = 3,
    backend: str = "tensorflow",
) -> Converted:
    """The arrays of one layer in the layout of Keras 3, in its order, and what had to be done for it.

    Args:
        class_name: The class of Keras 3: `Conv2D`, `LSTM`, `TimeDistributed` …
        config: Its configuration in the words of Keras 3; `data_format` is read, and a wrapper's `layer` (a dict with
            `class_name` and `config`) or `cell`.
        arrays: In the order of the file.
        generation: 1 for a file of Keras 1 (also 0.x), 2 of Keras 2, tf.keras or tf_keras, 3 of Keras 3.
        backend: What the file was trained on: `tensorflow`, `theano` or `cntk`.

    Returns:
        As many arrays as the layer of Keras 3 has weights, views of the given ones where nothing had to be put together.

    Raises:
        WeightsError: when the arrays fit none of the layouts the class ever had.

    Example:
        >>> old = [np.zeros((8, 3, 5, 5)), np.zeros(8)]
        >>> converted = convert_layer("Conv2D", {"data_format": "channels_first"}, old, generation=1)
        >>> [array.shape for array in converted.arrays], converted.changes
        ([(5, 5, 3, 8), (8,)], ("the kernel from Theano's order of axes",))
    """
    listed = list(arrays)
    inner = _inner(config, "layer", "cell")
    if class_name == "Bidirectional" and inner is not None:
        half = len(listed) // 2
        behind = _inner(config, "backward_layer") or inner
        forward = convert_layer(*inner, listed[:half], generation=generation, backend=backend)
        backward = convert_layer(*behind, listed[half:], generation=generation, backend=backend)
        return Converted([*forward.arrays, *backward.arrays], tuple(dict.fromkeys(forward.changes + backward.changes)))
    if class_name in ("TimeDistributed", "RNN", "SpectralNormalization") and inner is not None:
        own = len(listed) - (class_name == "SpectralNormalization")  # its vector comes after the layer's arrays
        held = convert_layer(*inner, listed[:own], generation=generation, backend=backend)
        return Converted([*held.arrays, *listed[own:]], held.changes)
    if not listed:
        return Converted(listed)
    changes: list[str] = []
    first = config.get("data_format") == "channels_first"
    if (class_name in ("LSTM", "LSTMCell") or class_name in _CONV_LSTM) and len(listed) == 12:
        listed = gates_joined(_unshaped(class_name, listed, first, generation), (0, 2, 1, 3))
        changes.append("four gates of three arrays joined")
    if class_name in ("GRU", "GRUCell") and len(listed) == 9:
        listed = gates_joined(listed, (0, 1, 2))
        changes.append("three gates of three arrays joined")
    if generation == 1:
        listed = _from_keras_1(class_name, listed, first, changes)
    if backend == "theano" and class_name in _CONVOLUTIONS | _DEPTHWISE | _CONV_LSTM:
        listed[0] = turned_round(listed[0])
        if class_name in _CONV_LSTM and len(listed) > 1:
            listed[1] = turned_round(listed[1])
        if any(n > 1 for n in listed[0].shape[:-2]):
            changes.append("the kernel turned round, as Theano convolves and TensorFlow correlates")
    if len(listed) == 3 and class_name in ("LSTM", "GRU") and listed[1].ndim == 2 and listed[2].ndim == 1:
        units = listed[1].shape[0]
        if class_name == "LSTM" and listed[2].shape == (8 * units,):
            listed = cudnn_lstm(*listed)
            changes.append("CuDNN's gates transposed, its two biases added")
        elif class_name == "GRU" and listed[2].shape == (6 * units,):
            listed = cudnn_gru(*listed)
            changes.append("CuDNN's gates transposed, its two biases one above the other")
    return Converted(listed, tuple(changes))


def _inner(config: Mapping[str, Any], *keys: str) -> tuple[str, Mapping[str, Any]] | None:
    for key in keys:
        layer = config.get(key)
        if isinstance(layer, Mapping) and isinstance(layer.get("class_name"), str) and isinstance(layer.get("config"), Mapping):
            return layer["class_name"], layer["config"]
    return None


def _unshaped(class_name: str, arrays: list[Array], first: bool, generation: int) -> list[Array]:
    """The twelve arrays of a ConvLSTM of Keras 1 with the filters last, where they can be joined."""
    if class_name not in _CONV_LSTM or not first or generation != 1:
        return arrays
    return [kernel_from_theano(array) if array.ndim > 1 else array for array in arrays]


def _from_keras_1(class_name: str, arrays: list[Array], first: bool, changes: list[str]) -> list[Array]:
    kernel = arrays[0]
    rest = arrays[1:]
    if class_name == "Conv1D" and kernel.ndim == 4:
        changes.append("a 1-D kernel kept as a 2-D one")
        if kernel.shape[1] != 1:  # (filters, channels, length, 1), before 1.2
            if kernel.shape[3] != 1:
                raise WeightsError(
                    "Converting a 1-D convolution of Keras 1.",
                    found=f"a kernel {kernel.shape}, not (length, 1, channels, filters) or (filters, channels, length, 1)",
                    cause="the file is damaged, or of a kind that isn't known here",
                )
            kernel = kernel_from_theano(kernel)
        return [kernel[:, 0], *rest]
    theano = "the kernel from Theano's order of axes"
    if class_name in ("Conv2D", "Conv3D") and first:
        changes.append(theano)
        return [kernel_from_theano(kernel), *rest]
    if class_name in ("Conv2DTranspose", "Conv3DTranspose"):
        changes.append(f"{theano if first else 'the kernel'} with inputs and outputs exchanged")
        kernel = kernel_from_theano(kernel) if first else kernel
        return [np.swapaxes(kernel, -1, -2), *rest]
    if class_name in _DEPTHWISE and first:
        changes.append(theano)
        return [kernel_from_theano(array) if array.ndim > 2 else array for array in arrays]
    return arrays
