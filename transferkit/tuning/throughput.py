"""How many rows a second a phase trains on, and what keeps it from more: reading, computing, or sharing what is computed.

Each is measured by itself: batches are read and dropped; of a batch in memory, one device takes a step on one replica's rows, all
replicas on the whole. Reading goes on while a step is computed, so a batch takes the longer of the two. What a step of all takes
longer than that of one replica's rows is what the replicas exchange, and whatever else it costs to have several.

May import Keras and the floors below.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras, tf
from transferkit._table import Table, Tabular
from transferkit.building.replicas import own_places
from transferkit.data import Batch, Data, as_batch, batches, is_arrays, row_count, rows_of
from transferkit.errors import DataError, PlanError
from transferkit.placement import Placement, running
from transferkit.tuning.feeding import as_tensor, epoch_order, first_rows, ordered_dataset
from transferkit.tuning.phases import in_effect
from transferkit.tuning.replicated import ReplicatedModel, own_steps, whole_batch_norm
from transferkit.tuning.trials import TrialSteps, left_alone, median_seconds, phase_of
from transferkit.tuning.tuner import FineTuner

__all__ = ["Throughput", "find_bottleneck"]

_ADVICE = {
    "input": "let frozen layers be computed once (.cache), give smaller images or larger batches, or read rows into memory",
    "computing": "freeze more, or measure Placement's precision= and jit_compile=; several devices share it",
    "communication": "give larger batches, or fewer devices or workers",
}


@dataclass(frozen=True)
class Throughput(Tabular):
    """What `find_bottleneck` measured.

    Args:
        phase: The phase it is of.
        batch_size: Rows in a batch.
        replicas: How many share a batch.
        input_seconds: To read a batch, while nothing else is done.
        compute_seconds: To step on one replica's rows, on one device.
        communication_seconds: What a step of all replicas takes longer than that; 0 for one.
    """

    phase: str
    batch_size: int
    replicas: int
    input_seconds: float
    compute_seconds: float
    communication_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """What a step takes, with the next batch read meanwhile."""
        return max(self.input_seconds, self.compute_seconds + self.communication_seconds)

    @property
    def rows_per_second(self) -> float:
        """Rows trained on in a second."""
        return self.batch_size / self.step_seconds

    @property
    def bottleneck(self) -> str:
        """`input`, `computing` or `communication`: what a step waits for longest."""
        if self.input_seconds > self.compute_seconds + self.communication_seconds:
            return "input"
        return "computing" if self.compute_seconds >= self.communication_seconds else "communication"

    def table(self) -> Table:
        """What each part takes for a batch."""
        parts = [("input", self.input_seconds), ("computing", self.compute_seconds)]
        parts += [("communication", self.communication_seconds)] if self.replicas > 1 else []
        rows = [(name, f"{seconds * 1000:,.2f}", "← bottleneck" if name == self.bottleneck else "") for name, seconds in parts]
        shared = f" shared by {self.replicas} replicas" if self.replicas > 1 else ""
        return Table(
            columns=("part", ">ms a batch", ""),
            rows=rows,
            title=f"Phase {self.phase!r}: {self.rows_per_second:,.0f} rows a second, in batches of {self.batch_size}{shared}",
            notes=(f"For more: {_ADVICE[self.bottleneck]}.", "Measured once, by itself: other work on the machine counts."),
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures, with rows a second and the bottleneck."""
        return {**asdict(self), "rows_per_second": self.rows_per_second, "bottleneck": self.bottleneck}


def find_bottleneck(
    model: Any,
    data: Any,
    *,
    tuner: FineTuner | None = None,
    phase: str | None = None,
    batch_size: int = 32,
    steps: int = 20,
    placement: Placement | None = None,
) -> Throughput:
    """Measures what a training step waits for: reading, computing or communication. The model is left exactly as it was.

    The phase is taken as computed in full; a phase on features that were computed once reads nothing and computes little.

    Args:
        model: A built model.
        data: Whatever `fit` takes; `steps` batches of it are read.
        tuner: The plan; one that trains everything where none is given.
        phase: A name of one of its phases; the last where none is given, for it usually trains most.
        batch_size: Rows in a batch of in-memory data.
        steps: How many batches are read, and how many steps taken, for each figure.
        placement: As for `fit`; every worker has to call this.

    Raises:
        DataError: for data without rows.
        PlanError: for a model with a `train_step` of its own on several replicas.

    Example:
        >>> import numpy as np
        >>> import transferkit as tk
        >>> model = tk.ModelBuilder((4,)).dense(8, "relu").classifier(3).build()
        >>> found = tk.find_bottleneck(model, (np.zeros((64, 4)), np.arange(64) % 3))
        >>> found.bottleneck in ("input", "computing") and found.rows_per_second > 0
        True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PlanError("Looking for a bottleneck.", found=f"steps={steps!r}", fix="a whole number above 0, such as steps=20")
    tuner = FineTuner() if tuner is None else tuner
    plan = phase_of(tuner, model, phase, default=-1)
    first, data = first_rows(data, name="training data")
    objective = tuner.objective(model, first.y)
    with running(placement, model) as strategy, left_alone(model), in_effect(model, plan), whole_batch_norm(model, strategy):
        reading, held = _reading(data, batch_size, steps, strategy)
        rows = row_count(held)
        replicas = 1 if strategy is None else int(strategy.num_replicas_in_sync)
        if strategy is not None and own_steps(model):
            raise PlanError("Looking for a bottleneck.", found="a model with a step of its own", fix="measure it on one device")
        # As tensors from here on: of both steps the same is timed.
        held = Batch(*(None if part is None else tf.nest.map_structure(as_tensor, part) for part in held))
        share = Batch(*rows_of(held, slice(0, -(-rows // replicas))))
        loss = (objective.loss, objective.loss_weights)
        one = TrialSteps(model, *loss, tuner.make_optimizer(0.0))
        computing = median_seconds(lambda: one(share), steps)
        sharing = 0.0
        if strategy is not None:
            whole = median_seconds(_shared_step(model, strategy, held, loss, tuner.make_optimizer(0.0)), steps)
            sharing = max(0.0, whole - computing)
    return Throughput(plan.phase.name, rows, replicas, reading, computing, sharing)


def _reading(data: Any, batch_size: int, steps: int, strategy: Any) -> tuple[float, Batch]:
    """Seconds to read a batch, and a whole one."""
    source: Any
    if isinstance(data, Data) or is_arrays(data):
        rows = row_count(data)
        held = next(iter(batches(data, batch_size=min(batch_size, rows))))
        source = ordered_dataset(
            data,
            batch_size=batch_size,
            orders=lambda: [epoch_order(rows, seed=0, epoch=0)],
            own=own_places(strategy),
        )
    elif isinstance(data, tf.data.Dataset):
        held, source = as_batch(next(iter(data))), data.prefetch(tf.data.AUTOTUNE)
    else:
        held, source = None, batches(data)
    times = []  # from the first on, with which the pipeline has begun
    for item in _over(source, steps + 1):
        held = as_batch(item) if held is None else held
        times.append(time.perf_counter())
    if held is None:
        raise DataError("Looking for a bottleneck.", found="no rows at all")
    # Batches that are read side by side come together, so single ones say little; a pause of the machine is in one third only.
    thirds = [part for part in np.array_split(np.diff(times), 3) if len(part)]
    return float(np.median([part.mean() for part in thirds])) if thirds else 0.0, held


def _over(source: Any, count: int) -> Iterator[Any]:
    """So many items, from the beginning again where there are fewer; no more than there are of what can be gone over once."""
    found = 0
    while found < count:
        before = found
        for item in itertools.islice(source, count - found):
            found += 1
            yield item
        if found == before:
            return


def _shared_step(model: Any, strategy: Any, held: Batch, loss: tuple[Any, Any], optimizer: Any) -> Callable[[], object]:
    """A step of all replicas on a batch in memory."""
    trained = ReplicatedModel(model, strategy)
    optimizer.build(model.trainable_variables)
    trained.compile(optimizer=optimizer, loss=loss[0], loss_weights=loss[1], jit_compile=False)
    step = tf.function(trained.train_step, autograph=False, reduce_retracing=True)
    return lambda: np.asarray(step(keras.utils.pack_x_y_sample_weight(*held))["loss"])
