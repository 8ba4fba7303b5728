"""Kills a run with SIGKILL at random moments until it is finished, and compares it with the run that nobody killed.

The plan has three phases, dropout, augmentation, mixup, Adam with a rate for each layer, a moving average and early stopping.
Beside it a run of plain Keras (one phase, dropout, augmentation, Adam, early stopping) with `BackupAndRestore` goes through the
same. Each life of a run is a process forked from one that has imported TensorFlow and not used it. It is killed at a random
moment after the first checkpoint that it wrote itself, so that every kill hits training; a pause after each step lets many lives
fit into a run.

    python benchmarks/resume_kills.py --kills 100 --json kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import transferkit as tk
from transferkit.tuning import tuner as _imported_before_the_fork  # noqa: F401

SIZE, CLASSES, ROWS, BATCH = 12, 4, 480, 16
PAUSE = 0.02


def rows(seed: int, count: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    y = generator.integers(0, CLASSES, count)
    return (generator.normal(size=(count, SIZE, SIZE, 1)) + 0.2 * y[:, None, None, None]).astype("float32"), y


def network() -> Any:
    image = keras.Input((SIZE, SIZE, 1))
    x = layers.RandomTranslation(0.1, 0.1)(layers.RandomFlip()(image))
    x = layers.Dropout(0.1)(layers.Conv2D(8, 3, activation="relu", name="low")(x))
    x = layers.Conv2D(8, 3, strides=2, activation="relu", name="middle")(layers.BatchNormalization()(x))
    x = layers.Dropout(0.3)(layers.Dense(16, activation="relu", name="high")(layers.Flatten()(x)))
    model = keras.Model(image, layers.Dense(CLASSES, name="head")(x))
    for index, weight in enumerate(model.trainable_variables):
        weight.assign(np.random.default_rng(index).normal(size=weight.shape, scale=0.2))
    return model


class Slow(keras.callbacks.Callback):
    """A pause after each step."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        time.sleep(PAUSE)


def ours(folder: Path | None) -> dict[str, Any]:
    plan = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=6, learning_rate=1e-2)
        .phase("top", train=tk.Layers.last(2), epochs=6, learning_rate=3e-3, schedule="cosine")
        .phase("all", train=tk.Layers.all(), epochs=40, learning_rate=1e-3, layer_decay=0.7)
        .mixup(0.2)
        .ema(0.99)
        .early_stopping(4)
    )
    model = network()
    more: dict[str, Any] = {} if folder is None else {"checkpoint_dir": folder, "resume": True, "save_every": 7}
    more["callbacks"] = [Slow()]
    run = plan.fit(model, rows(0, ROWS), validation_data=rows(1, 120), batch_size=BATCH, seed=1, verbose=0, **more)
    steps = sum(phase.steps for phase in run.phases)
    return {"variables": [v.numpy() for v in model.variables], "steps": steps, "history": dict(run.history)}


def plain(folder: Path | None) -> dict[str, Any]:
    keras.utils.set_random_seed(1)
    model = network()
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    callbacks: list[Any] = [keras.callbacks.EarlyStopping("val_loss", patience=4, restore_best_weights=True), Slow()]
    if folder is not None:
        callbacks.append(keras.callbacks.BackupAndRestore(folder / "backup"))
    data = tf.data.Dataset.from_tensor_slices(rows(0, ROWS)).shuffle(ROWS, seed=1).batch(BATCH)
    history = model.fit(data, epochs=25, validation_data=rows(1, 120), callbacks=callbacks, verbose=0)
    return {
        "variables": [v.numpy() for v in model.variables],
        "steps": int(model.optimizer.iterations.numpy()),
        "history": dict(history.history),
    }


def live(work: Callable[[Path | None], dict[str, Any]], folder: Path | None, out: Path, seconds: float | None) -> bool:
    """One life of a run: whether it came to its end before it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            result = work(folder)
            np.savez(out.with_suffix(".npz"), *result["variables"])
            out.write_text(json.dumps({"steps": result["steps"], "history": result["history"]}))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    deadline = None
    before = _kept(folder)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            if os.waitstatus_to_exitcode(status) != 0:
                raise RuntimeError("a life ended with an error")
            return True
        if deadline is None and seconds is not None and _kept(folder) - before:
            deadline = time.monotonic() + seconds
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)


def _kept(folder: Path | None) -> set[tuple[Path, int]]:
    """The checkpoints in a folder, each as it was written."""
    found = set()
    for path in [] if folder is None else folder.rglob("*"):
        if path.suffix in (".safetensors", ".h5", ".json") and not path.name.startswith("."):
            try:
                found.add((path, path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
    return found


def read(out: Path) -> tuple[list[Any], int, dict[str, list[float]]]:
    said = json.loads(out.read_text())
    with np.load(out.with_suffix(".npz")) as file:
        return [file[name] for name in file.files], said["steps"], said["history"]


def measure(name: str, work: Callable[[Path | None], dict[str, Any]], kills: int, longest: float, seed: int) -> dict[str, Any]:
    moments = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="resume-kills-"))
    begun = time.monotonic()
    live(work, None, folder / "whole", None)
    whole_seconds = time.monotonic() - begun
    whole = read(folder / "whole")
    killed, runs = 0, []
    while killed < kills:
        run = folder / f"run{len(runs)}"
        run.mkdir()
        before = killed
        try:
            while not live(work, run, folder / "again", moments.uniform(0.0, longest) if killed < kills else None):
                killed += 1
        except RuntimeError as error:
            if killed == before:
                raise
            runs.append({"kills": killed - before, "ended by": str(error), "exact": False})
            print(name, runs[-1], flush=True)
            shutil.rmtree(run)
            continue
        variables, steps, history = read(folder / "again")
        differing = sum(not np.array_equal(a, b) for a, b in zip(whole[0], variables, strict=True))
        largest = max(float(np.max(np.abs(a.astype("float64") - b))) for a, b in zip(whole[0], variables, strict=True))
        runs.append(
            {
                "kills": killed - before,
                "variables that differ": differing,
                "largest difference": largest,
                "steps": steps,
                "steps of the whole run": whole[1],
                "history identical": history == whole[2],
                "epochs in the history": len(history["loss"]),
                "exact": not differing and history == whole[2] and steps == whole[1],
            }
        )
        print(name, runs[-1], flush=True)
        shutil.rmtree(run)
    shutil.rmtree(folder)
    return {
        "kills": killed,
        "runs": runs,
        "exact runs": sum(run["exact"] for run in runs),
        "runs ended by an error": sum("ended by" in run for run in runs),
        "seconds of the whole run": round(whole_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-of-keras", type=int, default=10)
    parser.add_argument(
        "--longest", type=float, default=2.0, help="seconds from the first checkpoint of a life to the latest kill"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {
        "transferkit": measure("transferkit", ours, arguments.kills, arguments.longest, arguments.seed),
        "BackupAndRestore": measure("BackupAndRestore", plain, arguments.kills_of_keras, arguments.longest, arguments.seed),
        "versions": {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__},
    }
    for name in ("transferkit", "BackupAndRestore"):
        found = result[name]
        ended = found["runs ended by an error"]
        print(
            f"{name}: {found['kills']} kills in {len(found['runs'])} runs, {found['exact runs']} exact, {ended} ended by an error"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
