"""A run that can be gone on with: what it is at a step is kept in a folder, and a run of the same plan begins there.

What comes after a step follows from the weights, the state of optimizer, metrics, callbacks and random generators, and the place
in the data, whose order follows from seed and epoch. All of it is read at one step and written by a thread; the run goes on
meanwhile. May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transferkit.errors import StorageError
from transferkit.tuning.checkpoint import Array, Checkpoint, CheckpointFolder, pack, unpack
from transferkit.tuning.epochs import Place, Watch
from transferkit.tuning.guards import Guard, loss_spikes
from transferkit.tuning.identity import differences, environment, threads
from transferkit.tuning.keeping import CallbackStates, load_random_state, random_state, random_variables
from transferkit.tuning.naming import arrays_of, assign, named, optimizer_variables
from transferkit.tuning.phases import PhasePlan
from transferkit.tuning.run import PhaseRecord, Run
from transferkit.tuning.signals import Signals
from transferkit.tuning.snapshots import Reader
from transferkit.weights.values import is_finite

__all__ = ["Session"]

#: The share of the time of training that the work on checkpoints may be where nothing is said of how often they are written. What
#: it takes from training, whose step then waits for caches, for cores and to write its variables anew, is about twice as much.
_SHARE = 0.005
_FORMAT = 1


class Session(Watch):
    """One call of `fit` as its checkpoints, guards and signals see it.

    Args:
        folder: The checkpoints, or None for none.
        found: The one to go on from, or None.
        every: As `save_every`.
        signals: What takes signals.
    """

    def __init__(
        self, folder: CheckpointFolder | None, found: Checkpoint | None, every: int | float | None, signals: Signals
    ) -> None:
        self._folder, self._found, self._every, self._signals = folder, found, every, signals
        self.most_steps = every if isinstance(every, int) and folder is not None else None
        self._fingerprint: Mapping[str, str] = {}
        self._starts: dict[str, Array] = {}
        self._history: dict[str, list[Any]] = {}
        self._records: list[PhaseRecord] = []
        self._model: Any = None
        self._phase: dict[str, Any] = {}
        self._read: tuple[list[str], Reader] | None = None
        self._random: list[Any] = []
        self._steps = self._unsaved = 0
        self._saved = time.perf_counter()
        self._next = self._saved + 1.0
        self._by_epoch = False
        #: What the user should know of how it went.
        self.notes: list[str] = []

    def tell(self, note: str) -> None:
        """Says something before training, and once more in the result."""
        self.notes.append(note)
        warnings.warn(note, stacklevel=5)

    @property
    def keeps(self) -> bool:
        """Whether the run is kept in a folder."""
        return self._folder is not None

    @property
    def goes_on(self) -> bool:
        """Whether there is a run in the folder."""
        return self._found is not None

    @property
    def begins_at(self) -> str:
        """Where the run begins, in words."""
        return f"step {0 if self._found is None else self._found.state.get('steps', 'the last')}"

    # -- before training

    def seed(self, given: int | None) -> int | None:
        """The seed that was given, or that of the run that is gone on with."""
        return int(self._found.state["fingerprint"]["seed"]) if given is None and self._found is not None else given

    def check(self, marks: Mapping[str, str]) -> None:
        """Notes what the run is.

        Raises:
            StorageError: when it isn't the run in the folder, saying in what it differs.
        """
        self._fingerprint = marks
        if self._found is None:
            return
        finished = "finished" in self._found.state
        differing = differences(self._found.state["fingerprint"], marks)
        if differing:
            raise StorageError(
                f"Going on with the run in {repr(str(self._folder.path)) if self._folder else 'the folder of the chief'}.",
                found=differing,
                cause="it is another run's folder, or the script was changed since",
                fix="name another folder for another run"
                + (", also for training the finished model further" if finished else ", or give what the run was begun with"),
            )
        elsewhere = [] if finished else differences(self._found.state["environment"], _environment())
        if elsewhere:
            self.tell(
                "The run goes on where the last bits may come out otherwise than where it was begun, by "
                f"{'; '.join(elsewhere)}. To the bit it ends the same only with what it was begun with."
            )

    def finished(
        self, model: Any, plans: Sequence[PhasePlan], compile_with: Callable[[Any], Any], make_optimizer: Callable[[], Any]
    ) -> Run | None:
        """The result of a run that is finished, whose weights the model then has; else None."""
        if self._found is None or "finished" not in self._found.state:
            return None
        state, arrays, optimizer = self._found.state, self._found.arrays, make_optimizer()
        assign(named("model", model.variables), arrays)
        for row in plans[-1].layers:
            row.layer.trainable = row.trained
        with contextlib.suppress(TypeError, ValueError):  # a schedule or a class that Keras can't make again
            optimizer = type(optimizer).from_config(state["optimizer"])
        compile_with(optimizer)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        with contextlib.suppress(StorageError):
            assign(named("optimizer", optimizer_variables(model.optimizer)), arrays)
        run = state["finished"]
        return Run(
            history=run["history"],
            phases=tuple(PhaseRecord(**record) for record in run["phases"]),
            seed=run["seed"],
            placement=run["placement"],
            notes=tuple(run["notes"]),
        )

    # -- phases

    def begin(
        self,
        model: Any,
        history: dict[str, list[Any]],
        records: list[PhaseRecord],
        by_epoch: str,
        *,
        spread: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins the run, or goes on with it: the model gets its weights, the history what is in it.

        Args:
            model: The model.
            history: The figures over all phases.
            records: What the phases did.
            by_epoch: Why the run can go on from the beginning of an epoch only; empty when it can from any batch.
            spread: Gives replicas what is each one's own, when all have the same.
        """
        self._model, self._history, self._records, self._by_epoch = model, history, records, bool(by_epoch)
        self._own = list(model.variables)
        self._spread = spread
        if self._folder is not None and by_epoch:
            self.tell(f"A stopped run goes on from the beginning of an epoch: the data is {by_epoch}.")
        if self._found is not None:
            assign(named("model", self._own), self._found.arrays)
            history.update({name: list(values) for name, values in self._found.state["history"].items()})
            self._steps = self._found.state["steps"]
        spread()

    def starts(self, values: dict[int, Any], variables: Sequence[Any]) -> dict[int, Any]:
        """The weights as they were loaded at the run's beginning, which this call's needn't be; and they are kept."""
        names = {f"start/{number}": id(item) for number, item in enumerate(variables) if id(item) in values}
        if self._found is not None:
            values = {key: self._found.arrays.get(name, values[key]) for name, key in names.items()}
        self._starts = {name: np.asarray(values[key]) for name, key in names.items()}
        return values

    def done(self, index: int) -> PhaseRecord | None:
        """What a phase did that was finished before."""
        if self._found is None or index >= self._found.state["phase"]:
            return None
        return PhaseRecord(**self._found.state["records"][index])

    def _here(self, index: int) -> Mapping[str, Any] | None:
        """What was kept of the phase, when it is the one to go on with."""
        return self._found.state if self._found is not None and index == self._found.state["phase"] else None

    def decided(self, index: int) -> tuple[bool, str] | None:
        """Whether the phase trained on features, and the words for it."""
        here = self._here(index)
        return None if here is None else (here["cached"], here["words"])

    def compiled(self, index: int) -> bool | None:
        """Whether XLA compiled the steps of the phase."""
        here = self._here(index)
        return None if here is None else bool(here["jit_compile"])

    def is_first(self, index: int) -> bool:
        """Whether the phase is the first of this call."""
        return index == (0 if self._found is None else self._found.state["phase"])

    def elapsed(self, index: int) -> float:
        """How long the phase was trained before."""
        here = self._here(index)
        return 0.0 if here is None else float(here["elapsed"])

    def begin_phase(
        self, index: int, plan: PhasePlan, *, begun: int, trained: Any, callbacks: Any, words: str, in_full: Any, stream: Any
    ) -> None:
        """Begins a phase, whose optimizer is compiled.

        Args:
            index: Its number.
            plan: The phase.
            begun: Its first epoch.
            trained: The model that is trained, the whole or a part.
            callbacks: The `CallbackList`.
            words: How the frozen part is computed.
            in_full: The `FullSteps`, or None on features.
            stream: What they are fed.
        """
        changing = [weight for row in plan.layers if row.trained for weight in row.layer.weights]
        changing += plan.own_weights if plan.phase.train.is_everything else ()
        self._guard = Guard(plan.phase.name, changing, self._model.variables)
        self._states = CallbackStates(callbacks.callbacks)
        self._trained, self._read = trained, None
        self._random = self._random or (random_variables() if self._folder or self._found else [])
        self._in_full = in_full
        if self._folder is not None and in_full is None and stream.reshuffles:
            self.tell(
                f"Phase {plan.phase.name!r} trains on features of a data set that is shuffled anew in each pass, or may be: "
                "after a stop in it their order needn't be the same."
            )
        here = self._here(index)
        jit = bool(getattr(self._model, "jit_compile", False))
        self._phase = {"phase": index, "begun": begun, "words": words, "cached": in_full is None, "jit_compile": jit}
        self._name, self._begun_at = plan.phase.name, time.perf_counter() - self.elapsed(index)
        self._at = (begun, 0)
        if self._folder is not None and self.is_first(index):
            for unkept in self._states.unkept():
                warnings.warn(
                    f"The callback {unkept}, which no checkpoint can keep: after a stop it begins anew there. Give it "
                    "state_dict() and load_state_dict(state).",
                    stacklevel=4,
                )
        if here is not None:
            self._states.prepare(here["callbacks"])
            self._at = (here["place"]["epoch"], here["place"]["batch"])
            if in_full is not None:
                stream.load_state(here["stream"])
        elif in_full is not None:
            in_full.begin()

    def end_phase(self, first: int, count: int) -> None:
        """Looks at the phase once more, and says what looks wrong in it."""
        self._signals.waits = False
        if self._folder is not None and self._signals.received is not None:
            self._signals.stop("the last checkpoint")
        self._guard.look(self._where, {})
        note = self._guard.unchanged()
        self.notes += [*([note] if note else []), *loss_spikes(self._history, first=first, count=count, phase=self._name)]
        if self._here(self._phase["phase"]) is not None:
            self._found = None  # what comes now is new

    def go_back(self) -> None:
        """Gives the model what it had in the last good state."""
        self._guard.go_back()

    # -- what the loop tells

    def place(self) -> Place | None:
        here = self._here(self._phase["phase"])
        if here is None or self._found is None:
            return None
        place = here["place"]
        return Place(place["epoch"], place["batch"], unpack(place["logs"], self._found.arrays))

    def restore(self) -> None:
        found = self._found
        assert found is not None
        assign(self._named(), found.arrays)
        self._spread()
        load_random_state(found.state["random"], found.arrays)
        self._states.load(found.state["callbacks"], found.arrays)
        self._model.stop_training = found.state["stop"]

    def epoch_begun(self) -> None:
        self._signals.waits = True

    def stepped(self, epoch: int, batch: int, logs: Any) -> None:
        steps = batch - self._at[1] if epoch == self._at[0] else batch
        self._at = (epoch, batch)
        self._steps += steps
        self._unsaved += steps
        self._guard.stepped(steps, self._where, logs)
        if self._folder is None:
            if not self._signals.patient:
                self._signals.stop("the chief's last checkpoint")
            return
        if self._signals.received is not None:
            if self._by_epoch:
                self._signals.stop("the beginning of this epoch")
            self._leave(Place(epoch, batch, logs))
        if not self._by_epoch and self._is_due():
            self._save(Place(epoch, batch, logs))

    def epoch_ended(self, epoch: int, logs: Mapping[str, Any]) -> None:
        self._at = (epoch + 1, 0)
        if self._folder is None:
            return
        if self._signals.received is not None:
            self._leave(Place(epoch + 1, 0, logs))
        if self._by_epoch or self._is_due():
            self._save(Place(epoch + 1, 0, logs))

    def _where(self) -> str:
        epoch, batch = self._at
        return (
            f"step {self._steps}, after batch {batch} of epoch {epoch}" if batch else f"step {self._steps}, before epoch {epoch}"
        )

    def _is_due(self) -> bool:
        if self._folder is None or self._folder.busy:
            return False
        if isinstance(self._every, int):
            return self._unsaved >= self._every
        now = time.perf_counter()
        if self._every is not None:
            return now - self._saved >= self._every
        if now < self._next:
            return False
        # What the last one cost is known when it is written.
        return now - self._saved >= (self._cost + self._folder.seconds) / _SHARE

    _cost = 0.0

    # -- saving

    def _named(self) -> list[tuple[str, Any]]:
        model, optimizer = self._trained, self._model.optimizer
        own = {id(variable) for variable in self._own}
        return [
            *named("model", self._own),
            # What is on the model only while a phase runs: LoRA's factors.
            *named("model/added", [variable for variable in self._model.variables if id(variable) not in own]),
            *named("optimizer", optimizer_variables(optimizer)),
            *named("metrics", model.metrics_variables),
            *named("random", self._random),
        ]

    def _save(self, place: Place) -> None:
        assert self._folder is not None
        begun = time.perf_counter()
        if self._read is None:
            variables = self._named()
            self._read = ([name for name, _ in variables], Reader([variable for _, variable in variables]))
        names, reader = self._read
        values = reader()
        arrays: dict[str, Array] = dict(self._starts)
        state = {
            **self._phase,
            "format": _FORMAT,
            "fingerprint": dict(self._fingerprint),
            "environment": _environment(),
            "place": {
                "epoch": place.epoch,
                "batch": place.batch,
                "logs": pack({name: np.asarray(value)[()] for name, value in place.logs.items()}, arrays, "logs"),
            },
            "steps": self._steps,
            "stop": bool(self._model.stop_training),
            "history": self._history,
            "records": [dataclasses.asdict(record) for record in self._records],
            "elapsed": begun - self._begun_at,
            "stream": {} if self._in_full is None else self._in_full.state(),
            "random": random_state(arrays),
            "callbacks": self._states.pack(arrays),
        }
        text = json.dumps(state)  # now: the history goes on while the thread writes

        def make() -> tuple[Mapping[str, Any], Mapping[str, Array]] | None:
            arrays.update(arrays_of(names, values))
            finite = all(is_finite(array) for name, array in arrays.items() if name.startswith("model/"))
            return (json.loads(text), arrays) if finite else None

        self._folder.write(make)
        self._unsaved, self._saved = 0, time.perf_counter()
        self._cost = self._saved - begun

    def _leave(self, place: Place) -> None:
        """Writes a checkpoint and ends the run."""
        assert self._folder is not None
        self._folder.settle()
        self._save(place)
        self._folder.settle(strict=True)
        self._signals.stop(f"step {self._steps}")

    def finish(self, run: Run) -> None:
        """Writes down that the run is finished, and what it gave."""
        if self._folder is None:
            return
        self._folder.settle()
        model = self._model
        state = {
            "format": _FORMAT,
            "fingerprint": dict(self._fingerprint),
            "finished": run.to_dict(),
            "optimizer": _config(model.optimizer),
        }
        variables = [*named("model", model.variables), *named("optimizer", optimizer_variables(model.optimizer))]
        values = Reader([variable for _, variable in variables])()
        arrays = arrays_of([name for name, _ in variables], values)
        self._folder.write(lambda: (state, arrays))
        self._folder.settle(strict=True)


def _environment() -> dict[str, str]:
    return {**environment(), "number of threads": threads()}


def _config(optimizer: Any) -> Any:
    try:
        return json.loads(json.dumps(optimizer.get_config()))
    except (TypeError, ValueError, NotImplementedError):
        return None
