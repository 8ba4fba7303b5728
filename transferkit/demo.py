"""`python -m transferkit.demo`: the whole job on real data, offline, and an honest answer to whether transfer helped.

scikit-learn's 1,797 handwritten digits are split: 1,000 to pretrain on (which of the ten digits is it?), a pool to draw a few
labelled images from, 100 to choose learning rates on, 500 to test on. The new task asks another question about images of the
same kind, even or odd and small or large, of which 20 are labelled. Two ways to learn it have the same network, epochs,
batches and labels: from scratch; and transfer, which starts from the pretrained weights but for the head, and trains first
the head and then everything (LP-FT, Kumar et al., ICLR 2022).

Each way may choose among three learning rates, on draws and images that aren't used again. Then both run over several seeds,
each with a draw of labels and initial weights of its own, and the pairs' difference is given with its interval (Student's t).

Needs the `demo` extra.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import transferkit as tk
from transferkit._keras import keras, tf
from transferkit._table import Table
from transferkit.errors import MissingExtraError
from transferkit.evaluation.intervals import t_quantile
from transferkit.storage import atomic_path, write_json

__all__ = ["Comparison", "Way", "main", "run"]

CLASSES = ("even, 0 to 4", "even, 5 to 9", "odd, 0 to 4", "odd, 5 to 9")
PER_DIGIT = 2  # labelled images of each digit: 20 in all
EPOCHS, BATCH = 20, 8
TRIAL_SEEDS = (1001, 1002)  # draws on which the rates are chosen; none of them is reported
LEVEL = 0.95

Array = NDArray[Any]


@dataclass(frozen=True)
class Images:
    """The digits, split once and for all by a fixed seed.

    Args:
        source: 1,000 images to pretrain on, (n, 64) from 0 to 1, and their digits.
        pool: Images to draw the few labelled ones from, and their digits.
        validation: 100 images on which learning rates are chosen.
        test: 500 images that are used for the result and nothing else.
    """

    source: tuple[Array, Array]
    pool: tuple[Array, Array]
    validation: tuple[Array, Array]
    test: tuple[Array, Array]


def load_images() -> Images:
    """The digits of scikit-learn, which come with its package: nothing is downloaded."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError.of("The demo", package="scikit-learn", extra="demo") from error
    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(7).permutation(len(pixels))
    x, y = (pixels[order] / 16).astype(np.float32), digits[order]
    ends = (0, 1000, 1197, 1297, 1797)
    return Images(*((x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)))


def new_labels(digits: Array) -> Array:
    """The new task's class of each digit, an index into `CLASSES`."""
    return 2 * (digits % 2) + (digits >= 5)


def draw(images: Images, seed: int) -> tuple[Array, Array]:
    """A few labelled images of the new task: `PER_DIGIT` of each digit, so that each class shows all it consists of."""
    rng = np.random.default_rng(seed)
    x, digits = images.pool
    rows = np.concatenate([rng.permutation(np.flatnonzero(digits == digit))[:PER_DIGIT] for digit in range(10)])
    return x[rows], new_labels(digits[rows])


def network(classes: int) -> tk.ModelBuilder:
    """The network of both tasks; only the head differs."""
    return tk.ModelBuilder((64,)).dense(128, "relu", name="hidden").dense(64, "relu", name="features").classifier(classes)


@dataclass(frozen=True)
class Way:
    """One way to learn the new task.

    Args:
        name: What the table calls it.
        tuner: Learning rate → the plan.
        rates: The rates it may choose among.
        weights: The pretrained file it starts from; None for random weights.
    """

    name: str
    tuner: Callable[[float], tk.FineTuner]
    rates: tuple[float, ...]
    weights: Path | None = None

    def accuracy(self, rate: float, *, train: tuple[Array, Array], on: tuple[Array, Array], seed: int) -> float:
        """Trains a fresh model and gives its accuracy on other images, 0 to 1."""
        model = network(len(CLASSES)).build(seed=seed)
        if self.weights is not None:
            loader_for_new_head(self.weights).load(model)
        self.tuner(rate).fit(model, train, batch_size=BATCH, seed=seed, verbose=0)
        return float(tk.Evaluator("accuracy").run(model, on)["accuracy"])


def loader_for_new_head(path: Path) -> tk.WeightLoader:
    """Loads everything but the head, whose classes are others now."""
    return tk.WeightLoader(path).skip("head/*")


def ways(weights: Path, *, epochs: int) -> tuple[Way, Way]:
    """From scratch, and transfer, with the same number of epochs and as many rates to choose from."""
    first = epochs // 2

    def scratch(rate: float) -> tk.FineTuner:
        return tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=epochs, learning_rate=rate)

    def transfer(rate: float) -> tk.FineTuner:
        head = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=first, learning_rate=1e-2)
        return head.phase("all", train=tk.Layers.all(), epochs=epochs - first, learning_rate=rate)

    return (
        Way("from scratch", scratch, (1e-3, 3e-3, 1e-2)),
        Way("transfer", transfer, (3e-4, 1e-3, 3e-3), weights),
    )


def pretrain(images: Images, path: Path, *, epochs: int) -> float:
    """Trains on the ten digits, writes the model to `path` as Keras's HDF5 file, and gives its accuracy on the test images."""
    model = network(10).build(seed=0)
    tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=epochs, learning_rate=1e-3).fit(
        model, images.source, batch_size=32, seed=0, verbose=0
    )
    tk.save_model(model, path)
    return float(tk.Evaluator("accuracy").run(model, images.test)["accuracy"])


Verdict = Literal["helps", "hurts", "can't be told"]


@dataclass(frozen=True)
class Comparison:
    """Two ways over the same seeds, pair by pair.

    Args:
        names: What they are called; the second is the one in question.
        rates: The learning rate each chose.
        seeds: One for each pair.
        accuracies: For each way its accuracy at each seed, 0 to 1.
        seconds: How long it all took.
    """

    names: tuple[str, str]
    rates: tuple[float, float]
    seeds: tuple[int, ...]
    accuracies: tuple[tuple[float, ...], tuple[float, ...]]
    seconds: float = 0.0

    @property
    def differences(self) -> tuple[float, ...]:
        """Second less first, at each seed."""
        return tuple(second - first for first, second in zip(*self.accuracies, strict=True))

    @property
    def difference(self) -> tuple[float, float, float]:
        """The mean difference and the ends of its interval: Student's t over the pairs, two or more."""
        mean, n = statistics.mean(self.differences), len(self.seeds)
        half = t_quantile(0.5 + LEVEL / 2, n - 1) * statistics.stdev(self.differences) / math.sqrt(n)
        return mean, mean - half, mean + half

    @property
    def verdict(self) -> Verdict:
        """What the interval says of the second way."""
        _, low, high = self.difference
        return "helps" if low > 0 else "hurts" if high < 0 else "can't be told"

    def __str__(self) -> str:
        first, second = self.accuracies
        rows = [
            (str(seed), f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}") for seed, a, b in zip(self.seeds, first, second, strict=True)
        ]
        mean, low, high = self.difference
        rows.append(("mean", f"{statistics.mean(first):.3f}", f"{statistics.mean(second):.3f}", f"{mean:+.3f}"))
        said = {
            "helps": f"{self.names[1].capitalize()} helped: it is better by {mean:.3f}",
            "hurts": f"{self.names[1].capitalize()} LOST: it is worse than {self.names[0]} by {-mean:.3f}",
            "can't be told": f"No winner: the mean difference is {mean:+.3f}, and its interval holds zero",
        }[self.verdict]
        return str(
            Table(
                columns=(">seed", *(f">{name}" for name in self.names), ">difference"),
                rows=rows,
                title="Accuracy on 500 test images",
                notes=(f"{said} ({LEVEL:.0%} interval {low:+.3f} to {high:+.3f}, {len(self.seeds)} pairs, Student's t).",),
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain lists and dicts."""
        mean, low, high = self.difference
        return {
            "ways": {
                name: {"learning_rate": rate, "accuracies": list(values), "mean": statistics.mean(values)}
                for name, rate, values in zip(self.names, self.rates, self.accuracies, strict=True)
            },
            "seeds": list(self.seeds),
            "difference": {"mean": mean, "low": low, "high": high, "level": LEVEL, "method": "Student's t over pairs"},
            "verdict": f"{self.names[1]} {self.verdict}",
            "seconds": self.seconds,
        }


def choose_rate(way: Way, images: Images) -> float:
    """The rate with the best mean accuracy on the validation images over the trial draws; the smaller of equals."""
    x, digits = images.validation
    on = (x, new_labels(digits))
    means = {
        rate: statistics.mean(way.accuracy(rate, train=draw(images, seed), on=on, seed=seed) for seed in TRIAL_SEEDS)
        for rate in way.rates
    }
    return max(sorted(means), key=lambda rate: means[rate])


def run(folder: str | Path, *, seeds: int = 5, epochs: int = EPOCHS, say: Callable[[str], None] = print) -> Comparison:
    """Runs the demo. Writes `pretrained_model.h5`, `demo.json` and, with matplotlib, `demo.png` to `folder`.

    Args:
        folder: Made if it isn't there.
        seeds: How many pairs, two or more.
        epochs: Of each training.
        say: What is done with each line of progress.

    Raises:
        PlanError: for fewer than two seeds.
        MissingExtraError: without scikit-learn.
    """
    if seeds < 2:
        raise tk.errors.PlanError("Running the demo.", found=f"seeds={seeds!r}; an interval needs two pairs at least")
    started = time.perf_counter()
    images = load_images()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pretrained_model.h5"

    accuracy = pretrain(images, path, epochs=epochs)
    say(f"Pretrained on {len(images.source[0])} images of ten digits: accuracy {accuracy:.3f} on the test images. Wrote {path}.")
    report = loader_for_new_head(path).match(network(len(CLASSES)).build(seed=0))
    say(f"\nThe new task, {len(CLASSES)} classes ({'; '.join(CLASSES)}), takes over from it:\n\n{report}\n")

    both = ways(path, epochs=epochs)
    rates = tuple(choose_rate(way, images) for way in both)
    chosen = ", ".join(f"{way.name} {rate:g}" for way, rate in zip(both, rates, strict=True))
    say(f"Learning rates chosen on {len(images.validation[0])} other images: {chosen}.")
    say(f"Now {seeds} pairs, each on {10 * PER_DIGIT} labelled images for {epochs} epochs in batches of {BATCH} …\n")

    x, digits = images.test
    test = (x, new_labels(digits))
    accuracies = tuple(
        tuple(way.accuracy(rate, train=draw(images, seed), on=test, seed=seed) for seed in range(seeds))
        for way, rate in zip(both, rates, strict=True)
    )
    comparison = Comparison(
        names=(both[0].name, both[1].name),
        rates=(rates[0], rates[1]),
        seeds=tuple(range(seeds)),
        accuracies=(accuracies[0], accuracies[1]),
        seconds=round(time.perf_counter() - started, 1),
    )
    say(str(comparison))
    write_json(folder / "demo.json", {**comparison.to_dict(), "pretrained_accuracy": accuracy, **settings(epochs)})
    say(f"Wrote {folder / 'demo.json'}.")
    if draw_picture(comparison, folder / "demo.png"):
        say(f"Wrote {folder / 'demo.png'}.")
    say(f"{comparison.seconds:.0f} seconds.")
    return comparison


def settings(epochs: int) -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "labelled_images": 10 * PER_DIGIT,
        "epochs": epochs,
        "batch_size": BATCH,
        "versions": {
            "python": platform.python_version(),
            "transferkit": tk.__version__,
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }


def draw_picture(comparison: Comparison, path: Path) -> bool:
    """Draws the pairs and their difference; False where matplotlib isn't installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for first, second in zip(*comparison.accuracies, strict=True):
        left.plot((0, 1), (first, second), "o-", color="#9aa0a6", markersize=5, linewidth=1)
    means = [statistics.mean(values) for values in comparison.accuracies]
    left.plot((0, 1), means, "o-", color="#2166ac", markersize=8, linewidth=2.5, label="mean")
    left.set(xticks=(0, 1), xticklabels=comparison.names, xlim=(-0.3, 1.3), ylabel="accuracy on 500 test images")
    left.set_title(f"{len(comparison.seeds)} pairs, {10 * PER_DIGIT} labelled images each")
    left.legend(frameon=False, loc="upper left")
    mean, low, high = comparison.difference
    right.axvline(0, color="#30343b", linewidth=1)
    right.errorbar(mean, 0, xerr=[[mean - low], [high - mean]], fmt="o", color="#2166ac", capsize=6, markersize=8)
    right.plot(comparison.differences, [-0.3] * len(comparison.differences), "o", color="#9aa0a6", markersize=5)
    right.set(yticks=(), ylim=(-1, 1), xlabel="difference in accuracy")
    right.set_title(f"{LEVEL:.0%} interval: {low:+.3f} to {high:+.3f}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m transferkit.demo", description="Does transfer help? Measured on real digits."
    )
    parser.add_argument("--folder", default="transferkit-demo", help="where results are written (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="pairs to compare (%(default)s)")
    chosen = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Keras warns at each .h5 it writes; here that is the point
    run(chosen.folder, seeds=chosen.seeds)


if __name__ == "__main__":
    main()
