"""Layers as matching compares them: the arrays or variables under one path, and what their names and kinds say.

Pure: standard library, names and the values of `mapping` only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transferkit.weights.mapping import FileArray, ModelVariable
from transferkit.weights.names import canonical, creation_number, direction_of, is_automatic

__all__ = [
    "OTHER_WORDS",
    "Unit",
    "by_leaf",
    "nested",
    "same_creation_order",
    "same_own_names",
    "shapes_of",
    "told",
    "units_of",
]

# Names that versions of Keras gave the same variable; (kind, variable) or ("", variable) for every kind.
OTHER_WORDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("", "kernel"): ("W", "weights"),
    ("", "bias"): ("b", "biases"),
    ("", "alpha"): ("alphas",),
    ("", "embeddings"): ("W",),
    ("", "moving_mean"): ("running_mean",),
    ("", "moving_variance"): ("running_std",),  # Keras 1 called the variance so
    ("", "recurrent_kernel"): ("U",),
    ("highway", "carry_kernel"): ("W_carry",),
    ("highway", "carry_bias"): ("b_carry",),
    ("depthwiseconv1d", "kernel"): ("depthwise_kernel",),
    ("depthwiseconv2d", "kernel"): ("depthwise_kernel",),
}


@dataclass
class Unit:
    """A layer that owns arrays or variables: its path, kind, and the entries by their name within the layer."""

    path: str
    kind: str
    entries: dict[str, tuple[str, tuple[int, ...]]]  # variable -> (full name, shape)
    index: int

    @property
    def leaf(self) -> str:
        return canonical(self.path).rpartition("/")[2]

    @property
    def direction(self) -> str:
        return direction_of(canonical(self.path))

    @property
    def automatic(self) -> bool:
        """Whether nobody chose its name."""
        return is_automatic(self.leaf, self.kind)

    @property
    def numbered(self) -> bool:
        """Whether Keras made up any part of its path."""
        return self.automatic or any(is_automatic(part) for part in canonical(self.path).split("/")[:-1])

    @property
    def positional(self) -> bool:
        return all(variable.isdigit() for variable in self.entries)

    @property
    def container(self) -> tuple[str, ...]:
        """The models and blocks around it whose names somebody chose."""
        return tuple(part for part in canonical(self.path).split("/")[:-1] if not is_automatic(part))

    def text(self) -> str:
        shapes = ", ".join(f"{variable} {shape}" for variable, (_, shape) in self.entries.items())
        return f"{self.path!r} ({shapes})"


def units_of(entries: Sequence[FileArray] | Sequence[ModelVariable]) -> list[Unit]:
    units: dict[str, Unit] = {}
    for entry in entries:
        unit = units.setdefault(entry.path, Unit(entry.path, entry.kind, {}, len(units)))
        variable = entry.variable
        while variable in unit.entries:
            variable += "'"
        unit.entries[variable] = (entry.name, entry.shape)
    return list(units.values())


def by_leaf(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    """The layers by the innermost part of their path that somebody named."""
    found: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        if chosen := _chosen(unit.path):
            found[chosen[-1]].append(unit)
    return found


def nested(one: str, other: str) -> bool:
    return one.endswith(f"/{other}") or other.endswith(f"/{one}") or one == other or _chosen(one) == _chosen(other)


def _chosen(path: str) -> tuple[str, ...]:
    """The parts of a path that somebody named."""
    return tuple(part for part in path.split("/") if not is_automatic(part))


def told(units: Sequence[Unit], most: int = 6) -> str:
    shown = ", ".join(unit.text() for unit in units[:most])
    return shown if len(units) <= most else f"{shown} and {len(units) - most} more"


def shapes_of(unit: Unit) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for _, shape in unit.entries.values())


def same_creation_order(pairs: Sequence[tuple[Unit, Unit]]) -> bool:
    """Whether layers of equal shapes, all named by Keras, were made in the same order on both sides."""
    if not all(s.numbered and t.numbered for s, t in pairs):
        return False
    for side in (0, 1):
        numbers = [creation_number(pair[side].path) for pair in pairs]
        if numbers != sorted(numbers) or len(set(numbers)) < len(numbers):
            return False
    return True


def same_own_names(pairs: Sequence[tuple[Unit, Unit]]) -> bool:
    """Whether layers of equal shapes go by their own names, each once: the query of the one attention is the other's."""
    names = [s.leaf for s, t in pairs if s.leaf == t.leaf and not s.automatic]
    return len(set(names)) == len(pairs)
