"""Real transfers: the default plan against the official guide's recipe, a grid of plain `fit`, and training from scratch.

    KERAS_HOME=… TRANSFERKIT_DATA=… python benchmarks/transfer.py hymenoptera/mobilenet-0.25 --out runs.jsonl
    python benchmarks/transfer.py --report runs.jsonl --out result.json

A task and a seed are one cell; each arm of it is a line of the file, and those that are there aren't run again, so that a run can
be ended and gone on with at any time. Tasks: `hymenoptera/…`, `cifar-25/…`, `cifar-100/…` (images a class) with the backbones
`mobilenet-0.25`, `mobilenet-0.75`, `mobilenetv2-0.35`; `sst2/embeddings` (500 sentences, word vectors from the unlabelled text of
Subj and MR); `mnist-20/resnet20` (20 images a class, a network trained on CIFAR-10).

Every arm sees the same rows in the same split, the same epochs, batches and seeds. A fifth of the rows is kept for choosing on;
no arm trains on it. Arms:

- `default`: `FineTuner.default(model, data, epochs=…)`;
- `guide`: keras.io's transfer-learning guide: base frozen and called with `training=False`, Adam(1e-3), then everything unfrozen
  and Adam(1e-5), half of the epochs each;
- `plain-RATE`: one `fit` of everything with Adam at that rate. The `grid` is the one with the best accuracy on the rows kept for
  choosing, at the cost of all;
- `scratch`: the same network from random weights, Adam(1e-3).

The figure is accuracy on rows no arm has trained or chosen on. Differences are paired by seed, with Student's interval of 95%.
Costs are the processor's seconds of the process (both cores'), so that other work on the machine doesn't count. The arms that
train everything by plain `fit` share one compiled model within a process: their seconds are without tracing, which stands apart
as `tracing`, and which the default's own seconds include.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import platform
import re
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import keras
import numpy as np
from networks import resnet20

import transferkit as tk
from transferkit.storage import write_json

Array = Any
RATES = (3e-3, 1e-3, 3e-4, 1e-4)
BACKBONES = ("mobilenet-0.25", "mobilenet-0.75", "mobilenetv2-0.35")
SIDE = 64
#: Student's t at 97.5% by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def shared() -> Path:
    """The folder of real data."""
    return Path(os.environ.get("TRANSFERKIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def picture(file: Any, side: int) -> Array:
    """A picture's centre, at `side` × `side`, as numbers from 0 to 255."""
    from PIL import Image

    image = Image.open(file).convert("RGB")
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) // 2, (height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(square, "float32")


@functools.cache
def hymenoptera() -> tuple[Array, Array, Array, Array]:
    """Ants and bees: training and test rows."""
    parts: list[Array] = []
    for part in ("train", "val"):
        files = sorted((shared() / "images" / "hymenoptera" / part).glob("*/*"))
        parts += [
            np.stack([picture(file, SIDE) for file in files]),
            np.array([file.parent.name == "bees" for file in files], int),
        ]
    return parts[0], parts[1], parts[2], parts[3]


def cifar(per_class: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """A draw of the CIFAR-10 subset: training images of each class, and 50 test images a class."""
    random = np.random.default_rng(seed)
    found: dict[str, tuple[list[Array], list[int]]] = {"train": ([], []), "test": ([], [])}
    with zipfile.ZipFile(shared() / "images" / "cifar10_jpg_subset_12k.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".jpeg", ".png")))
        classes = sorted({name.split("/")[-2] for name in names})
        for part, count in (("train", per_class), ("test", 50)):
            for label, kind in enumerate(classes):
                own = [name for name in names if f"/{part}/" in f"/{name}" and name.split("/")[-2] == kind]
                for name in random.permutation(own)[:count]:
                    found[part][0].append(picture(io.BytesIO(archive.read(name)), SIDE))
                    found[part][1].append(label)
    (x, y), (x_test, y_test) = found["train"], found["test"]
    return np.stack(x), np.array(y), np.stack(x_test), np.array(y_test)


def mnist(per_class: int, seed: int) -> tuple[Array, Array, Array, Array]:
    """A draw of MNIST, three channels of 32 × 32; 1,000 test images."""
    random = np.random.default_rng(seed)
    with np.load(shared() / "images" / "mnist.npz") as data:
        x, y, x_test, y_test = (data[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    rows = np.concatenate([random.permutation(np.flatnonzero(y == label))[:per_class] for label in range(10)])
    test = np.random.default_rng(0).permutation(len(x_test))[:1000]

    def images(part: Array) -> Array:
        padded = np.pad(part.astype("float32"), ((0, 0), (2, 2), (2, 2)))[..., None] / 255
        return (np.repeat(padded, 3, axis=-1) - 0.45) / 0.225

    return images(x[rows]), y[rows].astype(int), images(x_test[test]), y_test[test].astype(int)


def words(line: str) -> list[str]:
    return re.findall(r"[a-z0-9']+|[!?]", line.lower())


def lines(name: str) -> list[str]:
    return (shared() / "text" / name).read_text(encoding="latin-1").splitlines()


@functools.cache
def vectors(width: int = 64) -> tuple[dict[str, int], Array]:
    """Word vectors of the unlabelled sentences of Subj and MR: positive pointwise information, its largest singular vectors."""
    from scipy import sparse
    from scipy.sparse.linalg import svds

    names = ("subj.objective", "subj.subjective", "rt-polarity.neg", "rt-polarity.pos")
    sentences = [words(line) for name in names for line in lines(name)]
    counts = Counter(word for sentence in sentences for word in sentence)
    index = {word: number for number, (word, count) in enumerate(counts.most_common()) if count >= 4}
    pairs: Counter[tuple[int, int]] = Counter()
    for sentence in sentences:
        known = [index[word] for word in sentence if word in index]
        for at, word in enumerate(known):
            for other in known[max(0, at - 5) : at]:
                pairs[word, other] += 1
                pairs[other, word] += 1
    rows, columns = np.array(list(pairs)).T
    seen = np.array(list(pairs.values()), float)
    single = np.bincount(rows, seen, len(index))
    positive = np.maximum(0, np.log(seen * seen.sum() / (single[rows] * single[columns] ** 0.75 * (single.sum() ** 0.25))))
    matrix = sparse.csr_matrix((positive, (rows, columns)), shape=(len(index), len(index)))
    left, values, _ = svds(matrix, width, random_state=0)
    found = left * np.sqrt(values)
    return index, (found / found.std()).astype("float32")


def sst2(seed: int, rows: int = 500, length: int = 40) -> tuple[Array, Array, Array, Array]:
    """A draw of SST-2's training sentences, and its test sentences, as numbers of words; 0 is no word."""
    index, _ = vectors()

    def read(name: str) -> tuple[Array, Array]:
        x, y = [], []
        for line in lines(name):
            label, text = line.split(" ", 1)
            known = [index[word] + 1 for word in words(text) if word in index][:length]
            x.append(known + [0] * (length - len(known)))
            y.append(int(label))
        return np.array(x), np.array(y)

    x, y = read("stsa.binary.train")
    chosen = np.random.default_rng(seed).permutation(len(x))[:rows]
    return (x[chosen], y[chosen], *read("stsa.binary.test"))


def photo_network(backbone: str, classes: int, *, pretrained: bool, guide: bool) -> tuple[Any, Any]:
    kind, alpha = backbone.rsplit("-", 1)
    make = {"mobilenet": keras.applications.MobileNet, "mobilenetv2": keras.applications.MobileNetV2}[kind]
    weights = "imagenet" if pretrained else None
    base = make(input_shape=(SIDE, SIDE, 3), alpha=float(alpha), include_top=False, weights=weights, pooling="avg")
    inputs = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = base(x, training=False) if guide else base(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="head")(x)), base


def text_network(*, pretrained: bool, guide: bool) -> tuple[Any, Any]:
    del guide  # it has nothing that is another in training
    _, found = vectors()
    embedding = keras.layers.Embedding(len(found) + 1, found.shape[1], mask_zero=True, name="words")
    inputs = keras.Input((40,), dtype="int32")
    x = keras.layers.GlobalAveragePooling1D()(embedding(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    if pretrained:
        embedding.set_weights([np.concatenate([np.zeros((1, found.shape[1]), "float32"), found])])
    return model, embedding


def cifar_network(*, pretrained: bool, guide: bool) -> tuple[Any, Any]:
    base = resnet20(head=False)
    if pretrained:
        tk.WeightLoader(shared() / "torch" / "resnet20-12fca82f.th").layout("torch").skip("linear*", of="file").load(base)
    inputs = keras.Input((32, 32, 3))
    x = base(inputs, training=False) if guide else base(inputs)
    return keras.Model(inputs, keras.layers.Dense(10, name="head")(x)), base


@dataclass(frozen=True)
class Task:
    """Rows by seed, a network, and how long it trains."""

    rows: Callable[[int], tuple[Array, Array, Array, Array]]
    network: Callable[..., tuple[Any, Any]]
    epochs: int


def task_named(name: str) -> Task:
    data, network = name.split("/")
    if data == "sst2":
        return Task(sst2, text_network, 10)
    if data.startswith("mnist-"):
        return Task(functools.partial(mnist, int(data[6:])), cifar_network, 10)
    if data == "hymenoptera":
        return Task(lambda _: hymenoptera(), functools.partial(photo_network, network, 2), 10)
    per_class = int(data.removeprefix("cifar-"))
    return Task(functools.partial(cifar, per_class), functools.partial(photo_network, network, 10), 10 if per_class < 50 else 6)


def loss() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Whole:
    """Plain `fit` of everything by Adam, compiled once and begun anew from any weights, at any rate."""

    def __init__(self, task: Task, rows: tuple[Array, Array]) -> None:
        keras.utils.set_random_seed(0)
        self.model, _ = task.network(pretrained=False, guide=False)
        self.model.compile(keras.optimizers.Adam(), loss())
        x, y = rows
        sizes = sorted({32, len(x) % 32 or 32}, reverse=True)
        started = time.process_time()
        for size in sizes:
            self.model.fit(x[:size], y[:size], verbose=0)
        self.tracing = time.process_time() - started

    def fit(self, weights: list[Array], rate: float, rows: tuple[Array, Array], epochs: int, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        self.model.set_weights(weights)
        for variable in self.model.optimizer.variables:
            variable.assign(keras.ops.zeros_like(variable))
        self.model.optimizer.learning_rate = rate
        self.model.fit(*rows, batch_size=32, epochs=epochs, verbose=0)


def accuracy(model: Any, x: Array, y: Array) -> float:
    return float((model.predict(x, batch_size=64, verbose=0).argmax(1) == y).mean())


def run_arm(arm: str, task: Task, whole: Whole, rows: tuple[Array, Array], seed: int) -> tuple[Any, float]:
    """Trains by one arm's recipe; gives the model and the processor's seconds."""
    keras.utils.set_random_seed(seed)
    if arm == "default" or arm == "guide":
        model, base = task.network(pretrained=True, guide=arm == "guide")
        started = time.process_time()
        if arm == "default":
            tk.FineTuner.default(model, rows, epochs=task.epochs).fit(model, rows, seed=seed, verbose=0)
        else:
            base.trainable = False
            model.compile(keras.optimizers.Adam(1e-3), loss())
            model.fit(*rows, batch_size=32, epochs=task.epochs // 2, verbose=0)
            base.trainable = True
            model.compile(keras.optimizers.Adam(1e-5), loss())
            model.fit(*rows, batch_size=32, epochs=task.epochs - task.epochs // 2, verbose=0)
        return model, time.process_time() - started
    start, _ = task.network(pretrained=arm != "scratch", guide=False)
    weights = start.get_weights()
    started = time.process_time()
    whole.fit(weights, 1e-3 if arm == "scratch" else float(arm.split("-", 1)[1]), rows, task.epochs, seed)
    return whole.model, time.process_time() - started


def run(name: str, seeds: list[int], arms: list[str], out: Path, first_seed: int) -> None:
    task = task_named(name)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    have = {(item["task"], item["seed"], item["arm"]) for item in done}
    whole: Whole | None = None
    for seed in seeds:
        if all((name, seed, arm) in have for arm in arms):
            continue
        x, y, x_test, y_test = task.rows(first_seed + seed)
        apart = np.zeros(len(x), bool)
        apart[np.random.default_rng(1000 + first_seed + seed).permutation(len(x))[: len(x) // 5]] = True
        rows, chosen_on = (x[~apart], y[~apart]), (x[apart], y[apart])
        whole = whole or Whole(task, rows)
        for arm in arms:
            if (name, seed, arm) in have:
                continue
            model, seconds = run_arm(arm, task, whole, rows, seed)
            line = {
                "task": name,
                "seed": seed,
                "arm": arm,
                "accuracy": accuracy(model, x_test, y_test),
                "chosen_on": accuracy(model, *chosen_on),
                "seconds": round(seconds, 2),
                "tracing": round(whole.tracing, 2),
                "epochs": task.epochs,
                "rows": len(rows[0]),
            }
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def with_grid(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A cell's arms, and the plain one that is best on the rows kept for choosing, at the cost of all."""
    plain = {arm: item for arm, item in cells.items() if arm.startswith("plain-")}
    if plain:
        best = max(plain.values(), key=lambda item: item["chosen_on"])
        cells["grid"] = {**best, "seconds": sum(item["seconds"] + item["tracing"] for item in plain.values())}
        cells["grid, traced once"] = {**best, "seconds": sum(item["seconds"] for item in plain.values()) + best["tracing"]}
    return cells


def report(path: Path, out: Path) -> None:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    result: dict[str, Any] = {}
    for name in sorted({item["task"] for item in found}):
        cells = {
            seed: with_grid({item["arm"]: item for item in found if (item["task"], item["seed"]) == (name, seed)})
            for seed in sorted({item["seed"] for item in found if item["task"] == name})
        }
        arms = sorted({arm for cell in cells.values() for arm in cell})
        means = {arm: float(np.mean([cell[arm]["accuracy"] for cell in cells.values() if arm in cell])) for arm in arms}
        result[name] = {"accuracy": means, "against": {}}
        print(name, {arm: round(value, 3) for arm, value in means.items()})
        for arm in ("guide", "grid", "grid, traced once", "scratch"):
            pairs = [(cell["default"], cell[arm]) for cell in cells.values() if "default" in cell and arm in cell]
            if len(pairs) < 2:
                continue
            points = 100 * np.array([mine["accuracy"] - other["accuracy"] for mine, other in pairs])
            half = T[len(points) - 1] * points.std(ddof=1) / np.sqrt(len(points))
            ratio = float(np.median([mine["seconds"] / other["seconds"] for mine, other in pairs]))
            result[name]["against"][arm] = {
                "seeds": len(points),
                "points": float(points.mean()),
                "low": float(points.mean() - half),
                "high": float(points.mean() + half),
                "time_ratio": ratio,
            }
            mean, low, high = points.mean(), points.mean() - half, points.mean() + half
            print(
                f"  default − {arm}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}), {len(points)} seeds, {ratio:.2f} × its time"
            )
    write_json(
        out,
        {
            "claim": "the default plan beats the guide's recipe and is within 0.5 points of a tuned grid at a fifth of its time",
            "versions": {"keras": keras.__version__, "numpy": np.__version__, "transferkit": tk.__version__},
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "tasks": result,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "task", nargs="?", help="hymenoptera/mobilenet-0.25, cifar-25/…, cifar-100/…, sst2/embeddings, mnist-20/resnet20"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--first-seed", type=int, default=0, help="added to the seeds of the draws: others to develop on")
    parser.add_argument("--arms", nargs="*", default=["default", "guide", *[f"plain-{rate:g}" for rate in RATES], "scratch"])
    parser.add_argument("--report", type=Path, help="the file of lines to report on, instead of a run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.report:
        report(options.report, options.out)
    else:
        run(options.task, options.seeds, options.arms, options.out, options.first_seed)


if __name__ == "__main__":
    main()
