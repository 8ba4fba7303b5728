"""Rates for each variable: against NumPy, against plain Keras to the bit, over phases, saving, loss scaling and replicas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transferkit._keras import keras, tf
from transferkit.errors import ModelError, PlanError, TrainingError
from transferkit.tuning.optimizer_state import carry_over
from transferkit.tuning.optimizers import Penalty, PerVariable, decays, with_multipliers

STEPS = 20
FEW = 8
RATES = (1.0, 0.1, 0.37)
Array = Any

# ── NumPy references, from the papers' formulas with Keras's conventions for epsilon ──────────────────────────────────────────


def sgd_momentum(w: Array, grads: list[Array], rate: float) -> Array:
    m = np.zeros_like(w)
    for g in grads:
        m = 0.9 * m - rate * g
        w = w + m
    return w


def adam(w: Array, grads: list[Array], rate: float, decay: float = 0.0) -> Array:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        w = w - decay * rate * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        alpha = rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        w = w - alpha * m / (np.sqrt(v) + 1e-7)
    return w


def adamw(w: Array, grads: list[Array], rate: float) -> Array:
    return adam(w, grads, rate, decay=0.04)


def lion(w: Array, grads: list[Array], rate: float) -> Array:
    m = np.zeros_like(w)
    for g in grads:
        w = w - rate * np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    return w


def rmsprop(w: Array, grads: list[Array], rate: float) -> Array:
    v = np.zeros_like(w)
    for g in grads:
        v = 0.9 * v + 0.1 * g**2
        w = w - rate * g / np.sqrt(v + 1e-7)
    return w


def adafactor(w: Array, grads: list[Array], rate: float) -> Array:
    def rms(x: Array) -> Array:
        return np.sqrt(np.mean(x**2))

    r, c, v = np.zeros(w.shape[:-1]), np.zeros(w.shape[:-2] + w.shape[-1:]), np.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        rho = min(min(rate, 1 / np.sqrt(t)), 1 / np.sqrt(t))
        beta = 1 - t**-0.8
        square = g**2 + 1e-30
        if w.ndim > 1:
            r = beta * r + (1 - beta) * square.mean(-1)
            c = beta * c + (1 - beta) * square.mean(-2)
            v = (r / r.mean(-1, keepdims=True))[..., None] * c[..., None, :]
        else:
            v = beta * v + (1 - beta) * square
        u = g / np.sqrt(v)
        w = w - max(1e-3, rms(w)) * rho * u / max(1.0, rms(u))
    return w


def muon(w: Array, grads: list[Array], rate: float) -> Array:
    if w.ndim != 2:  # Muon trains vectors by AdamW
        return adam(w, grads, rate, decay=0.004)
    m = np.zeros_like(w)
    for g in grads:
        w = w - 0.004 * rate * w
        m = 0.95 * m + g
        x = g + 0.95 * m
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if tall else x
        w = w - rate * x * np.sqrt(max(w.shape)) * 0.2
    return w


REFERENCES: dict[str, tuple[Callable[[], Any], Callable[..., Array]]] = {
    "SGD": (lambda: keras.optimizers.SGD(0.01, momentum=0.9), sgd_momentum),
    "Adam": (lambda: keras.optimizers.Adam(0.01), adam),
    "AdamW": (lambda: keras.optimizers.AdamW(0.01, weight_decay=0.04), adamw),
    "Lion": (lambda: keras.optimizers.Lion(0.01), lion),
    "RMSprop": (lambda: keras.optimizers.RMSprop(0.01), rmsprop),
    "Adafactor": (lambda: keras.optimizers.Adafactor(0.01), adafactor),
    "Muon": (lambda: keras.optimizers.Muon(0.01), muon),
}
ALL: tuple[str, ...] = (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lamb",
    "Lion",
    "Muon",
    "Nadam",
    "RMSprop",
)
ALL += ("SGD", "ScheduleFreeAdamW")


def present(*names: str) -> list[str]:
    """The optimizers this version of Keras has."""
    return [name for name in names if hasattr(keras.optimizers, name)]


def problem(dtype: str = "float32") -> tuple[list[Any], list[list[Array]]]:
    rng = np.random.default_rng(3)
    shapes = [(4, 3), (3,), (5, 5)]
    variables = [keras.Variable(rng.normal(size=shape) * 0.3, dtype=dtype, name=f"kernel_{i}") for i, shape in enumerate(shapes)]
    return variables, [[rng.normal(size=shape).astype(dtype) for shape in shapes] for _ in range(STEPS)]


def by_position(variables: list[Any], values: Any) -> Callable[[Any], Any]:
    table = {id(variable): value for variable, value in zip(variables, values, strict=True)}
    return lambda variable: table[id(variable)]


def run(optimizer: Any, variables: list[Any], grads: list[list[Array]]) -> None:
    for step in grads:
        optimizer.apply([tf.constant(g) for g in step], variables)


def value(variable: Any) -> Array:
    return np.array(variable.numpy())


def values(variables: list[Any]) -> list[Array]:
    return [value(variable) for variable in variables]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", present(*REFERENCES))
def test_each_variable_follows_the_numpy_reference_at_its_own_rate(name: str) -> None:
    make, reference = REFERENCES[name]
    variables, grads = problem("float32" if name == "Muon" else "float64")  # Keras's Muon works in float32 only
    expected = [
        reference(value(w), [step[i] for step in grads], float(np.float32(0.01)) * RATES[i]) for i, w in enumerate(variables)
    ]
    plain = reference(value(variables[1]), [step[1] for step in grads], float(np.float32(0.01)))
    optimizer = with_multipliers(make(), variables, multiplier=by_position(variables, RATES), decay=True)
    run(optimizer, variables, grads)
    for variable, target in zip(variables, expected, strict=True):
        np.testing.assert_allclose(value(variable), target, rtol=0, atol=1e-6)
    assert np.abs(value(variables[1]) - plain).max() > 1e-3, "the multiplier must show"


@pytest.mark.parametrize("name", present(*ALL))
def test_a_multiplier_is_what_the_plain_optimizer_does_at_that_rate(name: str) -> None:
    together, grads = problem()
    make = getattr(keras.optimizers, name)
    decay = {} if name == "Muon" else {"weight_decay": 0.05}  # Muon has its own default
    run(
        with_multipliers(make(0.02, **decay), together, multiplier=by_position(together, RATES), decay=True),
        together,
        grads[:FEW],
    )
    for position, rate in enumerate(RATES):
        alone, _ = problem()
        run(make(0.02 * rate, **decay), [alone[position]], [[step[position]] for step in grads[:FEW]])
        np.testing.assert_allclose(value(together[position]), value(alone[position]), rtol=2e-5, atol=2e-6)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.05},
    "ema": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    "clip": {"global_clipnorm": 0.5},
    "accumulation": {"gradient_accumulation_steps": 3},
    "schedule": {"learning_rate": "schedule"},
}


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, "decay") for name in present(*ALL)] + [(name, key) for name in present("SGD", "AdamW", "Muon") for key in SETTINGS],
)
def test_with_every_multiplier_one_the_weights_are_those_of_the_plain_optimizer_to_the_bit(name: str, setting: str) -> None:
    def make() -> Any:
        settings = dict(SETTINGS[setting])
        if settings.get("learning_rate") == "schedule":
            settings["learning_rate"] = keras.optimizers.schedules.CosineDecay(0.02, STEPS)
        return getattr(keras.optimizers, name)(**{"learning_rate": 0.02, **settings})

    plain, grads = problem()
    grads = grads[:FEW]
    run(make(), plain, grads)
    ours, _ = problem()
    start = values(ours)
    run(with_multipliers(make(), ours, decay=True), ours, grads)
    assert same(plain, ours)
    assert not same(start, ours)


def small_model(dtype: str | None = None) -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="body", dtype=dtype),
            keras.layers.BatchNormalization(name="norm", dtype=dtype),
            keras.layers.Dense(3, name="head", dtype="float32"),
        ]
    )


def small_data(n: int = 64) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 6)).astype("float32"), rng.integers(0, 3, n)


def head_first(model: Any, low: float = 0.1) -> Callable[[Any], float]:
    head = {id(variable) for variable in model.get_layer("head").trainable_variables}
    return lambda variable: 1.0 if id(variable) in head else low


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model: Any, optimizer: Any, **options: Any) -> Any:
    optimizer = with_multipliers(optimizer, model.trainable_variables, multiplier=head_first(model), **options)
    model.compile(optimizer, LOSS, jit_compile=False)
    return model


@pytest.mark.parametrize("name", present(*REFERENCES))
def test_saved_in_the_middle_and_reloaded_training_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    make, _ = REFERENCES[name]
    x, y = small_data()
    model = compiled(small_model(), make())
    model.fit(x, y, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    model.fit(x, y, shuffle=False, verbose=0)
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.options == model.optimizer.options
    again.fit(x, y, shuffle=False, verbose=0)
    assert same(model.variables, again.variables)
    assert same(model.optimizer.variables, again.optimizer.variables)


def test_a_penalty_to_the_start_is_saved_with_its_start(tmp_path: Path) -> None:
    x, y = small_data()
    model = compiled(small_model(), keras.optimizers.SGD(0.1), penalty=Penalty(0.5, to_start=True))
    model.fit(x, y, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    model.fit(x, y, shuffle=False, verbose=0)
    again = keras.models.load_model(tmp_path / "model.keras")
    again.fit(x, y, shuffle=False, verbose=0)
    assert same(model.variables, again.variables)


class Signed(keras.optimizers.Optimizer):
    """A user's own rule, with a schedule of the user's own, neither registered."""

    def __init__(self, learning_rate: Any = 0.01, power: float = 1.0, **kwargs: Any) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.power = power

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self.totals = [self.add_variable_from_reference(variable, name="total") for variable in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        total = self.totals[self._get_variable_index(variable)]
        self.assign_add(total, gradient)
        self.assign_sub(variable, learning_rate * keras.ops.sign(total) * self.power)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "power": self.power}


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 0.02 * keras.ops.power(0.5, keras.ops.cast(step, "float32") / 10)

    def get_config(self) -> dict[str, Any]:
        return {}


def test_an_optimizer_and_a_schedule_of_the_users_own_work_unregistered(tmp_path: Path) -> None:
    x, y = small_data()
    model = compiled(small_model(), Signed(Halving(), power=0.5))
    assert isinstance(model.optimizer, Signed)
    model.fit(x, y, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", custom_objects={"Signed": Signed, "Halving": Halving})
    model.fit(x, y, shuffle=False, verbose=0)
    again.fit(x, y, shuffle=False, verbose=0)
    assert again.optimizer.power == 0.5
    assert same(model.variables, again.variables)


def test_one_learning_rate_for_callbacks_and_readers() -> None:
    x, y = small_data()
    model = compiled(small_model(), keras.optimizers.SGD(0.1))
    model.fit(x, y, verbose=0, callbacks=[keras.callbacks.LearningRateScheduler(lambda _: 0.0)])
    assert float(model.optimizer.learning_rate) == 0.0
    before = values(model.trainable_variables)
    model.fit(x, y, verbose=0)
    assert same(before, model.trainable_variables), "the rate the callback set must hold for all"


def test_loss_scaling_wraps_and_is_wrapped() -> None:
    x, y = small_data()

    def trained(wrap: Callable[[Any], Any]) -> Any:
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = small_model("mixed_float16")
            model.compile(wrap(model), LOSS, jit_compile=False)
        finally:
            keras.config.set_dtype_policy("float32")
        model.fit(x, y, shuffle=False, verbose=0)
        return model

    scaled = keras.optimizers.LossScaleOptimizer
    plain = trained(lambda _: scaled(keras.optimizers.Adam(0.01)))
    around = trained(lambda m: with_multipliers(scaled(keras.optimizers.Adam(0.01)), m.trainable_variables))
    inside = trained(lambda m: with_multipliers(keras.optimizers.Adam(0.01), m.trainable_variables))
    for model in (around, inside):  # `compile` wraps the one as it wraps a plain optimizer
        assert isinstance(model.optimizer, scaled)
        assert isinstance(model.optimizer.inner_optimizer, PerVariable)
        assert same(plain.variables, model.variables)


def test_the_given_optimizer_is_left_alone() -> None:
    optimizer = keras.optimizers.Adam(0.01)
    variables, grads = problem()
    run(with_multipliers(optimizer, variables), variables, grads)
    assert not optimizer.built
    assert int(optimizer.iterations) == 0
    assert type(optimizer) is keras.optimizers.Adam


# ── weight decay and penalties ────────────────────────────────────────────────────────────────────────────────────────────────


def test_weight_decay_leaves_biases_normalisation_and_embeddings_alone() -> None:
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(7, 4)(inputs)
    x = keras.layers.MultiHeadAttention(2, 2)(x, x)
    x = keras.layers.LayerNormalization()(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.BatchNormalization()(keras.layers.Flatten()(x))))
    kept = [variable.path for variable in model.trainable_variables if not decays(variable)]
    expected = "embeddings bias bias bias bias gamma beta gamma beta bias"
    assert " ".join(path.split("/")[-1] for path in kept) == expected
    optimizer = with_multipliers(keras.optimizers.AdamW(0.1, weight_decay=0.5), model.trainable_variables)
    before = {variable.path: value(variable) for variable in model.trainable_variables}
    optimizer.apply([tf.zeros(variable.shape) for variable in model.trainable_variables], model.trainable_variables)
    moved = [v.path for v in model.trainable_variables if not np.array_equal(before[v.path], value(v))]
    assert moved == [v.path for v in model.trainable_variables if decays(v)]


def test_variables_the_user_excluded_from_decay_stay_excluded() -> None:
    variables, _ = problem()
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["kernel_2"])
    ours = with_multipliers(optimizer, variables, decay=True)
    assert [options.decay for options in ours.options] == [True, True, False]


@pytest.mark.parametrize("to_start", [True, False])
def test_the_penalty_is_that_of_the_loss(to_start: bool) -> None:
    """Against automatic differentiation of loss + strength/2 · ‖w − w₀‖², clipping included."""
    x, y = small_data()

    def fit(penalised_loss: bool) -> Any:
        model = small_model()
        model.get_layer("norm").trainable = False
        start = values(model.trainable_variables)
        if penalised_loss:
            for _ in range(5):
                with tf.GradientTape() as tape:
                    loss = LOSS(y, model(x, training=True))
                    for w, w0 in zip(model.trainable_variables, start, strict=True):
                        loss += 0.15 * tf.reduce_sum((w - (w0 if to_start else 0.0)) ** 2)
                if "optimizer" not in locals():
                    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0)
                optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        else:
            optimizer = with_multipliers(
                keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0),
                model.trainable_variables,
                penalty=Penalty(0.3, to_start=to_start),
            )
            model.compile(optimizer, LOSS, jit_compile=False)
            model.fit(x, y, batch_size=64, epochs=5, shuffle=False, verbose=0)
        return model.trainable_variables

    for a, b in zip(fit(True), fit(False), strict=True):
        np.testing.assert_allclose(value(a), value(b), atol=2e-6)


def test_a_penalty_under_loss_scaling_is_not_scaled() -> None:
    results = []
    for settings in ({}, {"loss_scale_factor": 1024.0}):
        variable = keras.Variable([2.0, -1.0])
        optimizer = with_multipliers(keras.optimizers.SGD(0.1, **settings), [variable], penalty=Penalty(1.0))
        optimizer.apply([tf.zeros(2)], [variable])
        results.append(value(variable))
    np.testing.assert_allclose(results[0], [1.8, -0.9], rtol=1e-6)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


# ── from phase to phase ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", present(*ALL))
def test_variables_that_stay_go_on_to_the_bit_and_those_that_join_start_afresh(name: str) -> None:
    make = getattr(keras.optimizers, name)
    variables, grads = problem()
    grads = grads[:FEW]
    stays, joins = variables[0], variables[2]
    whole, _ = problem()
    run(make(0.02), [whole[0]], [[step[0]] for step in grads])
    late, _ = problem()
    run(make(0.02), [late[2]], [[step[2]] for step in grads[4:]])

    first = with_multipliers(make(0.02), [stays], decay=True)
    run(first, [stays], [[step[0]] for step in grads[:4]])
    second = with_multipliers(make(0.02), [joins, stays], decay=True)
    assert carry_over(first, second) == 1
    run(second, [joins, stays], [[step[2], step[0]] for step in grads[4:]])
    assert int(second.iterations) == FEW
    assert same([whole[0]], [stays])
    if name == "Nadam":  # its product of momenta is common to all
        assert np.abs(value(joins) - value(late[2])).max() < 0.05
    else:
        assert same([late[2]], [joins])


def test_without_an_origin_of_its_own_a_joining_variable_steps_too_far() -> None:
    """What plain Adam does to a layer unfrozen after 100 steps; under equal gradients each step should be 1 × rate."""
    old, new = keras.Variable([1.0]), keras.Variable([1.0])
    one = tf.constant([1.0])
    plain = keras.optimizers.Adam(0.001)
    plain.build([old, new])
    first = with_multipliers(keras.optimizers.Adam(0.001), [old])
    for optimizer in (plain, first):
        for _ in range(100):
            optimizer.apply([one], [old])
    for _ in range(10):
        plain.apply([one, one], [old, new])
    assert (1.0 - float(new[0])) / 0.001 > 16

    other = keras.Variable([1.0])
    second = with_multipliers(keras.optimizers.Adam(0.001), [old, other])
    carry_over(first, second)
    for _ in range(10):
        second.apply([one, one], [old, other])
    assert (1.0 - float(other[0])) / 0.001 == pytest.approx(10.0, abs=1e-3)


def test_the_moving_average_of_a_joining_variable_starts_from_its_value() -> None:
    settings = {"use_ema": True, "ema_momentum": 0.9}
    first_value, other = keras.Variable([1.0]), keras.Variable([5.0])
    first = with_multipliers(keras.optimizers.SGD(0.1, **settings), [first_value])
    first.apply([tf.ones(1)], [first_value])
    second = with_multipliers(keras.optimizers.SGD(0.1, **settings), [first_value, other])
    carry_over(first, second)
    second.apply([tf.zeros(1), tf.zeros(1)], [first_value, other])
    second.finalize_variable_values([first_value, other])
    assert float(other[0]) == pytest.approx(5.0)
    assert float(first_value[0]) == pytest.approx(0.9)


def test_loss_scale_carries_over() -> None:
    variable = keras.Variable([1.0])
    first = with_multipliers(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), [variable])
    first.apply([tf.constant([np.inf])], [variable])
    second = with_multipliers(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), [variable])
    assert float(second.dynamic_scale) != float(first.dynamic_scale)
    carry_over(first, second)
    assert float(second.dynamic_scale) == float(first.dynamic_scale)


# ── under tf.distribute ───────────────────────────────────────────────────────────────────────────────────────────────────────

ANOTHER_PROCESS = """
import json, sys
import numpy as np
import tensorflow as tf, keras
cpu = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu[0], [tf.config.LogicalDeviceConfiguration()] * 2)
from transferkit.tuning.optimizers import Penalty, with_multipliers

loaded = keras.models.load_model(sys.argv[1])

def train(make):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
    head = {id(v) for v in model.layers[-1].trainable_variables}
    optimizer = with_multipliers(make(), model.trainable_variables, multiplier=lambda v: 1.0 if id(v) in head else 0.3,
                                 penalty=lambda v: Penalty(0.1, to_start=id(v) not in head))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 6)).astype("float32"), rng.integers(0, 3, 64)
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return [v.numpy() for v in model.trainable_variables]

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
apart = []
for make in (lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1), lambda: keras.optimizers.SGD(0.1, momentum=0.9)):
    one = train(make)
    with strategy.scope():
        two = train(make)
    apart.append(max(float(np.abs(a - b).max()) for a, b in zip(one, two)))
print(json.dumps({"multipliers": [o.multiplier for o in loaded.optimizer.options],
                  "iterations": int(loaded.optimizer.iterations), "apart": apart}))
"""


@pytest.fixture(scope="module")
def another_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process with two devices finds: a model saved in this one, and training on one device and on two."""
    x, y = small_data()
    model = compiled(small_model(), keras.optimizers.Adam(0.01))
    model.fit(x, y, verbose=0)
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    model.save(path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def test_a_saved_model_opens_in_another_process(another_process: dict[str, Any]) -> None:
    assert another_process["multipliers"] == [0.1, 0.1, 0.1, 0.1, 1.0, 1.0]
    assert another_process["iterations"] == 2


def test_two_replicas_train_as_one_device_does(another_process: dict[str, Any]) -> None:
    assert len(another_process["apart"]) == 2
    assert max(another_process["apart"]) < 2e-6


# ── what can't be done is said ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_multiplier_is_an_error() -> None:
    variables, _ = problem()
    with pytest.raises(PlanError) as caught:
        with_multipliers(keras.optimizers.Adam(), variables, multiplier=by_position(variables, (1.0, -1.0, float("nan"))))
    assert str(caught.value) == (
        "Giving the optimizer Adam a rate for each variable.\n"
        "  found: multipliers or penalty strengths of -1.0, nan\n"
        "  to fix it: give finite numbers of 0 or more; to leave a layer as it is, freeze it"
    )


def test_an_optimizer_without_an_update_step_is_an_error() -> None:
    variables, _ = problem()

    class Whole(keras.optimizers.Optimizer):
        pass

    with pytest.raises(ModelError) as caught:
        with_multipliers(Whole(0.1), variables)
    assert str(caught.value) == (
        "Giving the optimizer Whole a rate for each variable.\n"
        "  found: Whole has no `update_step` of its own\n"
        "  likely cause: rates are scaled where Keras hands them to `update_step`, once for each variable\n"
        "  to fix it: write the update rule in `update_step(gradient, variable, learning_rate)`"
    )


def test_an_optimizer_that_goes_round_its_update_step_is_an_error() -> None:
    class Round(keras.optimizers.SGD):
        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            for grad, variable in zip(grads, trainable_variables, strict=True):
                variable.assign_sub(0.1 * grad)

    variables, grads = problem()
    optimizer = with_multipliers(Round(0.1), variables, multiplier=0.5)
    with pytest.raises(TrainingError, match="applied gradients without calling `update_step`, so the rates had no effect"):
        run(optimizer, variables, grads)


def test_other_variables_than_the_rates_were_made_for_are_an_error() -> None:
    model = compiled(small_model(), keras.optimizers.Adam())
    config = keras.saving.serialize_keras_object(model.optimizer)
    optimizer = keras.saving.deserialize_keras_object(config)
    with pytest.raises(ModelError) as caught:
        optimizer.build(model.trainable_variables[2:])
    assert str(caught.value) == (
        "Building the optimizer PerVariableAdam on 4 variables.\n"
        "  found: rates for 6 variables; number 0 has another shape\n"
        "  likely cause: `trainable` was changed on some layer, or the model is another one\n"
        "  to fix it: make the optimizer anew with `with_multipliers`, for the variables that are trained now"
    )


def test_state_is_not_carried_between_two_rules() -> None:
    variables, _ = problem()
    adam_, sgd = (with_multipliers(make(), variables) for make in (keras.optimizers.Adam, keras.optimizers.SGD))
    with pytest.raises(ModelError) as caught:
        carry_over(adam_, sgd)
    assert str(caught.value) == (
        "Carrying the state of the optimizer PerVariableAdam over to PerVariableSGD.\n"
        "  found: optimizers of two classes\n"
        "  likely cause: the slots of one rule mean nothing to another\n"
        "  to fix it: make both with `with_multipliers`, of the same class; or start the phase with a fresh optimizer"
    )
