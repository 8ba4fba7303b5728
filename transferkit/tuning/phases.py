"""What each phase trains: a phase of the plan resolved against a real model, layer by layer, and put into effect.

Freezing is `trainable=False` on the layers themselves. Calling a backbone with `training=False` doesn't hold: `fit` overrides
it, and its BatchNorm statistics move (keras-team/keras#20285). May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit.building.graph import NOISE
from transferkit.building.heads import leaf_layers
from transferkit.errors import TrainingError, shorten
from transferkit.tuning.layers import Layers
from transferkit.tuning.rates import multipliers_of

__all__ = ["BATCH_NORM_POLICIES", "Phase", "PhasePlan", "ResolvedLayer", "in_effect", "resolve"]

BATCH_NORM_POLICIES = ("freeze", "adapt")


@dataclass(frozen=True)
class Phase:
    """One phase as the plan words it.

    Args:
        name: Its name.
        train: The layers that train; all others are frozen.
        epochs: How many times it goes over the data.
        learning_rate: The optimizer's, or None for the one it was given with.
        layer_decay: What each block's rate is multiplied with for every block above it, or None for one rate.
        schedule: The course of the rate over the phase (`Schedule`, or a Keras schedule), or None for a constant one.
    """

    name: str
    train: Layers
    epochs: int
    learning_rate: float | None
    layer_decay: float | None = None
    schedule: Any = None


@dataclass(frozen=True)
class ResolvedLayer:
    """One layer of the model in one phase.

    Args:
        path: Its name, with those of the models it lies in.
        layer: The layer.
        trained: Whether its weights train.
        batch_norm: For BatchNorm, `frozen` (its statistics are used and kept) or `adapts` (the batch's are used, its own move);
            else empty.
        silenced: Whether its dropout or noise is off, because what comes after it is frozen.
        parameters: How many numbers its weights hold.
        shape: Of its output, as text.
        multiplier: Factor on the learning rate.
        frozen_parts: The BatchNorm layers within it that stay frozen though it trains.
    """

    path: str
    layer: Any = field(repr=False)
    trained: bool
    batch_norm: str
    silenced: bool
    parameters: int
    shape: str
    multiplier: float = 1.0
    frozen_parts: tuple[Any, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class PhasePlan:
    """A phase resolved against a model.

    Args:
        phase: The phase.
        layers: Every layer, in the model's order.
        own_weights: Weights that a subclassed model keeps beside its layers; they train when the phase trains everything.
    """

    phase: Phase
    layers: tuple[ResolvedLayer, ...]
    own_weights: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def trained_parameters(self) -> int:
        """How many numbers train."""
        own = self.own_parameters if self.phase.train.is_everything else 0
        return own + sum(row.parameters for row in self.layers if row.trained)

    @property
    def own_parameters(self) -> int:
        """How many numbers a subclassed model keeps beside its layers."""
        return _count(self.own_weights)

    @property
    def parameters(self) -> int:
        """How many numbers the model's weights hold."""
        return self.own_parameters + sum(row.parameters for row in self.layers)


def _count(weights: Sequence[Any]) -> int:
    return int(sum(np.prod(weight.shape) for weight in weights))


def parts_of(layer: Any) -> Iterator[Any]:
    """The layer and those it holds in its attributes, lists and dicts, however deep (a wrapper's, a block's of the user's)."""
    seen: set[int] = set()
    waiting = [layer]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, keras.layers.Layer):
            yield item
            waiting.extend(vars(item).values())
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)


def _is_fresh(layer: Any) -> bool:
    """Whether a BatchNorm layer still has its initial statistics, so that there is nothing to preserve."""
    mean, variance = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
    return bool(np.all(mean == 0) and np.all(variance == 1))


def _frozen_parts(layer: Any) -> tuple[Any, ...]:
    """The BatchNorm layers within a block of the user's that have statistics to keep."""
    normalisations = (part for part in parts_of(layer) if isinstance(part, keras.layers.BatchNormalization))
    return tuple(part for part in normalisations if part is not layer and not _is_fresh(part))


def _noise_attribute(layer: Any) -> str | None:
    return next((name for kind, name in NOISE.items() if isinstance(layer, kind)), None)


def resolve(model: Any, phase: Phase, *, batch_norm: str, rates: Sequence[tuple[Layers, float]] = ()) -> PhasePlan:
    """What `phase` means for `model`, without changing it.

    Args:
        model: A built model.
        phase: The phase.
        batch_norm: `freeze`: BatchNorm keeps its statistics and its weights even where its neighbours train; one that still has
            its initial statistics adapts, for it has none to keep. `adapt`: BatchNorm trains with the layers selected.
        rates: Groups of layers with a factor each on the learning rate.

    Raises:
        ModelError: when the phase selects nothing.
    """
    chosen = set(phase.train.resolve(model))
    multipliers = multipliers_of(model, layer_decay=phase.layer_decay, rates=rates)
    leaves = list(leaf_layers(model))
    rows: list[ResolvedLayer] = []
    frozen_after = False
    # Backwards, because dropout belongs to the part that comes after it: dropout in front of a frozen layer is frozen too.
    for path, layer in reversed(leaves):
        trained = path in chosen and bool(layer.weights)
        mode = ""
        if isinstance(layer, keras.layers.BatchNormalization):
            adapts = trained and (batch_norm == "adapt" or _is_fresh(layer))
            mode = "adapts" if adapts else "frozen"
            trained = adapts
        if layer.weights and not isinstance(layer, keras.layers.BatchNormalization):
            frozen_after = not trained
        rows.append(
            ResolvedLayer(
                path=path,
                layer=layer,
                trained=trained,
                batch_norm=mode,
                silenced=frozen_after and _noise_attribute(layer) is not None,
                parameters=_count(layer.weights),
                shape=_shape(layer),
                multiplier=multipliers.get(path, 1.0),
                frozen_parts=_frozen_parts(layer) if trained and batch_norm == "freeze" else (),
            )
        )
    in_layers = {id(weight) for _, layer in leaves for weight in layer.weights}
    own = tuple(weight for weight in model.weights if id(weight) not in in_layers and weight.trainable)
    return PhasePlan(phase=phase, layers=tuple(reversed(rows)), own_weights=own)


def _shape(layer: Any) -> str:
    try:
        return " + ".join(str(tuple(tensor.shape[1:])) for tensor in keras.tree.flatten(layer.output))
    except (AttributeError, ValueError):  # layers of a subclassed model keep no symbolic output
        return "?"


def freeze_digest(plan: PhasePlan) -> dict[str, str]:
    """For each layer the phase freezes, the SHA-256 of its weights' bytes, BatchNorm statistics among them."""
    digests = {row.path: _digest(row.layer.weights) for row in plan.layers if not row.trained and row.layer.weights}
    if plan.own_weights and not plan.phase.train.is_everything:
        digests["(the model's own)"] = _digest(plan.own_weights)
    return digests


def _digest(weights: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(weight)).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def in_effect(model: Any, plan: PhasePlan) -> Iterator[None]:
    """Freezes and silences what the phase says for the time of the block, which must compile the model anew.

    At the end dropout gets its rate back; the `trainable` flags stay as the phase set them, to agree with what was compiled.

    Raises:
        TrainingError: at the end, when a frozen weight has changed.
    """
    model.trainable = True
    for row in plan.layers:
        row.layer.trainable = row.trained
        for part in row.frozen_parts:
            part.trainable = False
    for weight in plan.own_weights:
        weight.trainable = plan.phase.train.is_everything
    silenced = _silence(plan)
    before = freeze_digest(plan)
    try:
        yield
    finally:
        for layer, name, value in reversed(silenced):  # a shared layer stands here twice: its first value is the real one
            setattr(layer, name, value)
        # No layer's flag brings these back, and the next phase must find them as they were.
        for weight in plan.own_weights:
            weight.trainable = True
    after = freeze_digest(plan)
    changed = [path for path, digest in before.items() if after[path] != digest]
    if changed:
        raise TrainingError(
            f"Training the phase {plan.phase.name!r} with {len(before)} layers frozen.",
            found=f"the weights of {shorten(changed)} changed all the same",
            cause="a callback, a custom train_step or a layer that writes its own weights changed them",
            fix="select them in the phase's train=, or leave them alone in the code that wrote them",
        )


def _silence(plan: PhasePlan) -> list[tuple[Any, str, float]]:
    """Turns off the dropout of what is frozen; gives what is needed to turn it on again."""
    changed = []
    for row in plan.layers:
        frozen_block = not row.trained and bool(row.layer.weights)
        parts = parts_of(row.layer) if frozen_block else [row.layer] if row.silenced else []
        for part in parts:
            name = _noise_attribute(part)
            if name is not None:
                changed.append((part, name, getattr(part, name)))
                setattr(part, name, 0.0)
    return changed
