"""What a run tells while it runs: a line for each epoch, a curve in a notebook, figures for TensorBoard.

All see one training over all phases, with one axis of epochs and one of optimizer steps. May import Keras and the floors below.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transferkit._keras import keras, tf
from transferkit.errors import MissingExtraError
from transferkit.tuning.figures import figure, figure_text

__all__ = ["LiveCurve", "Progress", "TensorBoardLogs"]


def _rate(model: Any) -> float:
    return float(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(model.optimizer.learning_rate)))


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Progress(keras.callbacks.Callback):
    """Prints a line for each epoch: the phase, the learning rate, the figures, and how long the rest may take at most.

    Args:
        phases: Names of the phases and their epochs at most, in order.
        write: Where a line goes; printed where nothing is given.
    """

    def __init__(self, phases: Sequence[tuple[str, int]], *, write: Callable[[str], Any] = print) -> None:
        super().__init__()
        self._phases = list(phases)
        self._write = write
        self._phase = 0
        self._first = 0
        self._started = 0.0
        self._seconds: list[float] = []

    def begin_phase(self, index: int, *, epoch: int) -> None:
        """Says which phase comes now, and the number of its first epoch on the run's axis."""
        self._phase, self._first, self._seconds = index, epoch, []

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: how long the phase's epochs took."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._seconds = list(state["seconds"])

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._seconds.append(time.perf_counter() - self._started)
        name, planned = self._phases[self._phase]
        done = epoch - self._first + 1
        left = planned - done + sum(epochs for _, epochs in self._phases[self._phase + 1 :])
        # The first epoch of a phase compiles the step; later ones tell the pace.
        pace = self._seconds[1:] or self._seconds
        figures = "  ".join(f"{key} {figure_text(value)}" for key, value in (logs or {}).items() if key != "learning_rate")
        rest = f"  at most {_duration(left * sum(pace) / len(pace))} left" if left else ""
        self._write(f"{name} {done}/{planned}  rate {_rate(self.model):.3g}  {figures}{rest}")


class TensorBoardLogs(keras.callbacks.Callback):
    """Writes figures for TensorBoard, all over the optimizer's steps: one axis for all phases.

    Args:
        folder: Where; `train` and `validation` are made in it.

    Raises:
        MissingExtraError: when TensorBoard isn't installed.
    """

    #: Counts batches, and is content to hear of many at once.
    joins_batches = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            import tensorboard  # noqa: F401  # tf.summary needs it, and says so only when it writes
        except ImportError as error:
            raise MissingExtraError.of("Logging for TensorBoard", package="tensorboard", extra="tensorboard") from error
        self._folder = Path(folder)
        self._writers: dict[str, Any] = {}
        self._step = 0
        self._batches = 0

    def _write(self, name: str, figures: Mapping[str, float]) -> None:
        if figures:
            if name not in self._writers:
                self._writers[name] = tf.summary.create_file_writer(str(self._folder / name))
            with self._writers[name].as_default():
                for key, value in figures.items():
                    tf.summary.scalar(key, value, step=self._step)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del logs
        self._batches = batch + 1

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self._batches = 0

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._step += self._batches
        figures: dict[str, float] = {}
        for key, value in (logs or {}).items():
            given = figure(value)
            parts = {f"{key}/{number}": part for number, part in enumerate(given)} if isinstance(given, list) else {key: given}
            figures.update(parts)
        own = {key: value for key, value in figures.items() if not key.startswith("val_")}
        self._write("train", {**own, "learning_rate": _rate(self.model), "epoch": float(epoch)})
        self._write("validation", {key[4:]: value for key, value in figures.items() if key.startswith("val_")})
        for writer in self._writers.values():
            writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        del logs
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


class LiveCurve(keras.callbacks.Callback):
    """Draws the curves of a run in a notebook, again after each epoch; give it to `fit(callbacks=[LiveCurve()])`.

    Args:
        monitor: Which figures; the loss and its validation where nothing is said.
        show: Takes the matplotlib figure; where nothing is given, the notebook's display.

    Raises:
        MissingExtraError: when matplotlib isn't installed.
    """

    def __init__(self, *monitor: str, show: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError.of("LiveCurve", package="matplotlib", extra="plots") from error
        self._make_figure = Figure
        self._monitor = monitor or ("loss", "val_loss")
        self._show = show or _notebook_display()
        self._history: dict[str, list[Any]] = {}

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        del epoch
        for key, value in (logs or {}).items():
            self._history.setdefault(key, []).append(figure(value))
        picture = self._make_figure(figsize=(6, 3.5), layout="constrained")
        axes = picture.add_subplot()
        for key in self._monitor:
            if key in self._history:
                axes.plot(range(1, len(self._history[key]) + 1), self._history[key], marker="o", label=key)
        axes.set_xlabel("epoch")
        axes.legend()
        self._show(picture)


def _notebook_display() -> Callable[[Any], Any]:
    """Puts a figure in the place of the one before; does nothing outside a notebook."""
    try:
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return lambda _: None
    handles: list[Any] = []

    def show(figure: Any) -> None:
        if handles:
            handles[0].update(figure)
        else:
            handle = display(figure, display_id=True)
            if handle is not None:
                handles.append(handle)

    return show
