"""Dropped paths: found under the names models give them, set by depth, off in what is frozen, and as they were afterwards."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit import errors
from transferkit.tuning.noise import drops_paths


class DropPath(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
    """Drops a branch with a probability, as models of the user's do."""

    def __init__(self, survival_probability: float, **options: Any) -> None:
        super().__init__(**options)
        self.survival_probability = survival_probability
        self.seen: list[float] = []

    def call(self, x: Any, training: bool = False) -> Any:
        if training:
            self.seen.append(self.survival_probability)
        return x


def network(*branches: Any) -> Any:
    keras.utils.set_random_seed(0)
    x = start = keras.Input((6,))
    for number, branch in enumerate(branches):
        x = keras.layers.Add()([x, branch(keras.layers.Dense(6, name=f"block_{number}")(x))])
    return keras.Model(start, keras.layers.Dense(3, name="head")(x))


def data() -> Any:
    return np.random.default_rng(0).normal(size=(32, 6)).astype("float32"), np.arange(32) % 3


def whole() -> tk.FineTuner:
    return tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1)


def test_the_rate_rises_to_the_last_branch_and_the_model_keeps_its_own() -> None:
    branches = [DropPath(0.9), DropPath(0.9), keras.layers.Dropout(0.3, noise_shape=(None, 1)), keras.layers.Dropout(0.3)]
    model = network(*branches)
    rates: list[float] = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            del logs
            rates.extend([branches[0].survival_probability, branches[1].survival_probability, branches[2].rate, branches[3].rate])

    whole().stochastic_depth(0.6).fit(model, data(), callbacks=[Look()], seed=0, verbose=0)
    assert rates == pytest.approx([0.8, 0.6, 0.6, 0.3]), "0.6 × 1/3, 2/3, 3/3; common dropout is no dropped branch"
    assert branches[0].seen[-1] == pytest.approx(0.8), "what the training step was traced with"
    assert [branches[0].survival_probability, branches[2].rate] == [0.9, 0.3]


def test_dropped_paths_of_the_applications_are_found() -> None:
    efficient = keras.applications.EfficientNetB0(weights=None, input_shape=(32, 32, 3))
    assert sum(drops_paths(layer) for layer in efficient.layers) == 9
    mobile = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3))
    assert not any(drops_paths(layer) for layer in mobile.layers)


def test_in_what_is_frozen_no_path_is_dropped() -> None:
    model = network(DropPath(0.5), DropPath(0.5))
    rates: list[float] = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            del logs
            rates.extend(layer.survival_probability for layer in model.layers if isinstance(layer, DropPath))

    plan = tk.FineTuner().phase("top", train=tk.Layers.named("block_1", "head"), epochs=1).cache(False)
    plan.fit(model, data(), callbacks=[Look()], seed=0, verbose=0)
    assert rates == [1.0, 0.5]


def test_a_model_without_any_is_told_before_training() -> None:
    model = network(keras.layers.Dropout(0.3))
    with pytest.raises(errors.ModelError) as caught:
        whole().stochastic_depth(0.2).describe(model)
    assert str(caught.value) == (
        f"Setting the stochastic depth of the model {model.name!r}.\n"
        "  found: no layer in it that drops branches\n"
        "  likely cause: MobileNet, ResNet and VGG have none; EfficientNet, ConvNeXt and many transformers do\n"
        "  to fix it: leave .stochastic_depth out of the plan; .mixup, .ema and .weight_decay regularise any model"
    )
    with pytest.raises(errors.PlanError):
        whole().stochastic_depth(1.0)
