"""RotatingKVCache: a window of the text. Before it is full a growing buffer, after that a ring.

A chunk of tokens makes mlx-lm lay the ring out in order and append; that is done here too, the laying out
outside of the program, so that one program serves every chunk of a length once the window is full.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models import base as mlx_lm_base
from mlx_lm.models import cache as mlx_lm

from qgraph.capture.caches.attention import session
from qgraph.capture.caches.growing import Window, grown, write
from qgraph.capture.caches.literal import Literal, blank
from qgraph.capture.caches.positions import Position
from qgraph.capture.caches.sizes import STEP, capacity, window
from qgraph.capture.state import Held, NotDynamic, Reader, Step

RotatingKVCache: Any = mlx_lm.RotatingKVCache


class _Growing(Window, RotatingKVCache):
    """A RotatingKVCache for one call, while all that was written is still in it."""

    def make_mask(  # pyright: ignore[reportIncompatibleMethodOverride]  (the order is that of the class)
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> Any:
        return super().make_mask(N, return_array, window_size)


class Growing:
    """A rotating cache with room for the tokens of this call: the program of a KVCache."""

    __slots__ = ("arrays", "cache", "key", "length", "offset", "slack", "window")
    names = ("keys", "values", "offset")

    def __init__(self, cache: Any, step: Step) -> None:
        offset, keys, values = cache.offset, cache.keys, cache.values
        size, total, most = keys.shape[2], cache.offset + step.length, cache.max_size
        if total > size or size > most or (size % STEP and size != most):
            size = min(capacity(total), most)
            keys, values = grown(keys, offset, size), grown(values, offset, size)
        self.cache, self.length, self.offset = cache, step.length, offset
        self.window = min(window(total), size)
        self.slack = self.window - total
        self.arrays = [keys, values, step.number(offset)]
        self.key = (RotatingKVCache, "growing", self.window, most)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Growing)
        made.keys, made.values, begin = arrays
        made.keep, made.max_size = self.cache.keep, self.cache.max_size
        made.offset = Position.counted(begin, 0, self.window)
        made._open(begin, self.window, self.length)
        return made, lambda: ([made.keys, made.values], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = arrays
        cache.offset = cache._idx = self.offset + after


class Ringed:
    """A full ring of keys and values, every entry of it filled, to which one token is added."""

    keys: Any
    values: Any
    offset: Any
    max_size: int
    _at: mx.array
    _added: int

    def filled(self) -> mx.array | None:
        return None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if keys.shape[2] != 1 or self._added:
            raise NotDynamic(f"{keys.shape[2]} positions added to a rotating cache in a call of one token")
        self._added = 1
        at = self._at.reshape(1)
        self.keys, self.values = write(self.keys, keys, at), write(self.values, values, at)
        self.offset = self.offset + 1
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        session().whole(self.keys, cast(Any, self))  # with the masks of the class, a Buffer
        return self.keys, self.values


class _Ring(Ringed, RotatingKVCache):
    """A full RotatingKVCache for one token."""

    _rolled: mx.array

    @property
    def end(self) -> Position:
        return self.offset

    @property
    def place(self) -> Hashable:
        return id(self._rolled), self.max_size

    def causal(self, length: int) -> mx.array | None:
        del length
        return None

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | None:
        del return_array
        if N != 1:
            raise NotDynamic(f"a mask for {N} tokens in a call of one")
        if window_size is None or self.max_size <= window_size:
            return None
        # Of a ring whose newest entry is at `rolled`, those that are at most window_size back.
        back = (self._rolled - mx.arange(self.max_size)) % self.max_size
        return session().masked(back < window_size, self.place, plain=False)


class Ring:
    """A full rotating cache, for one token."""

    __slots__ = ("arrays", "at", "cache", "key", "offset")
    names = ("keys", "values", "offset", "at", "newest")

    def __init__(self, cache: Any, step: Step) -> None:
        keys, values, most, keep, at = cache.keys, cache.values, cache.max_size, cache.keep, cache._idx
        extra = keys.shape[2] - most
        if extra > 0:
            keys, values, at = cache._trim(extra, keys), cache._trim(extra, values), most
        rolled = 0 if cache._idx >= most else cache._idx
        self.cache, self.offset, self.at = cache, cache.offset, keep if at == most else at
        self.arrays = [
            keys,
            values,
            step.number(cache.offset),
            step.number(self.at, "ring"),
            step.number(rolled, "rolled"),
        ]
        self.key = (RotatingKVCache, "ring", most, keep)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Ring)
        made.keys, made.values, begin, made._at, made._rolled = arrays
        made.keep, made.max_size = self.cache.keep, self.cache.max_size
        made.offset, made._added = Position.counted(begin), 0
        return made, lambda: ([made.keys, made.values], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = arrays
        cache.offset = self.offset + after
        cache._idx = self.at + after


class _Appended(RotatingKVCache):
    """A RotatingKVCache for one chunk: what is kept in order, then the chunk."""

    keys: Any
    values: Any
    offset: Any
    _before: int
    _added: int

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self._added:
            raise NotDynamic("a rotating cache is updated twice in a call")
        self._added = keys.shape[2]
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)
        self.offset = self.offset + self._added
        return self.keys, self.values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Any:
        size = window_size or self.max_size
        if self._before + N > size or return_array:
            return mlx_lm_base.create_causal_mask(N, self._before, window_size=size)
        return "causal"


class Appended:
    """A rotating cache that a chunk is appended to, and which then drops what is out of the window."""

    __slots__ = ("arrays", "before", "cache", "key", "offset")
    names = ("keys", "values", "offset")

    def __init__(self, cache: Any, step: Step) -> None:
        keys, values = cache._temporal_order(cache.keys), cache._temporal_order(cache.values)
        extra = keys.shape[2] - cache.max_size + 1
        if extra > 0:
            keys, values = cache._trim(extra, keys), cache._trim(extra, values)
        self.cache, self.offset = cache, cache.offset
        self.before: int = min(cache.max_size - 1, cache.offset)
        self.arrays = [keys, values, step.number(cache.offset)]
        self.key = (RotatingKVCache, "chunk", cache.max_size, self.before)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Appended)
        made.keys, made.values, begin = arrays
        made.keep, made.max_size = self.cache.keep, self.cache.max_size
        made.offset, made._before, made._added = Position.counted(begin), self.before, 0
        return made, lambda: ([made.keys, made.values], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = arrays
        cache.offset = self.offset + after
        cache._idx = cache.keys.shape[2]


def hold(cache: Any, step: Step) -> Held:
    """Hold a RotatingKVCache."""
    if cache.keys is None or not step.dynamic:
        return Literal(cache)
    whole = cache._idx == cache.offset
    if whole and cache.offset + step.length <= cache.max_size:
        return Growing(cache, step)
    if step.length > 1:
        return Appended(cache, step)
    full = cache.keys.shape[2] >= cache.max_size and cache.offset >= cache.max_size
    return Ring(cache, step) if full else Literal(cache)
