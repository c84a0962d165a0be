"""ArraysCache: the states of recurrent layers, arrays of fixed shapes. Nothing in it counts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm

from qgraph.capture.caches.literal import Literal, blank, class_of, put_together, taken_apart
from qgraph.capture.state import Held, Reader, Step

ArraysCache: Any = mlx_lm.ArraysCache
FIELDS = {"cache", "left_padding", "lengths"}


def _fields(cache: Any) -> list[Any]:
    return [*cache.cache, cache.left_padding, cache.lengths]


def _is_plain(fields: list[Any]) -> bool:
    return all(x is None or class_of(x) is mx.array for x in fields)


class States:
    """An ArraysCache whose entries are arrays or None: what `Literal` does, without its walk of a tree."""

    __slots__ = ("arrays", "cache", "filled", "key")

    def __init__(self, cache: Any, fields: list[Any]) -> None:
        self.cache: Any = cache
        self.arrays: list[mx.array] = [x for x in fields if x is not None]
        self.filled = tuple([x is not None for x in fields])
        self.key: Hashable = (ArraysCache, self.filled)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(ArraysCache)
        _put(made, self.filled, arrays)

        def read() -> tuple[list[mx.array], Any]:
            fields = _fields(made)
            if _is_plain(fields) and made.__dict__.keys() == FIELDS:
                return [x for x in fields if x is not None], tuple([x is not None for x in fields])
            after: list[mx.array] = []
            return after, {"tree": taken_apart(vars(made), after)}

        return made, read

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        if type(after) is tuple:
            _put(self.cache, after, arrays)
        else:
            vars(self.cache).update(put_together(after["tree"], list(arrays)))


def _put(cache: Any, filled: Any, arrays: list[mx.array]) -> None:
    given = iter(arrays)
    *cache.cache, cache.left_padding, cache.lengths = [next(given) if f else None for f in filled]


def hold(cache: Any, step: Step) -> Held:
    """Hold an ArraysCache."""
    del step
    fields = _fields(cache)
    if _is_plain(fields) and cache.__dict__.keys() == FIELDS:
        return States(cache, fields)
    return Literal(cache)
