"""The steps of a fine-tuning plan: each says one thing about how a model shall train, and checks what it is given.

What the steps mean for a model, and how they are carried out, is `tuner`'s. May import Keras and the floors below.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import Self

from transferkit._keras import keras
from transferkit._objects import FunctionReference, KerasObject, as_value, check_names
from transferkit._plan import FrozenMapping, Plan, steps_named
from transferkit.errors import PlanError, did_you_mean
from transferkit.tuning.cache_settings import CacheSettings
from transferkit.tuning.layers import Layers
from transferkit.tuning.phases import BATCH_NORM_POLICIES, Phase
from transferkit.tuning.schedules import Schedule

__all__ = ["TuningSteps", "fresh"]


class TuningSteps(Plan):
    """The steps of `FineTuner`."""

    STEPS: ClassVar[frozenset[str]] = frozenset(
        {
            "batch_norm",
            "cache",
            "cutmix",
            "early_stopping",
            "ema",
            "frozen_dropout",
            "l2_sp",
            "label_smoothing",
            "lora",
            "loss",
            "metrics",
            "mixup",
            "optimizer",
            "phase",
            "rate",
            "stochastic_depth",
            "swa",
            "weight_decay",
        }
    )

    def phase(
        self,
        name: str,
        *,
        train: Layers,
        epochs: int,
        learning_rate: float | None = None,
        layer_decay: float | None = None,
        schedule: Any = None,
    ) -> Self:
        """One more phase, after those before.

        Args:
            name: Its name, another than the others have.
            train: The layers that train. All others are frozen: their weights stay, their BatchNorm keeps its statistics, their
                dropout is off.
            epochs: How many times it goes over the data, at most.
            learning_rate: The optimizer's step size; None for the one the optimizer was given with (Adam's is 0.001). Momenta and
                second moments go on from the phase before for what goes on training.
            layer_decay: Above 0, at most 1: the head trains at the full rate, each block of layers below at this times the rate
                of the one above it. `describe` shows what comes of it.
            schedule: The course of the rate over the phase: a `Schedule` or its name (`"cosine"`, `"one_cycle"` …), or a Keras
                `LearningRateSchedule`, counted from the phase's first step.
        """
        problems = []
        if not isinstance(train, Layers):
            problems.append(f"train={train!r}, which is no selection of layers; Layers.head() and Layers.all() are")
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            problems.append(f"epochs={epochs!r}; it must be a whole number above 0")
        if learning_rate is not None and not (isinstance(learning_rate, (int, float)) and 0 < learning_rate < float("inf")):
            problems.append(f"learning_rate={learning_rate!r}; it must be a number above 0")
        if layer_decay is not None and not (_is_number(layer_decay) and 0 < layer_decay <= 1):
            problems.append(f"layer_decay={layer_decay!r}; it must be a number above 0, at most 1")
        if any(step.positional[0] == name for step in steps_named(self, ["phase"])):
            problems.append(f"a second phase named {name!r}")
        if problems:
            raise PlanError(f"Planning the phase {name!r}.", found=problems)
        if isinstance(schedule, str):
            schedule = Schedule.of(schedule)
        elif schedule is not None and not isinstance(schedule, Schedule):
            own = isinstance(schedule, (KerasObject, keras.optimizers.schedules.LearningRateSchedule))
            if not own:
                raise PlanError(
                    f"Planning the phase {name!r}.",
                    found=f"schedule={schedule!r}, which is neither a Schedule nor a Keras LearningRateSchedule",
                    fix='give a name, schedule="cosine", or a value, schedule=Schedule.cosine(warmup=0.1)',
                )
            schedule = as_value(schedule)
        return self._then(
            "phase",
            name=name,
            train=train,
            epochs=epochs,
            learning_rate=learning_rate,
            layer_decay=layer_decay,
            schedule=schedule,
        )

    def rate(self, layers: Layers, *, times: float) -> Self:
        """A factor on the learning rate of some layers, in every phase that trains them; several multiply.

        Args:
            layers: Which.
            times: The factor, 0 or more.
        """
        if not isinstance(layers, Layers) or not _is_number(times) or times < 0:
            raise PlanError("Planning a rate for some layers.", found=f"{layers!r} and times={times!r}; layers and a number")
        return self._then("rate", layers=layers, times=times)

    def weight_decay(self, weight_decay: float) -> Self:
        """Weight decay of the optimizer: not on biases, normalisation and embeddings, and at each layer's own rate.

        Args:
            weight_decay: The share of a weight that a step takes away, times the rate; 0 or more. An optimizer given with a
                weight decay of its own has it without this.
        """
        if not _is_number(weight_decay) or weight_decay < 0:
            raise PlanError("Planning weight decay.", found=f"{weight_decay!r}; it must be a number, at least 0")
        return self._then("weight_decay", weight_decay=weight_decay)

    def l2_sp(self, strength: float, *, head: float | None = None) -> Self:
        """L2-SP: holds the weights to those that were loaded, and the head's to zero (Li, Grandvalet & Davoine, ICML 2018).

        It goes into the gradients, not into the loss that is reported, and works with any optimizer and `train_step`.

        Args:
            strength: α of α/2 ‖w − w₀‖²; 0 or more.
            head: β of β/2 ‖w‖² on the head; `strength` / 10 where nothing is said.
        """
        head = strength / 10 if head is None and _is_number(strength) else head
        if steps_named(self, ["lora"]):
            raise PlanError("Planning L2-SP.", found="LoRA in the same plan, whose kernels don't move", fix="use .weight_decay")
        if not _is_number(strength) or not _is_number(head) or strength < 0 or (head or 0.0) < 0:
            raise PlanError("Planning L2-SP.", found=f"strength={strength!r}, head={head!r}; they must be numbers, at least 0")
        return self._then("l2_sp", strength=strength, head=head)

    def label_smoothing(self, smoothing: float) -> Self:
        """Takes a share of each label's weight and gives it to all classes alike, for labels of any kind.

        Args:
            smoothing: The share, from 0 to below 1.
        """
        if not _is_number(smoothing) or not 0 <= smoothing < 1:
            raise PlanError("Planning label smoothing.", found=f"{smoothing!r}; it must be a number from 0 to below 1")
        return self._then("label_smoothing", smoothing=smoothing)

    def mixup(self, alpha: float = 0.2) -> Self:
        """Trains on blends of pairs of rows and their labels (Zhang et al., ICLR 2018).

        Args:
            alpha: Of the Beta distribution of the blend; above 0.
        """
        return self._mixing("mixup", alpha)

    def cutmix(self, alpha: float = 1.0) -> Self:
        """Trains on images with a part of another pasted in, labels in proportion (Yun et al., ICCV 2019).

        Args:
            alpha: Of the Beta distribution of the part's size; above 0.
        """
        return self._mixing("cutmix", alpha)

    def _mixing(self, kind: str, alpha: float) -> Self:
        problems = []
        if not _is_number(alpha) or not alpha > 0:
            problems.append(f"alpha={alpha!r}; it must be a number above 0")
        if steps_named(self, ["cutmix" if kind == "mixup" else "mixup"]):
            problems.append("mixup and cutmix in one plan; it can hold one of them")
        if problems:
            raise PlanError(f"Planning {kind}.", found=problems)
        return self._then(kind, alpha=alpha)

    def ema(self, momentum: float = 0.999) -> Self:
        """Validates, and ends each phase, with a moving average of the weights.

        Args:
            momentum: How much of the average a step keeps, from 0 to below 1; less in the first steps, so that a short phase
                isn't averaged with its own beginning.
        """
        if not _is_number(momentum) or not 0 <= momentum < 1:
            raise PlanError("Planning a moving average.", found=f"momentum={momentum!r}; it must be a number from 0 to below 1")
        return self._averaged("ema", momentum=momentum)

    def swa(self, last: float = 0.25) -> Self:
        """Ends each phase with the mean of the weights at the ends of its last epochs (Izmailov et al., UAI 2018).

        BatchNorm layers that train get the statistics of the training data anew.

        Args:
            last: The share of the phase's epochs that counts, above 0, at most 1.
        """
        if not _is_number(last) or not 0 < last <= 1:
            raise PlanError("Planning an average of weights.", found=f"last={last!r}; it must be a number above 0, at most 1")
        if steps_named(self, ["early_stopping"]):
            raise PlanError(
                "Planning an average of weights.",
                found="early stopping in the same plan, which ends a phase with the weights of one epoch",
                fix="use .ema(), which early stopping can judge",
            )
        return self._averaged("swa", last=last)

    def _averaged(self, name: str, **arguments: Any) -> Self:
        if steps_named(self, ["swa" if name == "ema" else "ema"]):
            raise PlanError("Planning an average of weights.", found="ema and swa in one plan; it can hold one of them")
        return self._then(name, **arguments)

    def optimizer(self, optimizer: Any) -> Self:
        """Which optimizer makes the steps, Adam where nothing is said.

        Args:
            optimizer: A name of Keras's, or an optimizer of Keras or of yours.
        """
        value = as_value(optimizer)
        if isinstance(value, str):
            try:
                keras.optimizers.get(value)
            except ValueError as error:
                known = [name for name in dir(keras.optimizers) if name[0].isupper()]
                raise PlanError(
                    "Choosing an optimizer.", found=f"no optimizer named {value!r}{did_you_mean(value, known)}"
                ) from error
        elif not isinstance(optimizer, (keras.optimizers.Optimizer, KerasObject)):
            raise PlanError(
                "Choosing an optimizer.",
                found=f"{optimizer!r}",
                fix='give a name, .optimizer("adamw"), or an optimizer, .optimizer(keras.optimizers.AdamW())',
            )
        return self._then("optimizer", optimizer=value)

    def loss(self, loss: Any, *, weights: Any = None) -> Self:
        """Which loss is minimised; where nothing is said it follows from the head and the labels.

        Args:
            loss: A name of Keras's, a loss, a function of labels and predictions, or a dict or list of these for several outputs.
            weights: For several outputs, their weights in the sum, in the structure of the losses.
        """
        check_names("loss", loss, keras.losses)
        return self._then("loss", loss=_values(loss), weights=weights)

    def metrics(self, *metrics: Any) -> Self:
        """What is measured while training.

        Args:
            metrics: Names of Keras's, metrics, functions; or one dict of lists of these for several outputs.
        """
        check_names("metric", metrics, keras.metrics, also=_SHORT)
        return self._then("metrics", metrics=tuple(_values(metric) for metric in metrics))

    def early_stopping(self, patience: int = 3, *, monitor: str = "val_loss", restore_best: bool = True) -> Self:
        """Ends a phase when it no longer helps, and goes on to the next.

        Args:
            patience: After how many epochs without a gain.
            monitor: Which figure of the history; one with `auc` or `acc` in its name should rise, any other fall.
            restore_best: Whether the phase ends with the weights of its best epoch.
        """
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 0:
            raise PlanError("Planning early stopping.", found=f"patience={patience!r}; it must be a whole number, at least 0")
        return self._then("early_stopping", patience=patience, monitor=monitor, restore_best=restore_best)

    def cache(
        self,
        cache: bool | str | os.PathLike[str],
        *,
        dtype: str = "float32",
        views: int = 1,
        noise: float = 0.0,
        extraction: str = "exact",
    ) -> Self:
        """Whether what a phase freezes is computed once for every row, and the phase trains on the features.

        Where nothing is said, it is done where it pays. Losses and weights are the same either way; `docs/feature-cache.md`
        says how nearly. The other arguments change them; validation is always on exact features.

        Args:
            cache: True wherever it can be done, also for data that comes in batches, whose rows are then shuffled like arrays;
                False never; or a folder, where the features are kept for later runs.
            dtype: What training features are kept in: `float32`, `float16`, `bfloat16`, or `int8` with a scale for each channel
                of every 64 rows. The run says by how much values were rounded.
            views: How many times each training row is computed, each with another draw of the random augmentation in front of
                the frozen part. Epochs take the views in turn.
            noise: Augmentation of features: the standard deviation of Gaussian noise on each, as a share of the feature's own.
            extraction: `exact`; `folded`, with the frozen weights as constants and BatchNorms merged into the convolutions before
                them; or `bfloat16`, with the weights as constants in bfloat16. The run says how far off the first rows came out.
        """
        value = os.fspath(cache) if isinstance(cache, os.PathLike) else cache
        arguments: dict[str, Any] = {"dtype": dtype, "views": views, "noise": noise, "extraction": extraction}
        CacheSettings(value, **arguments)  # refuses what can't be
        return self._then("cache", cache=value, **arguments)

    def frozen_dropout(self, on: bool = True) -> Self:
        """Whether dropout and noise between frozen layers stay on, as Keras leaves them; off where nothing is said.

        What is frozen then draws anew for each batch, so only what lies before the first dropout can be computed once.

        Args:
            on: Whether they do.
        """
        if not isinstance(on, bool):
            raise PlanError("Planning the dropout of frozen layers.", found=f"{on!r}; it must be True or False")
        return self._then("frozen_dropout", on=on)

    def batch_norm(self, policy: str) -> Self:
        """What BatchNorm does in layers that train.

        Args:
            policy: `freeze` (what happens where nothing is said): it keeps its statistics, its scale and its offset, unless its
                statistics are still the initial ones, so that there is nothing to keep. `adapt`: it trains like the layers
                around it. `recalibrate`: when a phase begins, the layers it trains get the statistics of the training data
                (AdaBN, Li et al. 2017) and keep them, their scale and their offset through the phase.
        """
        if policy not in BATCH_NORM_POLICIES:
            raise PlanError(
                "Choosing what BatchNorm does.",
                found=f"{policy!r}{did_you_mean(str(policy), BATCH_NORM_POLICIES)}",
                fix="one of " + ", ".join(map(repr, BATCH_NORM_POLICIES)),
            )
        return self._then("batch_norm", policy=policy)

    def lora(self, rank: int = 8, *, layers: Layers | None = None, alpha: float | None = None, times: float = 1.0) -> Self:
        """Trains layers through two thin factors beside their frozen kernels (LoRA, Hu et al., ICLR 2022).

        Of the layers a phase trains, those meant here and able to (`enable_lora`: Dense, EinsumDense, Embedding, convolutions,
        attention) train so; the others as ever. When a phase ends the product is added into the kernel and the factors go, so
        that the model keeps its layers and weights, and is saved like any other.

        Args:
            rank: Of the factors.
            layers: Which layers; all but the head where nothing is said.
            alpha: The product counts alpha / rank times; `rank`, so once, where nothing is said.
            times: Factor on the learning rate of the factors.
        """
        alpha = rank if alpha is None else alpha
        problems = []
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            problems.append(f"rank={rank!r}; it must be a whole number above 0")
        if layers is not None and not isinstance(layers, Layers):
            problems.append(f"layers={layers!r}, which is no selection of layers")
        problems += [
            f"{name}={value!r}; it must be a number above 0"
            for name, value in (("alpha", alpha), ("times", times))
            if not (_is_number(value) and value > 0) and not problems
        ]
        if steps_named(self, ["l2_sp"]):
            problems.append("L2-SP in the same plan, which pulls kernels that the factors leave as they are; use .weight_decay")
        if problems:
            raise PlanError("Planning LoRA.", found=problems)
        return self._then("lora", rank=rank, layers=layers, alpha=alpha, times=times)

    def stochastic_depth(self, rate: float) -> Self:
        """How often residual branches are dropped in training, rising from the first to `rate` at the last (Huang et al. 2016).

        Where nothing is said, as the model has it. It needs layers that drop branches, as EfficientNet's and ConvNeXt's do;
        `describe` and `fit` say so where a model has none. In what is frozen it is off. The model keeps its own rates.

        Args:
            rate: From 0 to below 1.
        """
        if not _is_number(rate) or not 0 <= rate < 1:
            raise PlanError("Planning stochastic depth.", found=f"rate={rate!r}; it must be a number from 0 to below 1")
        return self._then("stochastic_depth", rate=rate)

    # What the steps say

    def phases(self) -> tuple[Phase, ...]:
        """The phases in order; the one that a plan without any stands for."""
        found = []
        depth = (self._last("stochastic_depth") or {}).get("rate")
        for step in steps_named(self, ["phase"]):
            (name,) = step.positional
            settings = step.arguments
            found.append(Phase(name, **{"learning_rate": None, "stochastic_depth": depth, **settings}))
        return tuple(found) or (Phase("all", Layers.all(), 10, None, stochastic_depth=depth),)

    def _last(self, name: str) -> dict[str, Any] | None:
        """The arguments of the last step of that name, positional ones under their parameters' names; None without one."""
        steps = steps_named(self, [name])
        return self._bound(steps[-1]) if steps else None

    def _policy(self) -> str:
        chosen = self._last("batch_norm")
        return str(chosen["policy"]) if chosen else "freeze"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


#: What `compile` takes for a metric and settles by the loss.
_SHORT = ("accuracy", "acc", "crossentropy", "ce")


def _values(thing: Any) -> Any:
    """What a plan keeps for a loss or metric, or for a dict or list of them."""
    if isinstance(thing, Mapping):
        return {key: _values(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return tuple(_values(value) for value in thing)
    return as_value(thing)


def fresh(value: Any) -> Any:
    """The Keras object, function or structure of these that a plan keeps as `value`, made anew."""
    if isinstance(value, (KerasObject, FunctionReference)):
        return value.fresh()
    if isinstance(value, FrozenMapping):
        return {key: fresh(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [fresh(item) for item in value]
    return value
