"""What each phase trains: a phase of the plan resolved against a real model, layer by layer, and put into effect.

Freezing is `trainable=False` on the layers themselves. Calling a backbone with `training=False` doesn't hold: `fit` overrides
it, and its BatchNorm statistics move (keras-team/keras#20285). May import Keras and the floors below.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from transferkit._keras import keras
from transferkit.building.heads import leaf_layers
from transferkit.building.parts import parts_of
from transferkit.errors import TrainingError, shorten
from transferkit.tuning.layers import Layers
from transferkit.tuning.low_rank import Lowered, LowRank, lower, lowerable
from transferkit.tuning.noise import drops_paths, noise_attribute, restore, set_stochastic_depth, turn_off
from transferkit.tuning.rates import multipliers_of
from transferkit.tuning.snapshots import Snapshot

__all__ = ["BATCH_NORM_POLICIES", "Phase", "PhasePlan", "ResolvedLayer", "in_effect", "resolve"]

BATCH_NORM_POLICIES = ("freeze", "adapt", "recalibrate")


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
        stochastic_depth: How often the last residual branch is dropped, those before it less; None as the model has it.
    """

    name: str
    train: Layers
    epochs: int
    learning_rate: float | None
    layer_decay: float | None = None
    schedule: Any = None
    stochastic_depth: float | None = None


@dataclass(frozen=True)
class ResolvedLayer:
    """One layer of the model in one phase.

    Args:
        path: Its name, with those of the models it lies in.
        layer: The layer.
        trained: Whether its weights train.
        batch_norm: For BatchNorm, `frozen` (its statistics are used and kept), `adapts` (the batch's are used, its own move) or
            `recalibrated` (they are the training data's from the phase's start on, and kept); else empty.
        silenced: Whether its dropout or noise is off, because what comes after it is frozen.
        parameters: How many numbers its weights hold.
        shape: Of its output, as text.
        multiplier: Factor on the learning rate.
        frozen_parts: The BatchNorm layers within it that stay frozen though it trains.
        lowered: The parts of it that train through factors, and how; their kernels stay as they are until the phase ends.
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
    lowered: tuple[Any, ...] = field(default=(), repr=False)
    low_rank: LowRank | None = None

    @property
    def trained_parameters(self) -> int:
        """How many numbers train: the factors' instead of the kernels' where there are factors."""
        if not self.trained:
            return 0
        whole = self.parameters
        if self.low_rank is not None:
            for part in self.lowered:
                kernel = _largest(part)
                # Keras splits a kernel of more axes before its last: (rows × rank) and (rank × columns).
                whole += self.low_rank.rank * (int(np.prod(kernel.shape[:-1])) + kernel.shape[-1]) - int(np.prod(kernel.shape))
        return whole


@dataclass(frozen=True)
class PhasePlan:
    """A phase resolved against a model.

    Args:
        phase: The phase.
        layers: Every layer, in the model's order.
        own_weights: Weights that a subclassed model keeps beside its layers; they train when the phase trains everything.
        dropout_on: Whether dropout and noise of what is frozen stay on.
    """

    phase: Phase
    layers: tuple[ResolvedLayer, ...]
    own_weights: tuple[Any, ...] = field(default=(), repr=False)
    dropout_on: bool = False

    @property
    def trained_parameters(self) -> int:
        """How many numbers train."""
        own = self.own_parameters if self.phase.train.is_everything else 0
        return own + sum(row.trained_parameters for row in self.layers)

    @property
    def own_parameters(self) -> int:
        """How many numbers a subclassed model keeps beside its layers."""
        return _count(self.own_weights)

    @property
    def parameters(self) -> int:
        """How many numbers the model's weights hold."""
        return self.own_parameters + sum(row.parameters for row in self.layers)


def _count(weights: Sequence[Any]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)


def _is_fresh(layer: Any) -> bool:
    """Whether a BatchNorm layer still has its initial statistics, so that there is nothing to preserve."""
    mean, variance = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
    return bool(np.all(mean == 0) and np.all(variance == 1))


def _frozen_parts(layer: Any) -> tuple[Any, ...]:
    """The BatchNorm layers within a block of the user's that have statistics to keep."""
    normalisations = (part for part in parts_of(layer) if isinstance(part, keras.layers.BatchNormalization))
    return tuple(part for part in normalisations if part is not layer and not _is_fresh(part))


def resolve(
    model: Any,
    phase: Phase,
    *,
    batch_norm: str,
    rates: Sequence[tuple[Layers, float]] = (),
    low_rank: tuple[Layers, LowRank] | None = None,
    dropout_on: bool = False,
) -> PhasePlan:
    """What `phase` means for `model`, without changing it.

    Args:
        model: A built model.
        phase: The phase.
        batch_norm: `freeze`: BatchNorm keeps its statistics and its weights even where its neighbours train; one that still has
            its initial statistics adapts, for it has none to keep. `adapt`: BatchNorm trains with the layers selected.
        rates: Groups of layers with a factor each on the learning rate.
        low_rank: Which layers train through factors, where they train, and how.
        dropout_on: Whether dropout and noise of what is frozen stay on.

    Raises:
        ModelError: when the phase selects nothing.
    """
    chosen = set(phase.train.resolve(model))
    multipliers = multipliers_of(model, layer_decay=phase.layer_decay, rates=rates)
    thin = set(low_rank[0].resolve(model)) if low_rank else set()
    leaves = list(leaf_layers(model))
    rows: list[ResolvedLayer] = []
    frozen_after = False
    # A dropped path belongs to the branch that it ends.
    branch_frozen = {}
    frozen_before = False
    for path, layer in leaves:
        if layer.weights and not isinstance(layer, keras.layers.BatchNormalization):
            frozen_before = path not in chosen
        branch_frozen[path] = frozen_before
    # Backwards, because dropout belongs to the part that comes after it: dropout in front of a frozen layer is frozen too.
    for path, layer in reversed(leaves):
        trained = path in chosen and bool(layer.weights)
        mode = ""
        if isinstance(layer, keras.layers.BatchNormalization):
            adapts = trained and (batch_norm == "adapt" or _is_fresh(layer))
            mode = "adapts" if adapts else "recalibrated" if trained and batch_norm == "recalibrate" else "frozen"
            trained = adapts
        if layer.weights and not isinstance(layer, keras.layers.BatchNormalization):
            frozen_after = not trained
        lowered = tuple(lowerable(layer)) if trained and path in thin else ()
        rows.append(
            ResolvedLayer(
                path=path,
                layer=layer,
                trained=trained,
                batch_norm=mode,
                silenced=not dropout_on
                and noise_attribute(layer) is not None
                and (branch_frozen[path] if drops_paths(layer) else frozen_after),
                parameters=_count(layer.weights),
                shape=_shape(layer),
                multiplier=multipliers.get(path, 1.0),
                frozen_parts=_frozen_parts(layer) if trained and batch_norm != "adapt" else (),
                lowered=lowered,
                low_rank=low_rank[1] if low_rank and lowered else None,
            )
        )
    in_layers = {id(weight) for _, layer in leaves for weight in layer.weights}
    own = tuple(weight for weight in model.weights if id(weight) not in in_layers and weight.trainable)
    return PhasePlan(phase=phase, layers=tuple(reversed(rows)), own_weights=own, dropout_on=dropout_on)


def _shape(layer: Any) -> str:
    try:
        return " + ".join(str(tuple(tensor.shape[1:])) for tensor in keras.tree.flatten(layer.output))
    except (AttributeError, ValueError):  # layers of a subclassed model keep no symbolic output
        return "?"


def _frozen_weights(plan: PhasePlan) -> dict[str, Sequence[Any]]:
    """For each layer the phase freezes, its weights, BatchNorm statistics among them."""
    found = {row.path: row.layer.weights for row in plan.layers if not row.trained and row.layer.weights}
    for row in plan.layers:
        for number, part in enumerate(row.lowered):
            base = [weight for weight in part.weights if not weight.trainable]
            found[f"{row.path} (below its factors, {number})" if number else f"{row.path} (below its factors)"] = base
    if plan.own_weights and not plan.phase.train.is_everything:
        found["(the model's own)"] = plan.own_weights
    return found


@contextlib.contextmanager
def in_effect(model: Any, plan: PhasePlan) -> Iterator[None]:
    """Freezes and silences what the phase says for the time of the block, which must compile the model anew.

    At the end dropout gets its rate back and factors are added into their kernels; the `trainable` flags stay as the phase set
    them, to agree with what was compiled.

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
    deep = [] if plan.phase.stochastic_depth is None else set_stochastic_depth(model, plan.phase.stochastic_depth)
    silenced = turn_off(_noisy(plan))
    lowered: list[Lowered] = []
    for row in plan.layers:
        if row.low_rank is not None:
            lowered.extend(lower(row.lowered, row.low_rank))
    frozen = {path: Snapshot(weights) for path, weights in _frozen_weights(plan).items()}
    try:
        yield
    finally:
        restore([*deep, *silenced])
        changed = [path for path, snapshot in frozen.items() if snapshot.changed()]
        for item in lowered:
            item.merge()
        # No layer's flag brings these back, and the next phase must find them as they were.
        for weight in plan.own_weights:
            weight.trainable = True
    if changed:
        raise TrainingError(
            f"Training the phase {plan.phase.name!r} with {len(frozen)} layers frozen.",
            found=f"the weights of {shorten(changed)} changed all the same",
            cause="a callback, a custom train_step or a layer that writes its own weights changed them",
            fix="select them in the phase's train=, or leave them alone in the code that wrote them",
        )


def _noisy(plan: PhasePlan) -> list[Any]:
    """The layers whose noise is off in the phase: in front of what is frozen, and within it."""
    found: list[Any] = []
    for row in plan.layers:
        frozen_block = not row.trained and bool(row.layer.weights) and not plan.dropout_on
        found.extend(parts_of(row.layer) if frozen_block else [row.layer] if row.silenced else [])
    return found


def _largest(part: Any) -> Any:
    """The kernel among a layer's weights."""
    return max(part.weights, key=lambda weight: int(np.prod(weight.shape)))
