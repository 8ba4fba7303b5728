"""Networks of other frameworks' weights, as tests and benchmarks build them in Keras."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers


def resnet20(*, head: bool = True) -> Any:
    """ResNet-20 of He et al. (2016) for CIFAR-10, in the names of its PyTorch weights; with the 10 logits or without."""

    def unit(x: Any, filters: int, stride: int, place: str, number: str) -> Any:
        if stride == 2:  # PyTorch pads both sides alike, "same" only the end
            x = layers.ZeroPadding2D(1)(x)
        padding = "valid" if stride == 2 else "same"
        x = layers.Conv2D(filters, 3, stride, padding=padding, use_bias=False, name=f"{place}conv{number}")(x)
        return layers.BatchNormalization(epsilon=1e-5, name=f"{place}bn{number}")(x)

    start = keras.Input((32, 32, 3))
    x = layers.ReLU()(unit(start, 16, 1, "", "1"))
    for stage, filters in enumerate((16, 32, 64), 1):
        for block in range(3):
            stride = 2 if stage > 1 and block == 0 else 1
            place = f"layer{stage}_{block}_"
            y = unit(layers.ReLU()(unit(x, filters, stride, place, "1")), filters, 1, place, "2")
            if stride == 2:
                x = keras.ops.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (filters // 4, filters // 4)))
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(start, layers.Dense(10, name="linear")(x) if head else x, name="resnet20")
