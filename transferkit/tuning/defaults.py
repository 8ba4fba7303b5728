"""The plan for those who haven't one, and what every step of a plan means in words.

May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit._table import Table
from transferkit.building.heads import head_layers, heads_of
from transferkit.data import Data, is_arrays, row_count
from transferkit.tuning.layers import Layers
from transferkit.tuning.rates import blocks_of

__all__ = ["default_plan", "explanation"]


def _rows(data: Any) -> int | None:
    """How many rows there are, where that can be told; of a data set of unknown batches, about."""
    if isinstance(data, Data) or is_arrays(data):
        return row_count(data)
    count = data.num_batches if isinstance(data, keras.utils.PyDataset) else getattr(data, "cardinality", lambda: None)()
    return 32 * int(count) if count is not None and int(count) > 0 else None


#: Steps in which Adam settles a head on fixed features.
_HEAD_STEPS = 600


def default_plan(empty: Any, model: Any, data: Any, *, epochs: int | None, once: Callable[[], bool]) -> Any:
    """The default phases and settings on an empty plan.

    Args:
        empty: A `FineTuner()`.
        model: A built model.
        data: What `fit` will be given.
        epochs: How often the data may go through the whole network, or None.
        once: Tells whether what is below the head can be computed once; asked only where that matters.
    """
    heads_of(model)
    rows = _rows(data)
    if epochs is None:
        # About 1,500 steps of 32 rows, which settles a small set, within reason at both ends.
        epochs = 10 if rows is None else min(40, max(6, round(1_500 * 32 / max(rows, 1))))
    body = len(blocks_of(model)) - 1
    if body < 1 or epochs < 2:
        return empty.phase("all", train=Layers.all(), epochs=epochs, learning_rate=1e-3, schedule="cosine")
    deep = max(1, round(epochs * 2 / 3))
    # What is frozen is computed once, so the head may well go on until it has settled; where it can't be, it has a third.
    head = epochs - deep
    if rows is not None and (isinstance(data, Data) or is_arrays(data)) and once():
        head = max(head, min(40, max(5, round(_HEAD_STEPS * 32 / rows))))
    # Under Adam every layer moves by about the rate, and what they do to the output adds up over the depth.
    rate = max(3e-4, min(3e-3, float(f"{3e-3 / body:.1g}")))
    plan = empty.phase("head", train=Layers.head(), epochs=head, learning_rate=_head_rate(model, data), schedule="cosine")
    return plan.phase("all", train=Layers.all(), epochs=deep, learning_rate=rate, layer_decay=0.8, schedule="cosine")


def _head_rate(model: Any, data: Any) -> float:
    """The rate at which a step of Adam moves an output of the head by about 0.1, as it moves each weight by about the rate.

    Read from what the head is given for the first rows; 0.001 where that can't be looked at.
    """
    heads = head_layers(model)
    if len(heads) != 1 or not (isinstance(data, Data) or is_arrays(data)):
        return 1e-3
    rows = np.arange(min(64, row_count(data)))
    x = data.rows(rows).x if isinstance(data, Data) else keras.tree.map_structure(lambda array: np.asarray(array)[rows], data[0])
    try:
        inputs = model.inputs[0] if len(model.inputs) == 1 else model.input
        given = keras.ops.convert_to_numpy(keras.Model(inputs, heads[0].input)(x, training=False))
    except (AttributeError, TypeError, ValueError):  # no graph to read: a subclassed model, a head that is called twice
        return 1e-3
    moved = float(np.abs(given).sum(-1).mean())
    return max(3e-4, min(1e-2, float(f"{0.1 / moved:.1g}"))) if np.isfinite(moved) and moved > 0 else 1e-3


_WORDS = {
    "phase": "trains {train} for {epochs} epochs at {rate}{rest}",
    "rate": "multiplies the rate of {layers} by {times}",
    "optimizer": "makes the steps by {optimizer}",
    "loss": "minimises {loss}",
    "metrics": "measures {metrics}",
    "early_stopping": "ends a phase after {patience} epochs without a gain in {monitor}, and goes on to the next",
    "batch_norm": "{policy}: what BatchNorm does in layers that train",
    "weight_decay": "shrinks kernels by {weight_decay} × the rate a step; not biases, normalisation and embeddings",
    "l2_sp": "holds weights to the loaded ones with strength {strength}, the head's to zero with {head} (Li et al. 2018)",
    "label_smoothing": "gives {smoothing:.0%} of each label's weight to all classes alike (Szegedy et al. 2016)",
    "mixup": "blends pairs of rows and labels, λ ~ Beta({alpha}, {alpha}) (Zhang et al. 2018)",
    "cutmix": "pastes part of one image into another, area ~ Beta({alpha}, {alpha}) (Yun et al. 2019)",
    "ema": "keeps a moving average of the weights with momentum {momentum}, which validation sees and the model is left with",
    "lora": "trains {layers} through factors of rank {rank}, added into the kernels when a phase ends (LoRA, Hu et al. 2022)",
    "stochastic_depth": "drops residual branches in training, the last with probability {rate} (Huang et al. 2016)",
    "cache": "computes what is frozen once: {cache}",
    "swa": "leaves the model with the mean of the weights of the last {last:.0%} of each phase's epochs (Izmailov et al. 2018)",
}


def explanation(plan: Any) -> Table:
    """The plan's steps in words."""
    rows = []
    for step in plan._steps:
        settings: dict[str, Any] = plan._bound(step)
        if step.name == "phase":
            rate = settings["learning_rate"]
            everything = settings["train"] == Layers.all()
            settings["rest"] = "" if everything else "; everything else is frozen, its statistics and dropout too"
            settings["rate"] = "the optimizer's rate" if rate is None else f"a learning rate of {rate:g}"
            rows.append((f"phase {settings['name']!r}", _WORDS["phase"].format(**settings)))
            if settings["layer_decay"] is not None:
                decay = settings["layer_decay"]
                rows.append(
                    ("", f"each block below the head at {decay:g} × the rate of the one above it: what is general moves less")
                )
            if settings["schedule"] is not None:
                rows.append(("", f"the rate runs by {settings['schedule']!r}, counted from the phase's first step"))
        else:
            words = _WORDS.get(step.name)
            rows.append((step.name, words.format(**settings) if words else ", ".join(f"{k}={v!r}" for k, v in settings.items())))
    names = [step.name for step in plan._steps]
    if names.count("phase") > 1 and names and plan.phases()[0].train == Layers.head():
        rows.insert(
            1, ("", "first the head alone, so that a random one doesn't tear the loaded weights (LP-FT, Kumar et al. 2022)")
        )
    return Table(columns=("step", "what it does"), rows=rows, title="What each step of the plan does")
