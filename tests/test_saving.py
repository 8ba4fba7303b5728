"""Files we write: read back by us and by plain Keras, whole or not at all, and damage noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import weights_files as files
from keras import layers

import transferkit as tk
from transferkit import errors
from transferkit.__main__ import main
from transferkit.errors import ModelError, StorageError, TransferKitError
from transferkit.weights.loader import WeightLoader
from transferkit.weights.readers import open_archive
from transferkit.weights.saving import save_weights
from transferkit.weights.writing import convert_weights

FORMATS = ["w.weights.h5", "w.h5", "w.safetensors", "w.npz"]


def net() -> Any:
    inner = keras.Input((6, 6, 3))
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="stem")(inner))
    base = keras.Model(inner, x, name="base")
    start = keras.Input((6, 6, 3))
    x = layers.Reshape((16, 4))(base(start))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="bi")(x)
    x = layers.MultiHeadAttention(1, 2, name="attention")(x, x)
    x = layers.TimeDistributed(layers.Dense(2), name="each")(x)
    return keras.Model(start, layers.Dense(2, name="out")(layers.Flatten()(x)), name="net")


def scrambled() -> Any:
    model = net()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 1, variable.shape))
    return model


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(one.weights, other.weights, strict=True))


@pytest.mark.parametrize("file", FORMATS)
def test_what_we_write_we_and_plain_keras_read(tmp_path: Path, file: str) -> None:
    saved = scrambled()
    saved.get_layer("base").get_layer("bn").trainable = False
    written = save_weights(saved, tmp_path / file, class_names=["ant", "bee"])
    assert written.arrays == len(saved.weights)
    assert written.nbytes == sum(v.numpy().nbytes for v in saved.weights)
    model = net()
    assert WeightLoader(tmp_path / file).load(model).verify(saved).ok
    assert same(model, saved)
    with open_archive(tmp_path / file) as archive:
        assert archive.class_names == ("ant", "bee")
    if file.endswith(".h5"):
        saved.get_layer("base").get_layer("bn").trainable = True
        save_weights(saved, tmp_path / file)
        plain = net()
        plain.load_weights(tmp_path / file)
        assert same(plain, saved)


@pytest.mark.parametrize("file", FORMATS)
def test_a_flipped_bit_is_noticed(tmp_path: Path, file: str) -> None:
    saved = scrambled()
    save_weights(saved, tmp_path / file)
    raw = bytearray((tmp_path / file).read_bytes())
    kernel = saved.get_layer("out").kernel.numpy().tobytes()
    at = raw.find(kernel)
    assert at > 0
    raw[at + 5] ^= 1
    (tmp_path / file).write_bytes(raw)
    model = net()
    with pytest.raises(TransferKitError):
        WeightLoader(tmp_path / file).load(model)


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in FORMATS:
        save_weights(scrambled(), tmp_path / file)
    before = {file: (tmp_path / file).read_bytes() for file in FORMATS}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for file in FORMATS:
        with pytest.raises(StorageError, match="the old file, if there was one, is untouched"):
            save_weights(scrambled(), tmp_path / file)
    assert {file: (tmp_path / file).read_bytes() for file in FORMATS} == before
    assert sorted(os.listdir(tmp_path)) == sorted(FORMATS)


def test_an_ending_that_names_no_format(tmp_path: Path) -> None:
    path = str(tmp_path / "w.bin")
    with pytest.raises(StorageError) as caught:
        save_weights(scrambled(), path)
    assert str(caught.value) == (
        f"Writing weights to {path!r}.\n"
        "  found: no format known by the ending of 'w.bin'\n"
        "  to fix it: end it with .weights.h5, .h5, .safetensors or .npz"
    )


def test_conversion_keeps_every_value(tmp_path: Path) -> None:
    saved = scrambled()
    save_weights(saved, tmp_path / "w.weights.h5")
    for file in ("a.npz", "b.safetensors", "c.h5"):
        convert_weights(tmp_path / "w.weights.h5", tmp_path / file)
        model = net()
        WeightLoader(tmp_path / file).load(model)
        assert same(model, saved)
    with pytest.raises(StorageError, match="follows the model's attributes"):
        convert_weights(tmp_path / "w.weights.h5", tmp_path / "d.weights.h5")


def test_many_layers_outgrow_one_attribute(tmp_path: Path) -> None:
    arrays = {f"layer_with_a_long_name_{i:05d}/kernel": np.full(2, i, "float32") for i in range(3000)}
    files.save_arrays(tmp_path / "w.npz", arrays)
    convert_weights(tmp_path / "w.npz", tmp_path / "w.h5")
    with open_archive(tmp_path / "w.h5") as archive:
        assert len(archive.layers) == 3000
        assert archive.read("layer_with_a_long_name_02999/kernel").tolist() == [2999, 2999]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = keras.Sequential([keras.Input((3,)), layers.Dense(4, name="a"), layers.Dense(2, name="b")])
    saved.save(tmp_path / "model.keras")
    save_weights(saved, tmp_path / "w.npz")
    assert main(["match", str(tmp_path / "w.npz"), str(tmp_path / "model.keras")]) == 0
    assert "parameters (100.0%)" in capsys.readouterr().out
    assert main(["match", str(tmp_path / "w.npz"), str(tmp_path / "model.keras"), "--skip", "nothing/*"]) == 1
    assert main(["match", str(tmp_path / "w.npz"), str(tmp_path / "model.keras"), "--map", "x"]) == 2
    assert main(["convert", str(tmp_path / "w.npz"), str(tmp_path / "w.safetensors")]) == 0
    assert "safetensors, " in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "none.npz"), str(tmp_path / "w.safetensors")]) == 2


def test_converting_needs_no_tensorflow(tmp_path: Path) -> None:
    files.save_arrays(tmp_path / "w.npz", {"a/kernel": np.ones(3, "float32")})
    program = (
        "import sys; from transferkit.__main__ import main; "
        f"main(['convert', {str(tmp_path / 'w.npz')!r}, {str(tmp_path / 'w.safetensors')!r}]); "
        "print('tensorflow' in sys.modules, 'keras' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("file", ["m.keras", "m.h5"])
def test_a_whole_model_is_saved_with_its_optimizer_and_read_by_plain_keras(tmp_path: Path, file: str) -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(9), layers.BatchNormalization(), layers.Dense(2, name="out")])
    model.compile("adam", keras.losses.MeanSquaredError())  # plain Keras doesn't find "mse" again in an .h5
    model.fit(np.ones((2, 3)), np.zeros((2, 2)), verbose=0)
    written = tk.save_model(model, tmp_path / file)
    assert (written.arrays, written.format) == (len(model.weights), file.removeprefix("m."))
    assert same(tk.open_model(tmp_path / file), model)
    plain = keras.saving.load_model(tmp_path / file)
    assert same(plain, model)
    assert int(plain.optimizer.iterations) == 1
    assert os.listdir(tmp_path) == [file]
    raw = bytearray((tmp_path / file).read_bytes())
    raw[raw.find(model.get_layer("out").kernel.numpy().tobytes()) + 5] ^= 1
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(TransferKitError):
        tk.open_model(tmp_path / file)


def test_what_is_lost_in_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 puts writing off, and h5py only prints what fails when an object goes: the file looks whole and holds zeros."""
    model = scrambled()
    plainly = type(model).save_weights

    def forgetful(self: Any, path: Any, **options: Any) -> None:
        plainly(self, path, **options)
        with h5py.File(path, "r+") as file:
            file["layers/dense/vars/0"][...] = 0

    monkeypatch.setattr(type(model), "save_weights", forgetful)
    (tmp_path / "w.weights.h5").write_text("old")
    with pytest.raises(StorageError) as caught:
        save_weights(model, tmp_path / "w.weights.h5")
    assert str(caught.value) == (
        f"Writing weights to {str(tmp_path / 'w.weights.h5')!r}.\n"
        "  found: the file read back isn't what was written: without the values of 'out/kernel'; "
        "the old file, if there was one, is untouched\n"
        "  likely cause: the disk is full, or the disk or the memory is failing\n"
        "  to fix it: free some space, or write to another disk"
    )
    assert (tmp_path / "w.weights.h5").read_text() == "old"


def test_models_that_cannot_be_saved_say_why(tmp_path: Path) -> None:
    class Unwritable(keras.layers.Layer):  # type: ignore[misc, unused-ignore]
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def call(self, x: Any) -> Any:
            return self.function(x)

    model = keras.Sequential([keras.Input((3,)), Unwritable(lambda x: x)])
    with pytest.raises(ModelError, match="a layer whose settings Keras can't write down"):
        tk.save_model(model, tmp_path / "m.keras")
    with pytest.raises(ModelError, match="isn't built"):
        tk.save_model(keras.Sequential([keras.layers.Dense(3)]), tmp_path / "m.keras")
    with pytest.raises(StorageError, match=r"no format of whole models known by the ending of 'm\.pb'"):
        tk.save_model(scrambled(), tmp_path / "m.pb")
    assert os.listdir(tmp_path) == []


def test_bfloat16_is_kept_and_checked(tmp_path: Path) -> None:
    layers = [keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")]
    model = keras.Sequential(layers)
    for file in ("w.weights.h5", "w.safetensors"):
        save_weights(model, tmp_path / file)
        other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
        WeightLoader(tmp_path / file).load(other)
        assert all(
            np.array_equal(a.numpy().view("u2"), b.numpy().view("u2")) for a, b in zip(model.weights, other.weights, strict=True)
        )
    tk.save_model(model, tmp_path / "m.keras")
    with pytest.raises(StorageError, match=r"weights of type bfloat16, which .h5 can't hold"):
        tk.save_model(model, tmp_path / "m.h5")


_CLASSES = ["ants", "bees"]


def _insects(names: list[str]) -> Any:
    return tk.ModelBuilder((4,)).dense(5, "relu").classifier(names).build(seed=0)


@pytest.mark.parametrize("name", ["whole.keras", "whole.h5", "w.weights.h5", "w.h5", "w.safetensors", "w.npz"])
def test_class_names_go_with_the_model(tmp_path: Path, name: str) -> None:
    x, y = np.random.default_rng(0).normal(size=(12, 4)).astype("float32"), np.arange(12) % 2
    path, model = tmp_path / name, _insects(_CLASSES)
    if name.startswith("whole"):
        tk.save_model(model, path)
        opened = tk.open_model(path)
        np.testing.assert_array_equal(keras.saving.load_model(path).predict(x, verbose=0), model.predict(x, verbose=0))
    else:
        tk.save_weights(model, path)
        opened = tk.ModelBuilder((4,)).dense(5, "relu").classifier(2).build(seed=1)
        tk.WeightLoader(path).load(opened)
    with open_archive(path) as archive:
        assert archive.class_names == tuple(_CLASSES)
    turned = tk.Data.arrays(x, y, class_names=_CLASSES[::-1])
    with pytest.raises(errors.DataError, match="the same classes in another order"):
        tk.Evaluator("accuracy").run(opened, turned)
    other = _insects(_CLASSES[::-1])
    before = other.get_weights()
    with pytest.raises(
        errors.MatchError, match=r"another order: 'ants', 'bees' in the file, 'bees', 'ants' in the model"
    ) as told:
        tk.WeightLoader(path).load(other)
    assert "classes(target=['bees', 'ants'])" in str(told.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, other.get_weights(), strict=True))
    tk.WeightLoader(path).classes(target=_CLASSES[::-1]).load(other)
    np.testing.assert_array_equal(other.predict(x, verbose=0)[:, ::-1], model.predict(x, verbose=0))


def test_other_class_names_than_the_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match="stand for"):
        tk.save_weights(_insects(_CLASSES), tmp_path / "w.safetensors", class_names=_CLASSES[::-1])
    assert not any(tmp_path.iterdir())
