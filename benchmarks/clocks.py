"""What several benchmarks measure time with."""

from __future__ import annotations

import gc
import time
from typing import Any

import keras


def settle() -> None:
    """Takes from the garbage collector what earlier turns left, which it would otherwise go through within some turn, for half a
    second and more where these made models."""
    gc.collect()
    gc.freeze()


class Clock(keras.callbacks.Callback):
    """The seconds of each epoch, from its begin to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self.seconds.append(time.perf_counter() - self.begun)
