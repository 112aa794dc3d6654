"""Pickles read as data: whatever a pickle names is not imported, and whatever it calls is not called.

A pickle is a program for a stack machine. `read_pickle` runs the part of it that builds lists, dicts and values. The
other part, which finds classes and functions by name and calls them, leaves an `Object` that says what would have been
called. `pickletools` of the standard library splits the bytes into instructions.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

MAX_INSTRUCTIONS = 5_000_000  # one takes up to about 200 bytes of memory; a checkpoint of a ResNet-50 has 20,000


@dataclass(frozen=True, eq=False)
class Named:
    """A class or function by its name, such as `collections.OrderedDict`."""

    path: str


@dataclass(eq=False)
class Object:
    """What calling `of` with `args` would have made; `state` is for its `__setstate__`, `items` for its `[]`."""

    of: Any
    args: Any = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Persistent:
    """A reference to something outside of the pickle: in files of torch.save, the values of a tensor."""

    id: Any


class Pickle(NamedTuple):
    """The value of a pickle and all references in it."""

    value: Any
    persistent: list[Persistent]


def read_pickle(file: BinaryIO) -> Pickle:
    """Read one pickle, of any protocol, from an open file, up to the byte after its end.

    Only strings, numbers, booleans and None are kept as keys of dicts. Memory is bounded by the size of the pickle.

    Raises ValueError, IndexError, KeyError, TypeError, AttributeError or UnicodeDecodeError for anything else than a
    pickle, and for one with more than MAX_INSTRUCTIONS.
    """
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == MAX_INSTRUCTIONS:
            raise ValueError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
        operation = _OPERATIONS.get(opcode.name)
        if operation is not None:
            operation(machine, argument)
        elif opcode.name in _VALUES:
            machine.push(argument)
        elif opcode.name == "STOP":
            return Pickle(machine.stack.pop(), machine.persistent)
        elif opcode.name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle has the instruction {opcode.name}, which no state dict needs")
    raise ValueError("its pickle has no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.persistent: list[Persistent] = []

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("its pickle takes more from the stack than there is")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values


def _mark(m: _Machine, _: Any) -> None:
    m.below.append(m.stack)
    m.stack = []


def _pop(m: _Machine, _: Any) -> None:
    m.stack.pop() if m.stack else m.since_mark()


def _append(m: _Machine, values: list[Any]) -> None:
    if isinstance(m.stack[-1], list):
        m.stack[-1].extend(values)


def _set_items(m: _Machine, values: list[Any]) -> None:
    _fill(m.stack[-1].items if isinstance(m.stack[-1], Object) else m.stack[-1], values)


def _fill(target: Any, values: list[Any]) -> dict[Any, Any]:
    if not isinstance(target, dict):
        raise ValueError(f"its pickle sets items of a {type(target).__name__}")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if isinstance(key, str | int | float | bytes | None):  # the hash of nested tuples can take for ever
            target[key] = value
    return target


def _build(m: _Machine, _: Any) -> None:
    state = m.stack.pop()
    if isinstance(m.stack[-1], Object):
        m.stack[-1].state = state


def _remember(m: _Machine, index: int | None) -> None:
    m.memo[len(m.memo) if index is None else index] = m.stack[-1]


def _refer(m: _Machine, identifier: Any) -> None:
    m.persistent.append(Persistent(identifier))
    m.push(m.persistent[-1])


def _named(m: _Machine, text: str) -> None:
    m.push(Named(text.replace(" ", ".", 1)))


def _stack_named(m: _Machine, _: Any) -> None:
    module, name = m.pop(2)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("its pickle names a class by something else than text")
    m.push(Named(f"{module}.{name}"))


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.push(tuple(m.pop(count)))


def _object(count: int) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.push(Object(*m.pop(count)[:2]))


_VALUES = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "APPEND": lambda m, _: _append(m, m.pop(1)),
    "APPENDS": lambda m, _: _append(m, m.since_mark()),
    "EMPTY_SET": lambda m, _: m.push([]),
    "FROZENSET": lambda m, _: m.push(m.since_mark()),
    "ADDITEMS": lambda m, _: _append(m, m.since_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "DICT": lambda m, _: m.push(_fill({}, m.since_mark())),
    "SETITEM": lambda m, _: _set_items(m, m.pop(2)),
    "SETITEMS": lambda m, _: _set_items(m, m.since_mark()),
    "PUT": _remember,
    "BINPUT": _remember,
    "LONG_BINPUT": _remember,
    "MEMOIZE": _remember,
    "GET": lambda m, index: m.push(m.memo[index]),
    "BINGET": lambda m, index: m.push(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.push(m.memo[index]),
    "PERSID": _refer,
    "BINPERSID": lambda m, _: _refer(m, m.pop(1)[0]),
    "GLOBAL": _named,
    "STACK_GLOBAL": _stack_named,
    "REDUCE": _object(2),
    "NEWOBJ": _object(2),
    "NEWOBJ_EX": _object(3),
    "INST": lambda m, text: m.push(Object(Named(text.replace(" ", ".", 1)), tuple(m.since_mark()))),
    "OBJ": lambda m, _: m.push((lambda values: Object(values[0], tuple(values[1:])))(m.since_mark())),
    "BUILD": _build,
}
