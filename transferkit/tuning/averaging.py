"""Weights averaged: along a run (EMA, SWA), with the loaded ones (WiSE-FT), and over several runs (a greedy soup).

SWA: Izmailov et al., UAI 2018, algorithm 1. WiSE-FT: Wortsman et al., CVPR 2022, section 3. Greedy soup: Wortsman et al., ICML
2022, recipe 1. May import Keras and the floors below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit._table import Table, Tabular
from transferkit.data import batches
from transferkit.errors import ModelError, PlanError
from transferkit.tuning.optimizer_state import swap_averages

__all__ = [
    "AverageWeights",
    "Interpolation",
    "Soup",
    "StochasticWeightAverage",
    "greedy_soup",
    "recalibrate_batch_norm",
    "wise_ft",
]

Weights = Sequence[Any]
_TENTHS = tuple(round(0.1 * step, 1) for step in range(11))


class AverageWeights(keras.callbacks.Callback):
    """Shows the optimizer's moving average instead of the weights to validation and to the callbacks after this one.

    At the end of the phase the average stays in the model. Belongs to an optimizer made with `average=`.
    """

    #: Must be told before a batch, and is content to hear of many at once.
    joins_batches = True

    def __init__(self) -> None:
        super().__init__()
        self._shown = False

    def _show(self, shown: bool) -> None:
        if shown != self._shown:
            swap_averages(self.model.optimizer)
            self._shown = shown

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self._show(False)

    def on_test_begin(self, logs: Any = None) -> None:
        del logs
        self._show(True)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Validation in the middle of an epoch (a user's callback) must not leave the averages to be trained on.
        del batch, logs
        self._show(False)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch, logs
        self._show(True)

    def on_train_end(self, logs: Any = None) -> None:
        del logs
        self._show(True)


class StochasticWeightAverage(keras.callbacks.Callback):
    """Averages the weights of the last epochs of a phase, and leaves the average in the model at its end.

    Args:
        first_epoch: Number of the epoch, on the run's axis, whose end is the first to count.
    """

    def __init__(self, first_epoch: int) -> None:
        super().__init__()
        self._first = first_epoch
        self._count = 0
        self._mean: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del logs
        if epoch < self._first:
            return
        values = [
            np.asarray(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(weight)), "float64")
            for weight in self.model.trainable_weights
        ]
        self._count += 1
        if self._count == 1:
            self._mean = values
        else:
            self._mean = [mean + (value - mean) / self._count for mean, value in zip(self._mean, values, strict=True)]

    def on_train_end(self, logs: Any = None) -> None:
        del logs
        if self._count:
            for weight, mean in zip(self.model.trainable_weights, self._mean, strict=True):
                weight.assign(mean.astype(weight.dtype))


def recalibrate_batch_norm(model: Any, data: Any, *, batch_size: int = 32, layers: Sequence[Any] | None = None) -> int:
    """Sets the statistics of every BatchNorm layer that isn't frozen to those of `data`: needed after weights are averaged.

    The mean over all batches, each counted alike, as in SWA. Changes these statistics only.

    Args:
        model: A built model.
        data: Whatever `fit` takes; labels aren't used.
        batch_size: Rows in a batch of in-memory data; at least as many as in training.
        layers: The BatchNorm layers to set, frozen or not, while all others use the statistics they have; None for those that
            aren't frozen.

    Returns:
        How many layers were set.
    """
    every = [layer for layer in _layers(model) if isinstance(layer, keras.layers.BatchNormalization)]
    norms = [layer for layer in every if layer.trainable] if layers is None else list(layers)
    if not norms:
        return 0
    flags = [(layer, layer.trainable) for layer in every]
    for layer in every:
        layer.trainable = any(layer is chosen for chosen in norms)
    others = {id(weight) for layer in norms for weight in (layer.moving_mean, layer.moving_variance)}
    kept = [(weight, weight.numpy()) for weight in model.variables if id(weight) not in others]
    momenta = [layer.momentum for layer in norms]
    try:
        for number, batch in enumerate(batches(data, batch_size=batch_size)):
            for layer in norms:
                layer.momentum = number / (number + 1)
            model(batch.x, training=True)
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        for layer, trainable in flags:
            layer.trainable = trainable
        for weight, value in kept:  # dropout's seeds, and whatever else a forward pass writes
            weight.assign(value)
    return len(norms)


def _layers(model: Any) -> list[Any]:
    found: dict[int, Any] = {}
    waiting = list(model.layers)
    while waiting:
        layer = waiting.pop(0)
        if id(layer) not in found:
            found[id(layer)] = layer
            waiting.extend(getattr(layer, "layers", []))
    return list(found.values())


@dataclass(frozen=True)
class Interpolation(Tabular):
    """What `wise_ft` found.

    Args:
        scores: α → score on the validation data: 0 is the model before fine-tuning, 1 the fine-tuned one.
        best: The α whose weights the model now has.
    """

    scores: Mapping[float, float]
    best: float

    def table(self) -> Table:
        """The scores by α."""
        rows = [
            (f"{alpha:g}", f"{score:.4g}", "← the model now" if alpha == self.best else "")
            for alpha, score in self.scores.items()
        ]
        return Table(columns=(">α", ">score", ""), rows=rows, title="(1 − α) × loaded weights + α × fine-tuned weights")

    def to_dict(self) -> dict[str, Any]:
        """The scores by α as text, and the best."""
        return {"scores": {f"{alpha:g}": score for alpha, score in self.scores.items()}, "best": self.best}


def wise_ft(
    model: Any,
    before: Weights,
    score: Callable[[Any], float],
    *,
    alphas: Sequence[float] = _TENTHS,
) -> Interpolation:
    """Interpolates between the weights before and after fine-tuning, and leaves those with the best score in the model.

    Where two score alike, the larger α stays. BatchNorm statistics are interpolated with the weights.

    Args:
        model: The fine-tuned model.
        before: `model.get_weights()` from before fine-tuning.
        score: Takes the model, gives a number; higher is better. Use validation data, never the test's.
        alphas: Shares of the fine-tuned weights, from 0 to 1.

    Raises:
        ModelError: when `before` isn't of this model's shapes.

    Example:
        >>> import keras, numpy as np
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        >>> model.set_weights([np.array([[1.0]])])
        >>> before = model.get_weights()
        >>> model.set_weights([np.array([[3.0]])])
        >>> wise_ft(model, before, lambda m: -abs(m.get_weights()[0].item() - 2.0), alphas=(0, 0.5, 1)).best
        0.5
    """
    after = model.get_weights()
    _check_weights(model, [before], "Interpolating with the weights before fine-tuning.")
    alphas = [float(alpha) for alpha in alphas]
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise PlanError("Interpolating weights.", found=f"alphas={alphas!r}; they must be numbers from 0 to 1")

    def blended(alpha: float) -> list[Any]:
        if alpha in (0.0, 1.0):
            return list(after if alpha else before)
        return [_mean([old, new], [1 - alpha, alpha]) for old, new in zip(before, after, strict=True)]

    scores = {}
    try:
        for alpha in alphas:
            model.set_weights(blended(alpha))
            scores[alpha] = float(score(model))
    except BaseException:
        model.set_weights(after)
        raise
    best = max(scores, key=lambda alpha: (scores[alpha], alpha))
    model.set_weights(blended(best))
    return Interpolation(scores=scores, best=best)


@dataclass(frozen=True)
class Soup(Tabular):
    """What `greedy_soup` found.

    Args:
        scores: The score of each ingredient alone, in the order given.
        chosen: Numbers of those that went in, in the order they did.
        score: The soup's own score.
    """

    scores: tuple[float, ...]
    chosen: tuple[int, ...]
    score: float

    def table(self) -> Table:
        """The ingredients with their scores."""
        rows = [(str(n), f"{score:.4g}", "in" if n in self.chosen else "left out") for n, score in enumerate(self.scores)]
        note = f"The soup of {len(self.chosen)} scores {self.score:.4g}."
        return Table(columns=(">ingredient", ">score", ""), rows=rows, title="Greedy soup", notes=(note,))

    def to_dict(self) -> dict[str, Any]:
        """The soup as plain lists and numbers."""
        return {"scores": list(self.scores), "chosen": list(self.chosen), "score": self.score}


def greedy_soup(model: Any, ingredients: Sequence[Weights], score: Callable[[Any], float]) -> Soup:
    """Averages the weights of several fine-tuned copies of one model, each only if it doesn't make the average worse.

    The best comes first, then the others from best to worst. The soup is left in the model.

    Args:
        model: A model of the architecture of all ingredients.
        ingredients: For each copy, its `get_weights()`.
        score: Takes the model, gives a number; higher is better. Use validation data, never the test's.

    Raises:
        ModelError: when an ingredient isn't of this model's shapes.

    Example:
        >>> import numpy as np
        >>> import transferkit as tk
        >>> model = tk.ModelBuilder((2,)).regression().build()
        >>> cups = [[np.full((2, 1), value), np.zeros(1)] for value in (0.0, 1.0, 9.0)]
        >>> soup = tk.greedy_soup(model, cups, lambda m: -abs(float(np.mean(m.get_weights()[0])) - 0.5))
        >>> np.ravel(model.get_weights()[0]).tolist()
        [0.5, 0.5]
    """
    if not ingredients:
        raise PlanError("Making a soup of weights.", found="no ingredients")
    _check_weights(model, ingredients, "Making a soup of weights.")
    start = model.get_weights()
    try:
        alone = []
        for weights in ingredients:
            model.set_weights(weights)
            alone.append(float(score(model)))
        order = sorted(range(len(alone)), key=lambda number: -alone[number])
        chosen, best = [order[0]], alone[order[0]]
        for number in order[1:]:
            model.set_weights(_average([ingredients[n] for n in (*chosen, number)]))
            reached = float(score(model))
            if reached >= best:
                chosen.append(number)
                best = reached
    except BaseException:
        model.set_weights(start)
        raise
    model.set_weights(_average([ingredients[n] for n in chosen]))
    return Soup(scores=tuple(alone), chosen=tuple(chosen), score=best)


def _average(ingredients: Sequence[Weights]) -> list[Any]:
    if len(ingredients) == 1:
        return list(ingredients[0])
    shares = [1 / len(ingredients)] * len(ingredients)
    return [_mean(arrays, shares) for arrays in zip(*ingredients, strict=True)]


def _mean(arrays: Sequence[Any], shares: Sequence[float]) -> Any:
    """The weighted mean in float64; whole numbers (counters, seeds) are the last array's."""
    last = np.asarray(arrays[-1])
    if last.dtype.kind in "iub":
        return last
    total = sum(np.asarray(array, "float64") * share for array, share in zip(arrays, shares, strict=True))
    return np.asarray(total).astype(last.dtype)


def _check_weights(model: Any, ingredients: Sequence[Weights], asked: str) -> None:
    wanted = [tuple(weight.shape) for weight in model.weights]
    problems = []
    for number, weights in enumerate(ingredients):
        shapes = [np.shape(weight) for weight in weights]
        if shapes != wanted:
            apart = [f"{found} for {need}" for found, need in zip(shapes, wanted, strict=False) if found != need][:1]
            what = f"weights {number}" if len(ingredients) > 1 else "weights"
            problems.append(
                f"{what}: {len(shapes)} arrays for {len(wanted)}" + (f", the first that differs {apart[0]}" if apart else "")
            )
    if problems:
        raise ModelError(asked, found=problems, fix="take them with model.get_weights() from a copy of this model")
