"""ChunkedKVCache: attention within chunks of the text; the front is dropped when the buffer is full."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm

from qgraph.capture.caches.growing import Window, grown
from qgraph.capture.caches.literal import Literal, blank
from qgraph.capture.caches.positions import Position
from qgraph.capture.caches.sizes import STEP, capacity, window
from qgraph.capture.state import Held, NotDynamic, Reader, Step

ChunkedKVCache: Any = mlx_lm.ChunkedKVCache


class _Chunk(Window, ChunkedKVCache):
    """A ChunkedKVCache for one call: where it begins and where it ends are arrays."""

    start_position: Any
    _trims: bool

    def maybe_trim_front(self) -> None:
        self._trims = True  # done outside of the program, when there is no room


class Chunk:
    """A ChunkedKVCache that is not empty.

    mlx-lm copies the whole buffer for every token once a chunk is full. Here the front is dropped only when
    the buffer has no room: the model's mask leaves it out in either case, since it is of another chunk.
    """

    __slots__ = ("arrays", "cache", "key", "length", "offset", "slack", "start", "window")
    names = ("keys", "values", "offset", "start", "filled")

    def __init__(self, cache: Any, step: Step) -> None:
        keys, values, start = cache.keys, cache.values, cache.start_position
        valid = cache.offset - start
        size = keys.shape[2]
        if valid + step.length > size or size % STEP:
            drop = max(valid - cache.chunk_size, 0)
            start, valid = start + drop, valid - drop
            size = capacity(valid + step.length)
            keys, values = (grown(x[..., drop:, :], valid, size) for x in (keys, values))
        self.cache, self.length, self.offset, self.start = cache, step.length, cache.offset, start
        self.window = min(window(valid + step.length), size)
        self.slack = self.window - (valid + step.length)
        self.arrays = [
            keys,
            values,
            step.number(cache.offset),
            step.number(start, "start"),
            step.number(valid, "filled"),
        ]
        self.key = (ChunkedKVCache, self.window, cache.chunk_size)

    def stand_in(self, arrays: list[mx.array]) -> tuple[Any, Reader]:
        made = blank(_Chunk)
        made.keys, made.values, offset, start, begin = arrays
        made.chunk_size, made._trims = self.cache.chunk_size, False
        made.offset = Position.counted(offset, 0, self.window, start)
        made.start_position = Position.counted(start)
        made._open(begin, self.window, self.length)

        def read() -> tuple[list[mx.array], int]:
            if not made._trims:
                raise NotDynamic("a ChunkedKVCache of a model that never drops its front")
            return [made.keys, made.values], made._added

        return made, read

    def commit(self, arrays: list[mx.array], after: Any) -> None:
        cache = self.cache
        cache.keys, cache.values = arrays
        cache.start_position = self.start
        cache.offset = self.offset + after


def hold(cache: Any, step: Step) -> Held:
    """Hold a ChunkedKVCache."""
    if cache.keys is None:
        return Literal(cache, step=capacity(step.length + 1))
    return Chunk(cache, step) if step.dynamic else Literal(cache)
