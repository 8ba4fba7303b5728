"""Each kind of file the library writes, and those of Keras, as `crashing.Kind`s: a version's number fills all weights."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from crashing import Kind

import transferkit as tk
from transferkit.storage import write_text
from transferkit.tuning.checkpoint import CheckpointFolder
from transferkit.tuning.feature_store import FeatureStore

__all__ = ["kinds"]


@functools.cache
def network(purpose: str) -> Any:
    """About a megabyte of weights in six arrays, and an optimizer; made when it is first used."""
    del purpose
    model = keras.Sequential(
        [keras.Input((300,)), keras.layers.Dense(600, "relu"), keras.layers.Dense(100), keras.layers.Dense(10, name="head")]
    )
    model.compile("sgd", "mse")
    return model


def _filled(model: Any, version: int) -> Any:
    for variable in model.variables:
        variable.assign(np.full(variable.shape, version, variable.dtype))
    return model


def _version(model: Any) -> int:
    values = {float(value) for variable in model.weights for value in np.unique(variable.numpy())}
    (value,) = values  # raises where a file is mixed of two versions
    return int(value)


def kinds(*, of_keras: bool = False) -> list[Kind]:
    """The kinds of files; with `of_keras` those of Keras's own savers."""

    def saving(save: Callable[[Any, Any], object]) -> Callable[[Path, int], object]:
        return lambda path, version: save(_filled(network("saved"), version), path)

    def weights(path: Path) -> int:
        tk.WeightLoader(path).load(network("read"))
        return _version(network("read"))

    def plain_weights(path: Path) -> int:
        network("read").load_weights(path)
        return _version(network("read"))

    if of_keras:

        def plain_model(path: Path) -> int:
            return _version(keras.saving.load_model(path, compile=False))

        return [
            Kind("model.save .keras", saving(lambda m, path: m.save(path)), plain_model, "m.keras"),
            Kind("model.save .h5", saving(lambda m, path: m.save(path)), plain_model, "m.h5"),
            Kind("model.save_weights .weights.h5", saving(lambda m, path: m.save_weights(path)), plain_weights, "m.weights.h5"),
        ]

    def whole(path: Path) -> int:
        return _version(tk.open_model(path, trusted=True))

    def text(path: Path, version: int) -> None:
        write_text(path, f"<!-- {version} -->" * 20_000)

    return [
        *(
            Kind(f"save_weights {ending}", saving(tk.save_weights), weights, f"w{ending}", crashes=ending == ".weights.h5")
            for ending in (".weights.h5", ".h5", ".safetensors", ".npz")
        ),
        Kind("save_model .keras", saving(tk.save_model), whole, "m.keras"),
        Kind("save_model .h5", saving(tk.save_model), whole, "m.h5", crashes=True),
        Kind("a page or table", text, _version_of_text, "report.html"),
        Kind("features", _keep_features, _version_of_features, "features"),
        Kind("checkpoints", _keep_checkpoint, _version_of_checkpoint, "checkpoints"),
    ]


def _version_of_text(path: Path) -> int:
    (said,) = set(path.read_text().removesuffix("-->").split("-->"))
    assert path.read_text() == f"{said}-->" * 20_000
    return int(said.removeprefix("<!-- "))


def _key(version: int) -> str:
    return f"{version:064d}"


def _keep_features(path: Path, version: int) -> None:
    store = FeatureStore(path)
    with store.writer(2) as writer:
        for _ in range(5):
            writer.append([np.full(2_000, version), np.full(2_000, version, "float32")])
        store.keep(writer, _key(version))


def _version_of_features(path: Path) -> int:
    """Entries are added, not replaced: the last one, whole, and the one before it."""
    store = FeatureStore(path)
    versions = sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdigit())
    for version in versions:
        entry = store.open(_key(version))
        assert entry is not None
        assert entry.files[0].view(np.int64).tolist() == [version] * 10_000
        assert set(entry.files[1].view(np.float32).tolist()) == {float(version)}
    for version in versions[:-2]:
        shutil.rmtree(path / _key(version))
    return versions[-1]


def _keep_checkpoint(path: Path, version: int) -> None:
    path.mkdir(exist_ok=True)
    # By its own hand rather than its thread's, which nothing could stop at a call to the system.
    CheckpointFolder(path, keep=2)._write(version, lambda: ({"version": version}, {"a": np.full(200_000, version, "float32")}))


def _version_of_checkpoint(path: Path) -> int:
    newest = CheckpointFolder(path, keep=2).newest()
    assert newest is not None
    assert set(newest.arrays["a"].tolist()) == {float(newest.state["version"])}
    return int(newest.state["version"])
