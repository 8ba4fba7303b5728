"""What a step waits for, as it is measured; XLA where it is measured to be faster; and a data set that a service reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transferkit as tk
from transferkit import errors
from transferkit._keras import keras, tf
from transferkit.data import Batch
from transferkit.tuning import loop
from transferkit.tuning.throughput import Throughput


def network(width: int = 4) -> Any:
    return tk.ModelBuilder((6,)).dense(width, "relu").classifier(3).build(seed=0)


def problem(rows: int = 64) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return random.normal(size=(rows, 6)).astype("float32"), np.arange(rows) % 3


def test_the_bottleneck_is_what_takes_longest() -> None:
    assert Throughput("all", 32, 1, 0.02, 0.01).bottleneck == "input"
    assert Throughput("all", 32, 1, 0.01, 0.02).bottleneck == "computing"
    shared = Throughput("all", 32, 4, 0.01, 0.01, 0.03)
    assert shared.bottleneck == "communication"
    assert shared.step_seconds == pytest.approx(0.04)
    assert shared.rows_per_second == pytest.approx(800)
    assert "800 rows a second, in batches of 32 shared by 4 replicas" in str(shared)
    assert shared.to_dict()["bottleneck"] == "communication"


def test_slow_reading_is_found() -> None:
    x, y = problem()

    def read(index: Any) -> Batch:
        time.sleep(0.04)
        return Batch(x[index], y[index], None)

    data = tk.Data(read=read, labels=y, size=len(y), class_names=(), source="rows")
    found = tk.find_bottleneck(network(), data, batch_size=16, steps=6)
    assert found.bottleneck == "input"
    assert found.input_seconds > 0.015  # two are read at a time
    assert found.batch_size == 16
    batches = [(x[:8], y[:8]), (x[8:16], y[8:16])]
    assert tk.find_bottleneck(network(), batches, steps=3).batch_size == 8
    assert tk.find_bottleneck(network(), tf.data.Dataset.from_tensor_slices((x, y)).batch(10), steps=9).batch_size == 10


def test_slow_computing_is_found_and_the_model_left_as_it_was() -> None:
    model = tk.ModelBuilder((6,)).dense(3000, "relu").dense(3000, "relu").classifier(3).build(seed=0)
    model.compile("sgd", "sparse_categorical_crossentropy")
    before = [variable.numpy() for variable in model.variables]
    optimizer = model.optimizer
    found = tk.find_bottleneck(model, problem(512), batch_size=512, steps=5)
    assert found.bottleneck == "computing"
    assert "freeze more" in str(found)
    assert model.optimizer is optimizer
    assert all(np.array_equal(old, new.numpy()) for old, new in zip(before, model.variables, strict=True))


def test_what_cannot_be_measured_is_told() -> None:
    with pytest.raises(errors.PlanError, match="steps=0"):
        tk.find_bottleneck(network(), problem(), steps=0)
    with pytest.raises(errors.DataError, match="no rows at all"):
        tk.find_bottleneck(network(), [])


def test_xla_is_taken_where_it_is_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = tk.Placement.cpu(jit_compile="measured")
    assert placement.describe() == "the CPU, float32, XLA where it is measured to be faster"
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1, learning_rate=0.01).cache(False)
    run = plan.fit(network(), problem(), seed=0, placement=placement, verbose=0)
    assert "; XLA o" in run.phases[0].frozen
    assert "ms a step with it" in run.phases[0].frozen
    ways = []
    for on in (True, False):
        monkeypatch.setattr(loop, "measured_jit", lambda *_, on=on: (on, "as told"))
        model = network()
        seen: list[bool] = []
        look = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_, model=model, seen=seen: seen.append(model.jit_compile))
        run = plan.fit(model, problem(), seed=0, placement=placement, callbacks=[look], verbose=0)
        assert seen == [on]
        ways.append(run.history["loss"][0])
    assert ways[0] == pytest.approx(ways[1], rel=1e-5)


def test_a_step_that_xla_cannot_compile_is_taken_without_it() -> None:
    def strange(y_true: Any, y_pred: Any) -> Any:
        means = tf.py_function(lambda one: one, [keras.ops.mean(y_pred, axis=-1)], "float32")
        return tf.ensure_shape(means, [None]) + 0 * keras.ops.cast(keras.ops.reshape(y_true, (-1,)), "float32")

    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1, learning_rate=0.01).loss(strange).cache(False)
    run = plan.fit(network(), problem(), seed=0, placement=tk.Placement.cpu(jit_compile="measured"), verbose=0)
    assert "XLA off, which can't compile a step" in run.phases[0].frozen


def test_xla_is_for_one_device() -> None:
    for way in (True, "measured"):
        with pytest.raises(errors.PlanError, match="on several devices; XLA compiles the steps of one"):
            tk.Placement.mirrored(["GPU:0", "GPU:1"], jit_compile=way)
    with pytest.raises(errors.PlanError, match="must be True, False"):
        tk.Placement.cpu(jit_compile="mesured")  # type: ignore[arg-type]


def test_replicas_have_communication(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, numpy as np, transferkit as tk\n"
        "placement = tk.Placement.mirrored(['CPU:0', 'CPU:1'])\n"
        "with placement.scope():\n"
        "    model = tk.ModelBuilder((6,)).dense(4, 'relu').classifier(3).build(seed=0)\n"
        "found = tk.find_bottleneck(model, (np.zeros((64, 6)), np.arange(64) % 3), steps=5, placement=placement)\n"
        "print(json.dumps(found.to_dict()))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replicas"] == 2
    assert found["communication_seconds"] > 0


def test_a_data_set_that_a_service_reads_gives_the_weights_of_the_same_data_set_read_here() -> None:
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    address = dispatcher.target.split("://")[1]
    worker = service.WorkerServer(service.WorkerConfig(dispatcher_address=address))
    data = tf.data.Dataset.from_tensor_slices(problem()).batch(16)
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2, learning_rate=0.01).cache(False)
    weights = []
    for source in (data, data.apply(service.distribute(service.ShardingPolicy.OFF, dispatcher.target))):
        model = network()
        plan.fit(model, source, seed=0, verbose=0)
        weights.append(model.get_weights())
    del worker
    assert all(np.array_equal(one, other) for one, other in zip(*weights, strict=True))
