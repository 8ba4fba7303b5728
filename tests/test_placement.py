"""Placements as values, what is refused, and that replicas give the numbers of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import transferkit as tk
from transferkit import errors
from transferkit._keras import keras, tf
from transferkit.building.replicas import _Shares
from transferkit.placement import is_chief, running
from transferkit.tuning.differences import check_batch, differences
from transferkit.tuning.phases import resolve

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "placement.py"


def table(folder: Path, *arguments: str) -> dict[str, dict[str, float]]:
    """The table that the benchmark gives."""
    result = folder / "result.json"
    command = [sys.executable, str(BENCHMARK), str(result), *arguments, "--chain"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(result.read_text())["table"]
    return found


def test_two_devices_and_two_workers_give_the_weights_of_one_device(tmp_path: Path) -> None:
    rows = ["accumulation", "clipped", "adapting,", "sequences", "cached", "read when"]
    found = table(tmp_path, "--columns", "one", "mirrored2", "workers2", "--rows", *rows)
    assert len(found) == len(rows)
    for name, row in found.items():
        assert row["largest"] > 0.1, name
        assert max(row["mirrored2"], row["workers2"]) < 2e-5 * max(1.0, row["largest"]), (name, row)


@pytest.mark.parametrize(("rows", "replicas"), [(7, 3), (8, 4), (2, 4), (1, 2), (5, 4), (4, 1)])
def test_each_row_counts_once_and_has_the_same_part_in_what_is_exchanged(rows: int, replicas: int) -> None:
    shares = _Shares.of(tf.constant(rows), replicas)
    places = [shares.places(replica).numpy().tolist() for replica in range(replicas)]
    taken = [place for part in places for place in part]
    assert taken[:rows] == list(range(rows))
    assert len({taken.count(row) for row in range(rows)}) == 1
    assert max(map(len, places)) - min(map(len, places)) <= 1
    assert shares.starts.numpy().tolist() == [sum(map(len, places[:replica])) for replica in range(replicas)]
    assert sum(float(shares.part(replica, "float32")) for replica in range(replicas)) == pytest.approx(1)
    padded = shares.padded(tf.ones((rows, 2))).numpy()
    assert padded.shape == (len(taken), 2)
    assert padded.sum() == 2 * rows


@pytest.mark.slow
def test_any_number_of_devices_and_workers_gives_the_weights_of_one_device(tmp_path: Path) -> None:
    for name, row in table(tmp_path).items():
        apart = max(value for column, value in row.items() if column != "largest")
        assert np.isfinite(apart), name
        assert apart < 2e-5 * max(1.0, row["largest"]) or name == "dropout", (name, row)


def test_a_placement_is_a_value() -> None:
    two = tk.Placement.mirrored(["GPU:0", "GPU:1"], precision="mixed_bfloat16")
    assert (
        two == tk.Placement.mirrored(("GPU:0", "GPU:1"), precision="mixed_bfloat16") != tk.Placement.mirrored(["GPU:0", "GPU:1"])
    )
    placements = [
        two,
        tk.Placement.auto(),
        tk.Placement.gpu(2, memory_growth=True, jit_compile=False),
        tk.Placement.multi_worker(),
        tk.Placement.tpu("grpc://10.0.0.1"),
    ]
    for placement in placements:
        assert eval(repr(placement), {"Placement": tk.Placement}) == placement
        value = json.loads(json.dumps(placement.to_json_value()))
        assert tk.Placement.from_json_value(value, custom_objects={}) == placement
    assert repr(placements[2]) == "Placement.gpu(2, jit_compile=False, memory_growth=True)"
    assert tk.Placement.cpu(jit_compile=True).describe() == "the CPU, float32, XLA on"


def test_what_a_placement_cannot_be_is_told_at_once() -> None:
    with pytest.raises(errors.PlanError) as caught:
        tk.Placement.mirrored(["GPU0", "GPU:1", "GPU:1"], precision="mixed_float61", jit_compile=True)
    assert caught.value.found == (
        "the precision 'mixed_float61' (did you mean 'mixed_float16' or 'mixed_bfloat16'?)",
        "jit_compile=True on several devices; XLA compiles the steps of one",
        "the device 'GPU0'; devices are named like 'GPU:0'",
        "the device 'GPU:1' twice",
    )


def test_parts_of_the_cpu_must_be_asked_for_before_tensorflow_begins() -> None:
    tf.constant(0)
    parts = len(tf.config.list_logical_devices("CPU"))
    with (
        pytest.raises(errors.PlacementError) as caught,
        tk.Placement.mirrored([f"CPU:{part}" for part in range(parts + 1)]).scope(),
    ):
        pass
    assert caught.value.found == (f"TensorFlow has begun, and its CPU is {parts} device",)
    assert "at the beginning of the script" in str(caught.value)


def test_workers_that_nobody_named_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in ("TF_CONFIG", "RANK", "WORLD_SIZE") or name.startswith(("TRANSFERKIT_", "SLURM_")):
            monkeypatch.delenv(name)
    with pytest.raises(errors.PlacementError) as caught, tk.Placement.multi_worker().scope():
        pass
    assert caught.value.found == ("no workers named in the environment",)


def test_precision_holds_inside_the_scope_only_and_a_model_of_another_is_refused() -> None:
    half = tk.Placement.cpu(precision="mixed_bfloat16")
    with half.scope() as strategy:
        inside = tk.ModelBuilder((4,)).dense(3, "relu").classifier(3).build()
    outside = tk.ModelBuilder((4,)).dense(3, "relu").classifier(3).build()
    assert strategy is None
    assert [layer.compute_dtype for layer in inside.layers[1:]] == ["bfloat16", "float32"]
    assert outside.layers[1].compute_dtype == "float32"
    with running(half, inside):
        pass
    with pytest.raises(errors.PlacementError) as caught, running(half, outside):
        pass
    assert caught.value.found == ("a model built outside the placement's scope, in float32",)


def test_a_distribution_of_keras_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "one")
    with pytest.raises(errors.PlacementError) as caught, tk.Placement.cpu().scope():
        pass
    assert caught.value.found == ("a distribution set by keras.distribution",)


def test_a_call_inside_a_scope_of_tensorflows_is_refused() -> None:
    model = tk.ModelBuilder((4,)).classifier(3).build()
    with (
        tf.distribute.OneDeviceStrategy("CPU:0").scope(),
        pytest.raises(errors.PlacementError, match=r"a call inside `strategy.scope\(\)` of tf.distribute"),
        running(tk.Placement.cpu(), model),
    ):
        pass


class _OwnStep(keras.Model):
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


def _differences(model: Any) -> list[str]:
    phase = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=1).batch_norm("adapt").phases()[0]
    plans = [resolve(model, phase, batch_norm="adapt")]
    return differences(model, plans, SimpleNamespace(num_replicas_in_sync=4))


def test_what_replicas_do_otherwise_is_said_before() -> None:
    inputs = keras.Input((4,))
    at = keras.layers.BatchNormalization()(keras.layers.Dropout(0.5, name="drop")(keras.layers.Dense(3)(inputs)))
    assert _differences(keras.Model(inputs, keras.layers.Dense(2)(at))) == [
        "Each of 4 replicas draws at random for itself, so one device would draw otherwise: 'drop'."
    ]
    assert _differences(keras.Model(inputs, keras.layers.Dense(2)(inputs))) == []


def test_steps_of_the_users_and_batches_too_small_are_refused_on_several_replicas() -> None:
    inputs = keras.Input((4,))
    with pytest.raises(errors.PlacementError) as caught:
        _differences(_OwnStep(inputs, keras.layers.Dense(2)(inputs)))
    assert "train_step" in caught.value.found[0]
    strategy = SimpleNamespace(num_replicas_in_sync=4)
    check_batch(4, strategy)
    check_batch(1, None)
    with pytest.raises(errors.PlacementError, match="Sharing batches of 3 rows among 4 replicas"):
        check_batch(3, strategy)


def test_the_chief_is_the_only_process_or_the_first_worker() -> None:
    assert is_chief(None)
    assert is_chief(SimpleNamespace(cluster_resolver=None))
    assert [is_chief(SimpleNamespace(cluster_resolver=SimpleNamespace(task_id=index))) for index in range(2)] == [True, False]


def test_what_is_no_placement_is_told_wherever_one_is_given() -> None:
    model = tk.ModelBuilder((4,)).classifier(3).build()
    data = (np.zeros((6, 4), "float32"), np.arange(6) % 3)
    recipe = tk.Recipe(tk.ModelBuilder((4,)).classifier(3))
    wrong: Any = "mirrored"
    for call in (
        lambda: tk.FineTuner().fit(model, data, placement=wrong),
        lambda: tk.Evaluator("accuracy").run(model, data, placement=[]),  # type: ignore[arg-type]
        lambda: recipe.run(data, placement=wrong),
        lambda: tk.cross_validate(recipe, data, folds=2, placement=wrong),
    ):
        with pytest.raises(errors.PlanError, match="a placement is a value of its own"):
            call()


@pytest.mark.parametrize(
    ("devices", "fix"),
    [(2, ["GPU:0", "GPU:1"]), ("CPU:0", ["CPU:0"]), ([], ["GPU:0", "GPU:1"]), (True, ["GPU:0", "GPU:1"])],
)
def test_devices_to_mirror_on_are_a_list_of_names(devices: Any, fix: list[str]) -> None:
    with pytest.raises(errors.PlanError) as caught:
        tk.Placement.mirrored(devices)
    assert f"Placement.mirrored({fix!r})" in str(caught.value)


def test_describe_says_which_devices_are_missing_and_begins_nothing() -> None:
    assert tk.Placement.gpu(3).describe() == "GPU:3 (not on this machine), float32"
    assert tk.Placement.mirrored(["GPU:0", "CPU:1"]).describe() == "mirrored over GPU:0 (not on this machine), CPU:1, float32"
    assert tk.Placement.mirrored().describe() == "mirrored over every GPU, of which this machine has none, float32"
    program = (
        "import transferkit as tk\n"
        "from transferkit._keras import tf\n"
        "tk.Placement.auto(memory_growth=True).describe(), tk.Placement.mirrored(['CPU:0', 'CPU:1']).describe()\n"
        "with tk.Placement.mirrored(['CPU:0', 'CPU:1']).scope() as strategy:\n"
        "    model = tk.ModelBuilder((4,)).classifier(3).build()\n"
        "import warnings, numpy as np\n"
        "warnings.simplefilter('error')\n"
        "try:\n"
        "    tk.FineTuner().fit(model, (np.zeros((6, 4)), np.arange(6) % 3), verbose=0)\n"
        "except UserWarning as warning:\n"
        "    print(warning)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "It runs on one device, though the process runs by Placement.mirrored(['CPU:0', 'CPU:1'])" in done.stdout


def test_training_alone_where_the_environment_names_workers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFERKIT_WORKERS", "127.0.0.1:2222,127.0.0.1:2223")
    monkeypatch.setenv("TRANSFERKIT_INDEX", "1")
    model = tk.ModelBuilder((4,)).classifier(3).build()
    with pytest.warns(UserWarning, match=r"worker 1 .* of 2.*each trains by itself"):
        tk.FineTuner().fit(model, (np.zeros((6, 4)), np.arange(6) % 3), verbose=0)


class _Counts(keras.layers.Layer):
    """Keeps a number besides its weight."""

    def build(self, input_shape: Any) -> None:
        del input_shape
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.mean = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        return x * self.scale


def test_masks_beside_batch_norm_and_numbers_of_ones_own_are_said() -> None:
    inputs = keras.Input((5,), dtype="int32")
    at = keras.layers.BatchNormalization(name="norm")(keras.layers.Embedding(4, 3, mask_zero=True)(inputs))
    assert _differences(keras.Model(inputs, keras.layers.Dense(2)(at))) == [
        "BatchNorm of each of 4 replicas takes the statistics of its own rows, in a model with masks: 'norm'."
    ]
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(2)(_Counts(name="counts")(inputs)))
    said = ["Numbers that layers keep besides weights are moved by the rows of each of 4 replicas: 'counts'."]
    assert _differences(model) == said
    model.get_layer("counts").trainable = False
    assert _differences(model) == said
    assert not model.get_layer("counts").trainable
