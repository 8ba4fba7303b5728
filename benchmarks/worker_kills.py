"""Claim: a run of four workers in which workers are killed again and again ends with the weights of the run that nobody killed.

Under `launch --restarts`, a random worker gets SIGKILL at a random moment after the first checkpoint that its start wrote, so
that every such kill hits training; a few more hit the time in which workers start, meet and compile. The launcher stops the
others, which wait for the dead one in a collective, and starts all anew. The plan has two phases, dropout, mixup, Adam with a
rate for each layer, a moving average and validation; a pause after each step lets many kills fit into a run. Where a run differs,
a second one that nobody kills says whether the collectives give the same bits from run to run. (Keras's own `fit` with
`BackupAndRestore` can't be beside it: with several workers it fails before its first step, Keras 3.15.)

    python benchmarks/worker_kills.py --kills 20 --json kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

ROWS, WIDTH, CLASSES, BATCH, PAUSE = 320, 8, 3, 32, 0.03
#: Seconds in which a start must have written a checkpoint, or a run ended; what takes longer hangs. Counted in turns of waiting,
#: so that a machine that was asleep isn't taken for it.
PATIENCE, TURN = 300.0, 0.02


def train(folder: Path) -> None:
    """The script of every worker; each writes what it ended with."""
    import keras
    import numpy as np

    import transferkit as tk

    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            del batch, logs
            time.sleep(PAUSE)

    def rows(seed: int, count: int) -> tuple[Any, Any]:
        generator = np.random.default_rng(seed)
        y = generator.integers(0, CLASSES, count)
        return (generator.normal(size=(count, WIDTH)) + y[:, None]).astype("float32"), y

    placement = tk.Placement.multi_worker()
    with placement.scope():
        x = keras.Input((WIDTH,))
        body = keras.layers.Dense(24, "relu", name="low")(x)
        body = keras.layers.Dropout(0.3)(keras.layers.Dense(16, "tanh", name="high")(body))
        model = keras.Model(x, keras.layers.Dense(CLASSES, name="head")(body))
    for index, weight in enumerate(model.trainable_variables):
        weight.assign(np.random.default_rng(index).normal(size=weight.shape, scale=0.3))
    plan = (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=4, learning_rate=1e-2)
        .phase("all", train=tk.Layers.all(), epochs=16, learning_rate=1e-3, layer_decay=0.7)
        .mixup(0.2)
        .ema(0.99)
        .cache(False)
    )
    run = plan.fit(
        model,
        rows(0, ROWS),
        validation_data=rows(1, 90),
        batch_size=BATCH,
        seed=1,
        callbacks=[Slow()],
        placement=placement,
        checkpoint_dir=folder / "checkpoints",
        resume=True,
        save_every=4,
        verbose=0,
    )
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    np.savez(folder / f"weights-{index}.npz", *(np.asarray(variable) for variable in model.variables))
    steps = sum(phase.steps for phase in run.phases)
    (folder / f"run-{index}.json").write_text(json.dumps({"steps": steps, "history": dict(run.history)}))


def checkpoints(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in folder.glob("checkpoints/**/*.safetensors"):
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return found


class Run:
    """A launch of four workers into a folder."""

    def __init__(self, folder: Path, workers: int, restarts: int) -> None:
        folder.mkdir()
        self.folder, self.workers = folder, workers
        options = ["--workers", str(workers), "--restarts", str(restarts), "--grace", "1", "--log-dir", str(folder / "logs")]
        command = [sys.executable, "-m", "transferkit", "launch", *options, __file__, "--train", str(folder)]
        self._said = open(folder / "launcher.log", "w")  # noqa: SIM115
        self.launcher = subprocess.Popen(command, stdout=self._said, stderr=self._said)

    def pids(self) -> dict[int, int]:
        """The processes of the workers that are there now."""
        found = {}
        for index in range(self.workers):
            try:
                pid = int((self.folder / f"pid-{index}").read_text() or 0)
                os.kill(pid, 0)
            except (FileNotFoundError, ProcessLookupError):
                continue
            found[index] = pid
        return found

    def new_start(self, before: dict[int, int]) -> dict[int, int] | None:
        """The processes of the start after the one with those of `before`; None when the run has ended."""
        for _ in self._turns("no new start"):
            now = self.pids()
            if len(now) == self.workers and not set(now.values()) & set(before.values()):
                return now
        return None

    def new_checkpoint(self, before: set[tuple[str, int]]) -> bool:
        return any(checkpoints(self.folder) - before for _ in self._turns("no new checkpoint"))

    def _turns(self, what: str) -> Iterator[int]:
        """Turns of waiting until the run has ended."""
        for turn in range(int(PATIENCE / TURN)):
            if self.launcher.poll() is not None:
                return
            yield turn
            time.sleep(TURN)
        self.launcher.terminate()
        raise SystemExit(f"hung: {what} for {PATIENCE:g} s; see {self.folder}")

    def result(self) -> dict[str, Any]:
        """What all workers ended with."""
        import numpy as np

        for _ in self._turns("no end"):
            pass
        code = self.launcher.returncode
        if code != 0:
            raise SystemExit(f"the run failed with exit code {code}; see {self.folder}")
        weights = []
        for index in range(self.workers):
            with np.load(self.folder / f"weights-{index}.npz") as file:
                weights.append([file[name] for name in file.files])
        said = [json.loads((self.folder / f"run-{index}.json").read_text()) for index in range(self.workers)]
        return {"weights": weights, "steps": said[0]["steps"], "histories": [one["history"] for one in said]}


def difference(result: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Of every worker's variables, to those of the same worker in the whole run: each has a seed of its own for dropout."""
    import numpy as np

    both = zip(whole["weights"], result["weights"], strict=True)
    pairs = [pair for before, after in both for pair in zip(before, after, strict=True)]
    return {
        "variables compared": len(pairs),
        "variables that differ": sum(not np.array_equal(a, b) for a, b in pairs),
        "largest difference": max(float(np.max(np.abs(a.astype("float64") - b))) for a, b in pairs),
        "steps": result["steps"],
        "steps of the whole run": whole["steps"],
        "histories identical": all(history == whole["histories"][0] for history in result["histories"]),
    }


def measure(folder: Path, kills: int, early: int, workers: int, longest: float, minutes: float, seed: int) -> dict[str, Any]:
    moments = random.Random(seed)
    begun = time.monotonic()
    whole = Run(folder / "whole", workers, 0).result()
    whole_seconds = time.monotonic() - begun
    done = {"training": 0, "starting": 0}
    killed_workers: list[int] = []
    back: list[float] = []
    runs = []
    while (done["training"] < kills or done["starting"] < early) and time.monotonic() - begun < 60 * minutes:
        run = Run(folder / f"run{len(runs)}", workers, 10_000)
        here = dict(done)
        pids: dict[int, int] = {}
        killed_at = None
        while (found := run.new_start(pids)) is not None:
            pids, before = found, checkpoints(run.folder)
            victim = moments.randrange(workers)
            if done["starting"] < early and moments.random() < 0.3:
                kind, latest = "starting", 6.0
            elif run.new_checkpoint(before):
                kind, latest = "training", longest
                if killed_at is not None:
                    back.append(time.monotonic() - killed_at)
            else:
                break
            if (done["training"] >= kills and kind == "training") or time.monotonic() - begun > 60 * minutes:
                break
            time.sleep(moments.uniform(0.0, latest))
            try:
                os.kill(pids[victim], signal.SIGKILL)
            except ProcessLookupError:
                break  # it had ended
            killed_at = time.monotonic()
            done[kind] += 1
            killed_workers.append(victim)
        result = difference(run.result(), whole)
        runs.append({**{f"kills while {kind}": done[kind] - here[kind] for kind in done}, **result})
        print(runs[-1], flush=True)
    exact = sum(not one["variables that differ"] and one["histories identical"] for one in runs)
    again = None if exact == len(runs) else difference(Run(folder / "again", workers, 0).result(), whole)
    return {
        "workers": workers,
        "kills while training": done["training"],
        "kills while starting": done["starting"],
        "kills of each worker": [killed_workers.count(index) for index in range(workers)],
        "seconds from a kill to the next checkpoint": [round(seconds, 1) for seconds in sorted(back)],
        "a second run that nobody killed": again,
        "runs": runs,
        "exact runs": exact,
        "seconds of the whole run": round(whole_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--early", type=int, default=4, help="kills while the workers start")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--longest", type=float, default=3.0, help="seconds from the first checkpoint of a start to the latest kill"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary folder unless given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        (arguments.train / f"pid-{index}").write_text(str(os.getpid()))
        train(arguments.train)
        return
    import keras
    import tensorflow as tf

    with tempfile.TemporaryDirectory(prefix="worker-kills-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        given = (arguments.kills, arguments.early, arguments.workers, arguments.longest, arguments.minutes, arguments.seed)
        result = measure(folder, *given)
    result["versions"] = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    result["processors"] = os.cpu_count()
    print(f"{result['kills while training']} + {result['kills while starting']} kills in {len(result['runs'])} runs,", end=" ")
    print(f"{result['exact runs']} of them exact; back after {result['seconds from a kill to the next checkpoint']} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
