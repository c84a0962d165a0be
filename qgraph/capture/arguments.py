"""The arguments of a call, with a place in the stead of every object that is held (see `state.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from qgraph.capture.state import holder


class Places:
    """Stands for `count` held objects in a row, or with count 0 for one; a part of a call's key."""

    __slots__ = ("_hash", "count", "first")

    def __init__(self, first: int, count: int = 0) -> None:
        self.first = first
        self.count = count
        self._hash = hash((first, count))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and (other.first, other.count) == (self.first, self.count)

    def __hash__(self) -> int:
        return self._hash


def set_aside(tree: Any, objects: list[Any]) -> Any:
    """The tree with `Places` for the objects that are held; they go to `objects`, each once."""
    kind = cast(Any, type(tree))
    items: list[Any] = tree if kind is list else []
    if items and all(map(holder, map(type, items))):
        first = len(objects)
        given = set(map(id, objects))
        if len(given | set(map(id, items))) == first + len(items):  # one cache for every layer
            objects += items
            return Places(first, len(items))
    if holder(kind):
        for i, x in enumerate(objects):
            if x is tree:
                return Places(i)
        objects.append(tree)
        return Places(len(objects) - 1)
    return _mapped(tree, lambda x: set_aside(x, objects))


def put_back(tree: Any, objects: list[Any]) -> Any:
    """The tree with other objects in their places."""
    if isinstance(tree, Places):
        return objects[tree.first : tree.first + tree.count] if tree.count else objects[tree.first]
    return _mapped(tree, lambda x: put_back(x, objects))


def _mapped(tree: Any, inner: Callable[[Any], Any]) -> Any:
    """The tree with its items replaced; anything but a plain list, tuple or dict has none."""
    kind: Any = cast(Any, type(tree))
    if kind in (list, tuple):
        return cast(Any, kind)(map(inner, cast("list[Any]", tree)))
    return {key: inner(x) for key, x in tree.items()} if kind is dict else tree
