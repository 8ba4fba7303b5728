"""What the replicas of a strategy can't do as one device does it, in words, before training. May import Keras and the floors
below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transferkit._keras import keras
from transferkit.building.graph import makes_mask
from transferkit.building.heads import leaf_layers
from transferkit.errors import PlacementError, shorten
from transferkit.tuning.phases import PhasePlan
from transferkit.tuning.replicated import own_steps

__all__ = ["check_batch", "differences"]


def check_batch(rows: int, strategy: Any) -> None:
    """Raises a PlacementError for batches of fewer rows than there are replicas to share them.

    Args:
        rows: Of a batch.
        strategy: The strategy, or None on one device.
    """
    if strategy is not None and rows < strategy.num_replicas_in_sync:
        raise PlacementError(
            f"Sharing batches of {rows} rows among {strategy.num_replicas_in_sync} replicas.",
            found="fewer rows than replicas",
            fix="give larger batches, or fewer devices or workers",
        )


def differences(model: Any, plans: Sequence[PhasePlan], strategy: Any) -> list[str]:
    """Notes on where training by a strategy gives other numbers than one device at the same batch size; none where it doesn't.

    Args:
        model: The model.
        plans: The phases.
        strategy: The strategy, or None on one device.

    Raises:
        PlacementError: for a model whose own steps can't be run by several workers.
    """
    if strategy is None:
        return []
    replicas = strategy.num_replicas_in_sync
    found = []
    if own := own_steps(model):
        raise PlacementError(
            f"Training the model {model.name!r} by {replicas} replicas.",
            found=f"{shorten(own)} of its own",
            cause="of such a step nothing is known, so it can't be shared among replicas with the same result",
            fix="train it on one device, or write a loss and metrics instead",
        )
    rows = {id(row.layer): row for plan in plans for row in plan.layers}
    drawing = [path for path, layer in leaf_layers(model) if _draws(layer) and not _silent(layer, plans)]
    if drawing:
        found.append(
            f"Each of {replicas} replicas draws at random for itself, so one device would draw otherwise: {shorten(drawing)}."
        )
    # Keras takes the statistics of all replicas' rows only where there is no mask.
    masks = any(makes_mask(layer) for _, layer in leaf_layers(model))
    apart = [
        row.path for row in rows.values() if row.batch_norm == "adapts" and (masks or not hasattr(row.layer, "synchronized"))
    ]
    if apart:
        why = ", in a model with masks" if masks else ""
        found.append(f"BatchNorm of each of {replicas} replicas takes the statistics of its own rows{why}: {shorten(apart)}.")
    trained = {id(row.layer) for plan in plans for row in plan.layers if row.trained}
    moved = [path for path, layer in leaf_layers(model) if id(layer) in trained and _keeps(layer)]
    if moved:
        found.append(
            f"Numbers that layers keep besides weights are moved by the rows of each of {replicas} replicas: {shorten(moved)}."
        )
    return found


def _draws(layer: Any) -> bool:
    return any(variable.path.endswith("seed_generator_state") for variable in layer.variables) and not _idle(layer)


def _idle(layer: Any) -> bool:
    """Dropout that drops nothing."""
    return isinstance(layer, (keras.layers.Dropout, keras.layers.SpatialDropout1D)) and not layer.rate


def _silent(layer: Any, plans: Sequence[PhasePlan]) -> bool:
    """Whether the layer draws nothing in any phase."""
    return all(any(row.layer is layer and row.silenced for row in plan.layers) for plan in plans)


def _keeps(layer: Any) -> bool:
    """Whether a layer has numbers that no gradient ever moves, and isn't known to keep them alike."""
    known = (keras.layers.BatchNormalization, keras.layers.Normalization)
    frozen = not layer.trainable  # in which case Keras counts every weight among those that don't train
    if frozen:
        layer.trainable = True
    numbers = [item for item in layer.non_trainable_weights if "float" in keras.backend.standardize_dtype(item.dtype)]
    if frozen:
        layer.trainable = False
    return not isinstance(layer, known) and bool(numbers)
