"""A reader of pickles that can build numbers, text, lists, tuples, dicts and tensors, and nothing else.

A pickle is a program for a small stack machine; Python's own machine calls whatever the program names. This one knows the
instructions that data needs, and a list of names that stand for something; any other name is refused. It calls nothing.
Source of the instructions: Python's `pickletools`. Standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Global", "Inert", "PickleError", "RefusedError", "unpickled"]

_MOST_STEPS = 8_000_000
_MOST_STACK = 2_000_000
_MARK = object()


class PickleError(Exception):
    """The program is broken."""


class RefusedError(Exception):
    """The program names something that isn't data."""


@dataclass(frozen=True)
class Global:
    """A name the program mentions: module and name in it."""

    module: str
    name: str


@dataclass
class Inert:
    """What a permitted call stands for where its result isn't needed: the name and its arguments; nothing was called."""

    name: Global
    arguments: tuple[Any, ...] = ()
    state: Any = field(default=None)


def unpickled(
    data: memoryview,
    *,
    find: Callable[[Global], Any],
    call: Callable[[Any, tuple[Any, ...]], Any],
    persistent: Callable[[Any], Any],
) -> tuple[Any, int]:
    """The value a pickle describes, and the offset of the first byte after it.

    Args:
        data: The pickle; what follows it is left alone.
        find: What a name stands for; raises `RefusedError` for those that aren't data.
        call: What a call of such a thing with arguments stands for.
        persistent: What a reference to something outside the pickle stands for.

    Raises:
        PickleError: when it is broken.
        RefusedError: when it names something that isn't data.
    """
    try:
        return _Machine(data, find, call, persistent).run()
    except (struct.error, IndexError, KeyError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise PickleError(f"a broken pickle ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(
        self,
        data: memoryview,
        find: Callable[[Global], Any],
        call: Callable[[Any, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
    ) -> None:
        self.data, self.at = data, 0
        self.find, self.call, self.persistent = find, call, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise PickleError("it ends in the middle")
        piece = bytes(self.data[self.at : self.at + count])
        self.at += count
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.at
        while self.data[end] != 10:
            end += 1
            if end - self.at > 4096:
                raise PickleError("a line without an end")
        return self.take(end - self.at + 1)[:-1].decode("utf-8")

    def marked(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise PickleError("no mark on the stack")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("a mark where a value should be")
        return value

    def run(self) -> tuple[Any, int]:
        for _ in range(_MOST_STEPS):
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.pop(), self.at
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise RefusedError(f"the pickle instruction 0x{code:02x}, which no tensor needs")
            operation(self)
            if len(self.stack) > _MOST_STACK:
                break
        raise RefusedError("a pickle of more steps than any model needs")

    # -- values -------------------------------------------------------------------------------------------------------------

    def text(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)).decode("utf-8", "surrogatepass"))

    def raw(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)))

    def old_text(self, form: str) -> None:
        self.stack.append(self.take(self.number(form)).decode("latin1"))

    def long(self, form: str) -> None:
        count = self.number(form)
        if count > 1024:
            raise PickleError(f"an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def integer_line(self) -> None:
        line = self.line().rstrip("L")
        self.stack.append({"00": False, "01": True}[line] if line in ("00", "01") else int(line))

    # -- containers ---------------------------------------------------------------------------------------------------------

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Inert):
            target.arguments += tuple(items)
        else:
            raise PickleError("items for something that is no list")

    def set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2 or not isinstance(target, (dict, Inert)):
            raise PickleError("pairs for something that is no dict")
        if isinstance(target, Inert):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bool, type(None), tuple)):
                raise PickleError(f"a key of type {type(key).__name__}")
            target[key] = value

    def dict_of(self, items: Sequence[Any]) -> None:
        self.stack.append({})
        self.set_items(items)

    def one_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def one_append(self) -> None:
        value = self.pop()
        self.append([value])

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        # An OrderedDict's attributes (`_metadata` of a state dict) say nothing about tensors.
        elif not isinstance(target, dict):
            raise RefusedError("a state given to something that isn't data")

    # -- names and calls ----------------------------------------------------------------------------------------------------

    def name(self) -> None:
        module, name = self.line(), self.line()
        self.stack.append(self.find(Global(module, name)))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("a name that is no text")
        self.stack.append(self.find(Global(module, name)))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple):
            raise PickleError("arguments that are no tuple")
        self.stack.append(self.call(function, arguments))

    def remember(self, key: int) -> None:
        if self.stack[-1] is _MARK:
            raise PickleError("a mark in the memo")
        self.memo[key] = self.stack[-1]


def _push(value: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value())


_OPERATIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    0x28: lambda m: m.stack.append(_MARK),
    0x30: lambda m: m.stack.pop(),
    0x31: lambda m: m.marked(),
    0x32: lambda m: m.stack.append(m.stack[-1]),
    0x4E: _push(lambda: None),
    0x88: _push(lambda: True),
    0x89: _push(lambda: False),
    0x4A: lambda m: m.stack.append(m.number("<i")),
    0x4B: lambda m: m.stack.append(m.number("<B")),
    0x4D: lambda m: m.stack.append(m.number("<H")),
    0x49: lambda m: m.integer_line(),
    0x4C: lambda m: m.integer_line(),
    0x8A: lambda m: m.long("<B"),
    0x8B: lambda m: m.long("<i"),
    0x46: lambda m: m.stack.append(float(m.line())),
    0x47: lambda m: m.stack.append(m.number(">d")),
    0x58: lambda m: m.text("<I"),
    0x8C: lambda m: m.text("<B"),
    0x8D: lambda m: m.text("<Q"),
    0x56: lambda m: m.stack.append(m.line()),
    0x55: lambda m: m.old_text("<B"),
    0x54: lambda m: m.old_text("<i"),
    0x42: lambda m: m.raw("<I"),
    0x43: lambda m: m.raw("<B"),
    0x8E: lambda m: m.raw("<Q"),
    0x5D: _push(list),
    0x29: _push(tuple),
    0x7D: _push(dict),
    0x8F: _push(list),  # EMPTY_SET: as good as a list here
    0x61: lambda m: m.one_append(),
    0x65: lambda m: m.append(m.marked()),
    0x90: lambda m: m.append(m.marked()),
    0x6C: lambda m: m.stack.append(m.marked()),
    0x74: lambda m: m.stack.append(tuple(m.marked())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    0x73: lambda m: m.one_item(),
    0x75: lambda m: m.set_items(m.marked()),
    0x64: lambda m: m.dict_of(m.marked()),
    0x68: lambda m: m.stack.append(m.memo[m.number("<B")]),
    0x6A: lambda m: m.stack.append(m.memo[m.number("<I")]),
    0x67: lambda m: m.stack.append(m.memo[int(m.line())]),
    0x71: lambda m: m.remember(m.number("<B")),
    0x72: lambda m: m.remember(m.number("<I")),
    0x70: lambda m: m.remember(int(m.line())),
    0x94: lambda m: m.remember(len(m.memo)),
    0x63: lambda m: m.name(),
    0x93: lambda m: m.stack_name(),
    0x52: lambda m: m.reduce(),
    0x81: lambda m: m.reduce(),
    0x62: lambda m: m.build(),
    0x51: lambda m: m.stack.append(m.persistent(m.pop())),
}
