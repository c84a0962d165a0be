"""What a function reads from outside its arguments: closure cells, globals, defaults.

Arrays found there are inputs of the program, read again at every call: another array of the same type
needs no new program. Numbers, text and None are part of the signature by value, other objects by identity.
Containers are looked into; the attributes of other objects are not: an array reached through them is a
constant of the program (the same object: what is assigned into it counts).
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import mlx.core as mx

from qgraph.ir.origin import is_library
from qgraph.quant import QuantizedTensor
from qgraph.trace.tree import typed

DEPTH = 12  # of containers in containers
LARGEST = 4096  # items of a container that is looked into; a larger one counts by identity
# Their functions read no state of the user's.
_FOREIGN = ("mlx", "numpy", "qgraph")


class Same:
    """Equal to another of the same object only, which it keeps alive: ids are used again."""

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)

    def __repr__(self) -> str:
        return f"Same({type(self.held).__name__})"


Place = tuple[str, int]  # what is read: a cell, a global, …; and which


class Surroundings:
    """The places that a function, and the user's functions it calls, read from outside."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._known: dict[FunctionType, None] = {}
        self._cells: list[Any] = []
        self._names: list[tuple[dict[str, Any], str]] = []
        self._values: list[Any] = [function]  # and defaults, the objects of bound methods, …
        self._written: set[Place] = set()

    def read(self, leaves: list[Any], spec: list[Any], objects: Iterable[Any] = ()) -> dict[Place, Any]:
        """Append the arrays that are there now to `leaves`, and all else that matters to `spec`.

        `objects` are static arguments, whose attributes are read too: the `self` of a method. The result
        has the tokens of every place by itself, for `forget_written`.
        """
        while True:
            reading = _Reading(leaves, spec)
            tokens = {place: self._look(reading, place, value) for place, value in self._places(objects)}
            new = [f for f in reading.functions if f not in self._known]
            if not new:
                break
            self._plan(new)
            del leaves[:], spec[:]
        seen: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            first = seen.setdefault(id(leaf), i)
            if first != i:  # two names of one array; were they two arrays, the program would be another
                spec.append(("alias", i, first))
        return tokens

    def forget_written(self, before: dict[Place, Any], after: dict[Place, Any]) -> None:
        """Leave out, from now on, what the function itself changed while it was traced.

        A list that it appends to, or a number that it counts up, would make every call another one. The
        arrays that are found there still count.
        """
        self._written.update(place for place, tokens in after.items() if before.get(place, tokens) != tokens)

    def _places(self, objects: Iterable[Any]) -> Iterator[tuple[Place, Any]]:
        for i, value in enumerate(objects):
            yield ("object", i), vars(value)
        for i, cell in enumerate(self._cells):
            yield ("cell", i), _content(cell)
        for i, (module, name) in enumerate(self._names):
            yield ("name", i), module.get(name)
        for i, value in enumerate(self._values):
            yield ("value", i), value

    def _look(self, reading: _Reading, place: Place, value: Any) -> tuple[Any, ...]:
        start = len(reading.spec)
        reading.look(value)
        tokens = tuple(reading.spec[start:])
        if place in self._written:
            del reading.spec[start:]
        return tokens

    def _plan(self, functions: list[FunctionType]) -> None:
        for f in functions:
            self._known[f] = None
            self._cells += f.__closure__ or ()
            self._values += [v for v in (f.__defaults__, f.__kwdefaults__) if v]
            self._names += [(f.__globals__, n) for n in _global_names(f.__code__) if not _is_builtin(f, n)]


class _Reading:
    """One reading: tokens, arrays, and the functions that were met."""

    def __init__(self, leaves: list[Any], spec: list[Any]) -> None:
        self.leaves = leaves
        self.spec = spec
        self.functions: list[FunctionType] = []

    def look(self, value: Any, depth: int = 0) -> None:
        """Append what `value` means for the program."""
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            self.spec.append(typed(value))
        elif isinstance(value, (mx.array, QuantizedTensor)):
            self.leaves.append(value)
            self.spec.append("leaf")
        elif callable(value) and not isinstance(value, dict):
            self.spec.append(Same(value))
            self.function(value, depth)
        else:
            self.container(value, depth)

    def container(self, value: Any, depth: int) -> None:
        """A dict (a module of mlx.nn is one), list, tuple or dataclass; anything else by identity."""
        items: list[Any]
        if isinstance(value, dict):
            found = cast("dict[Any, Any]", value)
            self.spec.append((type(found), tuple(map(typed, found))))
            items = list(found.values())
        elif isinstance(value, (list, tuple)):
            items = list(cast("list[Any]", value))
            self.spec.append((type(cast(object, value)), len(items)))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            items = [getattr(value, f.name) for f in dataclasses.fields(value)]
            self.spec.append(type(value))
        else:
            self.spec.append(Same(value))
            return
        if len(items) > LARGEST or depth > DEPTH:
            self.spec.append(Same(cast(object, value)))
            return
        for item in items:
            self.look(item, depth + 1)

    def function(self, value: Any, depth: int) -> None:
        """Note the Python functions behind a callable, and look at what it carries."""
        if isinstance(value, FunctionType):
            if not _foreign(value):
                self.functions.append(value)
        elif isinstance(value, functools.partial):
            self.look((value.func, value.args, value.keywords), depth + 1)
        elif isinstance(value, MethodType):
            self.function(value.__func__, depth)
            self.look(vars(value.__self__) if hasattr(value.__self__, "__dict__") else None, depth + 1)
        elif isinstance(getattr(value, "__wrapped__", None), FunctionType):  # e.g. a jitted function
            self.function(value.__wrapped__, depth)


def is_plain_object(x: Any) -> bool:
    """Whether `x` is an argument whose attributes are state, e.g. the `self` of a method."""
    kind = cast("type[object]", type(x))
    return kind.__hash__ is object.__hash__ and hasattr(x, "__dict__") and not callable(x)


def _foreign(function: FunctionType) -> bool:
    module = (function.__module__ or "").partition(".")[0]
    return module in _FOREIGN or is_library(function.__code__)


def _is_builtin(function: FunctionType, name: str) -> bool:
    return name not in function.__globals__ and hasattr(builtins, name)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


@functools.cache
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The globals that the code, and the code inside it, reads."""
    import dis

    names: dict[str, None] = {}
    stack = [code]
    while stack:
        current = stack.pop()
        loads = (i for i in dis.get_instructions(current) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
        names.update(dict.fromkeys(str(i.argval) for i in loads))
        stack += [c for c in current.co_consts if isinstance(c, CodeType)]
    return tuple(names)
