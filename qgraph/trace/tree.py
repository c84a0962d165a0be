"""Argument trees: dicts, lists, tuples, named tuples and dataclasses of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, cast

import mlx.core as mx

from qgraph._errors import TraceError
from qgraph.quant import QuantizedTensor

Leaf = Any
LARGEST = 4096  # sets of dict keys that are remembered
Spec = tuple[Any, ...]  # tokens that determine the tree up to its leaves


def flatten(tree: Any, leaves: list[Leaf], spec: list[Any]) -> None:
    """Append the arrays of `tree` to `leaves`, and to `spec` the tokens that tell its structure.

    Everything that is not an array or a container is static: its type and value are tokens. Two trees
    have equal tokens exactly if `unflatten` would give the same tree for the same leaves.

    >>> leaves, spec = [], []
    >>> flatten({"w": mx.zeros(2), "k": (3, None)}, leaves, spec)
    >>> len(leaves), spec
    (1, ['dict', ('w', 'k'), 'leaf', 'tuple', 2, (<class 'int'>, 3), None])
    """
    kind = cast(Any, type(tree))
    if kind is dict:
        names = tuple(tree)
        spec += ("dict", names if names in _plain_names else _typed_names(names))
        children: Any = tree.values()
    elif kind in _ARRAYS or hasattr(tree, "_type"):
        leaves.append(tree)
        spec.append("leaf")
        return
    else:
        children = _other(tree, kind, leaves, spec)
    for child in children:
        if type(child) in _ARRAYS:  # most children are, and a tree of weights has hundreds
            leaves.append(child)
            spec.append("leaf")
        else:
            flatten(child, leaves, spec)


_ARRAYS = frozenset((mx.array, QuantizedTensor))
_plain_names: set[tuple[str, ...]] = set()  # keys of dicts that were seen, text all: no need to look again


def _typed_names(names: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys of a dict as a token: text as it is, all else with its type."""
    if all(type(name) is str for name in names):
        if len(_plain_names) < LARGEST:
            _plain_names.add(names)
        return names
    return tuple(name if type(name) is str else typed(name) for name in names)


def _other(tree: Any, kind: Any, leaves: list[Leaf], spec: list[Any]) -> Any:
    """The children of a sequence or a record, its tokens appended; a static value has none."""
    if kind is list or kind is tuple:
        spec += (kind.__name__, len(tree))
        return tree
    if getattr(tree, "_fields", None) is not None and isinstance(tree, tuple):
        spec += ("namedtuple", kind)
        return cast("tuple[Any, ...]", tree)
    if dataclasses.is_dataclass(kind):
        spec += ("dataclass", kind)
        return [getattr(tree, f.name) for f in dataclasses.fields(kind)]
    if isinstance(tree, mx.array) or getattr(kind, "__array__", None) is not None:
        leaves.append(mx.array(tree))
        spec.append("leaf")
    else:
        spec.append(None if tree is None else _static(tree))
        if isinstance(spec, Tokens) and _has_state(tree):
            spec.objects.append(tree)
    return ()


class Tokens(list[Any]):
    """Tokens of the arguments of a call, and the static ones that have state of their own."""

    __slots__ = ("objects",)

    def __init__(self) -> None:
        super().__init__()
        self.objects: list[Any] = []


def _has_state(x: Any) -> bool:
    """Whether `x` is told apart by identity and holds more than that: the `self` of a method, a function."""
    kind = cast("type[object]", type(x))
    return isinstance(x, MethodType) or (kind.__hash__ is object.__hash__ and hasattr(x, "__dict__"))


def _static(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise TraceError(
            f"an argument of type {type(value).__name__} is neither an array nor hashable",
            fix="pass arrays, QuantizedTensors, trees of them, or hashable Python values",
        ) from None
    return typed(value)


def typed(value: Any) -> tuple[Any, ...]:
    """A hashable value as part of a key: with its type, since 1 == 1.0 == True, and to the last bit.

    >>> typed(0.0) == typed(-0.0), typed(1) == typed(True), typed(float("nan")) == typed(float("nan"))
    (False, False, True)
    """
    kind = cast("type[object]", type(value))
    if kind is float or kind is complex:
        return kind, repr(value), _Exactly(value)
    return kind, value


class _Exactly:
    """Holds a float, whose repr the key compares instead: nan is not equal to itself, and 0.0 is to -0.0."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Exactly)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return repr(self.value)


def untyped(token: tuple[Any, ...]) -> Any:
    """The value that `typed` made the token of."""
    return token[2].value if len(token) == 3 else token[1]


def unflatten(spec: list[Any], leaves: list[Leaf]) -> Any:
    """The tree of `spec` with `leaves` in their places."""
    return _build(iter(spec), iter(leaves))


# Not a closure that calls itself: such a one is a cycle, which would hold the leaves until Python's collector
# comes by. An old cache that is still referenced is copied by MLX, a freed one is updated in place.
def _build(tokens: Iterator[Any], arrays: Iterator[Leaf]) -> Any:
    token = next(tokens)
    if token == "leaf":
        return next(arrays)
    if token is None:
        return None
    if token == "dict":
        names = next(tokens)
        return {key if type(key) is str else untyped(key): _build(tokens, arrays) for key in names}
    if token in ("list", "tuple"):
        items = [_build(tokens, arrays) for _ in range(next(tokens))]
        return items if token == "list" else tuple(items)
    if token == "namedtuple":
        kind = next(tokens)
        return kind(*[_build(tokens, arrays) for _ in kind._fields])
    if token == "dataclass":
        kind = next(tokens)
        return _rebuild(kind, {f.name: _build(tokens, arrays) for f in dataclasses.fields(kind)})
    return untyped(token)


def _rebuild(kind: Any, fields: dict[str, Any]) -> Any:
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def paths(tree: Any, prefix: str, visit: Callable[[str], None]) -> None:
    """Call `visit` with the dotted path of every leaf, in `flatten`'s order."""
    children: list[tuple[str, Any]]
    kind = cast(Any, type(tree))
    if kind in _ARRAYS or hasattr(tree, "_type") or getattr(kind, "__array__", None) is not None:
        visit(prefix)
        return
    if isinstance(tree, dict):
        children = [(str(k), v) for k, v in tree.items()]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    elif isinstance(tree, (list, tuple)):
        names = getattr(type(tree), "_fields", None) or range(len(tree))  # pyright: ignore[reportUnknownArgumentType]
        children = [(str(n), v) for n, v in zip(names, tree, strict=True)]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        children = [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    else:
        return
    for name, child in children:
        paths(child, f"{prefix}.{name}" if prefix else name, visit)
