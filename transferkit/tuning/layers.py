"""`Layers`: which layers of a model, as a value that is resolved against the real model only when a plan meets it.

Selectors join by `|`, `&` and `-`. Order is the model's own, nested models opened. May import Keras and the floors below.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, final

from transferkit._keras import keras
from transferkit._plan import JsonValue, register_value
from transferkit.building.heads import head_layers, leaf_layers
from transferkit.errors import ModelError, PlanError, did_you_mean, shorten

__all__ = ["Layers"]


@final
@register_value
class Layers:
    """A selection of layers, made by one of its named constructors.

    Example:
        >>> import transferkit as tk
        >>> tk.Layers.named("block_1*") | tk.Layers.head()
        Layers.named('block_1*') | Layers.head()
    """

    __slots__ = ("_arguments", "_kind")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self._kind = kind
        self._arguments = arguments

    @classmethod
    def all(cls) -> Layers:
        """Every layer."""
        return cls("all", ())

    @classmethod
    def none(cls) -> Layers:
        """No layer."""
        return cls("none", ())

    @classmethod
    def head(cls) -> Layers:
        """The last layer with weights on the way to each output."""
        return cls("head", ())

    @classmethod
    def last(cls, n: int) -> Layers:
        """The last `n` layers that have weights."""
        return cls("last", (_at_least_one("last", n),))

    @classmethod
    def first(cls, n: int) -> Layers:
        """The first `n` layers that have weights."""
        return cls("first", (_at_least_one("first", n),))

    @classmethod
    def named(cls, *patterns: str) -> Layers:
        """The layers whose name or path matches one of the patterns (`*`, `?`, `[abc]`), or that lie in a model that does."""
        if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise PlanError("Layers.named was called.", found=f"{patterns!r}", fix='give names: Layers.named("block_1*")')
        return cls("named", patterns)

    @classmethod
    def of(cls, *classes: type[Any]) -> Layers:
        """The layers of one of the classes, subclasses among them."""
        if not classes or not all(isinstance(item, type) for item in classes):
            raise PlanError(
                "Layers.of was called.", found=f"{classes!r}", fix="give classes: Layers.of(keras.layers.BatchNormalization)"
            )
        return cls("of", classes)

    @classmethod
    def above(cls, name: str) -> Layers:
        """The layers after the last one that `name` matches, up to the outputs; that one itself isn't among them."""
        return cls("above", (name,))

    @classmethod
    def below(cls, name: str) -> Layers:
        """The layers before the first one that `name` matches, down to the inputs; that one itself isn't among them."""
        return cls("below", (name,))

    def __or__(self, other: Layers) -> Layers:
        return Layers("|", (self, other))

    def __and__(self, other: Layers) -> Layers:
        return Layers("&", (self, other))

    def __sub__(self, other: Layers) -> Layers:
        return Layers("-", (self, other))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers) and (self._kind, self._arguments) == (other._kind, other._arguments)

    def __hash__(self) -> int:
        return hash((self._kind, self._arguments))

    def __repr__(self) -> str:
        if self._kind in ("|", "&", "-"):
            parts = [f"({item!r})" if item._kind in ("|", "&", "-") else repr(item) for item in self._arguments]
            return f" {self._kind} ".join(parts)
        shown = (item.__name__ if isinstance(item, type) else repr(item) for item in self._arguments)
        return f"Layers.{self._kind}({', '.join(shown)})"

    def to_json_value(self) -> JsonValue:
        if self._kind in ("|", "&", "-"):
            return [self._kind, [item.to_json_value() for item in self._arguments]]
        if self._kind == "of":
            return [self._kind, [keras.saving.get_registered_name(item) for item in self._arguments]]
        return [self._kind, list(self._arguments)]

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> Layers:
        kind, arguments = value
        if kind in ("|", "&", "-"):
            return cls(kind, tuple(cls.from_json_value(item, custom_objects=custom_objects) for item in arguments))
        if kind == "of":
            return cls.of(*(_layer_class(name, custom_objects) for name in arguments))
        if kind not in ("all", "none", "head", "last", "first", "named", "above", "below"):
            raise PlanError("Reading a selection of layers from JSON.", found=f"the unknown kind {kind!r}")
        made: Layers = getattr(cls, kind)(*arguments)
        return made

    @property
    def is_everything(self) -> bool:
        """Whether the selection is of every layer, whatever the model."""
        return self._kind == "all" or (self._kind == "|" and any(item.is_everything for item in self._arguments))

    def resolve(self, model: Any) -> list[str]:
        """The paths of the selected layers in the model's order, nested models opened (`backbone/block_1_conv`).

        Raises:
            ModelError: when the selection is empty because nothing in the model matches; near names are shown.
        """
        leaves = list(leaf_layers(model))
        chosen = self._chosen(model, leaves)
        return [path for path, _ in leaves if path in chosen]

    def _chosen(self, model: Any, leaves: list[tuple[str, Any]]) -> set[str]:
        paths = [path for path, _ in leaves]
        if self._kind == "all":
            return set(paths)
        if self._kind == "none":
            return set()
        if self._kind in ("|", "&", "-"):
            left, right = (item._chosen(model, leaves) for item in self._arguments)
            return set(left | right if self._kind == "|" else left & right if self._kind == "&" else left - right)
        if self._kind == "head":
            heads = {id(layer) for layer in head_layers(model)}
            return self._found([path for path, layer in leaves if id(layer) in heads], model, paths)
        if self._kind in ("last", "first"):
            weighted = [path for path, layer in leaves if layer.weights]
            n = self._arguments[0]
            return self._found(weighted[-n:] if self._kind == "last" else weighted[:n], model, paths)
        if self._kind == "of":
            return self._found([path for path, layer in leaves if isinstance(layer, self._arguments)], model, paths)
        matches = [[path for path in paths if _matches(path, pattern)] for pattern in self._arguments]
        missing = [pattern for pattern, found in zip(self._arguments, matches, strict=True) if not found]
        if missing:
            raise ModelError(
                f"Selecting {self!r} in the model {model.name!r}.",
                found=[f"no layer matches {pattern!r}{did_you_mean(pattern, _names(paths))}" for pattern in missing],
                fix=f"the layers are {shorten(paths)}",
            )
        if self._kind == "above":
            return set(paths[paths.index(matches[0][-1]) + 1 :])
        if self._kind == "below":
            return set(paths[: paths.index(matches[0][0])])
        return {path for found in matches for path in found}

    def _found(self, found: list[str], model: Any, paths: list[str]) -> set[str]:
        if not found:
            raise ModelError(
                f"Selecting {self!r} in the model {model.name!r}.",
                found="no such layer in it",
                fix=f"the layers are {shorten(paths)}",
            )
        return set(found)


def _matches(path: str, pattern: str) -> bool:
    """Whether the pattern fits the path, one of the models it lies in, or the layer's own name."""
    parts = path.split("/")
    candidates = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)] + parts
    return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in candidates)


def _names(paths: list[str]) -> list[str]:
    return sorted({part for path in paths for part in path.split("/")} | set(paths))


def _layer_class(name: str, custom_objects: Mapping[str, Any]) -> type[Any]:
    found = custom_objects.get(name) or keras.saving.get_registered_object(name) or getattr(keras.layers, name, None)
    if not isinstance(found, type):
        raise PlanError(
            "Reading a selection of layers from JSON.",
            found=f"the layer class {name!r}, which isn't Keras's",
            fix=f"from_json(text, custom_objects={{{name!r}: {name}}})",
        )
    return found


def _at_least_one(kind: str, n: int) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise PlanError(f"Layers.{kind} was called.", found=f"{n!r}; it must be a whole number above 0")
    return n
