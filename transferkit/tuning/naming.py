"""The names under which checkpoints hold variables: their kind, and a number within it. May import Keras and the floors below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transferkit.errors import StorageError
from transferkit.tuning.checkpoint import Array
from transferkit.tuning.snapshots import as_array, copies_of

__all__ = ["arrays_of", "assign", "named", "optimizer_variables"]


def named(kind: str, variables: Sequence[Any]) -> list[tuple[str, Any]]:
    """The variables with their names, which say of what kind they are and which of these."""
    return [(f"{kind}/{number}", variable) for number, variable in enumerate(variables)]


def _part(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name


def arrays_of(names: Sequence[str], values: Sequence[Sequence[Any]]) -> dict[str, Array]:
    """What a checkpoint holds for variables of these names, of which a `Reader` read these values."""
    return {
        _part(name, number): as_array(part)
        for name, parts in zip(names, values, strict=True)
        for number, part in enumerate(parts)
    }


def optimizer_variables(optimizer: Any) -> list[Any]:
    """Each of the optimizer's, and of the one that it scales the loss for, once."""
    if optimizer is None:
        return []
    both = [*optimizer.variables, *getattr(getattr(optimizer, "inner_optimizer", None), "variables", [])]
    return list({id(variable): variable for variable in both}.values())


def assign(variables: Sequence[tuple[str, Any]], arrays: Mapping[str, Array]) -> None:
    """Gives variables what a checkpoint holds for them, checked before the first is changed."""
    pairs = [(_part(name, number), part) for name, variable in variables for number, part in enumerate(copies_of(variable))]
    wrong = [
        f"{name}: {'nothing' if name not in arrays else tuple(arrays[name].shape)} for a variable of shape {tuple(part.shape)}"
        for name, part in pairs
        if name not in arrays or tuple(arrays[name].shape) != tuple(part.shape)
    ]
    if wrong:
        raise StorageError(
            "Going on with a run from its checkpoint.",
            found=wrong[:5],
            cause="model, optimizer or metrics keep other state than when it was written: another version, or other devices",
            fix="go on with the versions and devices it was begun with, or start anew in another folder",
        )
    for name, part in pairs:
        part.assign(arrays[name])
