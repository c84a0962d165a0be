"""KVCache and QuantizedKVCache: buffers with room at the end, written at an offset that is an array."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm

from qgraph.capture.caches.attention import session
from qgraph.capture.caches.literal import Literal, blank
from qgraph.capture.caches.positions import Position
from qgraph.capture.caches.sizes import STEP, capacity, window
from qgraph.capture.state import Held, NotDynamic, Reader, Step

KVCache: Any = mlx_lm.KVCache
QuantizedKVCache: Any = mlx_lm.QuantizedKVCache


def grown(x: mx.array, filled: int, size: int) -> mx.array:
    """A buffer (B, H, n, D) with room for `size` positions, of which the first `filled` are those of `x`."""
    shape = (*x.shape[:2], size - filled, x.shape[3])
    return mx.concatenate([x[..., :filled, :], mx.zeros(shape, x.dtype)], axis=2)


def write(buffer: mx.array, new: mx.array, at: mx.array) -> mx.array:
    """`new` in its place in a buffer; no copy where nobody else holds the buffer."""
    return mx.slice_update(buffer, new.astype(buffer.dtype), at, axes=(2,))


class Window:
    """A buffer whose first positions are filled: what a stand-in has before its own class, to take its place.

    `_begin` is the index at which this call writes, as an array; `_added` how many positions it wrote.
    """

    keys: Any
    values: Any
    offset: Any
    _begin: mx.array
    _window: int
    _length: int
    _added: int
    _given: Any

    def _open(self, begin: mx.array, window: int, length: int) -> None:
        self._begin, self._window, self._length = begin, window, length
        self._added, self._given = 0, None

    @property
    def place(self) -> Hashable:
        return id(self._begin), self._window

    @property
    def end(self) -> Position:
        return Position.counted(self._begin, self._length)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        n = keys.shape[2]
        if n != self._length or self._added:
            raise NotDynamic(f"{n} positions added to a cache in a call of {self._length} tokens")
        self._added = n
        self._write(keys, values, self._begin.reshape(1))
        self.offset = self.offset + n
        self._given = None
        return self.keys_and_values()

    def _write(self, keys: mx.array, values: mx.array, at: mx.array) -> None:
        self.keys, self.values = write(self.keys, keys, at), write(self.values, values, at)

    def keys_and_values(self) -> tuple[Any, Any]:
        if self._given is None:
            n = self._window
            self._given = self.keys[..., :n, :], self.values[..., :n, :]
            session().fetched(self._given[0], self._given[1], self)
        return self._given

    def filled(self) -> mx.array | None:
        return mx.arange(self._window) < self._begin + self._length

    def causal(self, length: int, window_size: int | None = None) -> mx.array | None:
        begin = self._begin if length == self._length else self._begin + (self._length - length)
        rows = (begin + mx.arange(length))[:, None]
        columns = mx.arange(self._window)[None]
        mask = columns <= rows
        if window_size is not None:
            mask = mask & (columns > rows - window_size)
        # For one token mlx-lm's caches give no mask, or in batches one of four axes: models expect no other.
        return mask[None, None] if length == 1 else mask

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        made = self.causal(N, window_size)
        plain = not return_array and window_size is None
        return made if made is None else session().masked(made, self.place, plain=plain)


class _Keys(Window, KVCache):
    """A KVCache for one call, its offset an array."""


class Keys:
    """A KVCache that is not empty: one program for a capacity and a window of it."""

    names = ("keys", "values", "offset")
    __slots__ = ("arrays", "cache", "key", "length", "offset", "slack", "window")

    def __init__(self, cache: Any, step: Step) -> None:
        offset, keys, values = cache.offset, cache.keys, cache.values
        size: int = keys.shape[2]
        total: int = offset + step.length
        if total > size or size % STEP:
            size = capacity(total)
            keys, values = grown(keys, offset, size), grown(values, offset, size)
        self.cache, self.length, self.offset = cache, step.length, offset
        self.window = min(window(total), size)
        self.slack = self.window - total
        self.arrays = [keys, values, step.number(offset)]
        self.key: Hashable = (KVCache, self.window)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Keys)
        made.keys, made.values, begin = arrays
        made.offset = Position.counted(begin, 0, self.window)
        made._open(begin, self.window, self.length)
        return made, lambda: ([made.keys, made.values], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = arrays
        cache.offset = self.offset + after


def hold_keys(cache: Any, step: Step) -> Held:
    """Hold a KVCache. The first call computes as mlx-lm does, but with room for what follows."""
    if cache.keys is None:
        return Literal(cache, step=capacity(step.length + 1))
    return Keys(cache, step) if step.dynamic else Literal(cache)


class _Quantized(Window, QuantizedKVCache):
    """A QuantizedKVCache for one call, its offset an array."""

    group_size: int
    width: int

    @property
    def bits(self) -> int:
        # mlx-lm's attention asks for the bits, and then takes the mask that it was given.
        frame = sys._getframe(1)
        if frame.f_code.co_name == "scaled_dot_product_attention":
            session().attends(self._given, frame.f_locals.get("mask"), self)
        return self.width

    def _write(self, keys: mx.array, values: mx.array, at: mx.array) -> None:
        self.keys, self.values = (
            tuple(write(x, part, at) for x, part in zip(held, self._packed(new), strict=True))
            for held, new in ((self.keys, keys), (self.values, values))
        )

    def _packed(self, new: mx.array) -> Any:
        return mx.quantize(new, group_size=self.group_size, bits=self.width)

    def keys_and_values(self) -> tuple[Any, Any]:
        if self._given is None:
            n = self._window
            self._given = tuple(tuple(x[..., :n, :] for x in held) for held in (self.keys, self.values))
            session().fetched(self._given[0][0], self._given[1][0], self)
        return self._given


class Quantized:
    """A QuantizedKVCache that is not empty."""

    names = (*(f"{x}.{y}" for x in ("keys", "values") for y in ("packed", "scales", "biases")), "offset")
    __slots__ = ("arrays", "cache", "key", "length", "offset", "slack", "window")

    def __init__(self, cache: Any, step: Step) -> None:
        offset = cache.offset
        size: int = cache.keys[0].shape[2]
        total: int = offset + step.length
        parts: list[mx.array] = [*cache.keys, *cache.values]
        if total > size or size % STEP:
            size = capacity(total)
            parts = [grown(x, offset, size) for x in parts]
        self.cache, self.length, self.offset = cache, step.length, offset
        self.window = min(window(total), size)
        self.slack = self.window - total
        self.arrays = [*parts, step.number(offset)]
        self.key: Hashable = (QuantizedKVCache, self.window, cache.group_size, cache.bits)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Quantized)
        *parts, begin = arrays
        made.keys, made.values = tuple(parts[:3]), tuple(parts[3:])
        made.group_size, made.width = self.cache.group_size, self.cache.bits
        made.offset = Position.counted(begin, 0, self.window)
        made._open(begin, self.window, self.length)
        return made, lambda: ([*made.keys, *made.values], made._added)

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = tuple(arrays[:3]), tuple(arrays[3:])
        cache.offset = self.offset + after


def hold_quantized(cache: Any, step: Step) -> Held:
    """Hold a QuantizedKVCache."""
    if cache.keys is None:
        return Literal(cache, step=capacity(step.length + 1))
    return Quantized(cache, step) if step.dynamic else Literal(cache)
