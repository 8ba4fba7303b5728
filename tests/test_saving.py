"""Files we write: read back by us and by plain Keras, whole or not at all, and damage noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import weights_files as files
from keras import layers

from transferkit.__main__ import main
from transferkit.errors import StorageError, TransferKitError
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
