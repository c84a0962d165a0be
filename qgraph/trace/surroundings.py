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


Place = tuple[str, str, int]  # what is read: a cell, a global, …; its name; and which of that name


class Surroundings:
    """The places that a function, and the user's functions it calls, read from outside."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._plan = _Plan(function)
        self._written: dict[Place, tuple[int, tuple[Any, ...]]] = {}

    def read(self, leaves: list[Any], spec: list[Any], objects: Iterable[Any] = ()) -> dict[Place, Any]:
        """Append the arrays that are there now to `leaves`, and all else that matters to `spec`.

        `objects` are static arguments, whose attributes are read too: the `self` of a method. The result
        has the tokens of every place by itself, for `forget_written`.
        """
        tokens, met = self._follow(leaves, spec, objects)
        if met.keys() != self._plan.functions.keys():  # from the beginning: a function may be gone
            self._plan = _Plan(self._function)
            while new := [f for f in met if f not in self._plan.functions]:
                self._plan.add(new)
                tokens, met = self._follow(leaves, spec, objects)
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
            return not same_arrays and not self._plan.stored
        for place, tokens in after.items():
            if before.get(place, tokens) != tokens and len(before[place]) == len(tokens):
                own = {place[1]} if len(tokens) == 1 else {place[1], INSIDE}
                if own.isdisjoint(self._plan.stored):
                    return True
        return False

    def features(self, objects: Iterable[Any], *, by_identity: bool) -> dict[tuple[str, str], Any]:
        """The variables by name and what they hold, as `Storms` compares them."""
        arrays: list[Any] = []
        tokens = self.read(arrays, [], objects)
        found = {(p[1], "variable"): held for p, held in tokens.items() if p not in self._written}
        names = ", ".join(dict.fromkeys(p[1] for p, held in tokens.items() if "leaf" in held))
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

    def _follow(
        self, leaves: list[Any], spec: list[Any], objects: Iterable[Any]
    ) -> tuple[dict[Place, Any], dict[FunctionType, None]]:
        """One reading of all places of the plan; the functions that it met."""
        del leaves[:], spec[:]
        reading = _Reading(leaves, spec, self._plan.attributes)
        arguments = ((("object", "self", i), x) for i, x in enumerate(objects))
        tokens = {p: self._look(reading, p, x) for p, x in (*arguments, *self._plan.contents())}
        return tokens, reading.functions

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


class _Plan:
    """The functions that are known to run, and the places that their code reads."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.functions: dict[FunctionType, None] = {}
        self.attributes: dict[str, None] = {"__call__": None}  # that the code names
        self.stored: set[str] = set()  # the variables that it assigns to
        self._count: dict[tuple[str, str], int] = {}
        self._cells: list[tuple[Place, Any]] = []
        self._names: list[tuple[Place, dict[str, Any]]] = []
        self._values: list[tuple[Place, Any]] = [(("value", "the function", 0), function)]

    def add(self, functions: list[FunctionType]) -> None:
        """Add what these functions read."""
        for f in functions:
            self.functions[f] = None
            for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
                self._cells.append((self._place("cell", name), cell))
            for values in (f.__defaults__, f.__kwdefaults__):
                if values:
                    self._values.append((self._place("value", "a default"), values))
            read, attributes, stored = _names_in(f.__code__)
            for name in read:
                if not _is_builtin(f, name):
                    self._names.append((self._place("name", name), f.__globals__))
            self.attributes.update(dict.fromkeys(attributes))
            self.stored.update(stored)

    def _place(self, kind: str, name: str) -> Place:
        n = self._count.get((kind, name), 0)
        self._count[kind, name] = n + 1
        return kind, name, n

    def contents(self) -> Iterator[tuple[Place, Any]]:
        """Every place and what is there now."""
        for place, cell in self._cells:
            yield place, _content(cell)
        for place, module in self._names:
            yield place, module.get(place[1])
        yield from self._values


class _Reading:
    """One reading: tokens, arrays, and the functions that were met."""

    def __init__(self, leaves: list[Any], spec: list[Any], attributes: Iterable[str]) -> None:
        self.leaves = leaves
        self.spec = spec
        self.attributes = attributes
        self.functions: dict[FunctionType, None] = {}
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
                self.functions[value] = None
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
        if callable(value):
            self.look(value)
            return
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
