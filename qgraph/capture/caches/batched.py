"""BatchKVCache and BatchRotatingKVCache: rows of several lengths, padded on the left."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm

from qgraph.capture.caches.attention import session
from qgraph.capture.caches.growing import Window, grown
from qgraph.capture.caches.literal import Literal, blank, put_together
from qgraph.capture.caches.positions import Position
from qgraph.capture.caches.rotating import Ringed
from qgraph.capture.caches.sizes import STEP, capacity, window
from qgraph.capture.state import Held, NotDynamic, Reader, Step

BatchKVCache: Any = mlx_lm.BatchKVCache
BatchRotatingKVCache: Any = mlx_lm.BatchRotatingKVCache


class Padded(Window):
    """The masks of a buffer whose rows begin after some padding."""

    left_padding: Any

    @property
    def place(self) -> Hashable:
        return id(self._begin), self._window, "padded"

    def causal(self, length: int, window_size: int | None = None) -> mx.array | None:
        mask = super().causal(length, window_size)
        assert mask is not None
        padding = mx.expand_dims(self.left_padding, (1, 2, 3))
        return mask & (padding <= mx.arange(self._window))


class _Keys(Padded, BatchKVCache):
    """A BatchKVCache for one call, the index at which it writes an array."""

    _idx: Any

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        made = self.causal(N, window_size)
        return None if made is None else session().masked(made, self.place, plain=False)

    def _write(self, keys: mx.array, values: mx.array, at: mx.array) -> None:
        super()._write(keys, values, at)
        self._idx = self._idx + keys.shape[2]


class Keys:
    """A BatchKVCache that is not empty."""

    __slots__ = ("arrays", "at", "cache", "key", "length", "slack", "window")
    names = ("keys", "values", "offset", "left_padding", "at")

    def __init__(self, cache: Any, step: Step) -> None:
        at, keys, values = cache._idx, cache.keys, cache.values
        size, total = keys.shape[2], cache._idx + step.length
        if total > size or size % STEP:
            size = capacity(total)
            keys, values = grown(keys, at, size), grown(values, at, size)
        self.cache, self.length, self.at = cache, step.length, at
        self.window = min(window(total), size)
        self.slack = self.window - total
        self.arrays = [keys, values, cache.offset, cache.left_padding, step.number(at, "batch")]
        self.key = (BatchKVCache, self.window)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Keys)
        made.keys, made.values, made.offset, made.left_padding, begin = arrays
        made._idx, made._right_padding = Position.counted(begin, 0, self.window), None
        made._open(begin, self.window, self.length)
        return made, lambda: ([made.keys, made.values, made.offset], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values, cache.offset = arrays
        cache._idx = self.at + after


def hold_keys(cache: Any, step: Step) -> Held:
    """Hold a BatchKVCache."""
    if cache.keys is None:
        return Literal(cache, step=capacity(step.length + 1))
    return Keys(cache, step) if step.dynamic else Literal(cache)


class _Growing(Padded, BatchRotatingKVCache):
    """A BatchRotatingKVCache for one call, while all that was written is still in it."""

    max_size: int
    _idx: Any

    def _write(self, keys: mx.array, values: mx.array, at: mx.array) -> None:
        super()._write(keys, values, at)
        self._idx = self._idx + keys.shape[2]

    def make_mask(  # pyright: ignore[reportIncompatibleMethodOverride]  (the order is that of the class)
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> Any:
        del return_array
        made = self.causal(N, window_size or self.max_size)
        return None if made is None else session().masked(made, self.place, plain=False)


class Growing:
    """A batched rotating cache with room for one more token."""

    __slots__ = ("arrays", "at", "cache", "key", "slack", "total", "window")
    names = ("keys", "values", "offset", "left_padding", "at")

    def __init__(self, cache: Any, step: Step) -> None:
        at, keys, values, most = cache._idx, cache.keys, cache.values, cache.max_size
        size = keys.shape[2]
        if at + 1 > size or size > most or (size % STEP and size != most):
            size = min(capacity(at + 1), most)
            keys, values = grown(keys, at, size), grown(values, at, size)
        self.cache, self.at, self.total = cache, at, cache._offset
        self.window = min(window(at + 1), size)
        self.slack = self.window - (at + 1)
        self.arrays = [keys, values, cache.offset, cache.left_padding, step.number(at, "batch")]
        self.key = (BatchRotatingKVCache, "growing", self.window, most)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Growing)
        made.keys, made.values, made.offset, made.left_padding, begin = arrays
        made.max_size, made.rotated, made._lengths = self.cache.max_size, False, None
        made._idx = Position.counted(begin, 0, self.window)
        made._open(begin, self.window, 1)
        return made, lambda: ([made.keys, made.values, made.offset], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values, cache.offset = arrays
        cache._idx = self.at + after
        cache._offset = self.total + after


class _Ring(Ringed, BatchRotatingKVCache):
    """A full BatchRotatingKVCache for one token."""

    left_padding: Any

    @property
    def end(self) -> Position:
        return Position.counted(self._at, 1)

    @property
    def place(self) -> Hashable:
        return id(self._at), self.max_size, "padded"

    def causal(self, length: int) -> mx.array | None:
        del length
        return self.make_mask(1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        found = super().update_and_fetch(keys, values)
        self.left_padding = self.left_padding - 1
        return found

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | None:
        del return_array
        if N != 1:
            raise NotDynamic(f"a mask for {N} tokens in a call of one")
        most = self.max_size
        age = (self._at - mx.arange(most)) % most  # how far back each entry of the ring is
        place = (most - 1) - age
        padding = self.left_padding if self._added else self.left_padding - 1
        mask = place >= mx.expand_dims(padding, (1, 2, 3))
        mask = mask & (age < (window_size or most))
        return session().masked(mask, self.place, plain=False)


class Ring:
    """A full batched rotating cache, for one token."""

    __slots__ = ("arrays", "at", "cache", "key", "total")
    names = ("keys", "values", "offset", "left_padding", "at")

    def __init__(self, cache: Any, step: Step) -> None:
        keys, values, padding, most = cache.keys, cache.values, cache.left_padding, cache.max_size
        extra, at = keys.shape[2] - most, cache._idx
        if extra > 0:
            keys, values, at = keys[..., extra:, :], values[..., extra:, :], most
            padding = padding - extra
        self.cache, self.total, self.at = cache, cache._offset, 0 if at == most else at
        self.arrays = [keys, values, cache.offset, padding, step.number(self.at, "ring")]
        self.key = (BatchRotatingKVCache, "ring", most)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Ring)
        made.keys, made.values, made.offset, made.left_padding, made._at = arrays
        made.max_size, made._added, made._lengths = self.cache.max_size, 0, None
        return made, lambda: ([made.keys, made.values, made.offset, made.left_padding], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        if not after:
            return
        cache = self.cache
        cache.keys, cache.values, cache.offset, cache.left_padding = arrays
        cache.rotated, cache._idx = True, self.at + after
        cache._offset = self.total + after


class Appended(Literal):
    """A chunk of a batched rotating cache: mlx-lm's own code, whose mask looks at where the ring was.

    `_offset` counts all positions, but matters only up to the window: beyond, it is no part of the key.
    """

    __slots__ = ("beyond", "cache")

    def __init__(self, cache: Any) -> None:
        counted = blank(type(cache))
        vars(counted).update(vars(cache))
        self.cache: Any = cache
        self.beyond: int = max(cache._offset - cache.max_size, 0)
        counted._offset -= self.beyond
        super().__init__(counted)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        state = put_together(after, list(arrays))
        state["_offset"] += self.beyond
        vars(self.cache).update(state)


def hold_rotating(cache: Any, step: Step) -> Held:
    """Hold a BatchRotatingKVCache."""
    if cache.keys is None or not step.dynamic:
        return Literal(cache)
    if step.length > 1 or cache._lengths is not None:
        return Appended(cache)
    if not cache.rotated and cache._idx == cache._offset < cache.max_size:
        return Growing(cache, step)
    full = cache.keys.shape[2] >= cache.max_size and (cache.rotated or cache._idx >= cache.max_size)
    return Ring(cache, step) if full else Literal(cache)
