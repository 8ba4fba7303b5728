"""Runs that are stopped and gone on with: the same to the bit as if they had never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import transferkit as tk
from transferkit.errors import PlanError, StorageError, TrainingInterruptedError
from transferkit.tuning.identity import differences

ROWS, SIZE, CLASSES, BATCH = 44, 6, 3, 8


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """A job that a shell runs in the background starts with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stop(BaseException):
    """What stands for the end of the process."""


class Stopping(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    """Ends the run after so many batches, or at the beginning or end of epochs; counts the batches of the whole run."""

    joins_batches = True

    def __init__(self, at: int | None = None, *, hook: str = "batch") -> None:
        super().__init__()
        self.seen, self.at, self.hook = 0, at, hook
        self.epochs: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "epochs": list(self.epochs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.epochs = state["seen"], state["epochs"]

    def _stop(self, hook: str) -> None:
        if self.hook == hook and self.at is not None and self.seen >= self.at:
            raise Stop

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch, logs
        self.seen += 1
        self._stop("batch")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        self.epochs.append(epoch)
        self._stop("epoch")

    def on_test_begin(self, logs: Any = None) -> None:
        del logs
        self._stop("test")


def network(flips: bool = True, activation: str = "relu") -> Any:
    image = keras.Input((SIZE, SIZE, 1))
    x = layers.RandomFlip("horizontal")(image) if flips else image
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Dropout(0.2, name="drop")(x)
    x = layers.Dense(5, activation=activation, name="hidden")(layers.Flatten()(x))
    model = keras.Model(image, layers.Dense(CLASSES, name="head")(layers.Dropout(0.3)(x)))
    for index, weight in enumerate(model.trainable_variables):
        weight.assign(np.random.default_rng(index).normal(size=weight.shape, scale=0.3))
    return model


def rows(seed: int = 0, count: int = ROWS) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, SIZE, SIZE, 1)).astype("float32"), random.integers(0, CLASSES, count)


def rich() -> tk.FineTuner:
    return (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2)
        .phase("top", train=tk.Layers.last(2), epochs=2, learning_rate=3e-3, schedule="cosine")
        .phase("all", train=tk.Layers.all(), epochs=3, learning_rate=1e-3, layer_decay=0.7)
        .mixup(0.3)
        .ema(0.9)
        .early_stopping(1)
    )


def cached() -> tk.FineTuner:
    return (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=2, learning_rate=1e-2)
        .phase("all", train=tk.Layers.all(), epochs=2, learning_rate=1e-3)
        .l2_sp(0.01)
        .swa(0.5)
        .cache(True)
    )


def state_of(model: Any) -> list[Any]:
    return [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def fit(plan: tk.FineTuner, folder: Path | None, *callbacks: Any, model: Any = None, data: Any = None, **arguments: Any) -> Any:
    model = network() if model is None else model
    given: dict[str, Any] = {"validation_data": rows(1, 20), "batch_size": BATCH, "seed": 3, "verbose": 0, **arguments}
    if folder is not None:
        given = {"checkpoint_dir": folder, "resume": True, "save_every": 1, **given}
    return model, plan.fit(model, rows() if data is None else data, callbacks=list(callbacks), **given)


def stopped_and_resumed(
    plan: tk.FineTuner, folder: Path, stops: list[tuple[str, int]], make: Callable[[], Any] = lambda: None, **arguments: Any
) -> tuple[Any, Any, Stopping]:
    """The run, ended at each of the stops and begun again with a fresh model and fresh callbacks."""
    for hook, at in stops:
        with pytest.raises(Stop):
            fit(plan, folder, Stopping(at, hook=hook), data=make(), **arguments)
    last = Stopping()
    model, run = fit(plan, folder, last, data=make(), **arguments)
    return model, run, last


def batches(seed: int | None = 5) -> Any:
    x, y = rows()
    tf.random.set_seed(None)  # a fresh process has none, and a shuffle takes it in
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(ROWS, seed=seed).batch(BATCH)


class Sequence(keras.utils.PyDataset):  # type: ignore[misc, unused-ignore]
    """Shuffles its rows after every epoch, by a generator of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._rows, self._random = rows(), np.random.default_rng(0)
        self._order = np.arange(ROWS)

    def __len__(self) -> int:
        return -(-ROWS // BATCH)

    def __getitem__(self, index: int) -> Any:
        part = self._order[index * BATCH : (index + 1) * BATCH]
        return self._rows[0][part], self._rows[1][part]

    def on_epoch_end(self) -> None:
        self._random.shuffle(self._order)


def small() -> tk.FineTuner:
    return (
        tk.FineTuner()
        .phase("head", train=tk.Layers.head(), epochs=1, learning_rate=1e-2)
        .phase("all", train=tk.Layers.all(), epochs=2, learning_rate=1e-3)
    )


def check(
    plan: tk.FineTuner, folder: Path, stops: list[tuple[str, int]], make: Callable[[], Any] = lambda: None, **more: Any
) -> Any:
    """Asserts that the run with stops is the run without, to the bit; gives the latter."""
    whole = Stopping()
    model, run = fit(plan, None, whole, data=make(), **more)
    again, second, last = stopped_and_resumed(plan, folder, stops, make, **more)
    assert second.history == run.history
    assert [(record.epochs, record.steps) for record in second.phases] == [(record.epochs, record.steps) for record in run.phases]
    assert (last.seen, last.epochs) == (whole.seen, whole.epochs)
    assert same(state_of(again), state_of(model))
    return run


def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path: Path) -> None:
    run = check(rich(), tmp_path, [("batch", 3), ("batch", 26)])
    assert all(record.frozen.startswith("computed in full") for record in run.phases)


@pytest.mark.slow
def test_a_run_that_was_stopped_often_is_the_run_that_was_not(tmp_path: Path) -> None:
    check(rich(), tmp_path, [("batch", 3), ("epoch", 6), ("batch", 13), ("test", 18), ("batch", 26)])


def test_a_stopped_run_on_features_is_the_run_that_was_not(tmp_path: Path) -> None:
    plan, stops = cached(), [("batch", 2), ("epoch", 10)]
    whole = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: None)  # so that each batch is told
    model, run = fit(plan, None, whole, model=network(flips=False))
    assert "computed once" in run.phases[0].frozen
    for hook, at in stops:
        with pytest.raises(Stop):
            fit(plan, tmp_path, Stopping(at, hook=hook), model=network(flips=False))
    again, second = fit(plan, tmp_path, Stopping(), model=network(flips=False))
    assert "computed once" in second.phases[0].frozen
    assert second.history == run.history
    assert same(state_of(again), state_of(model))


def test_a_run_with_factors_goes_on_within_a_phase_that_has_them(tmp_path: Path) -> None:
    check(small().lora(2, layers=tk.Layers.all()), tmp_path, [("batch", 3), ("batch", 8), ("batch", 14)])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Sequence, id="PyDataset", marks=pytest.mark.slow),
        pytest.param(lambda: Sequence(workers=2), id="threads", marks=pytest.mark.slow),
        pytest.param(batches, id="tf.data"),
    ],
)
def test_data_in_batches_goes_on_at_the_batch(make: Callable[[], Any], tmp_path: Path) -> None:
    check(small(), tmp_path, [("batch", 4), ("epoch", 6), ("batch", 15)], make)


@pytest.mark.slow
def test_epochs_that_cut_the_data_go_on_where_they_were(tmp_path: Path) -> None:
    check(
        small(),
        tmp_path,
        [("batch", 3), ("epoch", 4), ("batch", 9)],
        lambda: batches().repeat(),
        steps_per_epoch=4,
    )


def test_features_of_a_reshuffled_data_set_are_said_before_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="features of a data set that is shuffled anew in each pass"), pytest.raises(Stop):
        fit(cached(), tmp_path, Stopping(1), model=network(flips=False), data=batches())


def test_a_data_set_that_gives_other_batches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(4), data=batches(seed=5))
    with pytest.raises(StorageError, match="a data set that gives other batches than it gave"):
        fit(small(), tmp_path, data=batches(seed=6))


@pytest.mark.slow
def test_a_generator_goes_on_from_an_epoch_and_it_is_said(tmp_path: Path) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield from batches()

    with pytest.warns(UserWarning, match="goes on from the beginning of an epoch: the data is a generator"), pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(6), data=endless(), steps_per_epoch=4)
    last = Stopping()
    with pytest.warns(UserWarning, match="beginning of an epoch"):
        _, run = fit(small(), tmp_path, last, data=endless(), steps_per_epoch=4)
    assert last.seen == 12
    assert run.phases[1].steps == 8


def test_an_unseeded_shuffle_is_said_before_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the data is a data set that is shuffled without a seed"), pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(1), data=batches(seed=None))


def test_a_finished_run_gives_its_result_at_once(tmp_path: Path) -> None:
    model, run = fit(small(), tmp_path)
    counted = Stopping()
    again, second = fit(small(), tmp_path, counted)
    assert counted.seen == 0
    assert second == run
    assert same(state_of(again), state_of(model))


def test_what_differs_is_said_and_nothing_is_changed(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(3))
    model = network()
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(StorageError) as caught:
        fit(small().ema(0.9), tmp_path, model=model, data=(rows(7)), seed=4, batch_size=4)
    text = str(caught.value)
    for word in (
        "epochs=2, learning_rate=0.001) there",
        ".ema(0.9) here",
        "another training data: 44 rows",
        "seed: 3 there, 4 here",
    ):
        assert word in text
    assert "another batch_size: 8 there, 4 here" in text
    assert same(before, [variable.numpy() for variable in model.variables])
    with pytest.raises(StorageError, match="a run that is under way there"):
        fit(small(), tmp_path, resume=False)
    with pytest.raises(StorageError, match=r"setting of a layer: … .*activation=relu.* there, … .*activation=tanh.* here"):
        fit(small(), tmp_path, model=network(activation="tanh"))


def test_a_model_that_looks_up_other_words_goes_on_with_no_run(tmp_path: Path) -> None:
    """No weight and no setting tells the words that a layer was adapted to."""

    def reader(words: list[str]) -> Any:
        text = keras.Input((1,), dtype="string")
        look_up = layers.TextVectorization(output_sequence_length=1)
        look_up.adapt(tf.constant(words))
        x = layers.Flatten()(layers.Embedding(8, 3)(look_up(text)))
        return keras.Model(text, layers.Dense(CLASSES, name="head")(x))

    texts = tf.data.Dataset.from_tensor_slices((np.array([["a"], ["b"], ["c"]] * 4), np.arange(12) % CLASSES)).batch(4)
    with pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(3), model=reader(["a", "b"]), data=texts, validation_data=None)
    with pytest.raises(StorageError, match=r"another vocabulary: 4 words, .* there, 4 words, .* here"):
        fit(small(), tmp_path, model=reader(["b", "c"]), data=texts, validation_data=None)
    fit(small(), tmp_path, model=reader(["a", "b"]), data=texts, validation_data=None)


def test_a_run_stopped_after_its_last_step_is_said_to_have_changed_its_weights(tmp_path: Path) -> None:
    counted = Stopping()
    model, _ = fit(small(), None, counted)
    with pytest.raises(SystemExit):
        fit(small(), tmp_path, Signalling(signal.SIGTERM, counted.seen, hook="test"), save_every=None)
    again, run = fit(small(), tmp_path, save_every=None)
    assert not any("changed no weight" in note for note in run.notes)
    assert same(state_of(again), state_of(model))


def test_rows_set_apart_otherwise_are_told_by_what_sets_them_apart() -> None:
    before = {"seed": "3", "validation_share": "0.25", "training data": "one", "validation data": "two"}
    other_rows = {"training data": "three", "validation data": "four"}
    assert differences(before, {**before, **other_rows, "seed": "4"}) == ["another seed: 3 there, 4 here"]
    assert differences(before, {**before, **other_rows, "validation_share": "0.2"}) == [
        "another validation_share: 0.25 there, 0.2 here"
    ]
    assert len(differences(before, {**before, **other_rows})) == 2
    without = {**before, "validation_share": "None"}
    assert len(differences(without, {**without, **other_rows, "seed": "4"})) == 3


def test_a_run_that_goes_on_with_other_threads_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(3))
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "77")
    with pytest.warns(UserWarning, match="another number of threads: [0-9]+ there, 77 here"):
        _, run = fit(small(), tmp_path)
    assert any("number of threads" in note for note in run.notes)


def test_a_loss_scale_goes_on(tmp_path: Path) -> None:
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=64.0, dynamic_growth_steps=3)
    plan = small().optimizer(scaled)
    model, _ = fit(plan, None)
    again, _, _ = stopped_and_resumed(plan, tmp_path, [("batch", 8)])
    assert float(again.optimizer.dynamic_scale.numpy()) == float(model.optimizer.dynamic_scale.numpy()) > 64.0
    assert same(state_of(again), state_of(model))


def test_a_recipe_over_a_folder_of_pictures_goes_on(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "pictures" / f"class{number % CLASSES}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(random.integers(0, 255, (SIZE, SIZE, 1), dtype="uint8")).numpy())
    data = tk.Data.image_folder(tmp_path / "pictures", size=(SIZE, SIZE), channels=1)
    recipe = tk.Recipe(network, tuner=small(), evaluator=tk.Evaluator("loss"))
    given: dict[str, Any] = {"test_data": data, "batch_size": 4, "verbose": 0}
    whole = recipe.run(data, seed=5, **given)
    with pytest.raises(Stop):
        recipe.run(data, seed=5, callbacks=[Stopping(5)], checkpoint_dir=tmp_path / "run", save_every=1, **given)
    again = recipe.run(data, checkpoint_dir=tmp_path / "run", resume=True, callbacks=[Stopping()], **given)
    assert (again.run.history, again.run.seed) == (whole.run.history, 5)
    assert same(state_of(again.model), state_of(whole.model))
    assert again.evaluation is not None
    assert whole.evaluation is not None
    assert again.evaluation["loss"].value == whole.evaluation["loss"].value


@pytest.mark.slow
def test_the_seed_that_was_drawn_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(3), seed=None)
    _, run = fit(small(), tmp_path, seed=None)
    with pytest.raises(StorageError, match="another seed"):
        fit(small(), tmp_path, seed=run.seed + 1)


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for arguments in ({"save_every": 0}, {"save_every": True}, {"keep_checkpoints": 0}, {"checkpoint_dir": None}):
        with pytest.raises(PlanError, match="Keeping checkpoints of a run"):
            fit(small(), tmp_path, **arguments)


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    model, run = fit(small(), None)
    with pytest.raises(Stop):
        fit(small(), tmp_path, Stopping(14))
    files = sorted(tmp_path.glob("checkpoint-*"))
    assert len(files) == 3
    files[-1].write_bytes(files[-1].read_bytes()[:1000])
    content = bytearray(files[-2].read_bytes())
    content[-10] ^= 1
    files[-2].write_bytes(content)
    with pytest.warns(UserWarning, match="A damaged checkpoint was passed over") as said:
        again, second = fit(small(), tmp_path)
    assert sum("A damaged checkpoint" in str(warning.message) for warning in said) == 2
    assert second.history == run.history
    assert same(state_of(again), state_of(model))


def test_a_folder_of_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001.safetensors").write_bytes(b"no")
    with pytest.raises(StorageError, match="start anew in another folder"):
        fit(small(), tmp_path)


def test_a_full_disk_is_said_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transferkit.tuning import checkpoint

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("Writing.", found="No space left on device")

    monkeypatch.setattr(checkpoint, "write_flat", full)
    with pytest.warns(UserWarning, match="couldn't be written, and training goes on"), pytest.raises(StorageError):
        fit(small(), tmp_path)  # only the result must be written


class Counting(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    """State in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.best: Any = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        del batch
        self.losses.append(float(logs["loss"]))
        self.best = np.minimum(self.losses[-1], np.inf if self.best is None else self.best)


def keras_callbacks(folder: Path) -> list[Any]:
    return [
        keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=0, factor=0.5, min_delta=0.1),
        keras.callbacks.ModelCheckpoint(folder / "best.weights.h5", save_best_only=True, save_weights_only=True),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        keras.callbacks.TensorBoard(folder / "tb", update_freq=1),
        Counting(),
    ]


@pytest.mark.slow
def test_callbacks_keep_their_state(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plan = tk.FineTuner().phase("all", train=tk.Layers.all(), epochs=6, learning_rate=0.05)
    whole = keras_callbacks(tmp_path / "a")
    model, run = fit(plan, None, *whole)
    for at in (4, 8, 11):
        killed = keras_callbacks(tmp_path / "b")
        with pytest.raises(Stop):
            fit(plan, tmp_path / "run", *killed, Stopping(at))
        killed[3].csv_file.close()
    again = keras_callbacks(tmp_path / "b")
    other, second = fit(plan, tmp_path / "run", *again, Stopping())
    assert second.history == run.history
    for name in ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter", "losses", "_global_train_batch"):
        for one, two in zip(whole, again, strict=True):
            assert getattr(one, name, None) == getattr(two, name, None), name
    assert (tmp_path / "a" / "log.csv").read_text() == (tmp_path / "b" / "log.csv").read_text()
    assert same(state_of(other), state_of(model))
    best = [network(), network()]
    for folder, loaded in zip("ab", best, strict=True):
        loaded.load_weights(tmp_path / folder / "best.weights.h5")
    assert same(best[0].get_weights(), best[1].get_weights())


class Unkeepable(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    """Holds what no file can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = iter(())


def test_a_callback_that_cant_be_kept_is_said_before_training(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"The callback Unkeepable holds lock \(tuple_iterator\)"), pytest.raises(Stop):
        fit(small(), tmp_path, Unkeepable(), Stopping(1))


def test_two_runs_in_one_folder_are_one_error(tmp_path: Path) -> None:
    class Second(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
        def on_train_begin(self, logs: Any = None) -> None:
            del logs
            with pytest.raises(StorageError, match="so that no other run writes there"):
                fit(small(), tmp_path)

    fit(small(), tmp_path, Second())


@pytest.mark.slow
def test_two_processes_in_one_folder_are_one_error(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r}); import test_resuming as t; t.fit(t.small(), {str(tmp_path)!r})"
    told: list[Any] = []

    class Second(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
        def on_train_begin(self, logs: Any = None) -> None:
            del logs
            told.append(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False))

    model, _ = fit(small(), tmp_path, Second())
    assert told[0].returncode == 1
    assert told[0].stderr.count("StorageError: ") == 1
    assert "so that no other run writes there" in told[0].stderr
    assert same(state_of(model), state_of(fit(small(), None)[0]))


# Signals


class Signalling(Stopping):
    """Sends itself a signal after so many batches, or before a test."""

    def __init__(self, number: int, at: int, *, hook: str = "batch", times: int = 1) -> None:
        super().__init__(at, hook=hook)
        self._number, self._times = number, times

    def _stop(self, hook: str) -> None:
        if self.hook == hook and self.at == self.seen:
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(
    ("number", "hook"),
    [
        (signal.SIGTERM, "batch"),
        pytest.param(signal.SIGTERM, "test", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "batch", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "test", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on(number: int, hook: str, tmp_path: Path) -> None:
    model, run = fit(small(), None)
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterruptedError if number == signal.SIGINT else SystemExit) as caught:
        fit(
            small(),
            tmp_path,
            Signalling(number, 6 if hook == "test" else 8, hook=hook),
            save_every=None if hook == "batch" else 1,
        )
    assert signal.getsignal(number) is before
    if number == signal.SIGTERM:
        assert isinstance(caught.value, SystemExit)
        assert caught.value.code == 75
    else:
        assert isinstance(caught.value, KeyboardInterrupt)
        assert "resume=True" in str(caught.value)
    again, second = fit(small(), tmp_path, save_every=None if hook == "batch" else 1)
    assert second.history == run.history
    assert same(state_of(again), state_of(model))


@pytest.mark.slow
def test_sigterm_in_each_phase_ends_a_run_that_goes_on(tmp_path: Path) -> None:
    model, run = fit(rich(), None, Stopping())
    assert [phase.steps for phase in run.phases][:2] == [12, 12]
    for at in (3, 15, 27):
        with pytest.raises(SystemExit) as caught:
            fit(rich(), tmp_path, Signalling(signal.SIGTERM, at), save_every=None)
        assert caught.value.code == 75
    again, second = fit(rich(), tmp_path, Stopping(), save_every=None)
    assert second.history == run.history
    assert [phase.steps for phase in second.phases] == [phase.steps for phase in run.phases]
    assert same(state_of(again), state_of(model))


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(small(), tmp_path, Signalling(signal.SIGINT, 8, times=2))
    assert not isinstance(caught.value, TrainingInterruptedError)


def test_signals_are_left_alone_without_a_folder() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(small(), None, Signalling(signal.SIGINT, 8))
    assert not isinstance(caught.value, TrainingInterruptedError)
