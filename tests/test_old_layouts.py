"""Old layouts of weights, against convolutions and recurrences written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transferkit.errors import WeightsError
from transferkit.weights.old_layouts import convert_layer, cudnn_gru, cudnn_lstm, kernel_from_theano, turned_round

rng = np.random.default_rng(0)


def test_theano_kernels_come_back_to_correlation() -> None:
    kernel = rng.normal(size=(4, 3, 5, 2))  # filters, channels, rows, columns
    new, bias = convert_layer(
        "Conv2D", {"data_format": "channels_first"}, [kernel, np.zeros(4)], generation=1, backend="theano"
    ).arrays
    assert new.shape == (5, 2, 3, 4)
    assert bias.shape == (4,)
    image = rng.normal(size=(3, 5, 2))
    # A convolution in the mathematicians' sense, of one patch: the kernel runs against the image.
    convolved = [
        sum(kernel[f, c, 4 - i, 1 - j] * image[c, i, j] for c in range(3) for i in range(5) for j in range(2)) for f in range(4)
    ]
    np.testing.assert_allclose(np.einsum("ijcf,cij->f", new, image), convolved)


def test_turning_round_twice_is_nothing() -> None:
    kernel = rng.normal(size=(3, 2, 4, 5))
    np.testing.assert_array_equal(turned_round(turned_round(kernel)), kernel)
    np.testing.assert_array_equal(kernel_from_theano(kernel)[1, 2], kernel[..., 1, 2].T)


@pytest.mark.parametrize(("class_name", "gates", "order"), [("LSTM", 4, (0, 2, 1, 3)), ("GRU", 3, (0, 1, 2))])
def test_gates_of_keras_1_are_joined_in_the_order_of_keras_2(class_name: str, gates: int, order: tuple[int, ...]) -> None:
    parts = [[rng.normal(size=(3, 2)), rng.normal(size=(2, 2)), rng.normal(size=2)] for _ in range(gates)]
    kernel, recurrent, bias = convert_layer(class_name, {}, [array for gate in parts for array in gate], generation=1).arrays
    for place, gate in enumerate(order):
        np.testing.assert_array_equal(kernel[:, 2 * place : 2 * place + 2], parts[gate][0])
        np.testing.assert_array_equal(recurrent[:, 2 * place : 2 * place + 2], parts[gate][1])
        np.testing.assert_array_equal(bias[2 * place : 2 * place + 2], parts[gate][2])


def test_cudnn_gates_are_transposed_in_memory() -> None:
    kernel, recurrent = np.arange(24.0).reshape(3, 8), np.arange(16.0).reshape(2, 8)
    new, new_recurrent, bias = cudnn_lstm(kernel, recurrent, np.arange(16.0))
    for gate in range(4):
        part = slice(2 * gate, 2 * gate + 2)
        # CuDNN reads the gate's memory as (units, inputs).
        np.testing.assert_array_equal(new[:, part], np.ascontiguousarray(kernel[:, part]).reshape(2, 3).T)
        np.testing.assert_array_equal(new_recurrent[:, part], recurrent[:, part].T)
    np.testing.assert_array_equal(bias, np.arange(8.0) + np.arange(8.0, 16.0))
    assert cudnn_gru(np.zeros((3, 6)), np.zeros((2, 6)), np.arange(12.0))[2].tolist() == [list(range(6)), list(range(6, 12))]


@pytest.mark.parametrize(
    ("class_name", "data_format", "old", "new"),
    [
        ("Conv1D", "channels_last", (5, 1, 3, 4), (5, 3, 4)),
        ("Conv1D", "channels_last", (4, 3, 5, 1), (5, 3, 4)),
        ("Conv2D", "channels_last", (5, 2, 3, 4), (5, 2, 3, 4)),
        ("Conv3D", "channels_first", (4, 3, 5, 2, 6), (5, 2, 6, 3, 4)),
        ("Conv2DTranspose", "channels_last", (5, 2, 3, 4), (5, 2, 4, 3)),
        ("Conv2DTranspose", "channels_first", (4, 3, 5, 2), (5, 2, 4, 3)),
        ("SeparableConv2D", "channels_first", (2, 3, 5, 4), (5, 4, 3, 2)),
    ],
)
def test_kernels_of_keras_1(class_name: str, data_format: str, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    assert convert_layer(class_name, {"data_format": data_format}, [np.zeros(old)], generation=1).arrays[0].shape == new
    assert convert_layer(class_name, {"data_format": data_format}, [np.zeros(old)], generation=2).arrays[0].shape == old


def test_wrappers_convert_what_they_hold() -> None:
    conv: dict[str, Any] = {"class_name": "Conv2D", "config": {"data_format": "channels_first"}}
    assert convert_layer("TimeDistributed", {"layer": conv}, [np.zeros((4, 3, 5, 2))], generation=1).arrays[0].shape == (
        5,
        2,
        3,
        4,
    )
    gates = [np.full(shape, float(i)) for i in range(8) for shape in ((3, 2), (2, 2), (2,))]
    both = convert_layer("Bidirectional", {"layer": {"class_name": "LSTM", "config": {}}}, gates, generation=1).arrays
    assert [array.shape for array in both] == [(3, 8), (2, 8), (8,)] * 2
    assert both[3][0].tolist() == [4.0, 4.0, 6.0, 6.0, 5.0, 5.0, 7.0, 7.0]


def test_a_kernel_of_no_known_layout_is_an_error() -> None:
    with pytest.raises(WeightsError) as raised:
        convert_layer("Conv1D", {}, [np.zeros((2, 3, 4, 5))], generation=1)
    assert str(raised.value) == (
        "Converting a 1-D convolution of Keras 1.\n"
        "  found: a kernel (2, 3, 4, 5), not (length, 1, channels, filters) or (filters, channels, length, 1)\n"
        "  likely cause: the file is damaged, or of a kind that isn't known here"
    )
