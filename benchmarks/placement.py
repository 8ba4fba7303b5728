"""Claim: n replicas give the weights of one device at the same batch size, whatever the plan says.

    python benchmarks/placement.py result.json [--columns one mirrored2 mirrored4 workers2 workers4]

Each column is one launch: one device, parts of the CPU as mirrored devices, or processes on the loopback address that train
together. Every row of the table is run in each, on small networks; a cell is the largest difference of the final weights (or
figures, or predictions) to one device, beside the largest weight.
At the end a run that is stopped twice goes on by other numbers of workers (`--chain`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.cluster import Cluster
from transferkit.data import Batch
from transferkit.meeting import free_ports

COLUMNS = ("one", "mirrored2", "mirrored4", "workers2", "workers4")
SEED, BATCH = 3, 32
Arrays = list[np.ndarray]


def placement_of(column: str) -> tk.Placement | None:
    if column == "one":
        return None
    if column.startswith("workers"):
        return tk.Placement.multi_worker()
    return tk.Placement.mirrored([f"CPU:{part}" for part in range(int(column.removeprefix("mirrored")))])


def rows_of(count: int = 96, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    y = random.integers(0, 3, count)
    return (random.normal(size=(count, width)) + y[:, None]).astype("float32"), y


def network(**settings: Any) -> Any:
    """Three layers; with `norm`, BatchNorm whose statistics aren't the initial ones; with `dropout`, that."""
    inputs = keras.Input((8,), name="x")
    at = keras.layers.Dense(16, "relu", name="low")(inputs)
    if settings.get("norm"):
        at = keras.layers.BatchNormalization(momentum=0.8, name="norm")(at)
    if settings.get("dropout"):
        at = keras.layers.Dropout(0.5, name="drop")(at)
    at = keras.layers.Dense(12, "tanh", kernel_regularizer=keras.regularizers.L2(1e-3), name="body")(at)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(at))
    random = np.random.default_rng(1)
    for weight in model.weights:
        if weight.dtype == "float32":
            values = random.normal(size=weight.shape).astype("float32") * 0.4
            weight.assign(np.abs(values) + 0.5 if "variance" in weight.path else values)
    return model


def two_ways() -> Any:
    left, right = keras.Input((8,), name="left"), keras.Input((4,), name="right")
    at = keras.layers.Dense(8, "tanh")(keras.layers.Concatenate()([keras.layers.Dense(8, "relu")(left), right]))
    model = keras.Model(
        {"left": left, "right": right},
        {"kind": keras.layers.Dense(3, name="kind")(at), "size": keras.layers.Dense(1, name="size")(at)},
    )
    random = np.random.default_rng(1)
    model.set_weights([random.normal(size=weight.shape).astype("float32") * 0.4 for weight in model.weights])
    return model


def plan_of(epochs: int = 3, rate: float = 0.01, **phase: Any) -> tk.FineTuner:
    return tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=epochs, learning_rate=rate, **phase)


def trained(placement: Any, plan: tk.FineTuner, data: Any = None, *, make: Callable[[], Any] = network, **fit: Any) -> Arrays:
    """The weights after the fit, the slots of the optimizer and the history."""
    if placement is None:
        model = make()
    else:
        with placement.scope():
            model = make()
    run = plan.fit(model, rows_of() if data is None else data, batch_size=BATCH, seed=SEED, placement=placement, verbose=0, **fit)
    return [
        *(np.asarray(weight) for weight in model.get_weights() if weight.dtype.kind == "f"),
        *map(np.asarray, run.history.values()),
    ]


def two_phases(placement: Any) -> Arrays:
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=2, learning_rate=0.02)
    plan = plan.phase("all", train=tk.Layers.all(), epochs=2, learning_rate=0.01).metrics("accuracy").cache(False)
    return trained(placement, plan, validation_data=rows_of(41))


def optimizer(name: str) -> Callable[[Any], Arrays]:
    return lambda placement: trained(placement, plan_of(layer_decay=0.5).optimizer(name), rows_of(99))


def cached(placement: Any) -> Arrays:
    plan = tk.FineTuner().phase("top", train=tk.Layers.named("body", "head"), epochs=3, learning_rate=0.01).cache(True)
    return trained(placement, plan.metrics("accuracy"), rows_of(99), validation_data=rows_of(41))


def stop_after(steps: int) -> Any:
    """A callback that ends the run as a crash would, after so many steps.

    The number is no attribute of it: those are kept in checkpoints, and a run that goes on would stop there once more.
    """

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            del batch, logs
            if self.model.optimizer.iterations == steps:
                raise KeyboardInterrupt

    return Stop()


def resumed(placement: Any) -> Arrays:
    folder = os.environ["PLACEMENT_FOLDER"]
    plan = plan_of(epochs=4).ema(0.9)
    with contextlib.suppress(KeyboardInterrupt):
        trained(placement, plan, rows_of(99), checkpoint_dir=folder, save_every=3, callbacks=[stop_after(7)])
    time.sleep(0.5)  # every worker has stopped, and what the chief was writing is written
    return trained(placement, plan, rows_of(99), checkpoint_dir=folder, save_every=3, resume=True)


def goes_on(placement: Any, folder: str, stop: int) -> Arrays:
    """A part of a run: from the newest checkpoint in the folder, up to the step `stop`, or to the end where that never comes."""
    plan = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=1, learning_rate=0.02)
    plan = (
        plan.phase("all", train=tk.Layers.all(), epochs=3, learning_rate=0.01, layer_decay=0.5)
        .optimizer("adamw")
        .ema(0.9)
        .mixup()
    )
    with contextlib.suppress(KeyboardInterrupt):
        return trained(
            placement, plan, rows_of(99), checkpoint_dir=folder, save_every=1, resume=True, callbacks=[stop_after(stop)]
        )
    return []


def both_ways(placement: Any) -> Arrays:
    x, y = rows_of(99)
    data = ({"left": x, "right": x[:, :4]}, {"kind": y, "size": x.sum(1, keepdims=True)})
    plan = plan_of().loss(
        {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mse"}, weights={"kind": 1.0, "size": 0.3}
    )
    return trained(placement, plan, data, make=two_ways)


def sequences(placement: Any) -> Arrays:
    def make() -> Any:
        inputs = keras.Input((6,), dtype="int32")
        at = keras.layers.Embedding(11, 5, mask_zero=True)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.SimpleRNN(6, return_sequences=True)(at)))
        random = np.random.default_rng(1)
        model.set_weights([random.normal(size=weight.shape).astype("float32") * 0.4 for weight in model.weights])
        return model

    random = np.random.default_rng(2)
    words = random.integers(0, 11, (99, 6))
    return trained(
        placement, plan_of().loss(keras.losses.SparseCategoricalCrossentropy(from_logits=True)), (words, words % 3), make=make
    )


def not_a_mean(y_true: Any, y_pred: Any) -> Any:
    """A loss of the whole batch: no mean over its rows."""
    centred = y_pred - keras.ops.mean(y_pred, axis=0, keepdims=True)
    away = keras.ops.one_hot(keras.ops.cast(keras.ops.reshape(y_true, (-1,)), "int32"), 3) - centred
    return keras.ops.sqrt(keras.ops.sum(keras.ops.square(away)) + keras.ops.sum(keras.ops.square(y_pred)) + 1.0)


def read_when_asked(placement: Any) -> Arrays:
    """Rows that aren't in memory, as those of a folder: a worker reads its own."""
    x, y = rows_of(99)
    data = tk.Data(read=lambda index: Batch(x[index], y[index], None), labels=y, size=len(y), class_names=(), source="rows")
    return trained(placement, plan_of().metrics("accuracy"), data, validation_data=data.take(np.arange(41)))


def evaluated(placement: Any) -> Arrays:
    model = in_scope(placement)
    evaluation = tk.Evaluator("loss", "accuracy", "auc").run(model, rows_of(99), placement=placement)
    return [np.array([float(value) for value in evaluation.values()])]


def predicted(placement: Any) -> Arrays:
    evaluation = tk.Evaluator("accuracy").run(in_scope(placement), rows_of(99), placement=placement)
    return [evaluation.scored.rows.predictions]


def in_scope(placement: Any) -> Any:
    if placement is None:
        return network()
    with placement.scope():
        return network()


def adam(**settings: Any) -> Any:
    return keras.optimizers.Adam(0.01, **settings)


ROWS: dict[str, Callable[[Any], Arrays]] = {
    "fit with two phases, validation": two_phases,
    **{f"rates per layer, {name}": optimizer(name) for name in ("sgd", "adam", "adamw", "lion", "rmsprop", "nadam")},
    "BatchNorm frozen": lambda placement: trained(placement, plan_of(), make=lambda: network(norm=True)),
    "BatchNorm adapting": lambda placement: trained(placement, plan_of().batch_norm("adapt"), make=lambda: network(norm=True)),
    "BatchNorm adapting, last batches of 2 and 5 rows": lambda placement: [
        array
        for count in (34, 37)
        for array in trained(placement, plan_of().batch_norm("adapt"), rows_of(count), make=lambda: network(norm=True))
    ],
    "dropout": lambda placement: trained(placement, plan_of(), make=lambda: network(dropout=True)),
    "mixup": lambda placement: trained(placement, plan_of().mixup(), rows_of(99)),
    "EMA": lambda placement: trained(placement, plan_of().ema(0.9), rows_of(99)),
    "Keras's EMA, overwriting every 3 steps": lambda placement: trained(
        placement, plan_of().optimizer(adam(use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3)), rows_of(99)
    ),
    "gradient accumulation": lambda placement: trained(
        placement, plan_of().optimizer(adam(gradient_accumulation_steps=3)), rows_of(99)
    ),
    "gradients clipped by their norm": lambda placement: trained(
        placement, plan_of().optimizer(adam(global_clipnorm=0.1)), rows_of(99)
    ),
    "L2-SP, weight decay, label smoothing": lambda placement: trained(
        placement, plan_of().optimizer("adamw").weight_decay(0.05).l2_sp(0.05).label_smoothing(0.1), rows_of(99)
    ),
    "steps_per_execution=2": lambda placement: trained(placement, plan_of(), rows_of(99), steps_per_execution=2),
    "uneven last batch: 33, 34, 35 rows": lambda placement: [
        array for count in (33, 34, 35) for array in trained(placement, plan_of().metrics("accuracy"), rows_of(count))
    ],
    "rows with weights": lambda placement: trained(placement, plan_of(), (*rows_of(99), np.linspace(0, 2, 99).astype("float32"))),
    "rows read when asked for": read_when_asked,
    "two inputs and outputs": both_ways,
    "sequences with masks": sequences,
    "a loss that is no mean over rows": lambda placement: trained(placement, plan_of().loss(not_a_mean), rows_of(99)),
    "cached features, validation": cached,
    "resumed within an epoch": resumed,
    "evaluate": evaluated,
    "predict": predicted,
}


def run_column(column: str, out: str) -> None:
    """Runs every row, and writes what it gave; in each worker of a cluster."""
    placement = placement_of(column)
    if placement is not None:
        with placement.scope():  # before TensorFlow begins, as an optimizer in a plan makes it
            pass
    warnings.simplefilter("ignore")
    found: dict[str, np.ndarray] = {}
    if "PLACEMENT_CHAIN" in os.environ:
        folder, stop = os.environ["PLACEMENT_CHAIN"].split("|")
        found = {f"chain/{at}": array for at, array in enumerate(goes_on(placement, folder, int(stop)))}
    for number, (name, row) in enumerate(ROWS.items() if not found and "PLACEMENT_CHAIN" not in os.environ else ()):
        os.environ["PLACEMENT_FOLDER"] = f"{out}-folder-{number}"
        begun = time.perf_counter()
        try:
            arrays = row(placement)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if column.startswith("workers"):
                raise
            continue
        print(f"{time.perf_counter() - begun:6.1f} s  {name}", file=sys.stderr, flush=True)
        found |= {f"{number}/{at}": array for at, array in enumerate(arrays)}
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if "TF_CONFIG" in os.environ else 0
    np.savez(f"{out}-{index}.npz", **found)


def launch(column: str, folder: Path, **variables: str) -> tuple[list[dict[str, np.ndarray]], float]:
    """What each process of a column wrote, and the seconds it took."""
    count = int(column.removeprefix("workers")) if column.startswith("workers") else 1
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(count))
    begun = time.perf_counter()
    processes = []
    for index in range(count):
        environ = {**os.environ, **variables}
        if count > 1:
            environ["TF_CONFIG"] = Cluster(workers, index).tf_config()
        command = [sys.executable, __file__, str(folder / column), "--column", column, "--rows", *ROWS]
        processes.append(subprocess.Popen(command, env=environ, stderr=None if index == 0 else subprocess.DEVNULL))
    failed = [process.wait() for process in processes]
    assert not any(failed), f"{column}: exit codes {failed}"
    found = [dict(np.load(f"{folder / column}-{index}.npz")) for index in range(count)]
    return found, time.perf_counter() - begun


def chain(columns: list[str], folder: Path) -> dict[str, float]:
    """The largest difference of a run that goes on by other numbers of workers to one that was never stopped."""
    whole = launch("one", folder, PLACEMENT_CHAIN=f"{folder / 'whole'}|-1")[0][0]
    for number, column in enumerate(columns, 1):
        stop = 5 * number + 1 if number < len(columns) else -1
        parts = launch(column, folder, PLACEMENT_CHAIN=f"{folder / 'parts'}|{stop}")[0][0]
    apart = max(float(np.abs(whole[key] - parts[key]).max()) for key in whole)
    return {"largest": max(float(np.abs(array).max()) for array in whole.values()), "difference": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--columns", nargs="+", default=COLUMNS)
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows with one of these in their names")
    parser.add_argument("--chain", nargs="*", default=["workers4", "workers2", "one"])
    parser.add_argument("--column", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in [name for name in ROWS if not any(part in name for part in given.rows)]:
        del ROWS[name]
    if given.column:
        run_column(given.column, given.result)
        return
    with tempfile.TemporaryDirectory() as folder:
        gone_on = chain(given.chain, Path(folder)) if given.chain else {}
        report(given, {column: launch(column, Path(folder)) for column in given.columns}, gone_on)


def report(given: Any, outcomes: dict[str, Any], gone_on: dict[str, float]) -> None:
    """Prints the table and writes it down."""
    reference = outcomes["one"][0][0]
    table: dict[str, dict[str, float]] = {}
    for number, name in enumerate(ROWS):
        keys = [key for key in reference if key.split("/")[0] == str(number)]
        table[name] = {"largest": max(float(np.abs(reference[key]).max()) for key in keys)}
        for column, (found, _) in outcomes.items():
            apart = [np.abs(reference[key] - one[key]).max() for one in found for key in keys if key in one]
            table[name][column] = float(max(apart)) if len(apart) == len(keys) * len(found) else float("nan")
        cells = "".join(f"{table[name][column]:12.1e}" for column in given.columns)
        print(f"{name:50}{table[name]['largest']:8.2f}{cells}")
    print(f"stopped twice, by {', '.join(given.chain)}: {gone_on}")
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    seconds = {column: round(outcome[1], 1) for column, outcome in outcomes.items()}
    Path(given.result).write_text(
        json.dumps({"versions": versions, "seconds": seconds, "table": table, "chain": gone_on}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
