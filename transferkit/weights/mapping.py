"""What matching takes and what it gives: arrays, variables and rules, pairs with their reasons. Values only; no imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FileArray", "Match", "ModelVariable", "Pair", "Rules"]


@dataclass(frozen=True)
class FileArray:
    """One array of a file as matching sees it.

    Args:
        name: Its name in the file.
        shape: Its shape in the file.
        path: The path of its layer, parts joined by `/`, as far as the file tells.
        variable: Its name within the layer; a number where the file knows the order only.
        kind: The class of its layer, or empty.
    """

    name: str
    shape: tuple[int, ...]
    path: str = ""
    variable: str = ""
    kind: str = ""


@dataclass(frozen=True)
class ModelVariable:
    """One variable of a model as matching sees it.

    Args:
        name: Its path in the model, unique: `backbone/conv1/kernel`.
        shape: Its shape.
        path: The path of the layer that owns it: `backbone/conv1`.
        variable: Its name within that layer: `kernel`.
        kind: The class of that layer: `Conv2D`.
        also: Its other paths, where layers are shared or weights are tied.
    """

    name: str
    shape: tuple[int, ...]
    path: str = ""
    variable: str = ""
    kind: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What the caller asked for.

    Args:
        only: Patterns; variables of the model that match none of them are left alone.
        skip: Patterns; variables of the model and arrays of the file that match one are left out.
        skip_in_model: The same for the model's variables alone.
        skip_in_file: The same for the file's arrays alone.
        rename: Pairs of a regular expression and its replacement, applied to the file's names in order.
        map: From a variable or a layer of the model to an array or a layer of the file.
        by_order: Whether layers may be matched by their order alone.
        words: What the file's framework calls a variable that Keras calls by the key.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    skip_in_model: tuple[str, ...] = ()
    skip_in_file: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    map: Mapping[str, str] = field(default_factory=dict)
    by_order: bool = False
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A variable and the array it takes.

    Args:
        target: The variable's name.
        source: The array's name in the file.
        how: `rule`, `name`, `path`, `structure` or `order`.
    """

    target: str
    source: str
    how: str


@dataclass(frozen=True)
class Match:
    """The outcome.

    Args:
        pairs: What belongs together, in the model's order.
        twins: Further arrays for a variable that has its own already, because the model ties what the file lists twice; their
            content must be equal.
        missing: Variables without an array, each with the reason.
        unused: Arrays without a variable, each with the reason.
        skipped: Variables a rule left out, each with the rule.
        left_out: Arrays a rule left out, each with the rule.
        undecided: The names among `missing` and `unused` that an ambiguity in `problems` speaks of already.
        problems: What can't be decided or doesn't fit, as sentences.
        notes: What the caller should know though nothing is wrong.
        rules: The calls that would settle `missing` and `unused`.
    """

    pairs: tuple[Pair, ...]
    twins: tuple[Pair, ...]
    missing: Mapping[str, str]
    unused: Mapping[str, str]
    skipped: Mapping[str, str]
    left_out: Mapping[str, str]
    undecided: frozenset[str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    rules: tuple[str, ...]
