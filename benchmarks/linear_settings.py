"""Two linear settings with known answers: LP-FT out of distribution, and L2-SP against L2 with few examples.

    python benchmarks/linear_settings.py --out result.json

LP-FT (Kumar et al., ICLR 2022, section 3): a two-layer linear network whose pretrained features are right. Training rows lie in a
subspace; fine-tuning from a random head bends the features within it, and errs outside. The paper's order out of distribution is
linear probe ≈ LP-FT < fine-tuning.

L2-SP (Li, Grandvalet & Davoine, ICML 2018): a linear student starts near its teacher and sees few noisy rows. Holding to the
start should beat holding to zero, the more so the fewer rows. The strength is picked on rows set apart, for both alike.

All training is `FineTuner`'s. Medians over seeds; the order is counted seed by seed.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import transferkit as tk
from transferkit.storage import write_json

Array = Any
DIMENSIONS, FEATURES, SUBSPACE, ROWS = 20, 5, 10, 16


def two_layers(features: Array, head: Array) -> Any:
    inputs = keras.Input((DIMENSIONS,))
    hidden = keras.layers.Dense(FEATURES, use_bias=False, name="features")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False, name="head")(hidden))
    model.set_weights([features, head])
    return model


def lp_ft(seed: int, steps: int) -> dict[str, float]:
    """Mean squared error outside the training rows' subspace, relative to the labels' variance, for the three ways."""
    random = np.random.default_rng(seed)
    right = np.linalg.qr(random.normal(size=(DIMENSIONS, FEATURES)))[0]
    head = random.normal(size=(FEATURES, 1))
    inside = np.linalg.qr(random.normal(size=(DIMENSIONS, SUBSPACE)))[0]
    x = (random.normal(size=(ROWS, SUBSPACE)) @ inside.T).astype("float32")
    outside = random.normal(size=(2_000, DIMENSIONS)).astype("float32")
    y, truth = (x @ right @ head).astype("float32"), (outside @ right @ head).astype("float32")
    start = random.normal(size=(FEATURES, 1))
    data = [(x, y)] * (steps // 4)

    def phase(plan: Any, name: str, train: Any) -> Any:
        return plan.phase(name, train=train, epochs=4, learning_rate=0.05)

    plain = tk.FineTuner().optimizer("sgd").loss("mse")
    probe = phase(plain, "head", tk.Layers.head())
    plans = {"FT": phase(plain, "all", tk.Layers.all()), "LP": probe, "LP-FT": phase(probe, "all", tk.Layers.all())}
    errors = {}
    for name, plan in plans.items():
        keras.backend.clear_session()
        model = two_layers(right, start)
        plan.fit(model, data, seed=seed, verbose=0)
        errors[name] = float(np.mean((model.predict(outside, batch_size=2_000, verbose=0) - truth) ** 2) / truth.var())
    return errors


def l2_sp(seed: int, rows: int, steps: int) -> dict[str, float]:
    """Relative error on fresh rows of students held to their start, and to zero, at the best of five strengths each."""
    random = np.random.default_rng(seed)
    teacher = random.normal(size=(30, 1)) / np.sqrt(30)
    start = teacher + 0.3 * random.normal(size=(30, 1)) / np.sqrt(30)
    x, x_apart, x_test = (random.normal(size=(count, 30)).astype("float32") for count in (rows, 100, 2_000))
    y = (x @ teacher + 0.5 * random.normal(size=(rows, 1))).astype("float32")
    truth = x_test @ teacher
    found = {}
    for name in ("L2-SP", "L2"):
        best = (np.inf, np.inf)
        for strength in (0.03, 0.1, 0.3, 1.0, 3.0):
            keras.backend.clear_session()
            # The layer held to the start is one below the head, which is a fixed 1.
            inputs = keras.Input((30,))
            body = keras.layers.Dense(1, use_bias=False, name="body")(inputs)
            model = keras.Model(inputs, keras.layers.Dense(1, use_bias=False, name="head")(body))
            model.set_weights([start, np.ones((1, 1))])
            # Plain L2 is what the head's part of the plan does, so there the layer is made the head.
            if name == "L2":
                model = keras.Sequential([keras.Input((30,)), keras.layers.Dense(1, use_bias=False, name="head")])
                model.set_weights([start])
            train = tk.Layers.named("body") if name == "L2-SP" else tk.Layers.all()
            plan = tk.FineTuner().phase("all", train=train, epochs=1, learning_rate=0.03).optimizer("sgd").loss("mse")
            plan.l2_sp(strength, head=strength).fit(model, [(x, y)] * steps, seed=seed, verbose=0)
            apart = float(np.mean((model.predict(x_apart, verbose=0) - x_apart @ teacher) ** 2))
            test = float(np.mean((model.predict(x_test, batch_size=2_000, verbose=0) - truth) ** 2) / truth.var())
            best = min(best, (apart, test))
        found[name] = best[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--rows", type=int, nargs="*", default=[5, 10, 50, 200])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    runs = []
    for seed in range(options.seeds):
        runs.append(lp_ft(seed, options.steps))
        print(f"seed {seed}  " + "  ".join(f"{name} {value:.4f}" for name, value in runs[-1].items()), flush=True)
    medians = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    wins = sum(run["LP-FT"] < run["FT"] for run in runs)
    print(f"out of distribution, medians: {medians}; LP-FT beats FT in {wins} of {len(runs)}")

    few: dict[str, Any] = {}
    for rows in options.rows:
        pairs = [l2_sp(seed, rows, options.steps // 4) for seed in range(options.seeds)]
        few[str(rows)] = {
            **{name: float(np.median([pair[name] for pair in pairs])) for name in pairs[0]},
            "wins": sum(pair["L2-SP"] < pair["L2"] for pair in pairs),
        }
        print(f"{rows} rows: {few[str(rows)]}", flush=True)
    write_json(
        options.out,
        {
            "claim": "LP-FT keeps the features of a linear network; L2-SP beats L2 with few rows",
            "lp_ft": {"medians": medians, "wins_over_ft": wins, "seeds": len(runs), "runs": runs},
            "l2_sp": few,
            "versions": {"keras": keras.__version__, "transferkit": tk.__version__},
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        },
    )


if __name__ == "__main__":
    main()
