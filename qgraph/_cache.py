"""The programs of a jitted function: found by the whole signature, the least recently used dropped."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from qgraph.execute.eager import stored
from qgraph.execute.program import Program
from qgraph.ir import Graph, TensorType
from qgraph.rewrite import Report, Result
from qgraph.trace.surroundings import Same

# One lock for the tables of all functions, held for a look-up only: a program is made without it.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a thread that held it is not in the child
    os.register_at_fork(after_in_child=LOCK._at_fork_reinit)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType]


class CacheInfo(NamedTuple):
    """Counts of a jitted function's program cache."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


@dataclass(frozen=True)
class Entry:
    """A compiled signature: the program, what it captured, and the shape of what it returns."""

    result: Result
    program: Program
    captures: tuple[Any, ...]  # arrays, or their places among those that the surroundings give
    spec: list[Any]  # of the returned tree
    types: tuple[TensorType, ...]  # of its leaves
    made_of: tuple[mx.array, ...] = ()  # the arrays outside as they were, where constants are made of them


def _unwritten(then: tuple[mx.array, ...], outer: list[Any]) -> bool:
    """Whether arrays are still the ones that were copied, without a look at their numbers.

    A copy and its original are one array for MLX until either is written into, and it draws them as one.
    """
    now = [x for x in outer if isinstance(x, mx.array)]
    return _drawn(*then) == _drawn(*then, *now)


def _drawn(*arrays: mx.array) -> str:
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue()


class Programs:
    """What everything that is compiled tells of its programs; a subclass says what `result` is."""

    _cache: Cache
    result: Callable[..., Result]

    def graph(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph as traced or captured, before any pass."""
        return self.result(*args, **kwargs).before

    def optimized(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph after all passes."""
        return self.result(*args, **kwargs).graph

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What every use of a quantized value became, or why it did not."""
        return self.result(*args, **kwargs).report

    def cache_info(self) -> CacheInfo:
        """Hits, misses, the bound and the size of the program cache."""
        with LOCK:
            return self._cache.info()

    def clear_cache(self) -> None:
        """Forget all programs, e.g. after a number in a module was changed: those are read at capture."""
        with LOCK:
            self._cache.clear()


class Cache:
    """Programs by key; all methods are called under LOCK."""

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self._entries: OrderedDict[Any, Entry] = OrderedDict()
        self._hits = self._misses = 0
        self._by_identity: set[Any] = set()

    def find(self, key: tuple[Any, ...], outer: list[Any]) -> Entry | None:
        """The program of a signature; `outer` are the arrays that the function reads from outside."""
        exact = self.exact(key, outer)
        entry = self._entries.get(exact)
        if entry is not None and entry.made_of and not _unwritten(entry.made_of, outer):
            del self._entries[exact]  # W[:] = 7 changes W, and not the constant that was made of it
            entry = None
        if entry is not None:
            self._hits += 1
            self._entries.move_to_end(exact)
        return entry

    def keep(self, key: tuple[Any, ...], outer: list[Any], entry: Entry) -> Entry:
        """Store a new program; as it is stored, with the captured arrays by their places in `outer`."""
        places = {id(x): i for i, x in enumerate(outer)}
        entry = replace(entry, captures=tuple(places.get(id(x), x) for x in entry.captures))
        if not all(type(c) is int for c in entry.captures):
            self._by_identity.add(key)
            constants = stored(c for c in entry.captures if type(c) is not int)
            if any("->" in _drawn(c) for c in constants):  # computed of something, and not a literal
                entry = replace(entry, made_of=tuple(x.__copy__() for x in outer if isinstance(x, mx.array)))
        exact = self.exact(key, outer)
        self._entries[exact] = entry
        self._misses += 1
        while len(self._entries) > self.maxsize:
            self._entries.popitem(last=False)
        if len(self._by_identity) > self.maxsize:
            self._by_identity.clear()  # the programs that are no longer found age out
        return entry

    def exact(self, key: tuple[Any, ...], outer: list[Any]) -> tuple[Any, ...]:
        """The key, with the arrays outside by identity where the program has one that is made of them.

        ``x @ W.T`` with an mx.array W outside the function is an example: MLX itself transposes it.
        """
        return (*key, *map(Same, outer)) if self._by_identity and key in self._by_identity else key

    def clear(self) -> None:
        """Forget all programs."""
        self._entries.clear()
        self._by_identity.clear()
        self._hits = self._misses = 0

    def info(self) -> CacheInfo:
        """The counts."""
        return CacheInfo(self._hits, self._misses, self.maxsize, len(self._entries))
