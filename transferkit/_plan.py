"""What every plan is: a frozen value made of the calls that wrote it.

A plan is a class name, the arguments of its constructor and a tuple of steps, one for each method called. Equality, hash,
the repr (which is the chain) and JSON there and back all follow from those. A plan holds no model, array or device.

Imports the standard library, NumPy and `errors` only.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from typing_extensions import Self

from transferkit.errors import PlanError, did_you_mean

__all__ = ["FORMAT_VERSION", "FrozenMapping", "JsonValue", "Plan", "PlanValue", "Step", "freeze", "register_value"]

FORMAT_VERSION = 1

JsonValue = Any  # None, bool, int, float, str, lists and dicts of these: recursive, so not written out


@runtime_checkable
class PlanValue(Protocol):
    """A value of another kind that a plan may hold: hashable, and with a JSON form of its own.

    A class is made known by `register_value`; `to_json` gives its content, `from_json` takes it back. Plans are plan values
    themselves.
    """

    def to_json_value(self) -> JsonValue: ...

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> Self: ...


_VALUE_TYPES: dict[str, type[Any]] = {}


def register_value(cls: type[Any]) -> type[Any]:
    """Class decorator: makes a kind of plan value known to `from_json`, under its class name."""
    _VALUE_TYPES[cls.__name__] = cls
    return cls


class FrozenMapping(Mapping[str, Any]):
    """A dict that can be hashed; keeps the order in which it was written, compares without it."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = {str(key): freeze(value) for key, value in items.items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def freeze(value: Any, *, where: str = "a plan") -> Any:
    """`value` as a plan keeps it: lists as tuples, dicts as frozen mappings, NumPy scalars as Python's, paths as strings.

    Raises:
        PlanError: for a value that can't be kept, arrays and open objects among them.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item, where=where) for item in value)
    if isinstance(value, Mapping):
        return FrozenMapping(value)
    if isinstance(value, PlanValue):
        return value
    raise PlanError(
        f"Keeping a value in {where}.",
        found=f"a {type(value).__name__}, which has no place in a plan",
        cause="a plan holds settings, to be compared, printed and replayed; arrays, models and devices go to the verbs",
        fix="give a number, a string, a list or dict of these, or another plan",
    )


def _to_json(value: Any) -> JsonValue:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, FrozenMapping):
        return {"$map": {key: _to_json(item) for key, item in value.items()}}
    if isinstance(value, PlanValue):
        return {"$kind": type(value).__name__, "value": value.to_json_value()}
    return value


def _from_json(value: JsonValue, custom_objects: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item, custom_objects) for item in value)
    if isinstance(value, dict):
        if set(value) == {"$map"}:
            return FrozenMapping({key: _from_json(item, custom_objects) for key, item in value["$map"].items()})
        kind = _VALUE_TYPES.get(value.get("$kind", ""))
        if kind is None:
            raise PlanError(
                "Reading a plan from JSON.",
                found=f"a value of the unknown kind {value.get('$kind')!r}{did_you_mean(str(value.get('$kind')), _VALUE_TYPES)}",
                cause="the text was not written by `to_json`, or by a later version of transferkit",
            )
        return kind.from_json_value(value["value"], custom_objects=custom_objects)
    return value


@dataclass(frozen=True)
class Step:
    """One method call of a chain: its name and its arguments, without those left at their default."""

    name: str
    positional: tuple[Any, ...]
    keyword: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        parts = [repr(value) for value in self.positional]
        parts += [f"{key}={value!r}" for key, value in self.keyword]
        return f"{self.name}({', '.join(parts)})"

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments alone, as a dict."""
        return dict(self.keyword)


def _as_step(name: str, function: Callable[..., Any], arguments: Mapping[str, Any], *, where: str) -> Step:
    """The call of `function` (an unbound method) with `arguments`, in its signature's order, defaults left out."""
    positional: list[Any] = []
    keyword: list[tuple[str, Any]] = []
    may_be_positional = True
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.extend(freeze(value, where=where) for value in arguments[parameter.name])
            may_be_positional = False
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            keyword.extend((key, freeze(value, where=where)) for key, value in arguments.get(parameter.name, {}).items())
            continue
        value = freeze(arguments[parameter.name], where=where)
        default = parameter.default
        if default is not parameter.empty and type(value) is type(default) and value == default:
            may_be_positional = False
        elif may_be_positional and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(value)
        else:
            keyword.append((parameter.name, value))
    return Step(name, tuple(positional), tuple(keyword))


class Plan:
    """The base of the four plans and of selectors: a constructor call and the steps after it.

    A subclass writes each of its methods as: check the arguments, then `return self._then("method", argument=argument, ...)`
    with every parameter of the method. What the plan means is read from `_steps` where it is needed.
    """

    __slots__ = ("_start", "_steps")

    _start: Step
    _steps: tuple[Step, ...]
    #: Names of the methods that are links of the chain; the only ones `from_json` will call.
    STEPS: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_value(cls)

    def _begin(self, /, **arguments: Any) -> None:
        """Called once, by the constructor of the subclass, with all its arguments."""
        cls = type(self)
        object.__setattr__(self, "_start", _as_step(cls.__name__, cls.__init__, arguments, where=cls.__name__))
        object.__setattr__(self, "_steps", ())

    def _then(self, method: str, /, **arguments: Any) -> Self:
        cls = type(self)
        link = _as_step(method, getattr(cls, method), arguments, where=f"{cls.__name__}.{method}")
        new = cls.__new__(cls)
        object.__setattr__(new, "_start", self._start)
        object.__setattr__(new, "_steps", (*self._steps, link))
        return new

    def _bound(self, step: Step) -> dict[str, Any]:
        """The arguments of a step by their parameters' names, defaults filled in."""
        bound = inspect.signature(getattr(type(self), step.name)).bind(self, *step.positional, **step.arguments)
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is a frozen value; its methods give a new one")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._start == other._start and self._steps == other._steps

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._start, self._steps))

    def __repr__(self) -> str:
        return ".".join(map(repr, (self._start, *self._steps)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unpickle, (type(self), self._start, self._steps))

    def to_json_value(self) -> JsonValue:
        return [
            [link.name, _to_json(link.positional), {key: _to_json(value) for key, value in link.keyword}]
            for link in (self._start, *self._steps)
        ]

    @classmethod
    def from_json_value(cls, value: JsonValue, *, custom_objects: Mapping[str, Any]) -> Self:
        if not isinstance(value, list) or not value:
            raise PlanError(f"Reading a {cls.__name__} from JSON.", found="no chain of steps where one must stand")
        plan: Any = None
        for name, positional, keyword in value:
            if plan is None:
                if name != cls.__name__:
                    raise PlanError(f"Reading a {cls.__name__} from JSON.", found=f"a {name!r} instead")
                call: Callable[..., Any] = cls
            elif name in cls.STEPS:
                call = getattr(plan, name)
            else:
                raise PlanError(
                    f"Reading a {cls.__name__} from JSON.",
                    found=f"an unknown step {name!r}{did_you_mean(str(name), cls.STEPS)}",
                    cause="the text was written by another version of transferkit, or by hand",
                )
            plan = call(
                *_from_json(positional, custom_objects),
                **{key: _from_json(item, custom_objects) for key, item in keyword.items()},
            )
        return plan  # type: ignore[no-any-return]  # every step of a plan gives the same class

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` turns back into an equal plan."""
        return json.dumps({"transferkit": FORMAT_VERSION, **_to_json(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, *, custom_objects: Mapping[str, Any] | None = None) -> Self:
        """The plan that `to_json` wrote.

        Args:
            text: What `to_json` gave.
            custom_objects: Name → class or function, for what the plan uses and Keras doesn't know. Nothing is imported or run
                because of a name in the text.

        Raises:
            PlanError: when the text is no plan, one of another kind, or of a later version.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise PlanError(f"Reading a {cls.__name__} from JSON.", found=f"text that is no JSON ({error})") from error
        version = content.get("transferkit") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise PlanError(
                f"Reading a {cls.__name__} from JSON.",
                found=f"format version {version!r}; this version of transferkit reads {FORMAT_VERSION}",
                fix="write the plan again with `to_json`, or install the version of transferkit that wrote it",
            )
        if content.get("$kind") != cls.__name__:
            raise PlanError(
                f"Reading a {cls.__name__} from JSON.",
                found=f"a {content.get('$kind')!r}",
                fix=f"{content.get('$kind')}.from_json(text)",
            )
        return cls.from_json_value(content["value"], custom_objects=custom_objects or {})


def _unpickle(cls: type[Plan], start: Step, steps: tuple[Step, ...]) -> Plan:
    plan = cls.__new__(cls)
    object.__setattr__(plan, "_start", start)
    object.__setattr__(plan, "_steps", steps)
    return plan


def steps_named(plan: Plan, names: Iterable[str]) -> list[Step]:
    """The steps of the plan that carry one of the names, in order."""
    wanted = set(names)
    return [link for link in plan._steps if link.name in wanted]
