"""What steps are fed: the batches of `fit` on arrays, to the size that their graph knows of."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import transferkit as tk
from transferkit.data import Data
from transferkit.tuning.feeding import epoch_order, ordered_dataset
from transferkit.tuning.objectives import Objective
from transferkit.tuning.settings import Targets
from transferkit.tuning.stream import Stream


def _rows(count: int) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return random.normal(size=(count, 8, 8, 3)).astype("float32"), random.integers(0, 3, count)


def _model() -> Any:
    keras.utils.set_random_seed(1)
    x = keras.Input((8, 8, 3))
    tensor = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, activation="relu")(x))
    return keras.Model(x, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(tensor)))


@pytest.mark.parametrize("kind", ["arrays", "read"])
@pytest.mark.parametrize(("count", "known"), [(48, 16), (50, None)])
def test_the_size_of_batches_is_known_where_all_have_it(kind: str, count: int, known: int | None) -> None:
    rows = _rows(count)
    data: Any = rows if kind == "arrays" else Data.arrays(*rows).map(lambda x: x)
    batches = ordered_dataset(data, batch_size=16, orders=lambda: [np.arange(count)])
    assert [spec.shape[0] for spec in batches.element_spec] == [known, known]
    assert np.array_equal(np.concatenate([x for x, _ in batches]), rows[0])


@pytest.mark.parametrize("count", [48, 50])
def test_training_in_full_is_that_of_fit_on_arrays_to_the_bit(count: int) -> None:
    x, y = _rows(count)
    plain, ours = _model(), _model()
    plain.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = []
    for epoch in range(2):
        order = epoch_order(count, seed=3, epoch=epoch)
        losses += plain.fit(x[order], y[order], batch_size=16, shuffle=False, verbose=0).history["loss"]
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2, learning_rate=1e-2)
    run = plan.fit(ours, (x, y), batch_size=16, seed=3, verbose=0)
    assert run.history["loss"] == losses
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True))


@pytest.mark.parametrize("mixes", [False, True])
def test_one_iterator_over_several_passes_gives_the_batches_of_each(mixes: bool) -> None:
    count, size, first = 50, 16, 2
    objective = Objective("categorical_crossentropy", None, None, "")
    targets = Targets(objective, classes=3, mixing=("mixup", 0.4)) if mixes else Targets(objective)

    def stream() -> Stream:
        return Stream(_rows(count), batch_size=size, seed=3, targets=targets)

    apart = [batch for number, start in ((1, first), (2, 0), (3, 0)) for batch in stream().open(number, start)]
    whole = stream()
    whole.may_go_on(1, 4)
    together = list(whole.open(1, first))
    assert [len(y) for _, y in together] == [16, 2, *[16, 16, 16, 2] * 2]
    for one, other in zip(apart, together, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_pass_has_an_iterator_of_its_own_where_its_end_must_be_seen() -> None:
    data, targets = _rows(48), Targets(Objective("mse", None, None, ""))
    for together, steps in ((2, None), (1, 2)):
        stream = Stream(data, batch_size=16, seed=3, targets=targets, steps_per_epoch=steps)
        stream.may_go_on(together, 4)
        assert stream.until is None
    assert not stream.goes_on()
