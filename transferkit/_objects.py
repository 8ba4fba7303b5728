"""Keras objects and functions as plans keep them: a recipe for a fresh one, never the thing itself.

A layer, optimizer or loss given to a plan is taken down as its class and configuration, so that each build or fit makes its own
and two runs of one plan share nothing. A layer or model that already has weights is held by reference and copied, weights
included, at each use: a configuration alone would lose what it learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transferkit._keras import keras
from transferkit._plan import JsonValue, register_value
from transferkit.errors import ModelError, PlanError, did_you_mean

__all__ = ["FunctionReference", "HeldModel", "KerasObject", "as_value", "check_names", "copy_of"]


@register_value
class FunctionReference:
    """A function of the user's: compared by identity, written to JSON as its name."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @property
    def name(self) -> str:
        """The name under which Keras knows the function, or its own."""
        return str(keras.saving.get_registered_name(self.function))

    def fresh(self) -> Callable[..., Any]:
        """The function."""
        return self.function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionReference) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return str(getattr(self.function, "__name__", self.function))

    def to_json_value(self) -> JsonValue:
        return self.name

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> FunctionReference:
        function = custom_objects.get(value) or keras.saving.get_registered_object(value)
        if function is None:
            raise PlanError(
                "Reading a plan from JSON.",
                found=f"the function {value!r}, which only its author has{did_you_mean(value, custom_objects)}",
                fix=f"from_json(text, custom_objects={{{value!r}: the_function}})",
            )
        return cls(function)


@register_value
class KerasObject:
    """The class and configuration of a Keras object, from which `fresh` makes a new one at each use."""

    __slots__ = ("_config", "_custom", "_trusted")

    def __init__(self, thing: Any) -> None:
        try:
            config = keras.saving.serialize_keras_object(thing)
            self._config = json.dumps(config, sort_keys=True)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise PlanError(
                f"Taking a {type(thing).__name__} into a plan.",
                found=f"it gives no configuration from which a fresh one could be made: {_first_line(error)}",
                cause="its constructor takes arguments, and it has no get_config method that returns them",
                fix=f"write its get_config, or give a function that makes one: lambda: {type(thing).__name__}(...)",
            ) from error
        # Of what hangs on the object only that counts which its configuration names.
        self._custom = {name: custom for name, custom in _custom_objects(thing) if f'"{name}"' in self._config}
        # What the user made in this process may hold a function of theirs (a Lambda layer); what a text names may not.
        self._trusted = True
        try:
            self.fresh()
        except Exception as error:
            raise PlanError(
                f"Taking a {type(thing).__name__} into a plan.",
                found=f"no fresh one can be made of its configuration: {_first_line(error.__context__ or error)}",
                cause="its constructor doesn't take all that its get_config returns, which holds what Keras adds, name and dtype",
                fix="let its __init__ take **kwargs and hand them to super().__init__, or write its get_config and from_config",
            ) from error

    def fresh(self) -> Any:
        """A new object of the same class and configuration."""
        return keras.saving.deserialize_keras_object(
            json.loads(self._config), custom_objects=self._custom, safe_mode=not self._trusted
        )

    @property
    def class_name(self) -> str:
        """The object's class."""
        return str(json.loads(self._config)["class_name"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KerasObject) and self._config == other._config and self._custom == other._custom

    def __hash__(self) -> int:
        return hash(self._config)

    def __repr__(self) -> str:
        name = json.loads(self._config)["config"].get("name")
        return f"<{self.class_name} {name}>" if name else f"<{self.class_name}>"

    def to_json_value(self) -> JsonValue:
        return {"object": json.loads(self._config), "custom": sorted(self._custom)}

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> KerasObject:
        needed = {name: custom_objects.get(name) or keras.saving.get_registered_object(name) for name in value["custom"]}
        missing = [name for name, found in needed.items() if found is None]
        if missing:
            raise PlanError(
                "Reading a plan from JSON.",
                found=[
                    f"the custom object {name!r}, which only its author has{did_you_mean(name, custom_objects)}"
                    for name in missing
                ],
                fix=f"from_json(text, custom_objects={{{', '.join(f'{name!r}: {name}' for name in missing)}}})",
            )
        new = cls.__new__(cls)
        new._config = json.dumps(value["object"], sort_keys=True)
        new._custom = needed
        new._trusted = False
        try:
            new.fresh()
        except Exception as error:  # Keras raises whatever the configuration led it to
            raise PlanError("Reading a plan from JSON.", found=f"an object Keras can't make: {_first_line(error)}") from error
        return new


@register_value
class HeldModel:
    """A layer or model that has weights already: held by identity, copied at each use, never changed."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    @property
    def class_name(self) -> str:
        """The layer's or model's class."""
        return type(self.thing).__name__

    def fresh(self) -> Any:
        """A copy of the layer or model as it is now, weights included."""
        return copy_of(self.thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldModel) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)

    def __repr__(self) -> str:
        return f"<{type(self.thing).__name__} {self.thing.name}>"

    def to_json_value(self) -> JsonValue:
        raise PlanError(
            "Writing a plan as JSON.",
            found=f"{self!r}, a {type(self.thing).__name__} with weights, which JSON has no room for",
            fix='build on a name instead, .backbone("MobileNetV2"), or load the weights from a file with a WeightLoader',
        )

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> HeldModel:
        del value, custom_objects
        raise PlanError("Reading a plan from JSON.", found="a model held in memory, which `to_json` never writes")


def as_value(thing: Any) -> Any:
    """What a plan keeps for `thing`: a Keras object's recipe, a model held by reference, a function, or the thing itself."""
    if isinstance(thing, (KerasObject, FunctionReference, HeldModel)):
        return thing
    if isinstance(thing, keras.layers.Layer) and (isinstance(thing, keras.Model) or thing.weights or _holds_tables(thing)):
        return HeldModel(thing)
    if isinstance(thing, (str, int, float, bool, type(None), list, tuple, Mapping)):
        return thing
    if hasattr(thing, "get_config") and not isinstance(thing, type):
        return KerasObject(thing)
    if callable(thing):
        return FunctionReference(thing)
    return thing


def copy_of(thing: Any) -> Any:
    """A copy of a layer or model, weights included, that shares no variable with the original.

    Raises:
        ModelError: for a model whose class can't be made again from its configuration.
    """
    if _holds_tables(thing):
        return thing  # Vocabularies aren't weights and can't be copied through them; sharing them is harmless: they don't train.
    try:
        with keras.saving.custom_object_scope(dict(_custom_objects(thing))):
            if isinstance(thing, keras.Sequential) or hasattr(thing, "operations"):
                copy = keras.models.clone_model(thing, clone_function=_copy_layer)
            else:
                copy = type(thing).from_config(thing.get_config())
                if thing.built:
                    copy.build_from_config(thing.get_build_config())
        copy.set_weights(thing.get_weights())
        _settle(copy)
    except ModelError:
        raise
    except Exception as error:  # whatever a user's class raises when made again
        raise ModelError(
            f"Copying the {type(thing).__name__} {thing.name!r}.",
            found=f"its class can't be made again from its configuration: {_first_line(error)}",
            cause="a subclassed model needs get_config, from_config and layers that are built when it is",
            fix=f"give a function that makes the model with its weights: .layer(lambda: make_{thing.name}())",
        ) from error
    return copy


def _settle(thing: Any) -> None:
    """Lets layers that derive values from their weights (Normalization) derive them anew."""
    if isinstance(thing, keras.Model):
        for layer in thing.layers:
            _settle(layer)
    elif hasattr(thing, "finalize_state"):
        thing.finalize_state()


def _copy_layer(layer: Any) -> Any:
    return layer if _holds_tables(layer) else type(layer).from_config(layer.get_config())


def _holds_tables(layer: Any) -> bool:
    """Whether the layer's state is a vocabulary rather than weights (TextVectorization, StringLookup and their kin)."""
    return hasattr(layer, "get_vocabulary")


def _custom_objects(thing: Any, depth: int = 4) -> Iterator[tuple[str, Any]]:
    """The classes and functions within `thing` that Keras can't find by itself, under the names its configuration gives them."""
    if isinstance(thing, (str, bytes, int, float, type(None))) or depth < 0:
        return
    if isinstance(thing, (list, tuple)):
        for item in thing:
            yield from _custom_objects(item, depth - 1)
        return
    if isinstance(thing, dict):
        yield from _custom_objects(list(thing.values()), depth)
        return
    kind = thing if callable(thing) and hasattr(thing, "__qualname__") else type(thing)
    if not _is_object(thing) and kind is not thing:
        return
    if not str(kind.__module__).startswith(("keras.", "tensorflow.", "numpy")):
        yield keras.saving.get_registered_name(kind), kind
    if kind is not thing:
        for name, value in list(vars(thing).items()):
            if not name.startswith(("_metrics", "_tracker", "_inbound", "_outbound")) and value is not thing:
                yield from _custom_objects(value, depth - 1)


def _is_object(thing: Any) -> bool:
    return hasattr(thing, "get_config") or (callable(thing) and hasattr(thing, "__qualname__"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_names(kind: str, given: Any, module: Any, *, also: Sequence[str] = ()) -> None:
    """Raises a PlanError for names that Keras doesn't know, with near ones.

    Args:
        kind: What they name: "loss", "metric", "activation".
        given: A name, or anything that may hold names; what isn't text is passed over.
        module: Where Keras keeps them, `keras.losses` and the like.
        also: Other names that are known.
    """
    unknown = []
    for name in keras.tree.flatten(given):
        if isinstance(name, str) and name not in also:
            try:
                module.get(name)
            except ValueError:
                unknown.append(name)
    if unknown:
        known = [*also, *(name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_"))]
        known = [name for name in known if name not in ("get", "serialize", "deserialize")]
        article = "an" if kind[0] in "aeiou" else "a"
        raise PlanError(
            f"Choosing {article} {kind}.",
            found=[f"no {kind} named {name!r}{did_you_mean(name, known)}" for name in unknown],
            cause="it is misspelt, or one of yours, which has to be given itself and not by name",
        )
