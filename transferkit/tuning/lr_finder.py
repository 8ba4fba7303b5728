"""Which learning rate, and how large a batch: short trials that leave the model exactly as it was.

The range test is Smith's (WACV 2017): the rate rises exponentially over a few dozen steps while the loss is watched. The loss is
smoothed as in Howard & Gugger's fastai (exponential mean, bias-corrected), and the test stops when it is four times its best.
The suggestion is fastai's `valley`: the point two thirds into the longest stretch over which the smoothed loss falls.

May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import tf
from transferkit._table import Table, Tabular
from transferkit.data import Batch, batches, is_arrays, row_count, rows_of
from transferkit.errors import DataError, PlanError
from transferkit.tuning.feeding import epoch_order
from transferkit.tuning.phases import in_effect
from transferkit.tuning.trials import TrialSteps, left_alone, phase_of
from transferkit.tuning.tuner import FineTuner

__all__ = ["BatchSizes", "LearningRates", "find_batch_size", "find_learning_rate"]


@dataclass(frozen=True)
class LearningRates(Tabular):
    """What `find_learning_rate` saw.

    Args:
        rates: The rates tried, rising.
        losses: The smoothed loss at each.
        suggestion: A rate to train at.
        steepest: The rate at which the loss fell fastest.
        phase: The phase it is for.
        planned: The rate the plan has for it; None where it is the optimizer's own.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float
    steepest: float
    phase: str
    planned: float | None = None

    @property
    def warning(self) -> str:
        """What to know about the plan's own rate; empty where it is within a factor of five of the suggestion."""
        if self.planned is None or 1 / 5 <= self.planned / self.suggestion <= 5:
            return ""
        times = self.planned / self.suggestion
        far = f"{times:.2g} times the suggestion" if times > 1 else f"{1 / times:.2g} times less than suggested"
        return f"The plan's rate of {self.planned:.2g} is {far}: it may {'diverge' if times > 1 else 'hardly move'}."

    def table(self) -> Table:
        """The curve, in about twelve rows, with the suggestion marked."""
        step = max(1, len(self.rates) // 12)
        rows = []
        low, high = min(self.losses), max(self.losses)
        for rate, loss in list(zip(self.rates, self.losses, strict=True))[::step]:
            bar = "█" * round(30 * (loss - low) / (high - low)) if high > low else ""
            rows.append((f"{rate:.2g}", f"{loss:.4g}", bar))
        note = f"Suggestion: {self.suggestion:.2g} (the loss falls fastest at {self.steepest:.2g})."
        return Table(
            columns=(">rate", ">loss", ""),
            rows=rows,
            title=f"Learning rates for the phase {self.phase!r}",
            notes=(note, *([self.warning] if self.warning else [])),
        )

    def to_dict(self) -> dict[str, Any]:
        """The curve as lists, and the suggestion."""
        return {
            "rates": list(self.rates),
            "losses": list(self.losses),
            "suggestion": self.suggestion,
            "steepest": self.steepest,
            "phase": self.phase,
            "planned": self.planned,
            "warning": self.warning,
        }


@dataclass(frozen=True)
class BatchSizes(Tabular):
    """What `find_batch_size` saw.

    Args:
        bytes_by_size: Batch size → peak memory of a training step, in bytes.
        best: The largest power of two that stays within the limit.
        limit: The limit, in bytes.
    """

    bytes_by_size: tuple[tuple[int, int], ...]
    best: int
    limit: int

    def table(self) -> Table:
        """The batch sizes that were tried, with the memory each takes."""
        rows = [(str(size), f"{used / 2**20:,.0f}", "← fits" if size == self.best else "") for size, used in self.bytes_by_size]
        return Table(columns=(">batch", ">MiB", ""), rows=rows, title=f"Limit {self.limit / 2**20:,.0f} MiB")

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain lists and numbers."""
        return {"bytes_by_size": [list(pair) for pair in self.bytes_by_size], "best": self.best, "limit": self.limit}


def find_learning_rate(
    model: Any,
    data: Any,
    *,
    tuner: FineTuner | None = None,
    phase: str | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 80,
    batch_size: int = 32,
    seed: int = 0,
) -> LearningRates:
    """Tries rising learning rates for a phase of a plan and suggests one. The model is left exactly as it was.

    Weights, BatchNorm statistics, random states, `trainable` flags, optimizer and everything compiled are those of before.
    Rates for single layers, penalties and mixing of the plan aren't used, its loss and optimizer are.

    Args:
        model: A built model.
        data: Whatever `fit` takes; gone over as often as the steps need.
        tuner: The plan; one that trains everything where none is given.
        phase: A name of one of its phases; the first where none is given.
        lowest: The first rate.
        highest: The last rate, unless the loss diverges before.
        steps: How many rates are tried.
        batch_size: Rows in a batch of in-memory data.
        seed: Fixes the order of in-memory rows, and dropout.

    Raises:
        DataError: when the loss is never finite.

    Example:
        >>> import keras, numpy as np
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
        >>> found = find_learning_rate(model, (x, x.sum(1, keepdims=True)), steps=40)
        >>> 1e-6 < found.suggestion < 1
        True
    """
    if not 0 < lowest < highest or steps < 5:
        raise PlanError(
            "Looking for a learning rate.",
            found=f"lowest={lowest!r}, highest={highest!r}, steps={steps!r}; 0 < lowest < highest, 5 steps",
        )
    tuner = FineTuner() if tuner is None else tuner
    plan = phase_of(tuner, model, phase)
    rates = np.geomspace(lowest, highest, steps)
    losses: list[float] = []
    mean = 0.0
    source = _endless(data, batch_size=batch_size, seed=seed)
    first = next(source)
    objective = tuner.objective(model, first.y)
    with left_alone(model), in_effect(model, plan):
        steps_of = TrialSteps(model, objective.loss, objective.loss_weights, tuner.make_optimizer(float(rates[0])))
        for number, (rate, batch) in enumerate(zip(rates, itertools.chain([first], source), strict=False), start=1):
            steps_of.optimizer.learning_rate = float(rate)
            loss = steps_of(batch)
            mean = 0.9 * mean + 0.1 * loss
            smooth = mean / (1 - 0.9**number)
            if not np.isfinite(smooth) or (number > 5 and smooth > 4 * min(losses)):
                break
            losses.append(smooth)
    if len(losses) < 5:
        raise DataError(
            f"Looking for a learning rate for the phase {plan.phase.name!r}.",
            found=f"a loss that isn't finite, or blows up, after {len(losses)} steps at rates from {lowest:.1e} on",
            cause="inputs or labels far outside what the model takes, or weights that aren't finite",
            fix="look at the data, or begin lower: lowest=1e-9",
        )
    tried = rates[: len(losses)]
    return LearningRates(
        rates=tuple(map(float, tried)),
        losses=tuple(losses),
        suggestion=_valley(tried, losses),
        steepest=float(tried[int(np.argmin(np.gradient(losses)))]),
        phase=plan.phase.name,
        planned=plan.phase.learning_rate,
    )


def _valley(rates: Any, losses: Sequence[float]) -> float:
    """The rate two thirds into the longest falling subsequence of the losses (for each end, the longest that ends there)."""
    count = len(losses)
    length, before = [1] * count, list(range(count))
    for end in range(count):
        for start in range(end):
            if losses[start] > losses[end] and length[start] + 1 > length[end]:
                length[end], before[end] = length[start] + 1, start
    end = int(np.argmax(length))
    begin = end
    while before[begin] != begin:
        begin = before[begin]
    return float(rates[begin + (end - begin) * 2 // 3])


def _endless(data: Any, *, batch_size: int, seed: int) -> Iterator[Batch]:
    for epoch in itertools.count():
        data_now = rows_of(tuple(data), epoch_order(row_count(data), seed=seed, epoch=epoch)) if is_arrays(data) else data
        empty = True
        for batch in batches(data_now, batch_size=batch_size):
            empty = False
            yield batch
        if empty:
            raise DataError("Reading data to try learning rates on.", found="no batch, or an iterator that can be read once only")


def find_batch_size(
    model: Any,
    data: Any,
    *,
    tuner: FineTuner | None = None,
    phase: str | None = None,
    limit: int | None = None,
    largest: int = 1024,
) -> BatchSizes:
    """Doubles the batch until a training step would pass a limit of memory. The model is left exactly as it was.

    Measures the process's (or the GPU's) peak, so it sees only growth: call it before larger batches were trained.

    Args:
        model: A built model.
        data: In-memory data, `(x, y)`; its rows are repeated for larger batches.
        tuner: The plan; one that trains everything where none is given.
        phase: A name of one of its phases; the last where none is given, for it usually trains most.
        limit: Bytes that a step may add; half of what is free where nothing is said.
        largest: No batch above this is tried.

    Example:
        >>> import numpy as np
        >>> import transferkit as tk
        >>> model = tk.ModelBuilder((4,)).dense(8, "relu").classifier(3).build()
        >>> found = tk.find_batch_size(model, (np.zeros((64, 4)), np.arange(64) % 3), largest=64)
        >>> found.best
        64
    """
    if not is_arrays(data):
        raise DataError("Looking for a batch size.", found=f"data of type {type(data).__name__}", fix="give some rows as (x, y)")
    tuner = FineTuner() if tuner is None else tuner
    plan = phase_of(tuner, model, phase, default=-1)
    limit = _free_bytes() // 2 if limit is None else limit
    rows = row_count(data)
    found: list[tuple[int, int]] = []
    objective = tuner.objective(model, np.asarray(data[1]) if hasattr(data[1], "shape") else data[1])
    with left_alone(model), in_effect(model, plan):
        base = _peak_bytes()
        size = 1
        while size <= largest:
            batch = next(iter(batches(rows_of(tuple(data), np.arange(size) % rows), batch_size=size)))
            try:
                TrialSteps(model, objective.loss, objective.loss_weights, tuner.make_optimizer(0.0))(batch)
            except tf.errors.ResourceExhaustedError:
                break
            used = max(_peak_bytes() - base, 0)
            found.append((size, used))
            # A step of twice the size takes about twice as much; it isn't tried where that would pass the limit.
            if used * 2 > limit:
                break
            size *= 2
    fitting = [size for size, used in found if used <= limit]
    if not fitting:
        raise DataError(
            "Looking for a batch size.", found=f"that one row alone passes {limit:,} bytes", fix="give a larger limit="
        )
    return BatchSizes(tuple(found), fitting[-1], limit)


def _peak_bytes() -> int:
    devices = tf.config.list_logical_devices("GPU")
    if devices:
        return int(tf.config.experimental.get_memory_info(devices[0].name.removeprefix("/device:"))["peak"])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 4 * 2**30
