"""KVCache and QuantizedKVCache: buffers with room at the end, written at an offset that is an array."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from qgraph.capture.state import Held, NotDynamic, Reader, Step
from qgraph.lm.caches.attention import session
from qgraph.lm.caches.literal import Literal
from qgraph.lm.caches.positions import Position
from qgraph.lm.caches.sizes import STEP, capacity, window


def grown(x: mx.array, filled: int, size: int) -> mx.array:
    """A buffer (B, H, n, D) with room for `size` positions, of which the first `filled` are those of `x`."""
    shape = (*x.shape[:2], size - filled, x.shape[3])
    return mx.concatenate([x[..., :filled, :], mx.zeros(shape, x.dtype)], axis=2)


def write(buffer: mx.array, new: mx.array, at: mx.array) -> mx.array:
    """`new` in its place in a buffer; no copy where nobody else holds the buffer."""
    return mx.slice_update(buffer, new.astype(buffer.dtype), at, axes=(2,))


class Window:
    """The masks of a buffer of which the first positions are filled: mixed into a stand-in.

    `_begin` is the index at which this call writes, as an array; `_added` how many positions it wrote.
    """

    _begin: mx.array
    _window: int
    _length: int
    _added: int

    def _open(self, begin: mx.array, window: int, length: int) -> None:
        self._begin, self._window, self._length, self._added = begin, window, length, 0

    @property
    def place(self) -> Hashable:
        return id(self._begin), self._window

    def _advance(self, n: int) -> None:
        if n != self._length or self._added:
            raise NotDynamic(f"{n} positions added to a cache in a call of {self._length} tokens")
        self._added += n

    def filled(self) -> mx.array | None:
        return mx.arange(self._window) < self._begin + self._length

    def causal(self, length: int, window_size: int | None = None) -> mx.array | None:
        rows = (self._begin + (self._length - length) + mx.arange(length))[:, None]
        columns = mx.arange(self._window)[None]
        mask = columns <= rows
        return mask if window_size is None else mask & (columns > rows - window_size)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | None:
        made = self.causal(N, window_size)
        plain = not return_array and window_size is None
        return made if made is None else session().masked(made, self.place, plain=plain)


class _Keys(Window, KVCache):
    """A KVCache for one call, its offset an array."""

    keys: Any
    values: Any
    offset: Any
    _given: Any

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._advance(keys.shape[2])
        at = self._begin.reshape(1)
        self.keys, self.values = write(self.keys, keys, at), write(self.values, values, at)
        self.offset = self.offset + keys.shape[2]
        self._given = None
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        if self._given is None:
            n = self._window
            whole = n == self.keys.shape[2]
            self._given = (
                (self.keys, self.values) if whole else (self.keys[..., :n, :], self.values[..., :n, :])
            )
            session().fetched(self._given[0], self)
        return self._given


class Keys:
    """A KVCache that is not empty: one program for a capacity and a window of it."""

    __slots__ = ("arrays", "cache", "key", "length", "window")

    def __init__(self, cache: Any, step: Step) -> None:
        offset, keys, values = cache.offset, cache.keys, cache.values
        size = keys.shape[2]
        total = offset + step.length
        if total > size or size % STEP:
            size = capacity(total)
            keys, values = grown(keys, offset, size), grown(values, offset, size)
        self.cache, self.length, self.window = cache, step.length, min(window(total), size)
        self.arrays = [keys, values, step.number(offset)]
        self.key = (KVCache, self.window)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = object.__new__(_Keys)
        made.keys, made.values, begin = arrays
        made.offset, made._given = Position.counted(begin, 0, self.window), None
        made._open(begin, self.window, self.length)
        return made, lambda: ([made.keys, made.values], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = arrays
        cache.offset += after


def hold_keys(cache: Any, step: Step) -> Held:
    """Hold a KVCache. The first call computes as mlx-lm does, but with room for what follows."""
    if cache.keys is None:
        return Literal(cache, step=capacity(step.length + 1))
    return Keys(cache, step) if step.dynamic else Literal(cache)


class _Quantized(Window, QuantizedKVCache):
    """A QuantizedKVCache for one call, its offset an array."""

    keys: Any
    values: Any
    offset: Any
    _given: Any

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self._advance(keys.shape[2])
        at = self._begin.reshape(1)
        self.keys, self.values = (
            tuple(
                write(buffer, part, at)
                for buffer, part in zip(
                    held, mx.quantize(new, group_size=self.group_size, bits=self.bits), strict=True
                )
            )
            for held, new in ((self.keys, keys), (self.values, values))
        )
        self.offset = self.offset + keys.shape[2]
        self._given = None
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        if self._given is None:
            n = self._window
            self._given = tuple(
                tuple(x if x.shape[2] == n else x[..., :n, :] for x in held)
                for held in (self.keys, self.values)
            )
            session().fetched(self._given[0][0], self)
        return self._given


class Quantized:
    """A QuantizedKVCache that is not empty."""

    __slots__ = ("arrays", "cache", "key", "length", "window")

    def __init__(self, cache: Any, step: Step) -> None:
        offset = cache.offset
        size = cache.keys[0].shape[2]
        total = offset + step.length
        parts = [*cache.keys, *cache.values]
        if total > size or size % STEP:
            size = capacity(total)
            parts = [grown(x, offset, size) for x in parts]
        self.cache, self.length, self.window = cache, step.length, min(window(total), size)
        self.arrays = [*parts, step.number(offset)]
        self.key = (QuantizedKVCache, self.window, cache.group_size, cache.bits)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = object.__new__(_Quantized)
        *parts, begin = arrays
        made.keys, made.values = tuple(parts[:3]), tuple(parts[3:])
        made.group_size, made.bits = self.cache.group_size, self.cache.bits
        made.offset, made._given = Position.counted(begin, 0, self.window), None
        made._open(begin, self.window, self.length)
        return made, lambda: ([*made.keys, *made.values], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = tuple(arrays[:3]), tuple(arrays[3:])
        cache.offset += after


def hold_quantized(cache: Any, step: Step) -> Held:
    """Hold a QuantizedKVCache."""
    if cache.keys is None:
        return Literal(cache, step=capacity(step.length + 1))
    return Quantized(cache, step) if step.dynamic else Literal(cache)
