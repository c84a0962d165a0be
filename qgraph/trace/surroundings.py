"""What a function reads from outside its arguments: closure cells, globals, defaults.

Arrays found there are inputs of the program, read again at every call: another array of the same type
needs no new program. Numbers, text and None are part of the signature by value, other objects by identity.
Containers are looked into; of modules, classes and other objects the attributes that the code names.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from sys import stdlib_module_names
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import mlx.core as mx

from qgraph.ir.origin import is_library
from qgraph.quant import QuantizedTensor
from qgraph.trace.tracer import signature
from qgraph.trace.tree import typed

DEPTH = 12  # of containers in containers
LARGEST = 4096  # items of a container that is looked into; a larger one counts by identity
# Their functions read no state of the user's.
_FOREIGN = ("mlx", "numpy", "qgraph", "builtins")
INSIDE = "[]"  # stands for the items and attributes that code assigns to


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
        self._cells: list[tuple[Any, str]] = []
        self._names: list[tuple[dict[str, Any], str]] = []
        self._values: list[Any] = [function]  # and defaults, the objects of bound methods, …
        self._attributes: dict[str, None] = {"__call__": None}  # that the code of the functions names
        self._stored: set[str] = set()  # the variables that it assigns to
        self._written: dict[Place, tuple[int, tuple[Any, ...]]] = {}

    def read(self, leaves: list[Any], spec: list[Any], objects: Iterable[Any] = ()) -> dict[Place, Any]:
        """Append the arrays that are there now to `leaves`, and all else that matters to `spec`.

        `objects` are static arguments, whose attributes are read too: the `self` of a method. The result
        has the tokens of every place by itself, for `forget_written`.
        """
        while True:
            reading = _Reading(leaves, spec, self._attributes)
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

    def changed_elsewhere(
        self, before: dict[Place, Any], after: dict[Place, Any], *, same_arrays: bool
    ) -> bool:
        """Whether something changed during a trace that no code here assigns to: another thread did it.

        What grew is taken for the function's own doing: a list that it appends to.
        """
        if before == after:
            return not same_arrays and not self._stored
        for place, tokens in after.items():
            if before.get(place, tokens) != tokens and len(before[place]) == len(tokens):
                own = {self.name(place)} if len(tokens) == 1 else {self.name(place), INSIDE}
                if own.isdisjoint(self._stored):
                    return True
        return False

    def features(self, objects: Iterable[Any], *, by_identity: bool) -> dict[tuple[str, str], Any]:
        """The variables by name and what they hold, as `Storms` compares them."""
        arrays: list[Any] = []
        tokens = self.read(arrays, [], objects)
        found = {(self.name(p), "variable"): held for p, held in tokens.items() if p not in self._written}
        names = ", ".join(dict.fromkeys(self.name(p) for p, held in tokens.items() if "leaf" in held))
        found[names, "types"] = signature(arrays)
        if by_identity:
            found[names, "identity"] = tuple(map(id, arrays))
        return found

    def forget_written(self, before: dict[Place, Any], after: dict[Place, Any]) -> None:
        """Leave out, from now on, what the function itself changed while it was traced.

        A list that it appends to, or a number that it counts up, would make every call another one. The
        arrays that are found there still count, and what somebody else changes there later does too.
        """
        for place, tokens in after.items():
            found = before.get(place, tokens)
            if found != tokens:
                epoch, left = self._written.get(place, (0, found))
                self._written[place] = (epoch + (left != found), tokens)

    def name(self, place: Place) -> str:
        """The variable that a place is, for messages."""
        kind, i = place
        if kind == "cell":
            return self._cells[i][1]
        return self._names[i][1] if kind == "name" else "self" if kind == "object" else "a default"

    def _places(self, objects: Iterable[Any]) -> Iterator[tuple[Place, Any]]:
        for i, value in enumerate(objects):
            yield ("object", i), value
        for i, (cell, _) in enumerate(self._cells):
            yield ("cell", i), _content(cell)
        for i, (module, name) in enumerate(self._names):
            yield ("name", i), module.get(name)
        for i, value in enumerate(self._values):
            yield ("value", i), value

    def _look(self, reading: _Reading, place: Place, value: Any) -> tuple[Any, ...]:
        start = len(reading.spec)
        if place[0] == "object":
            reading.state(value)
        else:
            reading.look(value)
        tokens = tuple(reading.spec[start:])
        written = self._written.get(place)
        if written is not None and written[1] == tokens:
            reading.spec[start:] = [written[0]]
        return tokens

    def _plan(self, functions: list[FunctionType]) -> None:
        for f in functions:
            self._known[f] = None
            self._cells += zip(f.__closure__ or (), f.__code__.co_freevars, strict=True)
            self._values += [v for v in (f.__defaults__, f.__kwdefaults__) if v]
            read, attributes, stored = _names_in(f.__code__)
            self._names += [(f.__globals__, n) for n in read if not _is_builtin(f, n)]
            self._attributes.update(dict.fromkeys(attributes))
            self._stored.update(stored)


class _Reading:
    """One reading: tokens, arrays, and the functions that were met."""

    def __init__(self, leaves: list[Any], spec: list[Any], attributes: Iterable[str]) -> None:
        self.leaves = leaves
        self.spec = spec
        self.attributes = attributes
        self.functions: list[FunctionType] = []
        self.seen: set[int] = set()  # objects whose attributes were looked at: there are cycles

    def look(self, value: Any, depth: int = 0) -> None:
        """Append what `value` means for the program."""
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            self.spec.append(typed(value))
        elif isinstance(value, (mx.array, QuantizedTensor)):
            self.leaves.append(value)
            self.spec.append("leaf")
        elif isinstance(value, ModuleType):
            self.spec.append(Same(value))
            if not _is_foreign(value.__name__):
                self.named(value, vars(value), (), depth)
        elif callable(value) and not isinstance(value, dict):
            self.spec.append(Same(value))
            self.function(value, depth)
        else:
            self.container(value, depth)

    def container(self, value: Any, depth: int) -> None:
        """A dict (a module of mlx.nn is one), list, tuple or dataclass; anything else by identity."""
        items: list[Any]
        if isinstance(value, dict):
            given = cast("dict[Any, Any]", value)
            kind = cast("type[object]", type(given))
            pairs = list(given.items())  # at once: another thread may be adding to it
            self.spec.append((kind, tuple([typed(key) for key, _ in pairs])))
            items = [item for _, item in pairs]
            if kind is not dict:  # a module of mlx.nn has arrays as items and numbers as attributes
                self.object(given, depth)
        elif isinstance(value, (list, tuple)):
            items = list(cast("list[Any]", value))
            self.spec.append((type(cast(object, value)), len(items)))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            items = [getattr(value, f.name) for f in dataclasses.fields(value)]
            self.spec.append(type(value))
        else:
            self.spec.append(Same(value))
            self.object(value, depth)
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
        elif isinstance(value, type):
            if not _is_foreign(value.__module__):
                self.named(value, {}, value.__mro__, depth)
        else:
            self.object(value, depth)

    def state(self, value: Any) -> None:
        """All attributes of a static argument, the `self` of a method, and what its class has."""
        self.look(vars(value))
        self.object(value, 0)

    def object(self, value: Any, depth: int) -> None:
        """The attributes of an object of a class of the user's."""
        kind = cast("type[object]", type(value))
        if not _is_foreign(kind.__module__):
            self.named(value, getattr(value, "__dict__", {}), kind.__mro__, depth)

    def named(self, owner: Any, own: dict[str, Any], classes: tuple[type, ...], depth: int) -> None:
        """The attributes that the code names, the object's own or those of its classes."""
        if id(owner) in self.seen or depth > DEPTH:
            return
        self.seen.add(id(owner))
        for name in self.attributes:
            for where in (own, *map(vars, classes)):
                if name in where:
                    self.spec.append(name)
                    self.attribute(where[name], depth + 1)
                    break

    def attribute(self, value: Any, depth: int) -> None:
        """What an attribute holds; of a property and of a static or class method, the function behind it."""
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, (staticmethod, classmethod)):
            value = cast(Any, value).__func__
        self.look(value, depth)


def is_plain_object(x: Any) -> bool:
    """Whether `x` is an argument whose attributes are state, e.g. the `self` of a method."""
    kind = cast("type[object]", type(x))
    return kind.__hash__ is object.__hash__ and hasattr(x, "__dict__") and not callable(x)


def _foreign(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _FOREIGN or is_library(function.__code__)


@functools.cache
def _is_foreign(module: str) -> bool:
    """Whether a module's objects hold no state that a user's function would read and a user change."""
    top = (module or "").partition(".")[0]
    return top in _FOREIGN or (top in stdlib_module_names and top != "__main__")


def _is_builtin(function: FunctionType, name: str) -> bool:
    return name not in function.__globals__ and hasattr(builtins, name)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


@functools.cache
def _names_in(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """The globals that the code, and the code inside it, reads; attributes; the variables it stores to."""
    import dis

    read: dict[str, None] = {}
    attributes: dict[str, None] = {}
    stored: dict[str, None] = {}
    table = {
        **dict.fromkeys(("LOAD_GLOBAL", "LOAD_NAME"), read),
        **dict.fromkeys(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"), attributes),
        **dict.fromkeys(("STORE_GLOBAL", "STORE_NAME", "STORE_DEREF"), stored),
    }
    inside = ("STORE_SUBSCR", "STORE_ATTR", "DELETE_SUBSCR", "DELETE_ATTR", "STORE_SLICE")
    stack = [code]
    while stack:
        current = stack.pop()
        for i in dis.get_instructions(current):
            if i.opname in table:
                table[i.opname][str(i.argval)] = None
            elif i.opname in inside:
                stored[INSIDE] = None
        stack += [c for c in current.co_consts if isinstance(c, CodeType)]
    return tuple(read), tuple(attributes), tuple(stored)
