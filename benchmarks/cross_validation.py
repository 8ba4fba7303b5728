"""Claim: cross-validating a frozen backbone with a new head takes a fraction of the time of the same folds by plain `fit`.

MobileNet (alpha 0.25) on the photos of a folder with one folder for each class; the head trains. Plain Keras trains the same
models on the same batches of the same folds; each fold's accuracy is asserted to be the same before any time is printed.

    python benchmarks/cross_validation.py result.json photos/ backbone_no_top.h5
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import transferkit as tk
from transferkit.data import batches
from transferkit.evaluation.folds import folds
from transferkit.selection.cross_validation import fold_seed
from transferkit.tuning.feeding import epoch_order

SIDE, EPOCHS, RATE, BATCH, FOLDS, REPEATS, SEED = 224, 10, 3e-3, 32, 5, 2, 0


def recipe_of(weights: str, classes: tuple[str, ...]) -> tk.Recipe:
    builder = tk.ModelBuilder((SIDE, SIDE, 3)).backbone("MobileNet", alpha=0.25, weights=weights).pool().classifier(classes)
    tuner = tk.FineTuner().phase("head", train=tk.Layers.head(), epochs=EPOCHS, learning_rate=RATE)
    return tk.Recipe(builder, tuner=tuner, evaluator=tk.Evaluator("accuracy", "loss", "auc"))


def plain_fold(recipe: tk.Recipe, x: Any, y: Any, fold: Any) -> tuple[float, float]:
    """The accuracy on the fold by Keras's own `fit`, and the seconds it took."""
    seed = fold_seed(SEED, fold)
    started = time.perf_counter()
    model, _ = recipe.make(None, seed=seed)
    for layer in model.layers[:-1]:
        layer.trainable = False
    model.compile(keras.optimizers.Adam(RATE), "sparse_categorical_crossentropy", metrics=["accuracy"])
    x_train, y_train = x[fold.train], y[fold.train]
    for epoch in range(EPOCHS):
        order = epoch_order(len(x_train), seed=seed, epoch=epoch)
        model.fit(x_train[order], y_train[order], batch_size=BATCH, shuffle=False, verbose=0)
    accuracy = model.evaluate(x[fold.test], y[fold.test], verbose=0)[1]
    return float(accuracy), time.perf_counter() - started


def main(target: str, folder: str, weights: str) -> None:
    photos = tk.Data.image_folder(folder, size=(SIDE, SIDE))
    read = list(batches(photos, batch_size=64))
    x, y = np.concatenate([batch.x for batch in read]), np.asarray(photos.labels)
    recipe = recipe_of(weights, photos.class_names)
    dealt = folds(len(y), FOLDS, labels=y, repeats=REPEATS, seed=SEED)
    started = time.perf_counter()
    found = tk.cross_validate(recipe, (x, y), folds=FOLDS, repeats=REPEATS, batch_size=BATCH, seed=SEED)
    seconds = time.perf_counter() - started
    plain = [plain_fold(recipe, x, y, fold) for fold in dealt]
    for (accuracy, _), ours in zip(plain, found.scores["accuracy"], strict=True):
        assert abs(accuracy - ours) < 1e-6, (accuracy, ours)
    by_fit = sum(spent for _, spent in plain)
    print(found)
    print(f"{len(dealt)} folds: {seconds:.1f} s; by plain fit {by_fit:.1f} s ({by_fit / seconds:.1f} times as long)")
    print("every fold's accuracy is plain fit's")
    result = {
        **found.to_dict(),
        "transferkit seconds": seconds,
        "plain seconds": by_fit,
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__, "numpy": np.__version__},
        "machine": platform.platform(),
    }
    Path(target).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
