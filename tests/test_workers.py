"""Two workers in two processes: that both are told what is wrong between them, and that folds are shared out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transferkit.cluster import Cluster
from transferkit.meeting import free_ports

SCRIPT = """
import json, os, sys, warnings
import numpy as np
import transferkit as tk
from transferkit._keras import keras, tf

worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
placement = tk.Placement.multi_worker()
with placement.scope():
    pass
plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=2, learning_rate=0.01).metrics("accuracy").cache(False)
random = np.random.default_rng(0)
x, y = random.normal(size=(40, 6)).astype("float32"), np.arange(40) % 3
found = {}

def model():
    with placement.scope():
        return tk.ModelBuilder((6,)).dense(5, "relu").classifier(3).build(seed=0)

def told(name, call):
    try:
        call()
        found[name] = "nothing"
    except tk.errors.TransferKitError as error:
        found[name] = [type(error).__name__, str(error)]

def fit(data, **more):
    return plan.fit(model(), data, batch_size=8, seed=1, placement=placement, verbose=0, **more)

told("rows", lambda: fit((x[: 40 - worker], y[: 40 - worker])))
told("content", lambda: fit((x + worker, y)))
told("batch size", lambda: plan.fit(model(), (x, y), batch_size=8 + worker, seed=1, placement=placement, verbose=0))
shuffled = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(40, seed=worker).batch(8)
told("shuffled", lambda: fit(shuffled))
keras.utils.set_random_seed(3)
order = [np.arange(40)] + [np.random.default_rng(worker).permutation(40)] * 9
passes = iter(order)
later = tf.data.Dataset.from_generator(
    lambda: ((x[rows], y[rows]) for rows in next(passes, order[-1]).reshape(5, 8)),
    output_signature=(tf.TensorSpec((8, 6)), tf.TensorSpec((8,), tf.int64)),
).apply(tf.data.experimental.assert_cardinality(5))
told("later", lambda: fit(later))
told("judged", lambda: tk.Evaluator("accuracy").run(model(), (x, np.roll(y, worker)), placement=placement))
told("alone", lambda: plan.fit(model(), (x, y), verbose=0))
told("alone said", lambda: plan.fit(model(), (x, y), placement=placement.alone(), verbose=0))
told("right", lambda: fit((x, y)))
builder = tk.ModelBuilder((6,)).dense(5, "relu").classifier(3)
recipe = tk.Recipe(builder, tuner=plan, evaluator=tk.Evaluator("accuracy", "log_loss"))
folds = dict(folds=3, repeats=2, batch_size=8)
apart = tk.cross_validate(recipe, (x, y), placement=placement, **folds)
alone = tk.cross_validate(recipe, (x, y), placement=placement.alone(), **folds)
same = bool(np.array_equal(apart.predictions, alone.predictions))
found["folds"] = [apart.scores == alone.scores, same, min(apart.seconds) > 0]
told("other folds", lambda: tk.cross_validate(recipe, (x, y), placement=placement, folds=3 + worker))
with open(sys.argv[1] + f"-{worker}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder / "found")],
            env={**os.environ, "TF_CONFIG": Cluster(workers, index).tf_config(), "CUDA_VISIBLE_DEVICES": "-1"},
            cwd=Path(__file__).resolve().parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), said[0][-3000:] + said[1][-3000:]
    return [json.loads((folder / f"found-{index}.json").read_text()) for index in range(2)]


def test_workers_of_other_rows_or_settings_are_told_before_training(two: list[dict[str, Any]]) -> None:
    for name, what in [
        ("rows", "another training data than the chief's on worker 1; here {} rows of float32"),
        ("content", "another training data than the chief's on worker 1; here 40 rows of float32"),
        ("batch size", "another batch_size than the chief's on worker 1; here {}"),
        ("shuffled", "another order of the training data than the chief's on worker 1; here begins with"),
    ]:
        for index, found in enumerate(two):
            kind, said = found[name]
            assert kind == "PlacementError"
            assert what.format({"rows": 40 - index, "batch size": 8 + index}.get(name)) in said, said


def test_workers_whose_rows_come_to_differ_stop_at_the_step(two: list[dict[str, Any]]) -> None:
    for found in two:
        for name in ("later", "judged"):
            assert found[name][0] == "DataError", name
            assert "labels in a step that aren't the same on all workers" in found[name][1]


def test_a_worker_trains_alone_only_where_that_is_said(two: list[dict[str, Any]]) -> None:
    for index, found in enumerate(two):
        assert found["alone"][0] == "PlacementError"
        assert f"a process that is worker {index}" in found["alone"][1]
        assert found["alone said"] == found["right"] == "nothing"


def test_workers_share_out_folds_with_the_scores_of_one_device(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["folds"] == [True, True, True]
        assert "another settings than the chief's on worker 1" in found["other folds"][1]


STOPPED = """
import sys, time
import numpy as np
import transferkit as tk
from transferkit._keras import keras

class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print("step", flush=True)
        time.sleep(0.02)

placement = tk.Placement.multi_worker()
with placement.scope():
    model = tk.ModelBuilder((6,)).dense(5, "relu").classifier(3).build(seed=0)
random = np.random.default_rng(0)
data = random.normal(size=(40, 6)).astype("float32"), np.arange(40) % 3
plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=400, learning_rate=0.01).cache(False)
plan.fit(model, data, validation_data=data, batch_size=8, seed=1, placement=placement, verbose=0, callbacks=[Slow()],
         checkpoint_dir=sys.argv[1], resume=True, save_every=100_000)
"""


@pytest.mark.slow
def test_sigterm_finds_workers_that_finish_the_step_together(tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(STOPPED)
    before = 0
    for turn in range(5):
        command = [sys.executable, "-m", "transferkit", "launch", "--workers", "2", "--log-dir", str(tmp_path / f"logs{turn}")]
        with subprocess.Popen([*command, str(script), str(folder)], stdout=subprocess.PIPE, text=True) as launched:
            assert launched.stdout is not None
            for _ in range(10 + 7 * turn):
                assert launched.stdout.readline(), (tmp_path / f"logs{turn}/worker-0.log").read_text()[-3000:]
            launched.send_signal(signal.SIGTERM)
            launched.stdout.read()
        assert launched.returncode == 75
        found = max(int(path.stem.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))
        assert found > before
        before = found
