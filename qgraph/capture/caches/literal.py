"""Any object held literally: its arrays go in and out, everything else that it holds is part of the key."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx

from qgraph.capture.state import NotDynamic, Reader, Step

ARRAY = ("array",)
PLAIN = (bool, int, float, str, bytes, type(None), mx.Dtype)


def taken_apart(value: Any, arrays: list[mx.array]) -> Hashable:
    """A hashable description of a tree, its arrays appended to `arrays`.

    Errors: NotDynamic for an object that is neither an array, a plain value nor a list, tuple or dict.
    """
    if isinstance(value, mx.array):
        arrays.append(value)
        return ARRAY
    if isinstance(value, PLAIN):
        return ("value", type(value), value)
    kind = class_of(value)
    if kind is list or kind is tuple:
        return (kind, *(taken_apart(v, arrays) for v in value))
    if kind is dict:
        return ("dict", *((k, taken_apart(v, arrays)) for k, v in value.items()))
    raise NotDynamic(
        f"a cache holds a {kind.__name__}",
        fix="keep arrays and plain values in it, in lists, tuples and dicts",
    )


def class_of(x: Any) -> Any:
    """The class of an object of which nothing is known."""
    return x.__class__


def blank(kind: Any) -> Any:
    """An object of a class, its `__init__` not run."""
    return object.__new__(kind)


def put_together(shape: Any, arrays: list[mx.array]) -> Any:
    """The tree of a description; `arrays` are taken from the front."""
    kind = shape[0]
    if kind == "array":
        return arrays.pop(0)
    if kind == "value":
        return shape[2]
    if kind == "dict":
        return {k: put_together(v, arrays) for k, v in shape[1:]}
    return kind(put_together(v, arrays) for v in shape[1:])


def _without(x: Any, names: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an object, without some."""
    return {k: v for k, v in x.__dict__.items() if k not in names}


class Literal:
    """An object held literally. Exact for any class; a counter in it makes a program for each of its values.

    `settings` are attributes of the stand-in alone, which the class reads (such as a step of growth).
    """

    __slots__ = ("arrays", "held", "key", "settings", "shape")

    def __init__(self, held: Any, **settings: Any) -> None:
        if not hasattr(held, "__dict__"):
            raise NotDynamic(f"a {class_of(held).__name__} keeps what it holds in __slots__")
        self.held: Any = held
        self.settings = settings
        self.arrays: list[mx.array] = []
        self.shape: Hashable = taken_apart(vars(held), self.arrays)
        self.key: Hashable = (type(held), self.shape, *settings.items())

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(type(self.held))
        vars(made).update(put_together(self.shape, list(arrays)), **self.settings)

        def read() -> tuple[list[mx.array], Any]:
            after: list[mx.array] = []
            shape = taken_apart(_without(made, self.settings), after)
            return after, shape

        return made, read

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        vars(self.held).update(put_together(after, list(arrays)))


class Unknown(Literal):
    """An object of a class that qgraph has not seen: it may count, and then every value is a program."""

    __slots__ = ()

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        del arrays
        name = class_of(self.held).__name__
        raise NotDynamic(
            f"{name} is a cache of the model's own, which may count in Python",
            fix="use the caches of mlx_lm.models.cache, or run this model as it is",
        )


def hold(cache: Any, step: Step) -> Literal:
    """Hold an object of arrays and plain values that do not change from call to call."""
    del step
    return Literal(cache)


def hold_unknown(cache: Any, step: Step) -> Literal:
    """Hold an object of arrays and plain values that may change."""
    return Unknown(cache) if step.dynamic else Literal(cache)
